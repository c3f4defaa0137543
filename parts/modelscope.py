"""ModelScope's hub, through its own client, with the same functions as parts/huggingface.py. The client itself checks
files against the list. Knows no choice of files and no sentence for the user."""

import logging
import os
from pathlib import Path

NAME, VARIABLE = "ModelScope", "MODELSCOPE_ENDPOINT"
# Limits of the ModelScope client, which reads them at its import; the environment's go first. A hub that is silent or
# drips is given up after 50 s for its list of files (3 x 15 s), after 150 s for the files (6 x 20 s), pauses included.
LIMITS = {
    "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "3",
    "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "5",
    "MODELSCOPE_DOWNLOAD_TIMEOUT": "20",  # seconds without a byte
    "MODELSCOPE_DOWNLOAD_LOW_SPEED_WINDOW_SECONDS": "20",
    "MODELSCOPE_DOWNLOAD_MIN_BYTES_PER_SECOND": "10240",
    "MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT": "21600",  # seconds a file; an hour is short for 3.4 GB
}


def open_api():
    """(client, its address)."""
    for limit, value in LIMITS.items():
        os.environ.setdefault(limit, value)
    from modelscope_hub import HubApi  # modelscope itself is a shim over it whose import pulls torch in: 3 s

    logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)  # it tells of every retry
    api = HubApi()
    return api, api.legacy.endpoint


def list_files(api, name: str, kind: str, revision: str | None) -> tuple[str | None, dict[str, dict]]:
    """(revision, {path: entry}) of the files in a repository."""
    files = [file for file in api.list_repo_files(name, kind, revision=revision) if not file.is_dir]
    # The client takes a size of 0 at its word, but here it may also be one that the list does not tell.
    return revision, {
        file.path: {"Path": file.path, "Size": file.size or None, "Sha256": file.sha256} for file in files
    }


def fetch(api, name: str, kind: str, revision: str | None, commit, files: dict[str, dict], folder: str | None) -> Path:
    """The folder of `files`: in the client's cache without a `folder`."""
    # Its own list, asked for anew, would not be the one that was checked.
    entries = list(files.values())
    return Path(api.download_repo(name, kind, revision=revision, local_dir=folder, file_list=entries, max_workers=16))


def find(name: str, revision: str | None) -> Path | None:
    """The folder of a model in the cache, whole or not; else None."""
    from modelscope_hub import HubApi, errors

    try:
        folder = HubApi().download_repo(name, "model", revision=revision or "master", local_files_only=True)
    except errors.CacheNotFound:
        return None
    # Older clients' folders do not tell the revision.
    return folder if revision is None or folder.parts[-2:] == ("snapshots", revision) else None
