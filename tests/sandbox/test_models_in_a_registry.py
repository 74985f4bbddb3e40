"""What is asked of a registry about a model: its manifest, and the front of its GGUF; over the sandbox's own."""

from __future__ import annotations

import hashlib
import json
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from selfhost_cli import models
from selfhost_cli.errors import UsageError
from selfhost_cli.models import registry
from selfhost_cli.models.planner import Layers
from tests.sandbox.market_process import MarketProcess
from tests.sandbox.test_rent_by_number import Person
from tests.templates.box import Server
from tests.unit.test_models_gguf import QWEN, made

MODEL = "application/vnd.ollama.image.model"


def offer(market: MarketProcess, name: str, *layers: tuple[str, bytes], told: int | None = None) -> str:
    """Put a model into the market's registry; its address. `told`: the size that its manifest gives each layer."""
    folder = market.cache / "registry/0badcafe"
    described = []
    for kind, data in layers:
        digest = hashlib.sha256(data).hexdigest()
        blob = folder / f"blobs/sha256-{digest}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        described.append({"mediaType": kind, "digest": f"sha256:{digest}", "size": told or len(data)})
    model, _, tag = name.partition(":")
    manifest = folder / "manifests/registry.ollama.ai/library" / model / (tag or "latest")
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"layers": described, "config": {"size": 3}}))
    url: str = market.facts["registry"]
    return url


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of GGUFs that came, by request."""
    sizes: list[int] = []
    before = registry._Remote._more

    def counted(self: registry._Remote, wanted: int) -> int:
        sizes.append(before(self, wanted))
        return sizes[-1]

    monkeypatch.setattr(registry._Remote, "_more", counted)
    return sizes


def test_only_the_front_of_the_file_is_fetched(clean: MarketProcess, taken: list[int]) -> None:
    weights = made("qwen3moe", QWEN) + bytes(3_000_000)
    projector = bytes(2000)
    url = offer(clean, "coder", (MODEL, weights), ("template", b"{{ }}"), (registry.WEIGHTS[1], projector))
    found = models.find("coder", url)
    assert found.weights == len(weights) + len(projector)
    assert found.attention
    assert found.attention.layers == (Layers(48, 4, 128, 128),)
    assert taken == [registry.BLOCK]


def test_the_registry_knows_the_weights_of_a_model_of_the_catalogue_better(
    clean: MarketProcess, taken: list[int]
) -> None:
    name = "qwen3-coder:30b"
    url = offer(clean, name, (MODEL, bytes(1234)))
    found = models.find(name, url, exact=True)
    assert (found.weights, found.attention) == (1234, models.find(name).attention)
    assert taken == []
    assert models.find(name, url).weights == models.find(name, "http://127.0.0.1:1", exact=True).weights != 1234


def test_a_header_that_is_longer_than_a_block_is_read_to_its_end(clean: MarketProcess, taken: list[int]) -> None:
    long = made("qwen3moe", QWEN, tokens=20_000, tokenizer_first=True)
    url = offer(clean, "long", (MODEL, long + bytes(500_000)))
    assert models.find("long", url).attention
    assert len(long) <= sum(taken) < len(long) + registry.BLOCK


def test_an_unknown_kind_of_attention_is_unknown_and_its_size_is_known(clean: MarketProcess) -> None:
    weights = made("deepseek2", QWEN | {"attention.kv_lora_rank": 512})
    found = models.find("mla", offer(clean, "mla", (MODEL, weights)))
    assert (found.weights, found.attention, found.model) == (len(weights), None, None)


def test_a_header_that_never_ends_is_given_up(
    clean: MarketProcess, taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "MOST", 200_000)
    found = models.find("endless", offer(clean, "endless", (MODEL, made("x", {}, tokens=60_000) + bytes(9))))
    assert found.attention is None
    assert sum(taken) <= 200_000 + registry.BLOCK


def test_a_model_that_is_not_there_is_named(clean: MarketProcess) -> None:
    with pytest.raises(UsageError, match="has no model 'nobody:1b' for everybody"):
        models.find("nobody:1b", clean.facts["registry"])


def test_a_registry_without_ranges_is_not_read_to_its_end() -> None:
    weights = made("qwen3moe", QWEN) + bytes(50_000_000)
    digest = f"sha256:{hashlib.sha256(weights).hexdigest()}"
    manifest = json.dumps({"layers": [{"mediaType": MODEL, "digest": digest, "size": len(weights)}]}).encode()
    sent: list[bool] = []

    class Old(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = manifest if "manifests" in self.path else weights
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            try:
                self.wfile.write(data)
                sent.append(data is weights)
            except OSError:
                pass  # the client is gone

        def log_message(self, *args: object) -> None: ...

    server = Server(Old)
    try:
        found = models.find("old", server.url)
    finally:
        server.close()
    assert (found.weights, found.attention) == (len(weights), None)
    assert sent == [False]


def test_a_registry_that_does_not_answer_leaves_all_unknown() -> None:
    found = models.find("somebody/model:q4", "http://127.0.0.1:1")
    assert (found.weights, found.attention) == (None, None)


def test_the_market_is_asked_for_cards_with_room_and_what_has_none_is_refused(
    clean: MarketProcess, tmp_path: Path
) -> None:
    """The whole way as a process: command line, registry, header, sum, the market's own list."""
    url = offer(clean, "coder:30b", (MODEL, made("qwen3moe", QWEN) + bytes(99)), told=18_556_000_000)
    person = Person(tmp_path / "selfhost", clean, {"ENGINE": "ollama", "REGISTRY": url, "MODEL": "coder:30b"})
    code, out, err = person.ask("offers", "--json")
    assert code == 0, err
    value = json.loads(out)
    assert value["counted"]["weights"] == 18_556_000_000
    assert value["need"]["gpu_ram_mb"] == 23_521  # 17,697 of weights, 3264 of KV, 2560 of the rest
    assert value["choice"]["ranked"]
    person.settings["SLOTS"] = "2"
    code, out, err = person.ask("offers")
    assert code == 4
    assert "coder:30b does not fit on RTX 4090: 2 × 65536 tokens, KV q8_0: 17.3 + 6.4 + 1.0 = 24.7 of 24.0 GiB" in err
    assert "`selfhost up --slots 1` fits" in err
