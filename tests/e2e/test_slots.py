"""Two slots, from the command line to the engine."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.e2e.stage import Stage

pytestmark = [pytest.mark.e2e, pytest.mark.box, pytest.mark.timeout(300)]


def test_slots_reach_the_engine_and_the_proxy_and_status_tells_them(make_stage: Callable[..., Stage]) -> None:
    stage = make_stage()
    stage.up("--slots", "2", "--context", "8192", "--kv-cache-type", "q8_0")
    (told,) = stage.ask("status", "--json").json
    assert (told["rental"]["slots"], told["rental"]["kv_cache_type"], told["rental"]["context"]) == (2, "q8_0", 8192)
    box = told["box"]
    assert (box["slots"], box["context"], box["components"]["llamacpp"]["slots"]) == (2, 8192, 2)
    assert stage.ask("ask", "Say OK.").out.strip()
    stage.ask("down")
