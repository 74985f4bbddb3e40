"""docs/models.md shows what the commands print, and says what the code does."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from selfhost_cli import claude
from selfhost_cli.cli import app
from selfhost_cli.errors import SelfhostError
from selfhost_cli.models import planner
from selfhost_cli.models.planner import Fit, Model, Shape
from tests.unit.test_models_planner import CODER, RTX_4090

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
SHOWN = re.findall(r"^```sh\n(selfhost models[^\n]*)\n```\n\n```text\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("line", "printed"), SHOWN, ids=[line for line, _ in SHOWN])
def test_what_is_shown_is_what_is_printed(
    line: str, printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SELFHOST_HOME", str(tmp_path))
    try:
        app.run(shlex.split(line)[1:])
        said = ""
    except SelfhostError as error:
        said = f"selfhost: {error.message}\n{error.remedy}\n"
    assert capsys.readouterr().out + said == printed


def test_three_are_shown() -> None:
    assert len(SHOWN) == 3


def test_the_figures_in_the_text_are_those_of_the_code() -> None:
    least = claude.least_context()
    assert f"Below {least:,} tokens" in PAGE
    assert f"At {least:,} that is at {claude.compacts_at(least):,}" in " ".join(PAGE.split())
    assert f"At 32,768 it is at {claude.compacts_at(32_768):,}" in " ".join(PAGE.split())
    assert f"about {claude.FIRST_REQUEST:,}" in PAGE
    assert (planner.COMPUTE, planner.MARGIN, planner.DRIVER * 2) == (planner.GIB,) * 3
    assert str(Fit(Model("", round(17.3 * planner.GIB), CODER), Shape(65_536), RTX_4090)) in PAGE
