"""ModelScope's hub, through its own client, with the same functions as parts/huggingface.py, and uploads. The client
itself checks files against the list. Knows no choice of files and no sentence for the user."""

import contextlib
import io
import logging
import os
import sys
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
    "MODELSCOPE_UPLOAD_BLOB_READ_TIMEOUT_SECONDS": "600",  # seconds for the answer to a file that was sent; 3600
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


def open_repository(api, name: str) -> bool:
    """Whether the model repository `name` can be seen by all. Where there is none, a private one is made: the client's
    upload would make a public one."""
    from modelscope_hub import errors
    from modelscope_hub.constants import Visibility

    try:
        return api.get_repo(name, "model").visibility != Visibility.PRIVATE
    except errors.NotExistError:
        api.create_repo(name, "model", visibility=Visibility.PRIVATE)
        return False


def upload(api, name: str, folder: str, files: list[str]) -> None:
    """Send these files of `folder`, where nothing is written, to the model repository `name`. What the hub has already,
    going by its SHA-256, is not sent again. Raises the client's error for the first file that failed."""
    with Failures(), contextlib.redirect_stdout(io.StringIO()):  # the client's own report
        quiet = not sys.stderr.isatty()
        api.upload_folder(name, "model", folder, allow_patterns=files, use_cache=False, disable_tqdm=quiet)


class Failures(logging.Handler):
    """Around an upload: the client raises only how many files failed, and logs why."""

    def __enter__(self):
        self.errors, self.logger = [], logging.getLogger("modelscope_hub.upload")
        self.logger.addHandler(self)
        self.logger.setLevel(logging.ERROR)
        self.logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        self.errors += [value for value in record.args if isinstance(value, Exception)]

    def __exit__(self, kind, error, trace):
        self.logger.removeHandler(self)
        if isinstance(error, Exception) and self.errors:
            raise self.errors[0].__cause__ or self.errors[0]
