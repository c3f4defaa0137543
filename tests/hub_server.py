"""A local server that answers ModelScope's and Hugging Face's clients, so that tests can run the real ones without a
network.

The shapes are those that the clients accept (modelscope_hub 0.5.1, huggingface_hub 1.31 and 2.4); they are not a
recording of the live services. Revisions are not told apart. What is uploaded to ModelScope lies in `inbox`.

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
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

from helpers import contents

# What a fault is put on, of either hub.
LISTING = r"/repo/(files|tree)\?|/api/(models|datasets)/\w+/\w+(/revision/\w+|/tree/\w+.*)?$"
FILE = r"/repo\?|/resolve/"
LIMITS = {  # of ModelScope's client, so that a test of a fault takes seconds
    "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "3",
    "MODELSCOPE_REPO_TREE_PAGE_RETRY_MAX_DELAY_SECONDS": "1",
    "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "2",
    "MODELSCOPE_DOWNLOAD_RETRY_MAX_DELAY_SECONDS": "1",
}
COMMIT = "c0" * 20
NAME = r"([^/]+/[^/]+)"
MODELSCOPE = re.compile(rf"/api/v1/(models|datasets)/{NAME}/repo(/files|/tree)?")
HUGGINGFACE = re.compile(
    rf"(?:/api/(models|datasets)|/(datasets))?/{NAME}(?:/(revision|tree|resolve)/[^/]+(?:/(.+))?)?"
)
UPLOAD = re.compile(rf"/api/v1/models|/api/v1/repos/models/{NAME}/(info/lfs/objects/batch|commit/master)|/blobs/(\w+)")


def on(pattern: str, fault: Callable[[Handler], bool | None], times: int = 1000) -> Callable[[Handler], bool | None]:
    """The fault, for the first requests whose address matches. It returns True where it has answered by itself."""
    matching = iter(range(times))

    def act(handler: Handler) -> bool | None:
        if re.search(pattern, handler.path) and next(matching, None) is not None:
            return fault(handler)

    return act


def status(code: int, handler: Handler) -> bool:
    handler.reply({"Code": code, "Message": "no", "Success": False}, code)
    return True


def change(function: Callable[[bytes], bytes], handler: Handler) -> None:
    """Send another body than the one announced."""
    handler.change = function


def page(handler: Handler) -> bool | None:
    """In place of a file, what a proxy or a log-in page in between may answer."""
    if handler.command == "GET":
        handler.send(200, b"<html><body>please log in</body></html>", {"Content-Type": "text/html"})
        return True


cut = partial(change, lambda body: body[: len(body) // 2])
wrong = partial(change, lambda body: body[::-1])


class Handler(BaseHTTPRequestHandler):
    """Answers one request. HTTP/1.0, the base's default, on purpose: no open connection outlives the server's stop."""

    change = staticmethod(lambda body: body)

    def answer(self) -> None:
        """Note the request and route it; what is not known is missing."""
        hub, url = self.server.owner, urlsplit(self.path)
        path, query = unquote(url.path), {key: values[-1] for key, values in parse_qs(url.query).items()}
        hub.requests.append(self.path)
        if hub.fault and hub.fault(self):
            return
        if hub.inbox and (route := UPLOAD.fullmatch(path)):
            return self.take(hub, *route.groups())
        if route := MODELSCOPE.fullmatch(path):
            kind, name, step = route.groups()
            file = query.get("FilePath")
        elif route := HUGGINGFACE.fullmatch(path):
            kind, other_kind, name, step, file = route.groups()
            kind = kind or other_kind or "models"
        folder = hub.folders[kind].get(name) if route else None
        if folder is None:
            status(404, self)
        elif file:
            self.file(hub.files(folder).get(file))
        else:
            self.listing(hub.files(folder), step)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def listing(self, files: dict[str, bytes], step: str | None) -> None:
        """The list of files in ModelScope's form, in Hugging Face's, or what that hub says of a repository."""
        if step in ("/files", "/tree"):
            entries = []
            for path, data in files.items():
                digest = hashlib.sha256(data).hexdigest()
                entries.append({"Path": path, "Type": "blob", "Size": len(data), "Sha256": digest})
            self.reply({"Code": 200, "Success": True, "Data": {"Files": entries}})
        elif step == "tree":
            self.reply([{"type": "file", "path": p, "size": len(d), "oid": "0"} for p, d in files.items()])
        else:
            self.reply({"id": "own/er", "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]})

    def take(self, hub: Hub, name: str | None, step: str | None, blob: str | None) -> None:
        """One step of an upload: make a repository unless it is there, which blobs are missing, a blob, the commit."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if blob:
            hub.blobs[blob] = body
            return self.reply({"Code": 200})
        data = json.loads(body)
        if not name:
            name = f"{data['Path']}/{data['Name']}"
            if name in hub.made:
                return self.reply({"Code": 10010101001, "Message": "the name is taken", "Success": False}, 400)
            hub.made[name] = data
            return self.reply({"Code": 200, "Success": True, "Data": data})
        if step.startswith("info"):
            wanted = []
            for item in data["objects"]:
                wanted.append({"oid": item["oid"], "actions": {"upload": {"href": f"{hub.url}/blobs/{item['oid']}"}}})
            return self.reply({"Data": {"objects": wanted}})
        for action in data["actions"]:
            path = hub.inbox / name / action["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(hub.blobs.get(action.get("sha256")) or base64.b64decode(action["content"]))
        self.reply({"Code": 200, "Success": True, "Data": {"oid": COMMIT}})

    def file(self, data: bytes | None) -> None:
        """A file, or the part of it that Range asks for."""
        if data is None:
            return status(404, self)
        head = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes", "X-Repo-Commit": COMMIT}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not part:
            return self.send(200, data, head)
        start, end = int(part[1]), min(int(part[2] or len(data)), len(data) - 1)
        self.send(206, data[start : end + 1], head | {"Content-Range": f"bytes {start}-{end}/{len(data)}"})

    def reply(self, value: dict | list, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, body: bytes, head: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in (head | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        with contextlib.suppress(ConnectionError):  # a client killed half-way is a test's business, not an error here
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else self.change(body))

    def log_message(self, *args) -> None:
        """Stay silent: Hub.requests has what came in."""


class Loopback:
    """A server on 127.0.0.1, inside `with`. Its `url` stays after the stop, when connections are refused."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.owner = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()


class Hub(Loopback):
    """A hub: 'owner/name' -> folder, read anew at each request.

    `requests` holds the addresses as sent, query included.
    `outside` holds files, {path: content}, that are listed and served with any path, also one that leaves the folder.
    `made` holds what was asked for at the making of a repository.
    """

    fault: Callable[[Handler], bool | None] | None = None
    inbox: Path | None = None

    def __init__(self, models: dict[str, Path] | None = None, datasets: dict[str, Path] | None = None):
        super().__init__(Handler)
        self.folders = {"models": models or {}, "datasets": datasets or {}}
        self.requests, self.outside, self.blobs, self.made = [], {}, {}, {}

    def files(self, folder: Path) -> dict[str, bytes]:
        """{path: content} of a repository."""
        return dict(sorted(contents(folder).items())) | self.outside

    def env(self, home: Path) -> dict[str, str]:
        """The environment for a client's process; no proxy and no client setting of the caller's leaks in."""
        own = {"HOME": str(home), "MODELSCOPE_CACHE": str(home / "cache"), "MODELSCOPE_ENDPOINT": self.url}
        for key, value in os.environ.items():
            if not key.lower().endswith("_proxy") and not key.startswith("MODELSCOPE_"):
                own.setdefault(key, value)
        return LIMITS | own
