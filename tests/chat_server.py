"""A local server that speaks an OpenAI-compatible endpoint's protocol, as a test tells it to."""

from __future__ import annotations

import contextlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread


def text(content: object, **choice) -> bytes:
    """A reply that says `content`."""
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}, **choice}]}).encode()


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.0, the base's default, on purpose: no open connection outlives the server's stop."""

    def answer(self) -> None:
        server = self.server.chat
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"null")
        server.requests.append((self.command, self.path, dict(self.headers), body))
        if self.path == "/v1/models":
            status, content = 200, server.models
        else:
            said = server.speak(body)
            status, content = said if isinstance(said, tuple) else (200, said)
        self.send_response(status)
        # The client waits as long as it is told before it asks again.
        headers = {"Location": server.elsewhere, "Content-Type": "application/json", "Retry-After-Ms": "1"}
        for name in headers:
            self.send_header(name, headers[name])
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # a client that gave up
            for start in range(0, len(content), step := 10 if server.pause else len(content) or 1):
                server.stopped.wait(server.pause)
                self.wfile.write(content[start : start + step])

    do_GET = do_POST = answer

    def log_message(self, *args) -> None:
        """Stay silent."""


class ChatServer:
    """On 127.0.0.1, inside `with`. `speak(body)` gives the bytes of a reply, or (status, bytes); `requests` holds
    (method, path, headers, body) as sent. `pause` seconds pass before every 10 bytes. The url stays after the stop,
    when connections are refused."""

    pause, elsewhere = 0.0, "/"
    models = b'{"data": [{"id": "judge"}]}'

    def __init__(self, speak=None):
        self.speak = speak or (lambda body: text("好"))
        self.requests, self.stopped = [], Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads, self.server.chat = True, self
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self) -> ChatServer:
        Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()
