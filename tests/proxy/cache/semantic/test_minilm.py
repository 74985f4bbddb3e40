"""The real model, what the benchmark measures with it, and what is said where the extra is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from selfhost_cli.proxy.cache.semantic.decide import THRESHOLD, Semantic
from selfhost_cli.proxy.cache.semantic.index import Index
from selfhost_cli.proxy.cache.semantic.minilm import MiniLM
from tests.proxy.kit import asynchronous

ROOT = Path(__file__).parents[4]
BLOCKED = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ImportError(name)
sys.meta_path.insert(0, Missing())
import selfhost_cli.proxy.cache.semantic.{module}
"""


@asynchronous
async def test_the_real_model_finds_what_means_the_same_and_the_guards_what_does_not() -> None:
    notes: list[str] = []
    cache = Semantic(MiniLM(), Index(MiniLM.name), "on", notes.append)
    await cache.learn("s", "Rename getUser to fetchUser in this function", "key")
    await cache.learn("s", "How do I delete a remote branch in git?", "branch")
    found = await cache.find("s", "How can I remove a remote git branch?")
    assert found
    assert found.key == "branch"
    assert await cache.find("s", "Rename fetchUser to getUser in this function") is None
    assert await cache.find("s", "What is the weather like in Lisbon?") is None
    assert notes == ["asked", "served", "asked", "vetoed.direction", "asked", "unknown"]
    await cache.close()


@asynchronous
async def test_its_vectors_have_length_one_and_do_not_depend_on_what_was_asked_before() -> None:
    model = MiniLM()
    alone = await model.embed("How do I exit vim?")
    await model.embed("something else, and much longer than that " * 9)
    assert np.array_equal(alone, await model.embed("How do I exit vim?"))
    assert float(np.linalg.norm(alone)) == pytest.approx(1, abs=1e-5)
    assert alone.shape == (384,)
    assert "difference" in model.lexicon
    assert "diffrence" not in model.lexicon
    await model.close()


@pytest.mark.parametrize(
    ("package", "module"), [("numpy", "decide"), ("onnxruntime", "minilm"), ("tokenizers", "minilm")]
)
def test_without_the_extra_it_says_which_one_to_install(package: str, module: str) -> None:
    code = BLOCKED.format(package=package, module=module)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith(
        "ImportError: the semantic cache needs more packages: pip install 'selfhost-cli[semantic]'\n"
    )


def test_our_own_pairs_are_as_many_as_the_page_says_and_none_is_there_twice() -> None:
    lines = (ROOT / "benchmarks" / "semantic-pairs.tsv").read_text().splitlines()
    pairs = [tuple(line.split("\t")) for line in lines if not line.startswith("#")]
    kinds = Counter(kind == "same" for kind, _, _ in pairs)
    assert len(set(pairs)) == len(pairs)
    assert f"{kinds[True]} true pairs and {kinds[False]} traps" in (ROOT / "docs" / "semantic.md").read_text()


def test_the_benchmark_prints_what_the_page_says() -> None:
    """The real model on every pair: the figures vary with the processor by less than one pair."""
    command = [sys.executable, "benchmarks/semantic.py", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    figures = {one["figure"]: one for one in json.loads(done.stdout)}
    page = (ROOT / "docs" / "semantic.md").read_text()
    printed = page.split("```\n")[1]
    assert f"threshold of {THRESHOLD:g}" in done.stderr
    shown = 0
    for line in printed.splitlines()[1:]:
        name, _, rest = line.partition("  ")
        assert figures[name]["value"] == pytest.approx(float(rest.split()[0]), abs=3), name
        shown += 1
    assert shown == len(figures)
    assert all(one["value"] <= 1 for name, one in figures.items() if "traps answered wrong, ours" in name)
