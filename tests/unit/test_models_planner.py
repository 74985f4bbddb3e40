"""The arithmetic: against published figures for qwen3-coder:30b on 24 GB cards, and against an engine's own log."""

from __future__ import annotations

from dataclasses import replace

import pytest

from selfhost_cli import claude
from selfhost_cli.models import catalogue, planner
from selfhost_cli.models.planner import GIB, Attention, Fit, Layers, Model, Shape

CODER = Attention((Layers(48, 4, 128, 128),), 262_144)
MODEL = Model("qwen3-coder:30b", round(17.3 * GIB), CODER)
RTX_4090 = 24_564 * 2**20
LEAST = claude.least_context()
MIB = 2**20


@pytest.mark.parametrize(("kv", "kib"), [("f16", 96), ("q8_0", 51), ("q4_0", 27)])
def test_a_token_takes_what_the_type_says(kv: str, kib: int) -> None:
    assert CODER.kv(1, kv) == kib * 1024


@pytest.mark.parametrize(
    ("context", "f16", "q8_0", "q4_0"),
    [
        (32_768, 3.00, 1.59, 0.84),
        (65_536, 6.00, 3.19, 1.69),
        (98_304, 9.00, 4.78, 2.53),
        (131_072, 12.0, 6.38, 3.38),
        (262_144, 24.0, 12.8, 6.75),
    ],
)
def test_a_context_takes_what_was_published(context: int, f16: float, q8_0: float, q4_0: float) -> None:
    for kv, gib in (("f16", f16), ("q8_0", q8_0), ("q4_0", q4_0)):
        assert CODER.kv(context, kv) / GIB == pytest.approx(gib, abs=0.051 if gib > 12 else 0.006)


@pytest.mark.parametrize(("kv", "context", "gib"), [("q8_0", 65_536, 21.5), ("f16", 32_768, 21.3)])
def test_the_safe_shapes_for_24_gb_add_up(kv: str, context: int, gib: float) -> None:
    fit = Fit(MODEL, Shape(context, 1, kv), RTX_4090)
    assert fit.fits
    assert fit.total / GIB == pytest.approx(gib, abs=0.05)


@pytest.mark.parametrize(
    ("kv", "careful", "tight"), [("f16", 45_000, 53_000), ("q8_0", 86_000, 100_000), ("q4_0", 163_000, 190_000)]
)
def test_the_largest_context_is_that_of_the_margin(
    kv: str, careful: int, tight: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert planner.largest(MODEL, RTX_4090, 1, kv) == pytest.approx(careful, abs=planner.GRAIN)
    monkeypatch.setattr(planner, "MARGIN", round(0.3 * GIB))
    assert planner.largest(MODEL, RTX_4090, 1, kv) == pytest.approx(tight, abs=planner.GRAIN)


def test_two_times_64k_do_not_fit_on_24_gb_and_what_does_is_said() -> None:
    wanted = Shape(65_536, slots=2)
    assert not Fit(MODEL, wanted, RTX_4090).fits
    assert planner.choose(MODEL, RTX_4090, wanted, LEAST) == Shape(65_536, slots=1)
    assert planner.table(MODEL, RTX_4090)[2] == {"f16": 20_480, "q8_0": 40_960, "q4_0": 77_824}
    assert Fit(MODEL, Shape(40_960, 2), RTX_4090).fits
    assert not Fit(MODEL, Shape(40_960 + planner.GRAIN, 2), RTX_4090).fits


@pytest.mark.parametrize(
    ("wanted", "memory_gib", "chosen"),
    [
        (Shape(65_536), 24, Shape(65_536)),
        (Shape(65_536, 1, "f16"), 24, Shape(65_536, 1, "q8_0")),  # costs nothing that could be measured
        (Shape(131_072), 24, Shape(86_016)),  # less context before less quality
        (Shape(131_072, 3), 24, Shape(86_016)),
        (Shape(65_536), 22, Shape(65_536, 1, "q4_0")),
        (Shape(131_072), 22, Shape(81_920, 1, "q4_0")),
        (Shape(131_072), 21, None),  # 45,056 tokens would fit, and nobody could work with them
        (Shape(65_536, 4), 48, Shape(65_536, 4)),
        (Shape(65_536), 16, None),
    ],
)
def test_what_comes_nearest_is_chosen(wanted: Shape, memory_gib: int, chosen: Shape | None) -> None:
    assert planner.choose(MODEL, memory_gib * GIB, wanted, LEAST) == chosen


def test_whatever_is_chosen_fits_and_is_no_smaller_than_it_may_be() -> None:
    for gib in range(17, 60):
        for slots in (1, 2, 4):
            for kv in planner.KV_TYPES:
                chosen = planner.choose(MODEL, gib * GIB, Shape(131_072, slots, kv), LEAST)
                if chosen:
                    assert Fit(MODEL, chosen, gib * GIB).fits
                    assert LEAST <= chosen.context <= 131_072


def test_no_context_is_larger_than_the_model_was_made_for() -> None:
    small = replace(MODEL, attention=replace(CODER, native_context=33_000))
    assert planner.largest(small, 80 * GIB, 1, "f16") == 33_000
    assert not Fit(small, Shape(40_960), 80 * GIB).fits


def test_layers_without_kv_take_a_state_of_one_size() -> None:
    """As logged by Ollama for Qwen3.8-27B at 65,536 tokens, f16: https://github.com/hogeheer499-commits/strix-halo-guide"""
    model = catalogue.find("qwen3.8:27b")
    assert model
    assert model.attention
    assert model.weights
    assert model.attention.kv(65_536, "f16") == 4096 * MIB
    fit = Fit(Model("", model.weights, model.attention), Shape(65_536, 1, "f16"), RTX_4090)
    assert fit.state / MIB == pytest.approx(748, abs=1)
    logged = 15_339 + 1_161 + 4_844 + 792
    assert logged < fit.total / MIB < logged + 400  # CUDA's own memory was not in the log


def test_a_window_bounds_what_its_layers_keep() -> None:
    windowed = Attention((Layers(12, 8, 64, 64), Layers(12, 8, 64, 64, window=128)), 131_072)
    plain = Attention((Layers(24, 8, 64, 64),), 131_072)
    assert windowed.kv(100, "f16") == plain.kv(100, "f16")
    tokens = 128 + planner.BATCH
    assert windowed.kv(131_072, "f16") == plain.kv(131_072, "f16") // 2 + plain.kv(tokens, "f16") // 2


def test_it_is_said_in_one_line() -> None:
    said = str(Fit(MODEL, Shape(65_536), RTX_4090))
    assert said == "1 × 65536 tokens, KV q8_0: 17.3 + 3.2 + 1.0 = 21.5 of 24.0 GiB"


def test_only_what_differs_becomes_an_option() -> None:
    assert planner.options(Shape(65_536), Shape(65_536)) == ""
    assert planner.options(Shape(40_960, 1, "q4_0"), Shape(65_536, 2)) == (
        "--context 40960 --slots 1 --kv-cache-type q4_0"
    )
