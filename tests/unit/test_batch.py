"""Many prompts: what is a task, what is kept over a kill, and what is asked again."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from selfhost_cli.attach import Front
from selfhost_cli.batch import run as running
from selfhost_cli.batch.journal import Journal, Result
from selfhost_cli.batch.tasks import Task, read
from selfhost_cli.cli import batch as command
from selfhost_cli.errors import SelfhostError, UsageError
from tests.proxy.kit import Json, asynchronous, ended, serving, started, text

# --- tasks ---


def test_a_line_is_a_prompt_or_an_object() -> None:
    lines = [
        "Why is the sky blue?\n",
        "\n",
        '{"id": "b", "prompt": "And the sea?", "max_tokens": 9}',
        '{"prompt": "x"}',
    ]
    assert read(lines, "stdin") == [
        Task("1", "Why is the sky blue?"),
        Task("b", "And the sea?", "", 9),
        Task("4", "x"),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "begins as JSON and is none"),
        ('{"id": "a"}', "no prompt"),
        ('{"prompt": "  "}', "no prompt"),
        ('{"prompt": "x", "promt": 1}', "no promt"),
        ('{"prompt": "x", "max_tokens": 0}', "max_tokens"),
        ('{"prompt": "x", "max_tokens": true}', "max_tokens"),
        ('{"prompt": "x", "id": ""}', "id"),
        (r'{"prompt": "\ud83d"}', "half of a character"),
        (r'{"prompt": "x", "id": "\ud83d"}', "half of a character"),
        ('{"prompt": "x", "id": "1"}', "already"),
    ],
)
def test_a_line_that_is_no_task_is_named(line: str, reason: str) -> None:
    with pytest.raises(UsageError, match=f"tasks.jsonl, line 2: .*{reason}"):
        read(["first", line], "tasks.jsonl")


def test_a_line_of_a_file_ends_where_a_line_of_stdin_ends(tmp_path: Path) -> None:
    file = tmp_path / "tasks.txt"
    file.write_text("one\N{LINE SEPARATOR}prompt\nanother\n")
    assert [task.prompt for task in command._tasks(str(file))] == ["one\N{LINE SEPARATOR}prompt", "another"]


def test_no_tasks_are_an_error() -> None:
    with pytest.raises(UsageError, match="holds no tasks"):
        read(["", "  \n"], "stdin")


# --- the file of results ---

ONE, TWO = Task("1", "one"), Task("2", "two")


def answered(task: Task) -> Result:
    return Result(task.id, task.digest, "yes", "end_turn")


def test_what_is_answered_is_not_left_and_a_failure_is(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    journal = Journal(path)
    journal.keep(answered(ONE))
    journal.keep(Result(TWO.id, TWO.digest, error="529: busy"))
    journal.close()
    again = Journal(path)
    assert again.left([ONE, TWO]) == [TWO]
    assert again.left([Task("1", "one, edited")]) != []
    again.keep(answered(TWO))
    assert again.left([ONE, TWO]) == []
    again.close()
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_line_that_a_kill_cut_off_is_asked_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "results.jsonl"
    journal = Journal(path)
    for task in (ONE, TWO):
        journal.keep(answered(task))
    journal.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    again = Journal(path)
    assert again.left([ONE, TWO]) == [TWO]
    again.keep(answered(TWO))
    again.close()
    assert path.read_bytes() == whole


def test_two_batches_do_not_write_one_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "results.jsonl")
    with pytest.raises(UsageError, match="another batch"):
        Journal(tmp_path / "results.jsonl")
    journal.close()


@pytest.mark.parametrize("held", ["a letter\n", "[]\n", '{"id": 1, "digest": ""}\n', "no end"])
def test_a_file_of_something_else_is_left_as_it_is(tmp_path: Path, held: str) -> None:
    path = tmp_path / "letter.txt"
    path.write_text(held)
    with pytest.raises(UsageError):
        Journal(path)
    assert path.read_text() == held


def test_a_full_disk_is_told_and_what_it_cut_off_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    journal = Journal(path)
    journal.keep(answered(ONE))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, before[1]))
    try:
        with pytest.raises(SelfhostError, match=r"results\.jsonl: File too large"):
            journal.keep(answered(TWO))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    journal.close()
    again = Journal(path)
    assert again.left([ONE, TWO]) == [TWO]
    again.close()


# --- asking ---

ANSWER = [started(), *text("yes"), *ended()]


class Service:
    """Answers each prompt by the steps of its own: a status, or the bytes of a stream."""

    def __init__(self) -> None:
        self.steps: dict[str, list[int | Sequence[bytes]]] = {}
        self.asked: list[Json] = []
        self.running = self.most = 0
        self.hold: asyncio.Event | None = None

    async def messages(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        self.asked.append(body)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if self.hold:
                await self.hold.wait()
            step = (self.steps.get(body["messages"][0]["content"]) or [ANSWER]).pop(0)
            if isinstance(step, int):
                error = {"type": "error", "error": {"type": "x", "message": "not now"}}
                return web.json_response(error, status=step, headers={"retry-after": "7"})
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await response.prepare(http)
            for piece in step:
                await response.write(piece)
            return response
        finally:
            self.running -= 1


class Batch:
    def __init__(self, url: str) -> None:
        self.front = Front(url, 0, "token")
        self.results: dict[str, Result] = {}
        self.slept: list[float] = []

    async def run(self, *prompts: str, at_once: int = 2) -> dict[str, Result]:
        async def sleep(seconds: float) -> None:
            self.slept.append(seconds)

        def keep(result: Result) -> None:
            self.results[result.id] = result

        tasks = [Task(prompt, prompt) for prompt in prompts]
        async with running.connected(self.front, "") as http:
            await running.run(http, tasks, model="tiny", max_tokens=50, at_once=at_once, keep=keep, sleep=sleep)
        return self.results


@asynccontextmanager
async def service() -> AsyncIterator[tuple[Service, Batch]]:
    made, app = Service(), web.Application()
    app.router.add_post("/v1/messages", made.messages)
    async with serving(app) as url:
        yield made, Batch(url)


@asynchronous
async def test_each_is_asked_once_and_its_answer_kept() -> None:
    async with service() as (made, batch):
        results = await batch.run(*"abcde")
    assert {name: one.text for name, one in results.items()} == dict.fromkeys("abcde", "yes")
    assert len(made.asked) == 5
    assert (results["a"].input_tokens, results["a"].output_tokens) == (20, 7)


@asynchronous
async def test_so_many_at_once_and_no_more() -> None:
    async with service() as (made, batch):
        made.hold = asyncio.Event()
        task = asyncio.create_task(batch.run(*"abcdefgh", at_once=3))
        while made.running < 3:
            await asyncio.sleep(0)
        made.hold.set()
        await task
    assert made.most == 3


@asynchronous
async def test_what_cannot_be_kept_ends_the_batch_with_its_reason() -> None:
    def keep(result: Result) -> None:
        raise SelfhostError("the disk is full")

    async with service() as (_, batch), running.connected(batch.front, "") as http:
        with pytest.raises(SelfhostError, match="the disk is full"):
            await running.run(http, [ONE, TWO], model="tiny", max_tokens=50, at_once=2, keep=keep)


@asynchronous
async def test_a_character_that_came_in_halves_is_whole_and_a_half_one_can_be_kept(tmp_path: Path) -> None:
    async with service() as (made, batch):
        made.steps["a"] = [[started(), *text("\ud83d", "\ude00"), *ended()]]
        made.steps["b"] = [[started(), *text("x\ud83d"), *ended()]]
        results = await batch.run("a", "b")
    assert [results["a"].text, results["b"].text] == ["\N{GRINNING FACE}", "x\N{REPLACEMENT CHARACTER}"]
    journal = Journal(tmp_path / "results.jsonl")
    journal.keep(results["b"])
    journal.close()


@pytest.mark.parametrize("failing", [429, 503, 529, [started(), *text("ye")], [started()], []])
@asynchronous
async def test_what_may_pass_is_asked_again(failing: int | list[bytes]) -> None:
    async with service() as (made, batch):
        made.steps = {"a": [failing, ANSWER]}
        results = await batch.run("a", "b")
    assert (results["a"].text, results["a"].attempts) == ("yes", 2)
    assert (results["b"].text, results["b"].attempts) == ("yes", 1)
    assert batch.slept == [7.0 if isinstance(failing, int) else 1.0]


@asynchronous
async def test_what_fails_for_good_is_told_and_keeps_nobody_else() -> None:
    async with service() as (made, batch):
        made.steps = {"a": [400], "b": [529] * 9}
        results = await batch.run("a", "b", "c")
    assert results["a"].error == "400: not now"
    assert (results["a"].attempts, results["b"].attempts) == (1, running.ATTEMPTS)
    assert results["c"].text == "yes"


def test_a_result_is_a_line_of_json(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "results.jsonl")
    journal.keep(Result("1", "d", "zwei\nZeilen ü"))
    journal.close()
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["text"] == "zwei\nZeilen ü"
