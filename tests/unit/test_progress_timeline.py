from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfhost_cli.cli.timeline import PARTS, Span, Timeline
from selfhost_cli.model import Event


class Hand:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def traced(*events: tuple[float, Event]) -> dict[str, Span]:
    """The trace of events, each so many seconds behind the one before."""
    clock = Hand()
    times = Timeline(clock)
    for seconds, event in events:
        clock.now += seconds
        times.tell(event)
    times.close()
    return {span.name: span for span in times.trace()}


STAGES = st.sampled_from(
    ["rent", "boot", "identity", "guard", "model", "start", "tunnel", "health: token", "down", "x"]
)
STATES = st.sampled_from(["start", "progress", "done", "skip", "fail", "note"])
EVENTS = st.builds(Event, STAGES, STATES, st.sampled_from(["", "a", "b", "a (3 s)"]))


@given(st.lists(st.tuples(st.floats(0, 100), EVENTS)))
def test_no_second_is_lost_and_none_is_counted_twice(events: list[tuple[float, Event]]) -> None:
    clock = Hand()
    times = Timeline(clock)
    told = 0.0
    for seconds, event in events:
        clock.now += seconds
        times.tell(event)
        told = told if event.status == "note" else clock.now
    going_on = any(stage.status == "running" for group in times.groups for stage in group.stages.values())
    times.close()
    spans = times.trace()
    assert sum(span.seconds for span in spans) == pytest.approx(clock.now if going_on else told, abs=0.05)
    for span in spans:
        together = max if span.name == "install" else sum
        assert together([0.0, *(part.seconds for part in span.parts)]) <= span.seconds + 0.05
    if told:
        assert sum(span.share or 0.0 for span in spans) == pytest.approx(1.0, abs=0.01)


def test_time_before_a_stage_says_that_it_begins_is_its_groups() -> None:
    install = traced((0.0, Event("guard", "done")), (2.0, Event("upload", "start")), (1.0, Event("upload", "done")))[
        "install"
    ]
    assert install.seconds == 3.0
    assert [(part.name, part.seconds) for part in install.parts] == [("before", 2.0), ("upload", 1.0)]


def test_what_only_says_that_it_is_over_has_the_time_since_the_last_word() -> None:
    health = traced((0.0, Event("tunnel", "done")), (2.0, Event("health: token", "done", "2 tokens")))["health"]
    assert [(part.name, part.seconds) for part in health.parts] == [("token", 2.0)]


def test_a_stage_is_told_apart_by_what_it_was_busy_with() -> None:
    (model,) = traced(
        (0.0, Event("model", "start")),
        (1.0, Event("model", "progress", "tiny.gguf", 0, 50)),
        (4.0, Event("model", "progress", "checking tiny.gguf", 50, 50)),
        (1.0, Event("model", "progress", "checking tiny.gguf.part (5 s)")),
        (1.0, Event("model", "done", "50 MB")),
    )["install"].parts
    assert [(part.name, part.seconds) for part in model.parts] == [("tiny.gguf", 5.0), ("checking tiny.gguf", 2.0)]
    assert model.bytes == 50


def test_stages_that_run_at_once_have_their_time_each_and_the_group_has_it_once() -> None:
    install = traced(
        (0.0, Event("model", "start")),
        (1.0, Event("proxy", "start")),
        (2.0, Event("model", "progress", "tiny.gguf", 10, 50)),
        (3.0, Event("proxy", "done")),
        (4.0, Event("model", "done")),
    )["install"]
    assert install.seconds == 10.0
    assert [(part.name, part.seconds) for part in install.parts] == [("model", 10.0), ("proxy", 5.0)]


def test_of_what_the_market_says_only_the_state_tells_parts_apart() -> None:
    said = ("loading a: 1 MB", "loading a: 2 MB", "running", "gone")
    boot = traced(*((1.0, Event("boot", "progress", text)) for text in said))["boot"]
    assert [(part.name, part.seconds) for part in boot.parts] == [("loading", 3.0), ("running", 1.0)]


def test_a_box_that_says_something_new_every_second_does_not_fill_the_trace() -> None:
    (model,) = traced(*((1.0, Event("model", "progress", f"word{n}")) for n in range(500)))["install"].parts
    assert len(model.parts) == PARTS + 1
    assert model.parts[-1].name == "more"
