"""A listener that proves itself as the keeper's front does, on a port of the system's choice."""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


class StubFront:
    """Answers `prove` under `token` and everything else from `answers`, name -> (status, body); GETs under their path.

    `seen` holds (name, authorization header, body) of every POST.
    """

    def __init__(self, token: str, answers: dict[str, tuple[int, Any]] | None = None) -> None:
        self.answers = answers or {}
        self.seen: list[tuple[str, str | None, dict[str, Any]]] = []
        front = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                name = self.path.removeprefix("/selfhost/")
                front.seen.append((name, self.headers["Authorization"], body))
                if name == "prove" and name not in front.answers:
                    signed = f"selfhost-prove\n{body['nonce']}\n{front.port}".encode()
                    self.reply(200, {"proof": hmac.new(token.encode(), signed, hashlib.sha256).hexdigest()})
                else:
                    self.reply(*front.answers.get(name, (404, {})))

            def do_GET(self) -> None:
                self.reply(*front.answers.get(self.path, (404, {})))

            def reply(self, status: int, answer: Any) -> None:
                text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> StubFront:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
