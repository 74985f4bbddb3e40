"""`selfhost bench`: what stops it before anything is asked, and what it prints."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from selfhost_cli import config
from selfhost_cli.bench import plot
from selfhost_cli.bench.client import Answer
from selfhost_cli.bench.figures import report
from selfhost_cli.bench.run import Burst, Measured, Round
from selfhost_cli.cli import app, entry
from selfhost_cli.cli import bench as command
from selfhost_cli.ledger import Ledger
from selfhost_cli.model import State
from tests.fakes.front import StubFront
from tests.fakes.rental import make_rental

TOKEN = "the-token-of-the-front"
RENTAL = make_rental(instance_id=4711, model="tiny", dph_total=0.36, context=32_768)


def answer(fresh: int, reused: int, first: float, *, out: int = 51, total: float | None = None) -> Answer:
    return Answer(fresh, reused, out, first, first + 1.0 if total is None else total, out, "end_turn", "miss")


def measured(*lengths: int, rounds: int = 1) -> Measured:
    """Each round 37 ms slower than the one before."""
    hit = Answer(0, 0, 3, 0.002, 0.003, 2, "end_turn", "hit")

    def one(length: int, slower: float) -> Round:
        return Round(answer(length, 0, length / 1000 + slower), answer(20, length, 0.25 + slower), hit)

    return Measured(
        lengths={length: [one(length, 0.037 * number) for number in range(rounds)] for length in lengths},
        bursts={2: [Burst(3.0, (answer(100, 0, 0.5), answer(100, 0, 1.5)))]},
        sessions=[(answer(400, 0, 0.5), answer(100, 400, 0.2))],
    )


@pytest.fixture
def settings(clean_environment: Path) -> config.Settings:
    """Of a profile with a box that is ready, and the keeper's token."""
    settings = config.load("default")
    settings.paths.make()
    settings.paths.front_token.write_text(TOKEN)
    with closing(Ledger(settings.paths.ledger)) as ledger:
        ledger.intend(RENTAL)
        ledger.advance(RENTAL, State.READY)
    return settings


def ran(*words: str) -> int:
    return entry.boundary(lambda: app.run(["bench", *words]))


def test_without_a_box_it_is_not_set_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert ran("--json") == 3
    told = capsys.readouterr()
    assert "Rent one: `selfhost up`" in told.err
    assert json.loads(told.out)["error"]["exit_code"] == 3


@pytest.mark.parametrize(
    ("words", "code", "why"), [(["--lengths", "64k"], 2, "31744"), (["--rounds", "0"], 2, "rounds")]
)
def test_what_makes_no_sense_is_told_before_anything_is_asked(
    settings: config.Settings, capsys: pytest.CaptureFixture[str], words: list[str], code: int, why: str
) -> None:
    assert ran(*words) == code
    assert why in capsys.readouterr().err


def test_a_drawing_that_cannot_be_made_is_told_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert ran("--svg", str(tmp_path / "nowhere" / "b.svg")) == 3
    assert "there is no folder" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "leather", None)
    assert ran("--svg", str(tmp_path / "b.svg")) == 3
    assert "pip install 'selfhost-cli[plot]'" in capsys.readouterr().err


