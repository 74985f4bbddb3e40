"""The proxies that others made, as benchmarks/proxy.py starts them: what scripts/peers installed.

Both pass Anthropic's /v1/messages through to an upstream that speaks it, the least that they can be asked to do, with
their logs off and one worker. Neither calls anything outside.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Site:
    """What a peer is told: a home of its own, its port, and the model, token and URL of the upstream."""

    home: Path
    port: int
    upstream: str
    model: str
    token: str

    def write(self, name: str, settings: dict[str, Any]) -> str:
        """Settings as JSON, which is YAML too. The file's path."""
        file = self.home / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
        return str(file)


@dataclass(frozen=True)
class Peer:
    """`settle` writes what the peer reads at its start, and returns its arguments and environment."""

    name: str
    program: Path
    settle: Callable[[Site], tuple[list[str], dict[str, str]]]


def installed(cache: Path, missing: Callable[[str], None]) -> Iterator[Peer]:
    """Those that scripts/peers put below the cache directory, their versions in their names; else `missing` is told."""
    for peer in PEERS:
        made = cache / "peers" / peer.program.parts[0] / "made"
        if not made.exists():
            missing(peer.name)
            continue
        version = re.split("==|@", made.read_text().strip())[-1]
        yield Peer(f"{peer.name} {version}", cache / "peers" / peer.program, peer.settle)


def litellm(site: Site) -> tuple[list[str], dict[str, str]]:
    """With Granian, which it brings: more requests/s than with its default server, for a second process's memory."""
    upstream = {"model": f"anthropic/{site.model}", "api_base": site.upstream, "api_key": "none"}
    config = site.write(
        "config.yaml",
        {
            "model_list": [{"model_name": site.model, "litellm_params": upstream}],
            "general_settings": {"master_key": site.token},
        },
    )
    env = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it fetches the newest prices first
        "LITELLM_MODE": "PRODUCTION",
        "LITELLM_LOG": "ERROR",
    }
    return ["--config", config, "--host", "127.0.0.1", "--port", str(site.port), "--run_granian"], env


def claude_code_router(site: Site) -> tuple[list[str], dict[str, str]]:
    """With its Anthropic transformer alone, which leaves requests and answers as they are."""
    upstream = {
        "name": "engine",
        "api_base_url": f"{site.upstream}/v1/messages",
        "api_key": "none",
        "models": [site.model],
        "transformer": {"use": ["Anthropic"]},
    }
    site.write(
        ".claude-code-router/config.json",
        {
            "HOST": "127.0.0.1",
            "PORT": site.port,
            "APIKEY": site.token,
            "LOG": False,
            "NON_INTERACTIVE_MODE": True,
            "Providers": [upstream],
            "Router": {"default": f"engine,{site.model}"},
        },
    )
    return ["start"], {}


PEERS = (
    Peer("LiteLLM", Path("litellm/bin/litellm"), litellm),
    Peer("claude-code-router", Path("ccr/node_modules/.bin/ccr"), claude_code_router),
)
