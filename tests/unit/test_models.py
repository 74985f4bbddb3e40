from __future__ import annotations

from collections.abc import Iterator

import pytest

from selfhost_cli import models
from selfhost_cli.errors import UsageError
from tests.templates.box import Files

MANIFEST = b'{"layers": [{"size": 491400064}, {"size": 1200}], "config": {"size": 500}}'


@pytest.fixture
def registry() -> Iterator[Files]:
    server = Files({"/v2/library/tiny/manifests/0.5b": MANIFEST, "/v2/library/odd/manifests/latest": b"[]"})
    yield server
    server.close()


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ("qwen3-coder:30b", "https://registry.ollama.ai/v2/library/qwen3-coder/manifests/30b"),
        ("qwen3-coder", "https://registry.ollama.ai/v2/library/qwen3-coder/manifests/latest"),
        ("somebody/model:q4_K_M", "https://registry.ollama.ai/v2/somebody/model/manifests/q4_K_M"),
        ("hf.co/somebody/Model-GGUF:Q4_0", "https://hf.co/v2/somebody/Model-GGUF/manifests/Q4_0"),
    ],
)
def test_a_tag_stands_for_a_manifest(model: str, path: str) -> None:
    assert models.manifest_url(model) == path


@pytest.mark.parametrize("model", ["", "two words", "a:b:c", "../../etc", "model:", "a//b", "model?x=1"])
def test_what_is_no_name_is_refused(model: str) -> None:
    with pytest.raises(UsageError, match="no model name"):
        models.manifest_url(model)


def test_the_size_is_what_a_pull_downloads(registry: Files) -> None:
    assert models.size("tiny:0.5b", registry.url) == 491_401_764


def test_a_model_that_is_not_there_is_an_error_before_money_is_spent(registry: Files) -> None:
    with pytest.raises(UsageError, match="has no model 'tiny:7b' for everybody"):
        models.size("tiny:7b", registry.url)


@pytest.mark.parametrize("model", ["qwen3-coder:480b-cloud", "minimax-m2:cloud", "user/m:a-b-cloud"])
def test_a_model_that_runs_elsewhere_is_refused(model: str) -> None:
    with pytest.raises(UsageError, match="Ollama's own machines"):
        models.size(model, "http://127.0.0.1:1")


def test_only_the_tag_says_where_a_model_runs() -> None:
    assert models.size("someone/notes-cloud", "http://127.0.0.1:1") is None


def test_a_registry_that_does_not_answer_sensibly_is_no_error(registry: Files) -> None:
    assert models.size("odd", registry.url) is None
    assert models.size("tiny:0.5b", "http://127.0.0.1:1") is None
