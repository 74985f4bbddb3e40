from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.templates.box import Box, Market


@pytest.fixture
def market() -> Iterator[Market]:
    server = Market()
    yield server
    server.close()


@pytest.fixture
def box(tmp_path: Path, market: Market) -> Iterator[Box]:
    """A box that rents from `market`. The market is closed after the box's processes are gone."""
    made = Box(tmp_path / "box", {"SELFHOST_MARKET_URL": market.url})
    yield made
    made.kill_all()
