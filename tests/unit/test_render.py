from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from selfhost_cli.cli import progress, render, words
from selfhost_cli.invoice import invoice
from selfhost_cli.ledger import Usage
from selfhost_cli.lifecycle import Ended
from selfhost_cli.model import BoxState, Charges, Endpoint, Event, Instance
from selfhost_cli.status import Status
from tests.fakes.rental import make_rental


def foreign(label: str) -> Instance:
    return Instance(7, label, BoxState.RUNNING, "running", "", 1, "RTX 4090", 0.3, None, None, None)


def test_the_sentence_people_came_for_is_not_said_of_boxes_that_are_not_ours(
    capsys: pytest.CaptureFixture[str],
) -> None:
    render.ended(Ended((), (), (), alone=True))
    assert "nothing is billed any more" in capsys.readouterr().out
    for doubtful in (Ended((), (), ()), Ended((), (), (), "the ledger is broken", alone=True)):
        render.ended(doubtful)
        assert "nothing of this installation is billed any more" in capsys.readouterr().out
    render.ended(Ended((), (), (foreign("selfhost-other-1"),)))
    said = capsys.readouterr().out
    assert "nothing is billed any more" not in said
    assert "selfhost down --all" in said


def test_a_label_that_looks_like_markup_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    render.ended(Ended((), (foreign("selfhost-[/x]"),), ()))
    assert "selfhost-[/x]" in capsys.readouterr().out


def test_an_invoice_tells_hours_parts_tokens_and_the_price_of_a_million(capsys: pytest.CaptureFixture[str]) -> None:
    rental = make_rental(instance_id=7, created_at=0.0, sent_at=0.0, running_at=0.0, ended_at=3600.0)
    render.ended(Ended((invoice(rental, Usage(3, 900_000, 1, 100_000), now=3600.0),), (), ()))
    said = capsys.readouterr().out
    assert "60.0 min  $0.3000" in said
    assert "$0.31" in said
    assert "900000 in (1 reused), 100000 out, 3 requests" in said


def test_an_invoice_says_whose_figures_it_has_and_what_it_cannot_know(capsys: pytest.CaptureFixture[str]) -> None:
    rental = make_rental(instance_id=7, created_at=0.0, sent_at=0.0, running_at=0.0, ended_at=40 * 3600.0)
    render.ended(Ended((invoice(rental, Usage(), now=0.0),), (), ()))
    said = capsys.readouterr().out
    assert "$2.4800 (estimate)" in said
    assert "! between $0.00 and $12.40: when exactly it ended, only the market knows" in said
    settled = replace(rental, charges=Charges(2.0, 0.5, 0.0, 0.0), estimated=2.48)
    render.ended(Ended((invoice(settled, Usage(), now=0.0),), (), ()))
    said = capsys.readouterr().out
    assert "$2.5000 (market's figure)" in said
    assert "between" not in said


def test_a_box_without_an_armed_watchdog_is_not_said_to_end_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for guarded, said in ((True, False), (False, True)):
        render.ready(make_rental(guarded=guarded), "http://127.0.0.1:1")
        assert ("its watchdog is not armed" in capsys.readouterr().err) is said


def test_small_amounts_have_enough_digits() -> None:
    assert [render.money(dollars) for dollars in (None, 0.0, 0.0031, 0.25, 1.0, 12.345)] == [
        "–",
        "$0.00",
        "$0.0031",
        "$0.2500",
        "$1.00",
        "$12.35",
    ]


def test_no_secret_is_in_json_and_an_endpoint_has_names(capsys: pytest.CaptureFixture[str]) -> None:
    render.as_json({"rental": make_rental(endpoint=Endpoint("192.0.2.1", 22))})
    told = json.loads(capsys.readouterr().out)["rental"]
    assert told["endpoint"] == {"host": "192.0.2.1", "port": 22}
    assert "box_token" not in told


def test_commands_shown_are_for_the_profile_at_hand() -> None:
    assert words.in_profile("Run `selfhost down`.", "default") == "Run `selfhost down`."
    assert words.in_profile("Run `selfhost down`.", "demo") == "Run `selfhost --profile demo down`."


STEERING = "\x1b]0;owned\x07\x1b[2J\x9b1A\rgone\u202ereversed\x08"
"""Sets a title, clears the screen, moves up, writes over, turns around."""


def steers(shown: str) -> bool:
    return any(not (character.isprintable() or character == "\n") for character in shown)


def test_what_a_market_or_a_box_says_never_steers_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    box = make_rental(instance_id=7, gpu=STEERING, place=STEERING, model=STEERING, reason=STEERING, ended_at=1.0)
    render.ended(Ended((invoice(box, Usage(), now=0.0),), (foreign(STEERING),), (foreign(STEERING),), STEERING))
    health: dict[str, Any] = {"status": STEERING, "components": {box.engine: {"version": STEERING}}}
    so_far = invoice(box, Usage(), now=0.0)
    render.status([Status(box, STEERING, STEERING, STEERING, health, so_far, (), None)])
    render.as_json({"reason": STEERING})
    words.say(f"selfhost: {STEERING}")
    with progress.Talk() as talk:
        talk(Event(STEERING, "fail", STEERING))
    told = capsys.readouterr()
    assert "gone" in told.out
    assert "gone" in told.err
    assert not steers(told.out + told.err)
