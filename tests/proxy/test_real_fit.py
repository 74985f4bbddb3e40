"""The real Ollama as the launcher on a box starts it, and what it logs to take: whether the planner counts right."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import selfhost_cli
from selfhost_cli import models
from selfhost_cli.models import planner
from selfhost_cli.sandbox import registry
from selfhost_cli.sandbox.assets import Assets
from tests.proxy.test_real_ollama import _link
from tests.waiting import until

pytestmark = [pytest.mark.ollama, pytest.mark.timeout(400)]

LAUNCHER = Path(selfhost_cli.__file__).parent / "templates" / "ollama.py"
CONTEXT, SLOTS = 4096, 2


@pytest.fixture(scope="module")
def folder(cache: Path, downloads: Assets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ~/.selfhost is on a box, with engine and model."""
    program = cache / "ollama" / "current" / "bin" / "ollama"
    made = tmp_path_factory.mktemp("box")
    for name in ("engine/bin", "engine/home", "run"):
        (made / name).mkdir(parents=True)
    (made / "engine/bin/ollama").symlink_to(program)
    prepared = registry.prepare(made / "cache", program, downloads.model, "tiny")
    shutil.copytree(prepared, made / "engine/models", copy_function=_link)
    return made


@contextmanager
def launched(folder: Path, kv: str, launcher: Path = LAUNCHER) -> Iterator[Path]:
    """Its log, once the model is loaded."""
    (folder / "run/engine.fit").unlink(missing_ok=True)
    words = ["serve", "--model", "tiny", "--context", CONTEXT, "--slots", SLOTS, "--kv-cache-type", kv]
    log = folder / "engine.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-IS", launcher, *map(str, words)], cwd=folder, stdout=output, stderr=output
        )
    try:
        until(lambda: fit(folder).get("loaded"), 120)
        yield log
    finally:
        process.terminate()
        assert process.wait(20) == 0


def fit(folder: Path) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads((folder / "run/engine.fit").read_text())
    except OSError:
        return {}
    return told


@pytest.mark.parametrize("kv", planner.KV_TYPES)
def test_what_it_takes_for_keys_and_values_is_what_the_planner_counts(kv: str, folder: Path, downloads: Assets) -> None:
    found = models.find(str(downloads.model))
    assert found.attention
    with launched(folder, kv) as log:
        url = f"http://127.0.0.1:{(folder / 'run/engine.port').read_text().strip()}/api/ps"
        with urllib.request.urlopen(url, timeout=10) as reply:
            (loaded,) = json.load(reply)["models"]
        said = log.read_text(errors="replace")
    logged = re.findall(r"llama_kv_cache: size = +([\d.]+) MiB .* (\d+)/(\d+) seqs", said)
    assert logged == [(logged[0][0], str(SLOTS), str(SLOTS))]
    assert SLOTS * found.attention.kv(CONTEXT, kv) / 2**20 == pytest.approx(float(logged[0][0]), abs=0.01)
    # Without a card nothing is taken away, and each slot has all of the context.
    assert (loaded["context_length"], loaded["size_vram"]) == (CONTEXT, 0)
    assert fit(folder)["slots"] == SLOTS


def test_the_real_one_is_started_again_with_less_until_it_fits(folder: Path, tmp_path: Path) -> None:
    """A card with room for 3,072 tokens is put in the place of what /api/ps says of one: there is none here."""
    told = 'size, there = entry.get("size") or 0, entry.get("size_vram") or 0'
    source = LAUNCHER.read_text()
    assert source.count(told) == 1
    launcher = tmp_path / "ollama.py"
    launcher.write_text(source.replace(told, "size, there = 1000, 1000 if got <= 3072 else 900"))
    with launched(folder, "q8_0", launcher) as log:
        url = f"http://127.0.0.1:{(folder / 'run/engine.port').read_text().strip()}/api/ps"
        with urllib.request.urlopen(url, timeout=10) as reply:
            (loaded,) = json.load(reply)["models"]
        said = log.read_text(errors="replace")
    assert (loaded["context_length"], fit(folder)["context"], fit(folder)["slots"]) == (3072, 3072, 1)
    steps = re.findall(r"does not fit into the GPU's memory: .*; now (\d+ × \d+) tokens", said)
    assert steps == ["1 × 4096", "1 × 3584", "1 × 3072"]
    begun = re.findall(r"starting llama-server.* -c (\d+) -np (\d+) ", said)
    assert begun == [("8192", "2"), ("4096", "1"), ("3584", "1"), ("3072", "1")]
