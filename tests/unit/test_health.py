"""What `health` makes of the answers of a box that is up; that it sees one that is not: tests/e2e."""

from __future__ import annotations

from typing import Any

import pytest

from selfhost_cli import health
from selfhost_cli.model import Event, Probe
from tests.fakes.box import serving

MODEL = "qwen3-coder:30b"
FACTS = {"version": "0.34.0", "parameters": "30.5B", "quantization": "Q4_K_M", "capabilities": ["completion", "tools"]}
SIZES = {"size": 21_500_000_000, "size_vram": 21_500_000_000}


def probes(gpu: bool = True, context: int = 65_536, **facts: Any) -> dict[str, Probe]:
    told: list[Event] = []
    with serving(MODEL, 65_536, "ollama", **{**FACTS, **SIZES, **facts}) as front:
        report = health.check(front, model=MODEL, context=context, gpu=gpu, report=told.append)
    assert [event.stage for event in told] == [f"health: {probe.name}" for probe in report.probes]
    return {probe.name: probe for probe in report.probes}


def test_all_of_ollama_is_probed_from_the_outside_in() -> None:
    found = probes()
    assert list(found) == ["tunnel", "proxy", "engine", "model", "gpu", "context", "token"]
    assert all(probe.ok for probe in found.values())
    assert found["engine"].detail == "ollama 0.34.0"
    assert found["model"].detail == "qwen3-coder:30b (30.5B Q4_K_M)"
    assert found["gpu"].detail == "100% of the model is on the GPU"


def test_a_model_that_spills_over_to_the_cpu_is_a_failure_where_there_is_a_gpu() -> None:
    last = probes(size_vram=20_900_000_000)["gpu"]
    assert not last.ok
    assert "97%" in last.detail
    assert "smaller" in last.remedy
    assert "gpu" not in probes(size_vram=0, gpu=False)


def test_a_model_that_cannot_call_tools_is_named() -> None:
    last = probes(capabilities=["completion"])["model"]
    assert not last.ok
    assert "cannot call tools" in last.detail


@pytest.mark.parametrize("missing", ["version", "capabilities", "size"])
def test_an_engine_that_tells_less_is_no_failure(missing: str) -> None:
    untold: dict[str, Any] = {missing: None}
    assert all(probe.ok for probe in probes(**untold).values())


def test_a_smaller_context_than_promised_is_a_failure() -> None:
    last = probes(context=131_072)["context"]
    assert not last.ok
    assert "65536 tokens, promised 131072" in last.detail
