"""What `health` makes of the answers of a box, sensible and not; that it sees a real one that is down: tests/e2e."""

from __future__ import annotations

from typing import Any

import pytest

from selfhost_cli import health
from selfhost_cli.attach import Front
from selfhost_cli.model import Event, Probe
from tests.fakes.box import TOKEN, answering, healthy, serving

MODEL = "qwen3-coder:30b"
FACTS = {"version": "0.34.0", "parameters": "30.5B", "quantization": "Q4_K_M", "capabilities": ["completion", "tools"]}
SIZES = {"size": 21_500_000_000, "size_vram": 21_500_000_000}


def probes(gpu: bool = True, context: int = 65_536, **facts: Any) -> dict[str, Probe]:
    told: list[Event] = []
    with serving(MODEL, 65_536, "ollama", **{**FACTS, **SIZES, **facts}) as front:
        report = health.check(front, model=MODEL, context=context, gpu=gpu, report=told.append)
    assert [(event.stage, event.status) for event in told] == [
        (f"health: {probe.name}", status)
        for probe in report.probes
        for status in ("start", "done" if probe.ok else "fail")
    ]
    assert all(probe.seconds >= 0 for probe in report.probes)
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


def report(box: object, token: tuple[int, object] = TOKEN) -> list[Probe]:
    with answering(box, token) as front:
        return list(health.check(front, model=MODEL, context=65_536, gpu=True, report=lambda event: None).probes)


def good(**engine: Any) -> dict[str, object]:
    return healthy(MODEL, 65_536, "ollama", **{**FACTS, **SIZES, **engine})


@pytest.mark.parametrize(
    ("box", "token", "probed", "said", "remedy"),
    [
        (
            {"status": "away", "state": "connecting", "reason": "no route"},
            TOKEN,
            ["tunnel"],
            "connecting: no route",
            "it comes back by itself",
        ),
        (
            {"status": "away", "state": "connected", "reason": "connection refused"},
            TOKEN,
            ["proxy"],
            "the proxy on the box does not answer: connection refused",
            "Run `selfhost up` to try again",
        ),
        (
            good(status="down", reason="loading"),
            TOKEN,
            ["tunnel", "proxy", "engine"],
            "ollama does not answer: loading",
            "It may still be loading",
        ),
        (
            {**good(), "model": "another"},
            TOKEN,
            ["tunnel", "proxy", "engine", "model"],
            f"serves another, wanted {MODEL}",
            "--model",
        ),
        (
            good(),
            (529, {"type": "error", "error": {"type": "overloaded_error", "message": "full"}}),
            ["tunnel", "proxy", "engine", "model", "gpu", "context", "token"],
            "529 {'type': 'overloaded_error', 'message': 'full'}",
            "Run `selfhost up` to try again",
        ),
        (
            good(),
            (200, {"usage": {"output_tokens": 0}}),
            ["tunnel", "proxy", "engine", "model", "gpu", "context", "token"],
            "200 {'usage': {'output_tokens': 0}}",
            "Run `selfhost up` to try again",
        ),
    ],
    ids=["tunnel", "proxy", "engine", "model", "token", "no token"],
)
def test_the_first_part_that_fails_is_named_with_what_to_do_and_none_after_it_is_probed(
    box: object, token: tuple[int, object], probed: list[str], said: str, remedy: str
) -> None:
    found = report(box, token)
    assert [probe.name for probe in found] == probed
    assert [probe.ok for probe in found] == [True] * (len(probed) - 1) + [False]
    assert found[-1].detail == said
    assert remedy in found[-1].remedy


def test_a_front_that_is_not_there_is_named() -> None:
    gone = Front("http://127.0.0.1:9", 9, "token")  # the discard port: nothing listens there
    (only,) = health.check(gone, model=MODEL, context=1, gpu=True, report=lambda event: None).probes
    assert (only.name, only.ok) == ("front", False)


NONSENSE: list[Any] = [None, [], "text", 7, True, {}, {"status": []}, {"status": "healthy"}]


@pytest.mark.parametrize("box", [*NONSENSE, *({**good(), "components": junk} for junk in NONSENSE)], ids=repr)
def test_a_box_that_answers_nonsense_has_no_proxy_or_no_engine(box: object) -> None:
    last = report(box)[-1]
    assert (last.ok, last.name) in ((False, "proxy"), (False, "engine"))


@pytest.mark.parametrize("junk", NONSENSE, ids=repr)
def test_an_engine_whose_facts_are_nonsense_fails_or_is_unknown(junk: Any) -> None:
    assert report({**good(), "components": {"ollama": junk}})[2].ok == (junk == {"status": "healthy"})
    for name in (*FACTS, *SIZES):
        assert report(good(**{name: junk}))[-1].name in ("model", "gpu", "token")
    assert not report({**good(), "context": junk})[-1].ok


@pytest.mark.parametrize("answer", [*NONSENSE, b"no JSON", *({"usage": junk} for junk in NONSENSE)], ids=repr)
def test_an_answer_without_a_token_in_it_is_a_failure(answer: object) -> None:
    last = report(good(), (200, answer))[-1]
    assert (last.name, last.ok) == ("token", False)


@pytest.mark.parametrize("junk", ["many", [], {}, -1])
def test_a_number_of_tokens_that_is_none_is_a_failure(junk: object) -> None:
    assert not report(good(), (200, {"usage": {"output_tokens": junk}}))[-1].ok


@pytest.mark.parametrize(("size", "there"), [(0, 0), (-1, -1), (1, 10**400), (1, -1)])
def test_sizes_that_cannot_be_are_unknown(size: int, there: int) -> None:
    assert health.on_gpu({"size": size, "size_vram": there}) is None
