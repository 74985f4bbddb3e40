"""Every test starts with an empty home and an empty environment: no key, no config, no cache of the user's."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from selfhost_cli.sandbox import assets
from selfhost_cli.sandbox.assets import Assets

# A shell that starts us in the background makes us ignore Ctrl-C, and our children with us; they are tested for it.
signal.signal(signal.SIGINT, signal.default_int_handler)

KEPT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV")


@pytest.fixture(autouse=True)
def clean_environment(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary HOME; only what running programs need, and what scripts/test hands over, stays set."""
    home = tmp_path_factory.mktemp("home")
    for name in list(os.environ):
        if name not in KEPT and not name.startswith(("SELFHOST_TEST_", "PYTEST_", "COVERAGE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.fixture(scope="session")
def cache() -> Path:
    """Where the sandbox's downloads are; tests never make them."""
    folder = os.environ.get("SELFHOST_TEST_CACHE")
    if not folder or not assets.ready(Path(folder)):
        pytest.skip("needs the sandbox's downloads: run scripts/test, which makes them and sets SELFHOST_TEST_CACHE")
    return Path(folder)


@pytest.fixture(scope="session")
def downloads(cache: Path) -> Assets:
    """The real model, the box's wheels and the real Claude Code."""
    return assets.ensure(cache, lambda line: None)
