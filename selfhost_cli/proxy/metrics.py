"""What `GET /metrics` tells, in Prometheus' format: numbers by class of request, and nothing of any text.

Some of what is of interest is a quotient of two of them:

    reused part of the prompts   selfhost_cached_tokens_total / selfhost_input_tokens_total
    tokens per second            selfhost_output_tokens_total / selfhost_engine_seconds_total{phase="answer"}

What an engine spends on a tool call that it tells only when it is whole (Ollama) counts as "prompt" when nothing was
said before it; tokens per second read too high then.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from selfhost_cli.proxy.admission import Admission
from selfhost_cli.proxy.web import Trace

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""Up to five minutes: as long as a large model may take to load."""


class Metrics:
    """The numbers of one application. `observe` is to be called once for every request, when it has ended."""

    def __init__(self, admission: Admission) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "Requests that ended", "outcome")
        self._input = self._counter("input_tokens", "Tokens of prompts, reused ones included")
        self._cached = self._counter("cached_tokens", "Tokens of prompts that the engine had computed before")
        self._output = self._counter("output_tokens", "Tokens generated in answers that came to their end")
        self._repaired = self._counter("repaired_calls", "Tool calls that came as text and left as calls")
        self._engine = self._counter("engine_seconds", "Slot to first output (prompt), first output to end", "phase")
        self._waited = self._histogram("queue_seconds", "Wait for the model to load and a slot, of those that got one")
        self._first = self._histogram("first_token_seconds", "From the request to the first output for its client")
        self._gauge("queue_length", "Requests that wait for a slot").set_function(lambda: admission.waiting)
        self._gauge("running", "Requests that hold a slot").set_function(lambda: admission.running)

    def observe(self, trace: Trace) -> None:
        self._requests.labels(trace.cls, trace.outcome or "ok").inc()
        if (waited := trace.seconds("queued", "turn")) is None:
            return  # the engine never saw it
        self._waited.labels(trace.cls).observe(waited)
        if (first := trace.seconds("began", "first")) is not None:
            self._first.labels(trace.cls).observe(first)
        self._input.labels(trace.cls).inc(trace.input_tokens)
        self._cached.labels(trace.cls).inc(trace.cached_tokens)
        self._output.labels(trace.cls).inc(trace.output_tokens)
        self._repaired.labels(trace.cls).inc(trace.repaired)
        prompt, answer = trace.seconds("turn", "heard"), trace.seconds("heard", "done")
        if prompt is not None and answer is not None:  # without its end, its output tokens are not known either
            self._engine.labels(trace.cls, "prompt").inc(prompt)
            self._engine.labels(trace.cls, "answer").inc(answer)

    def page(self) -> bytes:
        return generate_latest(self._registry)

    def _counter(self, name: str, told: str, *labels: str) -> Counter:
        return Counter(f"selfhost_{name}", told, ["class", *labels], registry=self._registry)

    def _histogram(self, name: str, told: str) -> Histogram:
        return Histogram(f"selfhost_{name}", told, ["class"], buckets=SECONDS, registry=self._registry)

    def _gauge(self, name: str, told: str) -> Gauge:
        return Gauge(f"selfhost_{name}", told, registry=self._registry)
