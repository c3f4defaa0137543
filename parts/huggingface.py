"""Hugging Face's hub, through its own client: lists a repository, downloads files of it, and checks them against the
list, as the client compares only sizes. Knows no choice of files and no sentence for the user."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic

from parts.checkpoints import sha256

NAME, VARIABLE = "Hugging Face", "HF_ENDPOINT"
SLOWEST, WINDOW = 10240, 20  # bytes/s on average, over so many seconds; a connection that drips more slowly is given up


def guard(response) -> None:
    """Hook of the client: raises TimeoutError where a body drips."""
    read = response.iter_raw

    def iter_raw(chunk_size=None):
        started, size = monotonic(), 0
        for part in read():
            yield part
            size += len(part)
            if (passed := monotonic() - started) > WINDOW:
                if size < SLOWEST * passed:
                    raise TimeoutError(f"less than {SLOWEST} B/s")
                started, size = monotonic(), 0

    response.iter_raw = iter_raw


def open_api():
    """(client, its address): HF_ENDPOINT as it is now, with connections that give up where the hub drips."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    constants.HF_HUB_DISABLE_XET = True  # its transfers have no such limit
    session = get_session()
    hooks = session.event_hooks
    if guard not in hooks["response"]:
        session.event_hooks = hooks | {"response": [*hooks["response"], guard]}
    api = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT", "").rstrip("/") or None)
    return api, api.endpoint


def list_files(api, name: str, kind: str, revision: str | None) -> tuple[str, dict[str, str | None]]:
    """(commit, {path: SHA-256, None for small files that the hub keeps in git})."""
    info = api.repo_info(name, repo_type=kind, revision=revision, files_metadata=True, timeout=20)
    return info.sha, {file.rfilename: file.lfs.sha256 if file.lfs else None for file in info.siblings or []}


def fetch(api, name, kind, revision, commit, files: dict[str, str | None], folder: str | None) -> Path:
    """The folder of `files`, in the client's cache without a `folder`. Raises ValueError where content is not as
    listed; that file is removed. A cache's revision is named last, so that only a whole download is found again."""

    cache = cache_of(name, kind)
    reference = cache / "refs" / (revision or "main")
    # Named last, so that a file whose check was interrupted is checked by the next try.
    known = reference.is_file() and reference.read_text() == commit

    def fetch_file(path: str) -> Path:
        options = {"repo_type": kind, "revision": commit}
        new = folder or not known or not (cache / "snapshots" / commit / path).exists()
        file = Path(api.hf_hub_download(name, path, local_dir=folder, **options))
        if new and files[path] and sha256(file) != files[path]:
            os.unlink(os.path.realpath(file))
            file.unlink(missing_ok=True)
            raise ValueError(f"{path}：内容与文件列表不符")
        return file

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(fetch_file, files))
    if folder:
        return Path(folder)
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(commit)
    return cache / "snapshots" / commit


def cache_of(name: str, kind: str) -> Path:
    """Where the client keeps a repository."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, f"{kind}s--" + name.replace("/", "--"))


def find(name: str, revision: str | None) -> Path | None:
    """The folder of a model in the cache, whole or not; else None."""
    cache = cache_of(name, "model")
    reference = cache / "refs" / (revision or "main")
    folder = cache / "snapshots" / (reference.read_text().strip() if reference.is_file() else revision or "main")
    return folder if folder.is_dir() else None
