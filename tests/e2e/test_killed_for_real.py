"""A sample of the matrix on real boxes: a real `up` killed after so many requests to the sandbox's market."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.e2e.stage import Stage
from tests.waiting import until

pytestmark = [pytest.mark.long, pytest.mark.e2e, pytest.mark.timeout(300)]


def killed(stage: Stage, *words: str, requests: int) -> None:
    """Start a command and kill it once the market has had so many more requests; it may end before."""
    already = len(stage.control("requests", "GET"))
    process = stage.spawn(*words)
    until(lambda: process.poll() is not None or len(stage.control("requests", "GET")) >= already + requests, 60)
    process.kill()
    process.communicate()


def rented(stage: Stage) -> int:
    return sum(row["method"] == "PUT" and "/asks/" in row["path"] for row in stage.control("requests", "GET"))


@pytest.mark.parametrize("requests", [1, 3, 5, 6, 7, 8, 10, 12])
def test_after_a_killed_up_another_one_resumes_what_is_paid_for(
    make_stage: Callable[..., Stage], requests: int
) -> None:
    stage = make_stage()
    killed(stage, "up", "--yes", "--detach", requests=requests)
    there = stage.billed
    sent = rented(stage)
    stage.up()
    assert stage.billed == 1
    assert rented(stage) == (sent if there else sent + 1)
    stage.ask("down")
    assert stage.billed == 0


@pytest.mark.parametrize("requests", [5, 6, 7, 9])
def test_after_a_killed_up_and_a_killed_down_another_down_ends_it(
    make_stage: Callable[..., Stage], requests: int
) -> None:
    stage = make_stage()
    killed(stage, "up", "--yes", "--detach", requests=requests)
    killed(stage, "down", requests=requests - 4)
    stage.ask("down")
    assert stage.billed == 0


@pytest.mark.parametrize("requests", [6, 8, 9])
def test_after_a_killed_up_the_keeper_alone_ends_it(make_stage: Callable[..., Stage], requests: int) -> None:
    stage = make_stage(orphan=0.02)
    killed(stage, "up", "--yes", "--detach", requests=requests)
    until(lambda: stage.billed == 0, 60)
    stage.wait_for_keeper_to_end()
