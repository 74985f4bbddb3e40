"""`selfhost ask`: what it sends, and what it makes of the answers that a stranger's machine may give."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest

from selfhost_cli.attach import Front
from selfhost_cli.cli import ask
from selfhost_cli.errors import SelfhostError, UsageError

Asked = Callable[..., ask.Answered]


def event(kind: str, **data: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode()


def delta(text: str) -> bytes:
    return event("content_block_delta", delta={"type": "text_delta", "text": text})


END = event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 2}) + event("message_stop")


@contextmanager
def answering(status: int, body: bytes) -> Iterator[tuple[Front, list[Any]]]:
    """A listener that answers one request so."""
    seen: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append((dict(self.headers), json.loads(self.rfile.read(int(self.headers["content-length"])))))
            self.send_response(status)
            self.send_header("x-selfhost-cache", "hit")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.handle_request)
    thread.start()
    port = server.server_address[1]
    try:
        yield Front(f"http://127.0.0.1:{port}", port, "front-token"), seen
    finally:
        thread.join(5)
        server.server_close()


def asked(status: int, body: bytes, *, quiet: bool = False) -> tuple[ask.Answered, Any]:
    with answering(status, body) as (front, seen):
        return ask._asked(front, {"messages": []}, quiet=quiet), seen[0]


def test_the_answer_is_printed_as_it_comes_and_made_plain(capsys: pytest.CaptureFixture[str]) -> None:
    body = b'event: ping\ndata: {"type": "ping"}\n\n' + delta("Hel") + delta("lo\x1b[31m") + b"data: nonsense\n\n" + END
    answer, (headers, _) = asked(200, body)
    assert (answer.text, answer.stop_reason, answer.cache) == ("Hello\x1b[31m", "end_turn", "hit")
    out = capsys.readouterr().out
    assert out.startswith("Hello")
    assert out.endswith("\n")
    assert "\x1b" not in out
    assert headers["Authorization"] == "Bearer front-token"
    assert headers["x-claude-code-request-class"] == "ask"
    assert "cache-control" not in headers


@pytest.mark.parametrize(("said", "sent"), [("off", "no-store"), ("refresh", "no-cache")])
def test_one_command_can_do_without_the_cache(monkeypatch: pytest.MonkeyPatch, said: str, sent: str) -> None:
    monkeypatch.setenv("SELFHOST_CACHE", said)
    _, (headers, _) = asked(200, END, quiet=True)
    assert headers["cache-control"] == sent


def test_a_wish_nobody_knows_is_told_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFHOST_CACHE", "of")
    with pytest.raises(UsageError, match="expected off"):
        ask._asked(Front("http://127.0.0.1:9", 9, "t"), {}, quiet=True)


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (529, json.dumps({"error": {"message": "the box is away\x1b"}}).encode(), "529: the box is away"),
        (502, b"<html>gateway", "502: <html>gateway"),
        (200, delta("Hel") + event("error", error={"message": "it broke"}), "broke off: it broke"),
    ],
)
def test_what_is_no_answer_is_an_error_with_a_remedy(status: int, body: bytes, message: str) -> None:
    with pytest.raises(SelfhostError) as failed:
        asked(status, body, quiet=True)
    assert message in failed.value.message
    assert "\x1b" not in failed.value.message
    assert failed.value.remedy == ask.HELP


def test_a_listener_that_is_gone_is_an_error() -> None:
    with pytest.raises(SelfhostError, match="the answer broke off"):
        ask._asked(Front("http://127.0.0.1:9", 9, "t"), {}, quiet=True)
