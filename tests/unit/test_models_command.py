"""`selfhost models` and `selfhost models fit`, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from selfhost_cli.cli import app, completion
from selfhost_cli.errors import NothingToRent, SelfhostError, UsageError
from selfhost_cli.models import catalogue
from tests.unit.test_models_gguf import QWEN, made


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of the user's, and a registry that does not answer."""
    monkeypatch.setenv("SELFHOST_HOME", str(tmp_path))
    monkeypatch.setenv("SELFHOST_REGISTRY", "http://127.0.0.1:1")
    for name in ("SELFHOST_CONTEXT", "SELFHOST_GPU", "SELFHOST_SLOTS", "SELFHOST_KV_CACHE_TYPE"):
        monkeypatch.delenv(name, raising=False)


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert app.run(["models", *words]) == 0
    return capsys.readouterr().out


def test_the_catalogue_is_a_line_for_each_model(capsys: pytest.CaptureFixture[str]) -> None:
    lines = asked(capsys).splitlines()
    rows = {line.split()[0]: line for line in lines if ":" in line.split("  ")[0]}
    assert rows["qwen3-coder:30b"].split()[1:4] == ["19.0", "262144", "86016"]
    assert rows["gemma4:26b"].split()[2:4] == ["unknown", "unknown"]
    assert rows["qwen3.6:35b-a3b"].split()[3] == "–"
    assert "RTX 4090 (24 GB)" in lines[-3]


def test_another_card_has_room_for_more(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFHOST_GPU", "RTX 5090")
    (row,) = [line for line in asked(capsys).splitlines() if line.startswith("qwen3-coder:30b")]
    assert int(row.split()[3]) > 200_000


def test_programs_get_each_figure_with_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(asked(capsys, "--json"))
    first = told["models"][0]
    assert (first["tag"], first["largest_context"], told["card"]["name"]) == ("qwen3-coder:30b", 86_016, "RTX 4090")
    assert first["sources"]["context"]["url"].startswith("https://")
    assert len(told["models"]) == len(catalogue.entries())


def test_a_model_is_counted_line_by_line(capsys: pytest.CaptureFixture[str]) -> None:
    text = asked(capsys, "fit", "qwen3-coder:30b", "--gpu", "RTX_4090")
    assert "48 layers × 4 KV heads × (128 + 128) × 1.0625 B = 51.0 KiB per token, × 65536 × 1" in text
    assert "= taken           21.49 GiB" in text
    assert "✓ fits: 1.00 GiB to spare" in text
    assert "2          20480    40960    77824" in text


def test_what_does_not_fit_is_counted_too_and_ends_with_4(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NothingToRent) as caught:
        asked(capsys, "fit", "qwen3-coder:30b", "--slots", "2")
    assert caught.value.exit_code == 4
    assert caught.value.remedy == (
        "This would fit: `selfhost up --model qwen3-coder:30b --context 65536 --slots 1 --kv-cache-type q8_0`."
    )
    assert "✗ does not fit: 2.19 GiB too little" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["--context", "131072"], "--context 86016 --slots 1 --kv-cache-type q8_0`"),
        (["--kv", "f16"], "--context 65536 --slots 1 --kv-cache-type q8_0`"),
        (["--memory", "22"], "--context 65536 --slots 1 --kv-cache-type q4_0`"),
        (["--memory", "16"], "a card of 23 GB or more, or a smaller model"),
    ],
)
def test_it_is_said_what_fits_instead(words: list[str], remedy: str) -> None:
    with pytest.raises(NothingToRent) as caught:
        app.run(["models", "fit", "qwen3-coder:30b", *words])
    assert remedy in caught.value.remedy


def test_programs_get_the_sums_in_bytes_and_the_failure_beside_them(capsys: pytest.CaptureFixture[str]) -> None:
    told: dict[str, Any] = json.loads(asked(capsys, "fit", "qwen3-coder:30b", "--json"))
    assert told["fits"] is True
    assert told["taken"] == told["weights"] + told["kv"] + told["state"] + told["compute"]
    assert told["needed"] <= told["card"]["memory"]
    assert told["largest_context"]["1"]["q8_0"] == 86_016
    with pytest.raises(NothingToRent):
        app.run(["models", "fit", "qwen3-coder:30b", "--slots", "2", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (told["fits"], told["error"]["exit_code"], told["nearest"]["slots"]) == (False, 4, 1)


def test_what_is_unknown_is_said_to_be_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown" in asked(capsys, "fit", "somebody/model:q4")
    told = json.loads(asked(capsys, "fit", "glm-4.7-flash", "--json"))
    assert (told["fits"], told["weights"]) == (None, None)


def test_a_gguf_on_this_machine_is_counted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "mine.gguf"
    file.write_bytes(made("qwen3moe", QWEN))
    text = asked(capsys, "fit", str(file), "--gpu", "RTX 3060")
    assert "mine.gguf on RTX 3060" in text
    assert "✓ fits" in text
    with pytest.raises(NothingToRent) as caught:
        app.run(["models", "fit", str(file), "--memory", "5"])
    assert "does not fit on a card of 5 GiB" in caught.value.message
    assert caught.value.remedy == "This would fit: 1 × 49152 tokens, KV q8_0."


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["fit", "qwen3-coder:30b", "--gpu", "RTX 9999"], "how much memory a RTX 9999 has is not known"),
        (["fit", "two words"], "no model name"),
        (["fit", "qwen3-coder:30b", "--kv", "q3"], "expected f16 or q8_0 or q4_0"),
        (["fit", "qwen3-coder:30b", "--slots", "0"], "more than zero"),
        (["fit", "qwen3-coder:30b", "--memory", "0"], "expected GiB"),
        (["fit", "minimax-m2:cloud"], "Ollama's own machines"),
    ],
)
def test_what_makes_no_sense_is_named(words: list[str], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        app.run(["models", *words])


def test_a_failure_is_json_for_who_asked_for_json(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SelfhostError):
        app.run(["models", "fit", "two words", "--json"])
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 2


def test_shells_complete_models_and_cards() -> None:
    assert "qwen3-coder:30b" in completion.models("qwen3-c")
    assert "RTX_4090" in completion.cards("RTX_4")
    assert completion.cards("GTX") == []
