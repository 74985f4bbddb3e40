"""What Ollama's registry says about a model, asked from here: before money is spent on a box that cannot have it."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

import httpx

from selfhost_cli.config import LOOPBACK
from selfhost_cli.errors import UsageError
from selfhost_cli.models import gguf

REGISTRY = "https://registry.ollama.ai"
"""Where Ollama pulls from when a name has no host in it (its own default). Never asked by this project's tests."""
LOOK_S = 10.0
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
WEIGHTS = ("application/vnd.ollama.image.model", "application/vnd.ollama.image.projector")
"""Layers of a manifest that go into the card's memory; the first is the GGUF whose header tells the dimensions."""
BLOCK, MOST = 2**16, 2**25
"""Bytes of a header asked for at once, and altogether at most."""
_NAME = re.compile(
    r"(?:(?P<host>\w[\w-]*(?:\.\w[\w-]*)+(?::\d+)?)/)?(?P<path>\w[\w.-]*(?:/\w[\w.-]*)*)(?::(?P<tag>\w[\w.-]*))?"
)


def manifest_url(model: str, registry: str = "") -> str:
    """Where the manifest of a tag is: `qwen3-coder:30b`, `name`, `user/name:tag`, `hf.co/user/name:tag`.

    Raises UsageError for what is no such name.
    """
    found = _NAME.fullmatch(model)
    if not found:
        raise UsageError(f"{model!r} is no model name", "Names look like qwen3-coder:30b or user/name:tag.")
    base = f"https://{found['host']}" if found["host"] else (registry or REGISTRY).rstrip("/")
    path = found["path"] if "/" in found["path"] else f"library/{found['path']}"
    return f"{base}/v2/{path}/manifests/{found['tag'] or 'latest'}"


def size(model: str, registry: str = "") -> int | None:
    """Bytes that a pull of it downloads; None when the registry cannot be asked now.

    Raises UsageError when the registry has no such model.
    """
    try:
        manifest = _manifest(model, registry)
        return sum(int(layer["size"]) for layer in [*manifest["layers"], manifest["config"]])
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None


def weights(model: str, registry: str = "", *, header: bool = True) -> tuple[int | None, dict[str, Any]]:
    """Bytes that its weights take, and with `header` its GGUF's metadata; None and {} for what is not told now.

    Raises UsageError when the registry has no such model.
    """
    total = None
    try:
        layers = [layer for layer in _manifest(model, registry)["layers"] if layer["mediaType"] in WEIGHTS]
        total = sum(int(layer["size"]) for layer in layers)
        if not header:
            return total or None, {}
        digest = next(layer["digest"] for layer in layers if layer["mediaType"] == WEIGHTS[0])
        url = manifest_url(model, registry).rpartition("/manifests/")[0] + f"/blobs/{digest}"
        with _client(url) as client:
            return total, gguf.metadata(_Remote(client, url))
    except (httpx.HTTPError, ValueError, KeyError, TypeError, StopIteration):
        return total or None, {}


def _manifest(model: str, registry: str) -> dict[str, Any]:
    """Raises UsageError when there is no such model; httpx.HTTPError or ValueError when it cannot be had now."""
    if re.search(r":(.*-)?cloud$", model):
        raise UsageError(f"{model} runs on Ollama's own machines, not on a box", "Choose a tag without cloud.")
    url = manifest_url(model, registry)
    with _client(url) as client:
        answer = client.get(url, headers={"Accept": MANIFEST})
        if answer.status_code in (401, 403, 404):
            raise UsageError(
                f"{urlsplit(url).hostname} has no model {model!r} for everybody",
                "Look for its exact tag at https://ollama.com/search.",
            )
        manifest = answer.raise_for_status().json()
    if not isinstance(manifest, dict):
        raise ValueError("the manifest is no object")
    return manifest


def _client(url: str) -> httpx.Client:
    return httpx.Client(timeout=LOOK_S, follow_redirects=True, trust_env=urlsplit(url).hostname not in LOOPBACK)


class _Remote:
    """The front of a file at a URL, fetched in blocks as far as it is read."""

    def __init__(self, client: httpx.Client, url: str) -> None:
        self._client, self._url = client, url
        self._held, self._at = bytearray(), 0

    def read(self, size: int, /) -> bytes:
        end = self._at + size
        if end > MOST:
            raise ValueError("the GGUF's metadata have no end")
        while len(self._held) < end and self._more(max(BLOCK, end - len(self._held))):
            pass
        data = bytes(self._held[self._at : end])
        self._at += len(data)
        return data

    def _more(self, wanted: int) -> int:
        """How many bytes came. A server that knows no ranges would send all of the file: it is not read then."""
        start = len(self._held)
        headers = {"Range": f"bytes={start}-{start + wanted - 1}", "Accept-Encoding": "identity"}
        with self._client.stream("GET", self._url, headers=headers) as answer:
            if answer.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                return 0
            if answer.status_code != httpx.codes.PARTIAL_CONTENT:
                raise ValueError(f"HTTP status {answer.status_code} instead of a part of the file")
            self._held += answer.read()[:wanted]
        return len(self._held) - start
