"""A local server that answers SwanLab's requests, well or badly, so that tests can run the real SDK without a network.

The shapes are those that swanlab 0.10.3 accepts; they are not a recording of the live service.
"""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread


class Handler(BaseHTTPRequestHandler):
    """Answers one request, as the Tracker says."""

    def answer(self) -> None:
        tracker = self.server.tracker
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        tracker.requests.append((self.command, self.path, body.decode("utf-8", "replace")))
        mode = tracker.after_points if tracker.points else tracker.mode
        # The login is answered all the same, so that the wait comes where the run itself begins.
        if mode == "hang" and "/login/" not in self.path:
            tracker.closing.wait()
        elif mode == "close":
            self.close_connection = True
        elif mode in ("ok", "hang"):
            self.reply(*self.route(tracker, json.loads(body) if body.startswith(b"{") else {}))
        else:
            self.reply(int(mode), {"code": "no", "message": "no"})

    do_GET = do_POST = do_PUT = answer

    def route(self, tracker: Tracker, body: dict) -> tuple[int, dict]:
        """(status, reply) to a request of the SDK; experiments and points are kept."""
        path = self.path.removeprefix("/api")
        if path == "/login/api_key":
            user = {"username": "tester", "name": "tester"}
            return 200, {"sid": "a-session", "expiredAt": "2099-01-01T00:00:00.000Z", "userInfo": user}
        if path.endswith("/experiment"):
            new = body["cuid"] not in tracker.experiments
            tracker.experiments.append(body["cuid"])
            run = {"cuid": body["cuid"], "slug": body["cuid"], "name": body["name"]}
            return 201 if new else 200, run | {"createdAt": "2026-01-01T00:00:00.000Z"}
        if path.startswith("/house/metrics/summaries/"):
            last = dict(sorted(tracker.points))  # of each key the highest step
            return 200, {"log": [], "media": [], "scalar": [{"key": key, "step": last[key]} for key in last]}
        if path == "/house/metrics" and body["type"] == "scalar":
            tracker.points += [(metric["key"], metric["index"]) for metric in body["metrics"]]
        if path == "/resources/presigned/put":
            return 200, {"urls": [f"{tracker.url}/stored/{i}" for i in range(len(body["paths"]))]}
        if self.command == "GET":
            project = {"cuid": "p", "name": path.split("/")[-1], "version": 1, "path": "/tester/p"}
            return 200, project | {"group": {"username": "tester"}, "_count": {"experiments": 0}}
        return 200, {}

    def reply(self, status: int, value: dict) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args) -> None:
        """Stay silent: Tracker.requests has what came in."""


class Tracker:
    """SwanLab on 127.0.0.1. `mode`: how it answers, `after_points`: how it answers once it has points. "hang": only the
    login, as long as it runs. "close": connections are closed unanswered. "401": with this HTTP status.

    requests holds (method, path, body), points (key, step) of each scalar, experiments the ids that runs began with.
    """

    def __init__(self, mode: str = "ok", after_points: str = "ok"):
        self.mode, self.after_points = mode, after_points
        self.closing = Event()
        self.requests: list[tuple[str, str, str]] = []
        self.points: list[tuple[str, int]] = []
        self.experiments: list[str] = []

    def __enter__(self) -> Tracker:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads, self.server.block_on_close, self.server.tracker = True, False, self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
