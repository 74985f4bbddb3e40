"""The launcher of llama.cpp, as far as it can be told without a model."""

from __future__ import annotations

import runpy
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import selfhost_cli

LAUNCHER = Path(selfhost_cli.__file__).parent / "templates" / "llamacpp.py"
CALLS = """within <tool_call></tool_call> XML tags:\\n<tool_call>\\n{}\\n</tool_call><|im_end|>
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}"""


@pytest.fixture(scope="module")
def launcher() -> dict[str, Any]:
    return runpy.run_path(str(LAUNCHER))


def gguf(*pairs: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + b"".join(pairs)


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def test_the_template_is_found_behind_every_other_kind_of_value(launcher: dict[str, Any], tmp_path: Path) -> None:
    words = struct.pack("<IIQ", 9, 8, 2) + string("a") + string("b")
    floats = struct.pack("<IIQ", 9, 6, 3) + bytes(12)
    file = tmp_path / "model.gguf"
    file.write_bytes(
        gguf(
            string("tokens") + words,
            string("scores") + floats,
            string("layers") + struct.pack("<II", 4, 24),
            string("tokenizer.chat_template") + struct.pack("<I", 8) + string("{{ é }}"),
        )
    )
    assert launcher["chat_template"](file) == "{{ é }}"


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\3\4", gguf(), gguf(string("x") + struct.pack("<I", 99))])
def test_a_file_that_is_no_model_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    args = ["--model", str(file), "--alias", "a", "--context", "512", "--port-file", str(tmp_path / "port")]
    done = subprocess.run([sys.executable, str(LAUNCHER), *args], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"llamacpp: {file}: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "port").exists()


def test_calls_are_fenced_and_results_followed_by_the_hint(launcher: dict[str, Any]) -> None:
    changed = launcher["fenced_calls"](CALLS)
    assert "tool_call" not in changed
    assert "within a ```json code fence:\\n```json\\n{}\\n```<|im_end|>" in changed
    assert f"{{{{- '\\n{launcher['HINT']}<|im_end|>\\n' }}}}" in changed


def test_a_template_with_another_syntax_is_left_alone(launcher: dict[str, Any]) -> None:
    assert launcher["fenced_calls"]("{{ messages }}") == "{{ messages }}"
