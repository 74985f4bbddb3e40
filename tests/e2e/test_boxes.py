"""Three real boxes behind one front: conversations stay where their prefix is, and move when their box dies."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from selfhost_cli import attach
from selfhost_cli.attach import Front
from selfhost_cli.proxy.front import BOX
from tests.e2e.stage import Stage
from tests.waiting import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

CONVERSATIONS = 30


@pytest.fixture
def stage(make_stage: Callable[..., Stage]) -> Stage:
    return make_stage(SELFHOST_CACHE="off")


def turn(front: Front, session: str, number: int) -> str:
    """One more turn of a conversation; the box that answered it to its end."""
    messages = [{"role": "user", "content": f"This is {session}. Say a word."}]
    for _ in range(number):
        messages += [{"role": "assistant", "content": "Word."}, {"role": "user", "content": "And another one."}]
    headers = {"authorization": f"Bearer {front.token}", "x-claude-code-session-id": session}
    headers["x-claude-code-request-class"] = "main"
    body = {"model": "any", "max_tokens": 2, "stream": True, "messages": messages}
    answer = httpx.post(f"{front.url}/v1/messages", json=body, headers=headers, timeout=120, trust_env=False)
    assert answer.status_code == 200, answer.text
    assert "event: message_stop" in answer.text, answer.text
    return answer.headers[BOX]


def all_of(front: Front, number: int) -> dict[str, str]:
    sessions = [f"session-{one}" for one in range(CONVERSATIONS)]
    with ThreadPoolExecutor(6) as pool:
        return dict(zip(sessions, pool.map(lambda session: turn(front, session, number), sessions), strict=True))


def test_three_boxes_keep_thirty_conversations_and_one_may_die(stage: Stage) -> None:
    told = json.loads(stage.up("--boxes", "3", "--max-spend", "6", "--json").out)
    assert len(told["boxes"]) == stage.billed == 3
    front = attach.find(stage.paths)
    assert front

    def spread() -> bool:
        """The keeper has told the router of all of them."""
        return len({turn(front, f"look-{number}", 0) for number in range(6)}) == 3

    until(spread, 60)
    first = all_of(front, 0)
    assert all_of(front, 1) == first
    assert min(Counter(first.values()).values()) >= 8

    rows = json.loads(stage.ask("status", "--json").out)
    assert sum(row["sessions"] for row in rows) >= CONVERSATIONS
    assert all(row["box"]["status"] == "healthy" and row["rental"]["dph_total"] > 0 for row in rows)
    assert stage.ask("status").out.count("conversations") == 3

    victim = next(rental for rental in told["boxes"] if rental["label"] == first["session-0"])
    with ThreadPoolExecutor(1) as pool:
        during = pool.submit(all_of, front, 2)
        stage.control("kill", instance=victim["instance_id"])
        after = during.result()
    last = all_of(front, 3)
    assert victim["label"] not in last.values()
    for session, box in first.items():
        if box != victim["label"]:
            assert after[session] == last[session] == box
    stage.ask("down")
    assert stage.billed == 0


def test_while_requests_wait_another_box_is_rented_without_asking(stage: Stage) -> None:
    stage.up("--boxes", "1..2", "--max-spend", "6")
    assert stage.billed == 1
    front = attach.find(stage.paths)
    assert front
    with ThreadPoolExecutor(8) as pool:
        asked = []

        def rented() -> bool:
            asked.extend(pool.submit(turn, front, f"busy-{len(asked)}-{number}", 12) for number in range(8))
            for one in asked[-8:]:
                one.result()
            return stage.billed == 2

        until(rented, 200)
    until(lambda: json.loads(stage.ask("status", "--json").out)[-1]["rental"]["state"] == "ready", 100)
    rows = json.loads(stage.ask("status", "--json").out)
    assert [row["rental"]["caps"]["max_dollars"] for row in rows] == [3.0, 3.0]
    stage.ask("down")
    assert stage.billed == 0
