"""The engine side: what runs on the box, between the tunnel and the engine."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import chain

from aiohttp import web

from selfhost_cli.proxy import contract
from selfhost_cli.proxy.admission import Admission
from selfhost_cli.proxy.answer import Narrator, collect
from selfhost_cli.proxy.contract import Json, Request
from selfhost_cli.proxy.engines import AnswerEvent, Done, Engine, Health, Prompt
from selfhost_cli.proxy.errors import (
    OVERLOADED,
    EngineBroke,
    EngineLoading,
    ProxyError,
    invalid,
    not_found,
    too_long,
)
from selfhost_cli.proxy.form import Form, in_words
from selfhost_cli.proxy.length import Length, Lengths
from selfhost_cli.proxy.metrics import CONTENT_TYPE, Metrics
from selfhost_cli.proxy.prewarm import Prewarm
from selfhost_cli.proxy.rescue import Rescue
from selfhost_cli.proxy.rundir import RunDir
from selfhost_cli.proxy.web import (
    AUXILIARY,
    PING_EVERY,
    EventStream,
    application,
    is_probe,
    read_body,
    request_class,
    trace,
)

RATE_S = 60.0
"""Over so long tokens per second are counted."""
ENGINE_ANSWER_S = 5.0
"""For /health: less than whoever asks waits for us."""

LOADING_S = 900.0
"""So long may a model load behind pings."""

log = logging.getLogger("selfhost.proxy")


@dataclass(frozen=True)
class Settings:
    """`touch_every`: seconds between two touches of the activity file while a client is served.

    `digest`: of the model's file, for an engine that does not tell it. `head_s`: so long may the 200 of a stream wait
    for the engine's first word, so that what it refuses at once is told by a status.
    """

    token: str = field(repr=False)
    model: str
    version: str
    digest: str = ""
    slots: int = 1
    ping_every: float = PING_EVERY
    touch_every: float = 4.0
    ready_every: float = 1.0
    head_s: float = 0.0


@dataclass(frozen=True)
class _Asked:
    """A request on its way. `form`: what its answer is checked for here, because the engine does not see to it."""

    request: Request
    length: Length
    form: Form | None


def build_server(settings: Settings, engine: Engine, run: RunDir) -> web.Application:
    """The application; it closes the engine's adapter when it ends."""
    return _EngineSide(settings, engine, run).application()


