from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import pytest

from selfhost_cli import models
from selfhost_cli.errors import UsageError
from selfhost_cli.models import gguf
from selfhost_cli.models.planner import Attention, Layers

QWEN = {"block_count": 48, "context_length": 262_144, "embedding_length": 2048, "attention.head_count": 32}
QWEN |= {"attention.head_count_kv": 4, "attention.key_length": 128, "attention.value_length": 128}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(of: Any) -> bytes:
    if isinstance(of, bool):
        return struct.pack("<I?", 7, of)
    if isinstance(of, int):
        return struct.pack("<II", 4, of)
    if isinstance(of, str):
        return struct.pack("<I", 8) + text(of)
    kind = value(of[0])[:4]
    return struct.pack("<I", 9) + kind + struct.pack("<Q", len(of)) + b"".join(value(one)[4:] for one in of)


def made(architecture: str, facts: dict[str, Any], *, tokens: int = 5000, tokenizer_first: bool = False) -> bytes:
    """The front of a GGUF, its tokenizer included."""
    known = {"general.architecture": architecture} | {f"{architecture}.{key}": one for key, one in facts.items()}
    words: dict[str, Any] = {"tokenizer.ggml.model": "gpt2"}
    if tokens:
        words["tokenizer.ggml.tokens"] = [f"word {number}" for number in range(tokens)]
    pairs = words | known if tokenizer_first else known | words
    body = b"".join(text(key) + value(one) for key, one in pairs.items())
    return b"GGUF" + struct.pack("<IQQ", 3, 7, len(pairs)) + body


def attention(architecture: str, **facts: Any) -> Attention | None:
    return gguf.attention(gguf.metadata(io.BytesIO(made(architecture, QWEN | facts))))


def test_layers_heads_and_lengths_are_read() -> None:
    assert attention("qwen3moe") == Attention((Layers(48, 4, 128, 128),), 262_144)


def test_nothing_is_read_of_the_tokenizer_behind_them() -> None:
    whole = made("qwen3moe", QWEN)
    file = io.BytesIO(whole)
    gguf.metadata(file)
    assert file.tell() < 1000 < len(whole)


def test_a_tokenizer_in_front_is_read_through() -> None:
    found = gguf.metadata(io.BytesIO(made("qwen3moe", QWEN, tokenizer_first=True)))
    assert gguf.attention(found) == attention("qwen3moe")


def test_without_a_length_of_heads_it_is_that_of_the_width() -> None:
    facts = {"block_count": 28, "context_length": 32_768, "embedding_length": 1536, "attention.head_count": 12}
    found = gguf.metadata(io.BytesIO(made("qwen2", facts | {"attention.head_count_kv": 2})))
    assert gguf.attention(found) == Attention((Layers(28, 2, 128, 128),), 32_768)


def test_only_every_nth_layer_may_have_kv_and_the_others_a_state() -> None:
    state: dict[str, Any] = {"ssm.inner_size": 6144, "ssm.state_size": 128, "ssm.conv_kernel": 4, "ssm.group_count": 16}
    found = attention("qwen35", block_count=64, full_attention_interval=4, **state)
    assert found
    assert found.layers == (Layers(16, 4, 128, 128),)
    assert found.state == 48 * 4 * (6144 * 128 + 3 * (6144 + 2 * 16 * 128))


def test_layers_that_only_draft_are_not_counted() -> None:
    found = attention("glm4moe", block_count=47, nextn_predict_layers=1)
    assert found
    assert found.layers[0].count == 46


def test_a_layer_without_kv_heads_keeps_nothing() -> None:
    found = attention("lfm2", block_count=4, **{"attention.head_count_kv": [0, 8, 0, 8]})
    assert found
    assert found.layers == (Layers(2, 8, 128, 128),)


@pytest.mark.parametrize(
    ("architecture", "facts", "full", "windowed"),
    [
        ("gptoss", {}, 12, 12),
        ("gemma3", {}, 4, 20),
        ("gemma9", {"attention.sliding_window_pattern": [True, True, False] * 8}, 8, 16),
        ("gemma9", {"attention.sliding_window_pattern": 4}, 6, 18),
        ("mistral", {}, 24, 0),  # llama.cpp does not use a window that is only named
    ],
)
def test_windows_are_those_of_the_layers_that_have_one(
    architecture: str, facts: dict[str, Any], full: int, windowed: int
) -> None:
    found = attention(architecture, block_count=24, **{"attention.sliding_window": 1024, **facts})
    assert found
    counts = {group.window: group.count for group in found.layers}
    assert counts == {0: full, 1024: windowed} if windowed else counts == {0: full}


def test_layers_with_a_window_may_have_lengths_of_their_own_and_the_last_ones_share() -> None:
    found = attention(
        "gemma9",
        block_count=6,
        **{
            "attention.sliding_window": 512,
            "attention.sliding_window_pattern": [True, True, False, True, True, False],
            "attention.key_length_swa": 64,
            "attention.value_length_swa": 64,
            "attention.shared_kv_layers": 3,
        },
    )
    assert found
    assert set(found.layers) == {Layers(2, 4, 64, 64, 512), Layers(1, 4, 128, 128)}


@pytest.mark.parametrize(
    "facts",
    [
        {"attention.kv_lora_rank": 512},  # compressed: what is kept differs between versions of llama.cpp
        {"block_count": "many"},
        {"attention.head_count_kv": [4, 4]},
        {"attention.key_length": 0},
    ],
)
def test_what_cannot_be_counted_is_unknown(facts: dict[str, Any]) -> None:
    assert attention("deepseek2", **facts) is None


def test_metadata_without_an_architecture_is_unknown() -> None:
    assert gguf.attention({}) is None
    assert gguf.attention({"general.architecture": "clip"}) is None


GOOD = made("qwen3moe", QWEN)
ONE = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\3\4",
        *(GOOD[:size] for size in (4, 30, 200)),
        GOOD[:4] + struct.pack("<IQQ", 9, 0, 0),
        ONE + struct.pack("<Q", 2**40),
        ONE + text("a") + struct.pack("<I", 99),
        ONE + text("a") + struct.pack("<IIQ", 9, 9, 1),
    ],
)
def test_a_file_that_is_no_gguf_is_an_error_that_names_it(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"model\.gguf: "):
        models.find(str(file))


def test_a_file_on_this_machine_is_counted_without_any_registry(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(GOOD + bytes(1_000_000))
    found = models.find(str(file), "http://127.0.0.1:1")
    assert found.weights == file.stat().st_size
    assert found.attention == attention("qwen3moe")
    assert found.model


def test_an_empty_list_of_heads_is_none_that_can_be_counted() -> None:
    found = gguf.metadata(io.BytesIO(made("qwen3moe", QWEN)))
    assert gguf.attention({**found, "qwen3moe.attention.head_count": []}) is None
