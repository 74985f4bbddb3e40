"""What Ollama's registry says about a model, asked from here: before money is spent on a box that cannot have it."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import httpx

from selfhost_cli.config import LOOPBACK
from selfhost_cli.errors import UsageError

REGISTRY = "https://registry.ollama.ai"
"""Where Ollama pulls from when a name has no host in it (its own default). Never asked by this project's tests."""
LOOK_S = 10.0
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
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
    if re.search(r":(.*-)?cloud$", model):
        raise UsageError(f"{model} runs on Ollama's own machines, not on a box", "Choose a tag without cloud.")
    url = manifest_url(model, registry)
    here = urlsplit(url).hostname in LOOPBACK
    try:
        answer = httpx.get(url, headers={"Accept": MANIFEST}, timeout=LOOK_S, follow_redirects=True, trust_env=not here)
        if answer.status_code in (401, 403, 404):
            raise UsageError(
                f"{urlsplit(url).hostname} has no model {model!r} for everybody",
                "Look for its exact tag at https://ollama.com/search.",
            )
        manifest = answer.raise_for_status().json()
        return sum(int(layer["size"]) for layer in [*manifest["layers"], manifest["config"]])
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None
