"""A local server that speaks an OpenAI-compatible endpoint's protocol, as a test tells it to."""

from __future__ import annotations

import contextlib
import json
from http.server import BaseHTTPRequestHandler
from threading import Event

from hub_server import Loopback


def text(content: object, **choice) -> bytes:
    """A reply that says `content`."""
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}, **choice}]}).encode()


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.0, the base's default, on purpose: no open connection outlives the server's stop."""

    def answer(self) -> None:
        server = self.server.owner
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"null")
        server.requests.append((self.command, self.path, dict(self.headers), body))
        if self.path == "/v1/models":
            status, content = 200, server.models
        else:
            said = server.speak(body)
            status, content = said if isinstance(said, tuple) else (200, said)
        self.send_response(status)
        # The client waits as long as it is told before it asks again.
        for header in (("Location", server.elsewhere), ("Content-Type", "application/json"), ("Retry-After-Ms", "1")):
            self.send_header(*header)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # a client that gave up
            for start in range(0, len(content), 10):
                server.stopped.wait(server.pause)
                self.wfile.write(content[start : start + 10])

    do_GET = do_POST = answer

    def log_message(self, *args) -> None:
        """Stay silent."""


class ChatServer(Loopback):
    """`speak(body)` gives the bytes of a reply, or (status, bytes); `requests` holds (method, path, headers, body) as
    sent. `pause` seconds pass before every 10 bytes."""

    pause, elsewhere = 0.0, "/"
    models = b'{"data": [{"id": "judge"}]}'

    def __init__(self, speak=None):
        super().__init__(Handler)
        self.url += "/v1"
        self.speak = speak or (lambda body: text("好"))
        self.requests, self.stopped = [], Event()

    def __exit__(self, *error) -> None:
        self.stopped.set()
        super().__exit__(*error)
