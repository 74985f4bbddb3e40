"""What the benchmarks say of what they measured: the parts that need no engine."""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
START = {"type": "message_start", "message": {}}
DELTA = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "So"}}
STOP = {"type": "message_stop"}


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("session")


@contextmanager
def answering(status: int, *events: dict[str, Any]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b": a comment\n\n")
            for event in events:
                self.wfile.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("status", "events", "why"),
    [
        (200, (START, DELTA, STOP), ""),
        (200, (START, DELTA), "it broke off"),
        (200, (START, {"type": "error", "error": {"message": "no"}}), '"no"'),
        (529, (), "529: "),
    ],
)
def test_an_answer_counts_when_it_came_whole(
    session: Any, status: int, events: tuple[dict[str, Any], ...], why: str
) -> None:
    request = session.Recorded("a turn", "main", {}, {"messages": []})
    with answering(status, *events) as url:
        first, took, failed = session.ask(url, request)
    assert 0 < first <= took
    assert why in failed
    assert bool(why) == bool(failed)


def test_the_first_token_is_not_the_message_that_some_send_at_once(session: Any) -> None:
    assert START["type"] not in session.SAYS
    assert DELTA["type"] in session.SAYS


def test_lines_that_vary_go_behind_those_that_two_prompts_share(session: Any) -> None:
    one = "you are\nin /one\ntoday is 2026-11-23\nbe brief\nask"
    other = "you are\nin /two\ntoday is 2026-11-23\nbe brief\nelse"
    assert session.settled(one, other, ["2026-11-23"]) == "you are\nbe brief\nin /one\ntoday is 2026-11-23\nask"
    assert session.settled(other, one, []) == "you are\ntoday is 2026-11-23\nbe brief\nin /two\nelse"


def way(session: Any, name: str, *asked: Any) -> Any:
    return session.Way(name, "", "", [], list(asked))


def test_what_was_reused_counts_only_as_far_as_it_was_shared_and_a_goal_is_ours_alone(session: Any) -> None:
    asked = [
        session.Asked(first=4.0, took=5.0, total=100, shared=0, reused=0, failed=""),
        session.Asked(first=1.0, took=2.0, total=120, shared=100, reused=103, failed=""),
        session.Asked(first=2.0, took=3.0, total=120, shared=100, reused=90, failed="529: busy"),
    ]
    ours, raw = (
        {one.figure.partition(": ")[2]: one for one in session.way_figures(way(session, name, *asked))}
        for name in ("ours", "raw")
    )
    reused = ours["of the shared tokens, reused"]
    assert (reused.value, reused.goal, reused.met) == (95, 99, False)
    assert (ours["requests that failed"].value, ours["requests that failed"].met) == (1, False)
    assert ours["first token of the first turn"].value == 4
    assert ours["first token of every later request"].value == 1.5
    assert ours["the whole session"].value == 10
    assert ours["read by the engine"].value == 340 - 193
    assert {one.met for one in raw.values()} == {None}
    assert [one.value for one in raw.values()] == [one.value for one in ours.values()]


def test_the_table_has_a_column_for_each_way_and_says_what_is_missed(session: Any) -> None:
    asked = session.Asked(first=4.0, took=5.0, total=100, shared=50, reused=25, failed="")
    lines = session.table([way(session, "ours", asked, asked), way(session, "raw", asked, asked)]).splitlines()
    assert lines[0].split()[:2] == ["ours", "raw"]
    assert lines[1].split()[-5:] == ["50.0", "%", "≥", "99", "MISSED"]
    assert len(lines) == 1 + len(session.way_figures(way(session, "ours", asked, asked)))


def test_what_misses_its_goal_comes_first(session: Any) -> None:
    figures = [session.figure("a", [1.0], "s"), session.figure("b", [1.0], "s", 2), session.figure("c", [3.0], "s", 2)]
    assert [one["figure"] for one in json.loads(session.as_json(figures))] == ["c", "b", "a"]


def test_the_machine_is_told_on_one_line_without_its_name(session: Any) -> None:
    told = session.machine()
    assert " cores, " in told
    assert " GB, load " in told
    assert "\n" not in told


def test_the_page_names_every_benchmark_with_its_command() -> None:
    page = (BENCHMARKS / "README.md").read_text()
    for file in BENCHMARKS.glob("*.py"):
        if "    .venv/bin/python benchmarks/" in file.read_text():
            assert f".venv/bin/python benchmarks/{file.name}" in page, file.name
