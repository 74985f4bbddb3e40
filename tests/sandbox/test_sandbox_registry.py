"""The registry: what `ollama pull` asks of it, over a small made-up store; and how the store is made."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from selfhost_cli.errors import SelfhostError
from selfhost_cli.sandbox import registry
from tests.sandbox.market_process import MarketProcess

BODY = bytes(range(256)) * 4000
DIGEST = hashlib.sha256(BODY).hexdigest()

# An Ollama whose `create` does to a model what the real one does: it writes it anew, a little different.
OLLAMA = r"""#!{python}
import hashlib, http.server, json, os, pathlib, sys
models = pathlib.Path(os.environ.get("OLLAMA_MODELS", ""))
if sys.argv[1] == "--version":
    print("client version is 9.9.9")
elif sys.argv[1] == "serve":
    assert {{"HOME", "OLLAMA_HOST", "OLLAMA_NO_CLOUD"}} <= os.environ.keys() and "SECRET" not in os.environ
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    print(f'msg="Listening on 127.0.0.1:{{server.server_port}} (version 9.9.9)"', flush=True)
    server.serve_forever()
elif "fails" in sys.argv[2]:
    sys.exit("Error: no such thing")
else:
    folder = pathlib.Path(sys.argv[4]).parent
    original = (folder / "model.gguf").read_bytes()
    assert (models / "blobs" / ("sha256-" + hashlib.sha256(original).hexdigest())).stat().st_size == len(original)
    def keep(data, kind):
        digest = hashlib.sha256(data).hexdigest()
        (models / "blobs" / f"sha256-{{digest}}").write_bytes(data)
        return {{"mediaType": kind, "digest": f"sha256:{{digest}}", "size": len(data)}}
    layers = [keep(original[::-1], "application/vnd.ollama.image.model"), keep(b"t", "template")]
    name, _, tag = sys.argv[2].partition(":")
    manifest = models / "manifests/registry.ollama.ai/library" / name / (tag or "latest")
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({{"config": keep(b"c", "config"), "layers": layers}}))
"""


@dataclass
class Store:
    """A model in the registry of a market."""

    url: str
    folder: Path
    manifest: bytes

    @property
    def blob(self) -> str:
        return f"{self.url}/v2/library/tiny/blobs/sha256:{DIGEST}"


@pytest.fixture
def store(clean: MarketProcess) -> Store:
    folder = clean.cache / "registry/0a1b2c3d"
    manifest = folder / "manifests/registry.ollama.ai/library/tiny/latest"
    for path, data in ((manifest, b'{"layers": []}'), (folder / f"blobs/sha256-{DIGEST}", BODY)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return Store(clean.facts["registry"], folder, manifest.read_bytes())


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    with httpx.Client(trust_env=False, timeout=20) as client:
        yield client


def test_a_manifest_is_served_as_it_is(http: httpx.Client, store: Store) -> None:
    answer = http.get(f"{store.url}/v2/library/tiny/manifests/latest")
    assert (answer.status_code, answer.content) == (200, store.manifest)
    assert answer.headers["Content-Type"] == "application/vnd.docker.distribution.manifest.v2+json"


def test_the_newest_model_of_a_name_counts(clean: MarketProcess, http: httpx.Client, store: Store) -> None:
    newer = clean.cache / "registry/ffffffff/manifests/registry.ollama.ai/library/tiny"
    newer.mkdir(parents=True)
    (newer / "latest").write_text("newer")
    assert http.get(f"{store.url}/v2/library/tiny/manifests/latest").text == "newer"
    (newer / "latest").unlink()


def test_the_size_of_a_blob_is_told_without_it(http: httpx.Client, store: Store) -> None:
    head = http.head(store.blob)
    assert (head.status_code, head.headers["Content-Length"]) == (200, str(len(BODY)))


@pytest.mark.parametrize(("asked", "sent_to"), [("127.0.0.1", "localhost"), ("localhost", "127.0.0.1")])
def test_a_blob_is_had_from_another_host_name(http: httpx.Client, store: Store, asked: str, sent_to: str) -> None:
    """Ollama's client insists: it starts on the blob only where a Location with another host name sends it."""
    answer = http.get(store.blob, headers={"Host": f"{asked}:{httpx.URL(store.url).port}"})
    where = httpx.URL(answer.headers["Location"])
    assert (answer.status_code, where.host, where.port) == (307, sent_to, httpx.URL(store.url).port)
    part = http.get(where.copy_with(host="127.0.0.1"), headers={"Range": "bytes=1000-1999"})
    assert (part.status_code, part.content) == (206, BODY[1000:2000])


