"""Is it really there? Probes from the outside in, the last one a token that was really generated. Only looks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from selfhost_cli.attach import Front
from selfhost_cli.model import Event, Probe

LOOK_S = 20.0
LEAST_ON_GPU = 0.99
"""Of the model's bytes: a layer on the CPU costs most of the speed.

Ollama reports exactly all of them when every layer is on the GPU (`MemorySize` in llm/llama_server.go of 0.34.0; read,
not seen: no GPU was at hand)."""
PROBES = ("tunnel", "proxy", "engine", "model", "gpu", "context", "token")
"""In their order. "gpu" only of a box that has one; "front" comes instead when nothing answers on this machine."""
REMEDIES = {
    "front": "`selfhost doctor` looks for what is in the way.",
    "tunnel": "`selfhost status` tells how the tunnel is; it comes back by itself.",
    "proxy": "Run `selfhost up` to try again; `selfhost logs proxy` may tell why.",
    "engine": "It may still be loading: look at `selfhost status` in a minute.",
    "model": "Choose another one: `selfhost down`, then `selfhost up --model NAME`.",
    "gpu": "Choose a smaller one: `selfhost down`, then `selfhost up --model NAME` or `selfhost up --context TOKENS`.",
    "context": "Ask for less: `selfhost down`, then `selfhost up --context TOKENS`; `selfhost models` shows what fits.",
    "token": "Run `selfhost up` to try again; `selfhost logs engine` may tell why.",
}
"""While the box stands."""
ONCE_GONE = {
    "model": "Choose another one: `selfhost up --model NAME`.",
    "gpu": "Choose a smaller one: `selfhost up --model NAME` or `selfhost up --context TOKENS`.",
    "context": "Ask for less: `selfhost up --context TOKENS`; `selfhost models` shows what fits on a card.",
}
"""Of a box that never got ready, which `up` has destroyed."""
AGAIN = "Run `selfhost up` to try again."


@dataclass(frozen=True)
class HealthReport:
    """The probes in order; the first failure is the last probe. `context`: the real one, where it was told."""

    probes: tuple[Probe, ...]
    context: int | None = None

    @property
    def failed(self) -> Probe | None:
        return next((probe for probe in self.probes if not probe.ok), None)


def check(
    front: Front,
    *,
    model: str,
    context: int,
    gpu: bool,
    report: Callable[[Event], None],
    least: int | None = None,
    token_s: float = 120.0,
) -> HealthReport:
    """Probe tunnel and proxy, engine, model, context and one real token; stops at the first failure.

    `gpu`: the box has a real one, so the model must be on it. `least`: of `context`, when less than all of it will do.
    `token_s`: seconds that the token may take. `report` is told when each begins and ends.
    """

    def begin(name: str) -> None:
        report(Event(f"health: {name}", "start"))

    found: list[Probe] = []
    told: list[int] = []
    for probe in probes(
        front, model=model, context=context, gpu=gpu, token_s=token_s, begin=begin, least=least, real=told.append
    ):
        found.append(probe)
        report(Event(f"health: {probe.name}", "done" if probe.ok else "fail", probe.detail))
    return HealthReport(tuple(found), told[0] if told else None)


def probes(
    front: Front,
    *,
    model: str,
    context: int,
    gpu: bool,
    token_s: float,
    begin: Callable[[str], None] = lambda name: None,
    least: int | None = None,
    real: Callable[[int], None] = lambda tokens: None,
) -> Iterator[Probe]:
    """What `check` reports, one by one; `begin` is told each name before it is asked. The first failure is the last.

    `real` is told the box's context.
    """
    with httpx.Client(
        base_url=front.url,
        headers={"Authorization": f"Bearer {front.token}"},
        timeout=LOOK_S,
        trust_env=False,
        verify=False,  # plain http on loopback; loading certificates takes 60 ms
    ) as client:
        for probe in _probes(client, model, context, context if least is None else least, gpu, token_s, begin, real):
            yield probe
            if not probe.ok:
                return


def _probes(
    client: httpx.Client,
    model: str,
    context: int,
    least: int,
    gpu: bool,
    token_s: float,
    begin: Callable[[str], None],
    tell: Callable[[int], None],
) -> Iterator[Probe]:
    began = time.monotonic()

    def start(name: str) -> None:
        nonlocal began
        began = time.monotonic()
        begin(name)

    def verdict(name: str, ok: bool, detail: str) -> Probe:
        return Probe(name, ok, detail, time.monotonic() - began, "" if ok else REMEDIES[name])

    start("tunnel")
    box = _box(client)
    if isinstance(box, Missing):
        yield verdict(box.part, False, box.why)
        return
    yield verdict("tunnel", True, "requests reach the box")
    start("proxy")
    yield verdict("proxy", True, f"selfhost {box.get('version', '?')} on the box")
    start("engine")
    engine = str(box.get("engine"))
    facts = section(box, "components", engine)
    named = f"{engine} {facts.get('version', '')}".strip()
    yield verdict("engine", _is_up(facts), named if _is_up(facts) else f"{engine} does not answer: {_reason(facts)}")
    start("model")
    problem = _wrong_model(box.get("model"), model, facts)
    yield verdict("model", not problem, problem or described(model, facts))
    share = on_gpu(facts)
    if gpu and share is not None:
        start("gpu")
        yield verdict("gpu", share >= LEAST_ON_GPU, f"{share:.0%} of the model is on the GPU")
    start("context")
    real = box.get("context")
    whole = isinstance(real, int) and real >= context
    if isinstance(real, int):
        tell(real)
    fits = isinstance(real, int) and real >= least
    yield verdict("context", fits, f"{real} tokens" if whole else f"{real} tokens, promised {context}")
    start("token")
    answer = _token(client, model, token_s)
    yield verdict("token", not answer.startswith("!"), answer.removeprefix("!"))


def section(answer: object, *names: str) -> dict[str, Any]:
    """What a box's answer holds below these names, {} when that is no object: a stranger's machine wrote it."""
    for name in names:
        answer = answer.get(name) if isinstance(answer, dict) else None
    return answer if isinstance(answer, dict) else {}


def described(model: str, facts: dict[str, Any]) -> str:
    """The model with its size and quantization, as far as the engine tells them."""
    more = " ".join(str(facts[key]) for key in ("parameters", "quantization") if facts.get(key))
    return f"{model} ({more})" if more else model


def on_gpu(facts: dict[str, Any]) -> float | None:
    """Which part of the model is in video memory, 0 to 1; None when the engine does not tell."""
    size, there = facts.get("size"), facts.get("size_vram")
    return there / size if isinstance(size, int) and isinstance(there, int) and 0 <= there <= size > 0 else None


def _wrong_model(served: object, model: str, facts: dict[str, Any]) -> str:
    if served != model:
        return f"serves {served}, wanted {model}"
    able = facts.get("capabilities")
    if isinstance(able, list) and "tools" not in able:
        return f"{model} cannot call tools, and Claude Code works with nothing else"
    return ""


@dataclass(frozen=True)
class Missing:
    """Which part did not answer, and why."""

    part: str
    why: str


def _box(client: httpx.Client) -> dict[str, Any] | Missing:
    """What the proxy on the box says of itself, or what is in the way."""
    try:
        body = client.get("/health").json()
    except (httpx.HTTPError, ValueError) as error:
        return Missing("front", f"the local front does not answer: {error}")
    box = section(body, "box")
    if section(box, "components"):
        return box
    if box.get("status") != "away":
        return Missing("proxy", "the proxy on the box does not tell what runs there")
    if box.get("state") != "connected":
        return Missing("tunnel", f"{box.get('state')}: {box.get('reason')}")
    return Missing("proxy", f"the proxy on the box does not answer: {_reason(box)}")


def _reason(part: dict[str, Any]) -> str:
    return str(part.get("reason") or part.get("status") or "no answer")


def _is_up(part: dict[str, Any]) -> bool:
    return part.get("status") in ("healthy", "up", "ok")


def _token(client: httpx.Client, model: str, seconds: float) -> str:
    """One really generated token; the reason with a leading "!" when there was none."""
    body = {"model": model, "max_tokens": 8, "messages": [{"role": "user", "content": "Say OK."}]}
    try:
        # Marked, because a probe is not activity: it must not keep an idle box alive.
        response = client.post("/v1/messages", json=body, headers={"x-selfhost-probe": "1"}, timeout=seconds)
        answer = response.json()
    except (httpx.HTTPError, ValueError) as error:
        return f"!no answer: {error}"
    tokens = section(answer, "usage").get("output_tokens")
    if response.status_code != 200 or not isinstance(tokens, int) or tokens < 1:
        return f"!{response.status_code} {section(answer, 'error') or answer}"
    return f"{tokens} {'token' if tokens == 1 else 'tokens'} generated"
