"""A local server that answers the ModelScope hub's requests, so that tests can run the real client without a network.

It serves what snapshot_download, dataset_snapshot_download and the single file downloads ask for. The shapes are those
that the modelscope client (modelscope_hub 0.5.1) accepts; they are not a recording of the live service. Revisions are
not told apart. With an `inbox` it takes models from those who have its token, under owners that are theirs.

A fault is put in with `hub.fault = on(FILE, cut, times=1)`: the first request for a file gets half of its bytes.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from urllib.parse import parse_qs, unquote, urlsplit

LISTING, FILE = r"/repo/(files|tree)\?", r"/repo\?"  # what a fault is put on
BLOB, COMMITTED = r"/blobs/", r"/commit/"
LIMITS = {  # of the client, so that a test of a fault takes seconds
    "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "3",
    "MODELSCOPE_REPO_TREE_PAGE_TIMEOUT_SECONDS": "1",
    "MODELSCOPE_REPO_TREE_PAGE_RETRY_MAX_DELAY_SECONDS": "1",
    "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "2",
    "MODELSCOPE_DOWNLOAD_RETRY_MAX_DELAY_SECONDS": "1",
    "MODELSCOPE_DOWNLOAD_TIMEOUT": "1",
    "MODELSCOPE_DOWNLOAD_LOW_SPEED_WINDOW_SECONDS": "1",
    "MODELSCOPE_DOWNLOAD_MIN_BYTES_PER_SECOND": "10240",
    "MODELSCOPE_UPLOAD_BLOB_MAX_ATTEMPTS": "1",
    "MODELSCOPE_UPLOAD_BLOB_RETRY_MAX_DELAY_SECONDS": "1",
    "MODELSCOPE_UPLOAD_BLOB_READ_TIMEOUT_SECONDS": "1",
    "MODELSCOPE_UPLOAD_COMMIT_MAX_ATTEMPTS": "2",
    "MODELSCOPE_UPLOAD_COMMIT_RETRY_TOTAL_WAIT_SECONDS": "1",
    "MODELSCOPE_UPLOAD_RECOVERY_MAX_DELAY_SECONDS": "1",
}
ROUTE = re.compile(r"/api/v1/(models|datasets)/([^/]+/[^/]+)/repo(/files|/tree)?")
UPLOAD = re.compile(
    r"/api/v1/models|/(?:openapi|api)/v1/models/([^/]+/[^/]+)|"
    r"/api/v1/repos/models/([^/]+/[^/]+)/(info/lfs/objects/batch|commit/master)|/blobs/(\w+)"
)

COMMIT = "c0" * 20
HUGGINGFACE = re.compile(
    r"/(?:(api/models|api/datasets|datasets)/)?([^/]+/[^/]+)/(?:revision|resolve)/([^/]+)(?:/(.+))?|"
    r"/(api/models|api/datasets)/([^/]+/[^/]+)"
)


def entries(folder: Path, root: str) -> list[dict]:
    """List the folder as the hub does: one entry a file or sub-folder, only those below root where it is given."""
    found = []
    for path in sorted(folder.rglob("*")):
        entry = {"Name": path.name, "Path": path.relative_to(folder).as_posix(), "Type": "tree", "Size": 0}
        if path.is_file():
            data = path.read_bytes()
            entry.update(Type="blob", Size=len(data), Sha256=hashlib.sha256(data).hexdigest())
        if not root or entry["Path"].startswith(root + "/"):
            found.append(entry)
    return found


def on(pattern: str, fault: Callable[[Handler], bool | None], times: int = 1000) -> Callable[[Handler], bool | None]:
    """The fault, for the first requests whose address matches. It returns True where it has answered by itself."""
    matching = iter(range(times))

    def act(handler: Handler) -> bool | None:
        if re.search(pattern, handler.path) and next(matching, None) is not None:
            return fault(handler)

    return act


def status(code: int, handler: Handler) -> bool:
    handler.reply(code, {"Code": code, "Message": "no", "Success": False})
    return True


def page(handler: Handler) -> bool:
    """What a proxy or a log-in page in between may answer to anything."""
    handler.send(200, b"<html><body>please log in</body></html>", {"Content-Type": "text/html"})
    return True


def silence(handler: Handler) -> bool:
    handler.server.hub.stopped.wait(60)
    return True


def change(function: Callable[[bytes], bytes], handler: Handler) -> None:
    """Send another body than the one announced."""
    handler.change = function


def drip(handler: Handler) -> None:
    handler.pause = 0.2  # seconds after every 10 bytes


cut = partial(change, lambda body: body[: len(body) // 2])
wrong = partial(change, lambda body: body[::-1])
without_sizes = partial(change, lambda body: body.replace(b'"Size"', b'"Siz_"').replace(b'"Sha256"', b'"Sha_56"'))


class Handler(BaseHTTPRequestHandler):
    """Answers one request. HTTP/1.0, the base's default, on purpose: no open connection outlives the server's stop."""

    pause = 0.0
    change = staticmethod(lambda body: body)

    def answer(self) -> None:
        """Note the request and route it; what is not known is missing, as is every POST but an upload's."""
        hub = self.server.hub
        hub.requests.append((self.command, self.path))
        if hub.fault and hub.fault(self):
            return
        url = urlsplit(self.path)
        if hub.inbox and (route := UPLOAD.fullmatch(unquote(url.path))):
            return self.take(hub, *route.groups())
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        if route := HUGGINGFACE.fullmatch(unquote(url.path)):
            return self.huggingface(route[1] or route[5], route[2] or route[6], route[4])
        route = ROUTE.fullmatch(unquote(url.path))
        folder = hub.folders[route[1]].get(route[2]) if route else None
        if folder is None or self.command == "POST":
            self.missing("no such repository")
        elif route[3]:
            self.listing(folder, query)
        else:
            self.file(folder, query.get("FilePath", ""))

    def huggingface(self, listed: str | None, name: str, file: str | None) -> None:
        """Answer Hugging Face's client: every file is LFS here, with a checksum in the list."""
        kind = "datasets" if listed and listed.endswith("datasets") else "models"
        folder = self.server.hub.folders[kind].get(name)
        if folder is None:
            return self.missing("no such repository")
        if file:
            return self.file(folder, file)
        files = []
        for entry in entries(folder, ""):
            if entry["Type"] == "blob":
                lfs = {"size": entry["Size"], "sha256": entry["Sha256"], "pointerSize": 9}
                files.append({"rfilename": entry["Path"], "size": entry["Size"], "blobId": "0", "lfs": lfs})
        files += [{"rfilename": path, "size": len(data)} for path, data in self.server.hub.outside.items()]
        self.reply(200, {"id": name, "sha": COMMIT, "siblings": files})

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def take(self, hub: Hub, asked: str | None, name: str | None, step: str | None, blob: str | None) -> None:
        """One step of an upload: is it there, make it, which blobs are missing, a blob, the commit."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers["Authorization"] != f"Bearer {hub.token}":
            return self.reply(401, {"Code": 401, "Message": "no such token", "Success": False})
        if blob:
            hub.blobs[hashlib.sha256(body).hexdigest()] = body
            return self.reply(200, {"Code": 200})
        data = json.loads(body or "{}")
        if asked:
            found = hub.made.get(asked)
            return self.reply(200, {"Data": found, "data": found}) if found else self.missing("no such repository")
        if not name:
            name = f"{data['Path']}/{data['Name']}"
            if name in hub.hidden | hub.made.keys():
                return self.reply(400, {"Code": 10010101001, "Message": "the name is taken", "Success": False})
        if name.split("/")[0] != hub.owner:
            return self.reply(403, {"Code": 403, "Message": "not yours", "Success": False})
        if not step:
            hub.made[name] = data
            return self.reply(200, {"Code": 200, "Success": True, "Data": data})
        if step.startswith("info"):
            missing = [item["oid"] for item in data["objects"] if item["oid"] not in hub.blobs]
            to = {oid: {"upload": {"href": f"{hub.url}/blobs/{oid}?signature=sesame"}} for oid in missing}
            return self.reply(200, {"Data": {"objects": [{"oid": oid, "actions": to[oid]} for oid in missing]}})
        for action in data["actions"]:
            path = hub.inbox / name / action["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            lfs = action["type"] == "lfs"
            path.write_bytes(hub.blobs[action["sha256"]] if lfs else base64.b64decode(action["content"]))
        self.reply(200, {"Code": 200, "Success": True, "Data": {"oid": COMMIT}})

    def listing(self, folder: Path, query: dict[str, str]) -> None:
        """Send the listing, or one page of it: only data sets are asked for page by page."""
        files = entries(folder, query.get("Root", "").strip("/"))
        files += [{"Path": path, "Type": "blob", "Size": len(data)} for path, data in self.server.hub.outside.items()]
        size = int(query.get("PageSize", len(files)))
        start = (int(query.get("PageNumber", 1)) - 1) * size
        self.reply(200, {"Code": 200, "Success": True, "Data": {"Files": files[start : start + size]}})

    def file(self, folder: Path, name: str) -> None:
        """Send a file, or the part of it that Range asks for."""
        if data := self.server.hub.outside.get(name):
            return self.send(200, data, {})
        # Looked up among the names that are there, so that no ../ leaves the folder.
        if name not in {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}:
            return self.missing("no such file")
        data = (folder / name).read_bytes()
        head = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes", "X-Repo-Commit": COMMIT}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not part:
            return self.send(200, data, head)
        start, end = int(part[1]), min(int(part[2] or len(data)), len(data) - 1)
        if start > end:
            return self.send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        self.send(206, data[start : end + 1], head | {"Content-Range": f"bytes {start}-{end}/{len(data)}"})

    def missing(self, message: str) -> None:
        self.reply(404, {"Code": 10010205001, "Message": message, "Success": False})

    def reply(self, status: int, value: dict) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, body: bytes, head: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in (head | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        with contextlib.suppress(ConnectionError):  # a client killed half-way is a test's business, not an error here
            self.end_headers()
            body = b"" if self.command == "HEAD" else self.change(body)
            step = 10 if self.pause else len(body) or 1
            for start in range(0, len(body), step):
                self.wfile.write(body[start : start + step])
                if self.server.hub.stopped.wait(self.pause):
                    break

    def log_message(self, *args) -> None:
        """Stay silent: Hub.requests has what came in."""


class Hub:
    """A hub on 127.0.0.1: 'owner/name' -> folder, read anew at each request.

    requests holds (method, path) as sent, query included. url stays after the stop, when connections are refused.
    outside holds files, {path: content}, that are listed and served with any path, also one that leaves the folder.
    What is uploaded lies below inbox; made holds what was asked for at the making of a repository, hidden the names of
    those that others keep private.
    """

    fault: Callable[[Handler], bool | None] | None = None
    inbox: Path | None = None
    token, owner = "ms-a-secret-token", "me"

    def __init__(self, models: dict[str, Path] | None = None, datasets: dict[str, Path] | None = None):
        self.folders = {"models": models or {}, "datasets": datasets or {}}
        self.requests: list[tuple[str, str]] = []
        self.outside: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.made: dict[str, dict] = {}
        self.hidden: set[str] = set()
        self.stopped = Event()

    def env(self, home: Path) -> dict[str, str]:
        """The environment for a client's process; no proxy and no client setting of the caller's leaks in."""
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.lower().endswith("_proxy") and not key.startswith("MODELSCOPE_")
        }
        own = {"HOME": str(home), "MODELSCOPE_CACHE": str(home / "cache"), "MODELSCOPE_ENDPOINT": self.url}
        return kept | LIMITS | own

    def __enter__(self) -> Hub:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()