class _EngineSide:
    def __init__(self, settings: Settings, engine: Engine, run: RunDir) -> None:
        self._settings = settings
        self._engine = engine
        self._run = run
        self._admission = Admission(settings.slots)
        self._metrics = Metrics(self._admission)
        self._clients = 0
        self._usage = {"requests": 0, "input_tokens": 0, "output_tokens": 0, "repaired_calls": 0}
        self._written: deque[tuple[float, int]] = deque()
        """When an answer was over, and its tokens: those of the last RATE_S."""
        self._lengths = Lengths()
        served = f"{engine.name} {settings.model} {settings.digest}"
        self._prewarm = Prewarm(served, engine, self._admission, lambda: run.engine_start, settings.ready_every)

    def application(self) -> web.Application:
        app = application(self._settings.token, observe=self._metrics.observe)
        app.router.add_get("/", self._hello)
        app.router.add_get("/api/hello", self._hello)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._tell_metrics)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{id:.+}", self._model)
        app.router.add_post("/v1/messages", self._messages)
        app.router.add_post("/v1/messages/count_tokens", self._count)
        app.router.add_post("/selfhost/prefix", self._wish)
        app.cleanup_ctx.append(self._background)
        return app

    async def _hello(self, http: web.Request) -> web.Response:
        return web.json_response({"selfhost": self._settings.version})

    async def _models(self, http: web.Request) -> web.Response:
        model = self._model_info()
        return web.json_response({"data": [model], "has_more": False, "first_id": model["id"], "last_id": model["id"]})

    async def _model(self, http: web.Request) -> web.Response:
        if http.match_info["id"] != self._settings.model:
            raise not_found(f"model {http.match_info['id']}")
        return web.json_response(self._model_info())

    def _model_info(self) -> Json:
        name = self._settings.model
        return {"type": "model", "id": name, "display_name": name, "created_at": "1970-01-01T00:00:00Z"}

    async def _health(self, http: web.Request) -> web.Response:
        """503 while degraded, with the same body: `curl -f` is enough to wait for it."""
        try:
            async with asyncio.timeout(ENGINE_ANSWER_S):
                health = await self._engine.health()
            slots = health.slots or self._admission.slots
            engine: Json = {"status": "healthy", "context": health.context, "slots": slots, **health.facts}
        except ProxyError as error:
            health = Health(context=0)
            engine = {"status": "down", "reason": error.message}
        except TimeoutError:
            health = Health(context=0)
            engine = {"status": "down", "reason": f"no answer within {ENGINE_ANSWER_S:g} s"}
        up = engine["status"] == "healthy"
        body = {
            "status": "healthy" if up else "degraded",
            "version": self._settings.version,
            "engine": self._engine.name,
            "model": self._settings.model,
            "digest": health.facts.get("digest") or self._settings.digest,
            "context": health.context or None,
            "slots": self._admission.slots,
            "requests": {"running": self._admission.running, "waiting": self._admission.waiting},
            "components": {"proxy": {"status": "healthy"}, self._engine.name: engine},
            "usage": self._usage,
            "tokens_per_s": self._rate(),
            "prefix": self._prewarm.told(),
            "watchdog": self._run.watched(),
        }
        return web.json_response(body, status=200 if up else 503)

    async def _tell_metrics(self, http: web.Request) -> web.Response:
        return web.Response(body=self._metrics.page(), headers={"content-type": CONTENT_TYPE})

    async def _count(self, http: web.Request) -> web.Response:
        trace().cls = "probe" if is_probe(http) else "count"
        body = await read_body(http)
        asked = self._asked(body)
        tokens = await self._engine.count(asked.request)
        if tokens is not None:
            return web.json_response({"input_tokens": tokens})
        # Claude Code shows it in /context; a 404 would leave that empty.
        return web.json_response({"input_tokens": asked.length.estimate, "estimated": True})

    async def _wish(self, http: web.Request) -> web.Response:
        """`?name=`: whose beginning it is. Read as soon as nobody asks; `/health` tells what became of it."""
        name = http.query.get("name", "default")
        if not re.fullmatch(r"[a-z-]{1,32}", name):
            raise invalid("name: 1 to 32 small letters")
        self._prewarm.wish(name, contract.parse(await read_body(http)))
        return web.json_response(self._prewarm.told(), status=202)

    async def _messages(self, http: web.Request) -> web.StreamResponse:
        trace().cls = request_class(http)
        with self._serving(probe=is_probe(http)):
            body = await read_body(http)
            asked = self._asked(body)
            trace().notes = asked.request.notes
            with self._admission.place():
                try:
                    await self._check_length(asked)
                except EngineLoading:
                    if not asked.request.stream:
                        raise
                    # it waits behind pings, and its length is looked at when that is possible
                self._usage["requests"] += 1
                if asked.request.stream:
                    return await self._stream(http, asked)
                return await self._whole(asked)

    def _asked(self, body: bytes) -> _Asked:
        """A form that the engine does not see to is asked for in words; what goes on with a turn has none by itself."""
        request, form = contract.parse(body), None
        schema = request.schema
        if schema is not None and request.messages[-1]["role"] == "user" and not self._engine.forms(request):
            request, form = in_words(request), Form(schema)
        return _Asked(request, self._lengths.of(request, len(body)), form)

    @contextmanager
    def _serving(self, *, probe: bool) -> Iterator[None]:
        """A touch before the first client and one after the last; in between the background task makes them."""
        if probe:
            yield
            return
        if not self._clients:
            self._run.touch_activity()
        self._clients += 1
        try:
            yield
        finally:
            self._clients -= 1
            if not self._clients:
                self._run.touch_activity()

    async def _check_length(self, asked: _Asked) -> None:
        """Before the 200, so that it is a real status, and so is an engine that is down."""
        limit = await self._engine.context()
        tokens = None if asked.length.fits(limit) else await self._engine.count(asked.request)
        asked.length.limit = limit  # not earlier: what an engine that loads did not count is to be counted again
        if tokens is None:
            return  # it fits, or the engine refuses it by itself
        asked.length.learn(tokens)
        if tokens > limit:
            raise too_long(tokens, limit)

    async def _stream(self, http: web.Request, asked: _Asked) -> web.StreamResponse:
        narrator = Narrator(self._settings.model)
        async with aclosing(self._answer(asked, narrator)) as answer, _begun(answer, self._settings.head_s) as events:
            return await self._streamed(http, narrator, events)

    async def _streamed(self, http: web.Request, narrator: Narrator, events: AsyncIterator[Json]) -> web.StreamResponse:
        async with EventStream(http, self._settings.ping_every) as stream:
            try:
                async for event in events:
                    await stream.send(event)
            except ProxyError as error:
                trace().outcome = error.kind
                await stream.send(_event_of(error, narrator))
            except ConnectionError:
                raise
            except Exception:
                # the 200 is out: another response in the middle of this one could not be read
                log.exception("id=%s a bug of ours, or an engine's answer of an unknown shape", trace().id)
                trace().outcome = "bug"
                await stream.send(_event_of(EngineBroke("the proxy failed; its log says why"), narrator))
        return stream.response

    async def _whole(self, asked: _Asked) -> web.Response:
        narrator = Narrator(self._settings.model)
        message = collect([event async for event in self._answer(asked, narrator)])
        return web.json_response(message, headers={"request-id": trace().id})

    async def _answer(self, asked: _Asked, narrator: Narrator) -> AsyncGenerator[Json]:
        """Wait for a slot and tell what the engine says. Leaving it early cancels the generation."""
        request = asked.request
        stops = bool(request.sampling.get("stop_sequences"))
        rescue = Rescue([*request.tools, *request.deferred.values()], stops=stops)
        traced = trace()
        try:
            async with aclosing(self._generated(asked)) as events:
                async for event in events:
                    if not isinstance(event, Prompt):
                        traced.mark("heard")
                    if isinstance(event, Done):
                        traced.mark("done")
                        # not only when it is told: what does not have its form is not, and was generated all the same
                        narrator.output_tokens = event.output_tokens
                        narrator.prompt_ms = round(1000 * (traced.seconds("turn", "heard") or 0))
                    kept = rescue.feed(event)
                    if asked.form:
                        kept = chain.from_iterable(map(asked.form.feed, kept))
                    for one in kept:
                        narrator.doubt = "repaired" if rescue.repaired else ""
                        for told in narrator.tell(one):
                            traced.mark("first")
                            yield told
                    if isinstance(event, Done):
                        break
            if not narrator.finished:
                raise EngineBroke("the engine stopped in the middle of the answer")
            asked.length.learn(narrator.prompt.total)
            self._prewarm.answered(request, narrator.prompt)
        finally:
            self._usage["repaired_calls"] += rescue.repaired
            traced.repaired = rescue.repaired
            self._record(narrator)

    async def _generated(self, asked: _Asked) -> AsyncGenerator[AnswerEvent]:
        """What the engine says, from a slot of its own.

        A stream waits while the model loads, without a slot: refused, Claude Code gives up after 80 s.
        """
        traced = trace()
        traced.mark("queued")
        deadline = traced.moments["began"] + LOADING_S
        while True:
            try:
                if not asked.length.limit:
                    await self._check_length(asked)
                self._prewarm.give_way()
                async with self._admission.turn(auxiliary=traced.cls == AUXILIARY):
                    traced.mark("turn")
                    async with aclosing(self._engine.messages(asked.request)) as events:
                        async for event in events:
                            yield event
                return
            except EngineLoading:
                if not asked.request.stream or time.monotonic() > deadline:
                    raise
                traced.moments.pop("turn", None)
            await asyncio.sleep(self._settings.ready_every)

    def _record(self, narrator: Narrator) -> None:
        trace().input_tokens, trace().cached_tokens = narrator.prompt.total, narrator.prompt.cached
        trace().output_tokens = narrator.output_tokens
        self._usage["input_tokens"] += narrator.prompt.total
        self._usage["output_tokens"] += narrator.output_tokens
        self._written.append((time.monotonic(), narrator.output_tokens))
        self._rate()

    def _rate(self) -> float:
        """Tokens per second that were written lately; what is being written counts once it is over."""
        while self._written and time.monotonic() - self._written[0][0] > RATE_S:
            self._written.popleft()
        return round(sum(tokens for _, tokens in self._written) / RATE_S, 1)

    async def _background(self, app: web.Application) -> AsyncIterator[None]:
        jobs = (self._touch(), self._await_ready(), self._keep_slots(), self._prewarm.run())
        tasks = [asyncio.create_task(job) for job in jobs]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._engine.close()

    async def _touch(self) -> None:
        while True:
            await asyncio.sleep(self._settings.touch_every)
            if self._clients:
                self._run.touch_activity()

    async def _keep_slots(self) -> None:
        """As many at once as the engine had room for."""
        while True:
            if (slots := self._run.slots(self._settings.slots)) != self._admission.slots:
                log.info("the engine has %d slots, of %d", slots, self._settings.slots)
                self._admission.resize(slots)
            await asyncio.sleep(self._settings.ready_every)

    async def _await_ready(self) -> None:
        while True:
            try:
                health = await self._engine.health()
                self._run.mark_ready()
            except ProxyError as error:
                log.debug("not ready: %s", error.message)
            except OSError as error:
                log.warning("ready, which cannot be noted: %s", error)
            else:
                log.info("ready: %s with %d tokens", self._settings.model, health.context)
                return
            await asyncio.sleep(self._settings.ready_every)


@asynccontextmanager
async def _begun(answer: AsyncIterator[Json], seconds: float) -> AsyncIterator[AsyncIterator[Json]]:
    """The answer, once its first event is there or `seconds` are over. Raises what came instead of it by then."""
    if not seconds:
        yield answer
        return
    first = asyncio.ensure_future(anext(answer))

    async def events() -> AsyncIterator[Json]:
        yield await first
        async for event in answer:
            yield event

    try:
        await asyncio.wait([first], timeout=seconds)
        if first.done():
            first.result()
        yield events()
    finally:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


def _event_of(error: ProxyError, narrator: Narrator) -> Json:
    """An error after the 200. Before `message_start`, Claude Code repeats a stream that was overloaded as it was."""
    early = (isinstance(error, EngineBroke) or error.status == 429) and not narrator.started
    body = error.body(trace().id)
    if early:
        body["error"]["type"] = OVERLOADED
    return body