def test_the_mirrors_switches_hold_for_blobs(clean: MarketProcess, http: httpx.Client, store: Store) -> None:
    where = http.get(store.blob).headers["Location"].replace("localhost", "127.0.0.1")
    clean.set("/mirror", cut_after=1000, cuts=1)
    with pytest.raises(httpx.RemoteProtocolError):
        http.get(where)
    assert http.get(where).content == BODY


@pytest.mark.parametrize(
    "path",
    [
        "manifests/other",
        "manifests/*",
        "manifests/..%2Flatest",
        f"blobs/sha256:{'0' * 64}",
        "blobs/sha256:*",
        "blobs/..%2F..%2Fsecret",
    ],
)
def test_what_there_is_not_is_not_found(http: httpx.Client, store: Store, path: str) -> None:
    assert http.get(f"{store.url}/v2/library/tiny/{path}").status_code == 404


# --- making one ---------------------------------------------------------------------------------------------------


@pytest.fixture
def ollama(tmp_path: Path) -> Path:
    path = tmp_path / "ollama"
    path.write_text(OLLAMA.format(python=sys.executable))
    path.chmod(0o755)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "cache/models/tiny.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(BODY)
    return path


def test_the_model_is_in_the_store_once_and_not_twice_on_the_disk(
    tmp_path: Path, ollama: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "a key of the user's")
    folder = registry.prepare(tmp_path / "cache", ollama, model, "tiny:1b")
    manifest = json.loads((folder / "manifests/registry.ollama.ai/library/tiny/1b").read_text())
    named = [layer["digest"] for layer in [manifest["config"], *manifest["layers"]]]
    assert sorted(path.name for path in (folder / "blobs").iterdir()) == sorted(d.replace(":", "-") for d in named)
    assert manifest["layers"][0] | {"mediaType": ""} == {
        "mediaType": "",
        "digest": f"sha256:{DIGEST}",
        "size": len(BODY),
    }
    assert (folder / f"blobs/sha256-{DIGEST}").samefile(model)
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, "lock"}


def test_a_second_call_only_looks_and_other_inputs_make_another_store(
    tmp_path: Path, ollama: Path, model: Path
) -> None:
    first = registry.prepare(tmp_path / "cache", ollama, model, "tiny")
    made = first.stat().st_mtime_ns
    assert registry.prepare(tmp_path / "cache", ollama, model, "tiny") == first
    assert first.stat().st_mtime_ns == made
    other = tmp_path / "Modelfile"
    other.write_text("FROM ./model.gguf\n")
    assert len({first, registry.prepare(tmp_path / "cache", ollama, model, "tiny", other)}) == 2


def test_a_store_that_could_not_be_made_is_not_there(tmp_path: Path, ollama: Path, model: Path) -> None:
    with pytest.raises(SelfhostError, match="no such thing"):
        registry.prepare(tmp_path / "cache", ollama, model, "fails")
    assert [path.name for path in (tmp_path / "cache/registry").iterdir()] == ["lock"]


def test_an_ollama_that_ends_at_once_is_named_with_its_words(tmp_path: Path, model: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "no such machine"; exit 1; }\n')
    broken.chmod(0o755)
    with pytest.raises(SelfhostError, match="ended at once: no such machine"):
        registry.prepare(tmp_path / "cache", broken, model, "tiny")
