"""What the metadata at the front of a GGUF says of a model's attention. The format: docs/gguf.md of ggml."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

from selfhost_cli.models.planner import Attention, Layers

LONG = 4096
"""Elements of an array that is not kept: the vocabulary's."""
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_WINDOW_EVERY = {"gptoss": 2, "gpt-oss": 2, "gemma2": 2, "gemma3": 6}
"""Architectures whose metadata names a window and not its layers: all but every n-th have it (llama-model.cpp)."""


class Readable(Protocol):
    def read(self, size: int, /) -> bytes:
        """Fewer bytes at its end only."""
        ...


def metadata(file: Readable) -> dict[str, Any]:
    """Its keys and values up to the tokenizer's, which come last and fill megabytes. Raises ValueError."""
    if _take(file, 4) != b"GGUF":
        raise ValueError("not a GGUF file")
    version, _, pairs = _numbers(file, "IQQ")
    if version not in (2, 3):
        raise ValueError(f"a GGUF of version {version}")
    found: dict[str, Any] = {}
    for _ in range(pairs):
        key = _text(file)
        # Should one write the tokenizer first, it is read through.
        if key.startswith("tokenizer.") and f"{found.get('general.architecture')}.block_count" in found:
            break
        found[key] = _value(file, *_numbers(file, "I"))
    return found


def attention(found: Mapping[str, Any]) -> Attention | None:
    """None when the metadata does not tell, or tells of attention that keeps something else than keys and values."""

    def get(name: str, default: Any = None) -> Any:
        return found.get(f"{found.get('general.architecture')}.{name}", default)

    try:
        layers = get("block_count") - get("nextn_predict_layers", 0)
        native, heads = get("context_length"), get("attention.head_count")
        width = None if heads is None else get("embedding_length") // (max(heads) if isinstance(heads, list) else heads)
        kv_heads = _each(get("attention.head_count_kv", heads), layers)
        lengths = get("attention.key_length", width), get("attention.value_length", width)
        windowed = get("attention.key_length_swa", lengths[0]), get("attention.value_length_swa", lengths[1])
        windows = _windows(get, str(found.get("general.architecture")), layers)
        every = get("full_attention_interval", 1)
        groups: Counter[tuple[int, int, int, int]] = Counter()
        for layer in range(layers - get("attention.shared_kv_layers", 0)):
            if (layer + 1) % every == 0 and kv_heads[layer]:
                window = windows[layer]
                groups[(kv_heads[layer], *(windowed if window else lengths), window)] += 1
        if get("attention.kv_lora_rank") or not groups or min(native, *lengths) < 1:
            return None
        state = _state(get) * sum(1 for n in range(layers) if (n + 1) % every or not kv_heads[n])
        made = tuple(Layers(count, *group) for group, count in groups.items())
    except (TypeError, ValueError, IndexError, ZeroDivisionError):
        return None  # a key is missing, empty, or of another type
    return Attention(made, native, state)


def _windows(get: Any, architecture: str, layers: int) -> list[int]:
    """Each layer's window, 0 for none."""
    window, pattern = get("attention.sliding_window", 0), get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        return [window if there else 0 for there in pattern]
    every = pattern or _WINDOW_EVERY.get(architecture, 1)
    return [window if (layer + 1) % every else 0 for layer in range(layers)]


def _state(get: Any) -> int:
    """Bytes that one recurrent layer keeps: its state and the end of its convolution, both as 32-bit numbers."""
    inner, size = get("ssm.inner_size", 0), get("ssm.state_size", 0)
    mixed = inner + 2 * get("ssm.group_count", 0) * size
    return 4 * int(inner * size + max(0, get("ssm.conv_kernel", 0) - 1) * mixed)


def _each(value: Any, layers: int) -> list[int]:
    return value if isinstance(value, list) else [value] * layers


def _value(file: Readable, kind: int) -> Any:
    if kind == _STRING:
        return _text(file)
    if kind == _ARRAY:
        inner, count = _numbers(file, "IQ")
        if inner == _ARRAY:
            raise ValueError("an array of arrays in the GGUF's metadata")
        if count <= LONG:
            return [_value(file, inner) for _ in range(count)]
        for _ in range(count):
            _value(file, inner)
        return None
    if kind not in _FORMATS:
        raise ValueError(f"a value of the unknown kind {kind} in the GGUF's metadata")
    return _numbers(file, _FORMATS[kind])[0]


def _text(file: Readable) -> str:
    (length,) = _numbers(file, "Q")
    return _take(file, length).decode(errors="replace")


def _numbers(file: Readable, layout: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{layout}", _take(file, struct.calcsize(f"<{layout}")))


def _take(file: Readable, size: int) -> bytes:
    if size > 2**24:
        raise ValueError("the GGUF's metadata make no sense")
    data = file.read(size)
    if len(data) < size:
        raise ValueError("the GGUF is cut short")
    return data
