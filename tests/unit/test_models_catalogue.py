from __future__ import annotations

import re

import pytest

from selfhost_cli import config, models
from selfhost_cli.models import catalogue
from selfhost_cli.models.planner import GIB


def test_every_figure_says_where_and_when_it_was_read() -> None:
    for entry in catalogue.entries():
        figures = {"download"} | {name for name in ("weights", "attention") if getattr(entry, name)}
        figures |= {"context"} if entry.native_context else set()
        assert set(entry.sources) == figures, entry.tag
        for source in entry.sources.values():
            assert source.url.startswith("https://")
            assert re.fullmatch(r"20\d\d-\d\d", source.read)
            assert source.how


def test_tags_are_what_a_pull_takes_and_stand_once() -> None:
    tags = [entry.tag for entry in catalogue.entries()]
    assert len(set(tags)) == len(tags)
    assert all(models.manifest_url(tag) for tag in tags)


def test_weights_are_about_the_download() -> None:
    for entry in catalogue.entries():
        if entry.weights:
            assert entry.weights == pytest.approx(entry.download_gb * 1e9, rel=0.06), entry.tag


def test_the_model_and_the_card_of_the_settings_are_known() -> None:
    settings = config.Settings
    found = models.find(settings.model, "http://127.0.0.1:1")
    assert found.model
    assert catalogue.card(settings.gpu)


@pytest.mark.parametrize("name", ["RTX 4090", "RTX_4090", "rtx_4090"])
def test_a_card_is_known_by_its_name_at_the_market(name: str) -> None:
    found = catalogue.card(name)
    assert found
    assert (found.name, found.memory) == ("RTX 4090", 24_564 * 2**20)
    assert found.memory < 24 * GIB
    assert catalogue.card(f"{name} Ti Super") is None


def test_a_tag_means_itself_and_no_other() -> None:
    assert catalogue.find("qwen3-coder:30b")
    assert catalogue.find("qwen3-coder") is None
    assert catalogue.find("qwen3-coder:480b") is None