def test_a_box_that_does_not_answer_is_an_error_and_an_empty_list_beside_it(
    settings: config.Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    away = {"error": {"type": "overloaded_error", "message": "the box is reconnecting"}}
    up = {"rentals": [{"label": RENTAL.label, "state": "up"}]}
    with StubFront(TOKEN, {"state": (200, up), "/v1/messages": (529, away)}) as front:
        settings.paths.keeper_file.write_text(json.dumps({"port": front.port}))
        assert ran("--json", "--quick") == 1
        assert ran("--quick") == 1
    told = capsys.readouterr()
    failed = json.loads(told.out[: told.out.index("\n}\n") + 2])
    assert failed["figures"] == []
    assert failed["error"]["message"] == "the box answers 529: the box is reconnecting"
    assert told.err.count("the box answers 529") == 2
    assert (front.seen[-1][0], front.seen[-1][1]) == ("/v1/messages", f"Bearer {TOKEN}")


def shown(seen: Measured, capsys: pytest.CaptureFixture[str], rounds: int = 1) -> list[str]:
    command.tables(report(seen, RENTAL.dph_total), RENTAL, rounds)
    return capsys.readouterr().out.splitlines()


def row(lines: list[str], name: str) -> list[str]:
    (line,) = (line for line in lines if line.startswith(name))
    return line.removeprefix(name).split()


def test_the_tables_tell_each_figure_once_with_its_unit(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(measured(1024, 4096), capsys)
    assert row(lines, "prompt, tokens") == ["1024", "4096"]
    assert row(lines, "first token, cold") == ["1.02", "s", "4.1", "s"]
    assert row(lines, "first token, cached") == ["2", "ms", "2", "ms"]
    assert row(lines, "prefill, tokens/s") == ["1000", "1000"]
    assert row(lines, "decode, tokens/s") == ["50", "50"]
    assert row(lines, "$ per million tokens read") == ["0.1", "0.1"]
    assert row(lines, "$ per million generated") == ["2", "2"]
    assert row(lines, "read and generated, tokens/s") == ["101"]
    assert row(lines, "first token of the last") == ["1.5", "s"]
    assert row(lines, "reused of the prompt before") == ["100", "%"]


def test_of_more_rounds_the_spread_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(measured(1024, rounds=3), capsys, rounds=3)
    assert "medians of up to 3 rounds" in lines[1]
    assert row(lines, "first token, cold") == ["1.06", "s", "(0.037)"]


def test_no_figure_is_cut_off_however_many_lengths_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    lengths = (1024, 4096, 16_384, 32_768, 65_536, 131_072, 253_952)
    lines = shown(measured(*lengths, rounds=3), capsys, rounds=3)
    assert row(lines, "prompt, tokens") == [str(length) for length in lengths]
    assert "…" not in "".join(lines)


def test_what_was_not_measured_is_a_dash_or_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    seen = measured(1024)
    (one,) = seen.lengths[1024]
    seen.lengths[1024] = [Round(answer(1024, 0, 1.0, out=1), one.warm, None)]
    lines = shown(Measured(lengths=seen.lengths), capsys)
    assert row(lines, "first token, cached") == row(lines, "decode, tokens/s") == ["–"]
    assert not [line for line in lines if "at once" in line or "session" in line]


def drawn(seen: Measured, path: Path) -> Any:
    plot.draw(report(seen, 0.36).lengths, "tiny", path)
    return ElementTree.parse(path).getroot()


SVG = "{http://www.w3.org/2000/svg}"


def test_the_drawing_has_a_line_over_the_lengths_for_each_figure(tmp_path: Path) -> None:
    root = drawn(measured(1024, 4096, 16_384), tmp_path / "b.svg")
    titles = {text.text for text in root.iter(f"{SVG}text")}
    assert {f"{title}, tiny" for title, _ in plot.CHARTS} <= titles
    lines = [path for path in root.iter(f"{SVG}path") if path.get("fill") == "none"]
    assert len(lines) == 4
    assert "http" not in (tmp_path / "b.svg").read_text().replace("http://www.w3.org/", "")


def test_one_length_is_a_dot_and_what_has_no_figures_is_not_drawn(tmp_path: Path) -> None:
    seen = measured(1024)
    (one,) = seen.lengths[1024]
    seen.lengths[1024] = [Round(answer(1024, 0, 1.0, out=1), one.warm, None)]
    root = drawn(seen, tmp_path / "b.svg")
    assert len(list(root.iter(f"{SVG}circle"))) == 3
    titles = {text.text for text in root.iter(f"{SVG}text")}
    assert "Prefill (tokens/s), tiny" in titles
    assert "Decode (tokens/s), tiny" not in titles
