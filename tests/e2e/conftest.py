from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.stage import Stage


@pytest.fixture
def make_stage(cache: Path, tmp_path: Path) -> Iterator[Callable[..., Stage]]:
    """A fresh sandbox; keyword arguments become SELFHOST_* settings of every command."""
    made: list[Stage] = []

    def make(**settings: object) -> Stage:
        home = tmp_path / f"stage{len(made)}"
        home.mkdir()
        made.append(Stage(home, cache, {f"SELFHOST_{name.upper()}": str(value) for name, value in settings.items()}))
        return made[-1]

    yield make
    for stage in made:
        stage.close()


@pytest.fixture(scope="module")
def ready(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One box that is up, for all tests of a module."""
    home = tmp_path_factory.mktemp("ready")
    stage = Stage(home, cache)
    try:
        stage.up()
        yield stage
        stage.ask("down")
    finally:
        stage.close()
