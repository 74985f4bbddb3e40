"""The commands: each parses, makes one call, renders the result."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import IO, Annotated, Any, Literal, ParamSpec, TypeVar

import typer

from selfhost_cli import __version__, config
from selfhost_cli.cli import completion as completions
from selfhost_cli.errors import SelfhostError, UsageError

app = typer.Typer(
    name="selfhost",
    help="Claude Code on a rented GPU: up, claude, down. Never a forgotten bill.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
configuration = typer.Typer(no_args_is_help=True)
app.add_typer(configuration, name="config", help="Show and set what commands go by.")
catalogue = typer.Typer()
app.add_typer(catalogue, name="models", help="Current coding models, and what of them fits on a card.")
answers = typer.Typer(no_args_is_help=True)
app.add_typer(answers, name="cache", help="The cache of answers: what it holds, what it saved, and forgetting it.")


def _setting(name: str, *declarations: str) -> Any:
    """An option whose words are those of the table of settings."""
    field = next(field for field in dataclasses.fields(config.Settings) if field.name == name)
    text = field.metadata["help"] + (f" (default: {field.default})" if field.default else "")
    return typer.Option(*declarations, help=text[0].upper() + text[1:], show_default=False)


def _total(what: str) -> Any:
    return typer.Option(help=f"New total in {what}; +N adds N.", show_default=False)


engines = typer.Typer()
app.add_typer(engines, name="backends", help="The engines that one can choose: the rented box, one's own, sold ones.")


P = ParamSpec("P")
R = TypeVar("R")
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Backend = Annotated[str, typer.Argument(help="Of a backend.", autocompletion=completions.backends, metavar="NAME")]
Name = Annotated[str, typer.Argument(help="Of a setting.", autocompletion=completions.settings)]


def run(argv: Sequence[str]) -> int:
    """Run one command line; SelfhostErrors pass through to `entry.main`, which is the one error boundary."""
    profile, rest = _take_profile(list(argv))
    if isinstance(sys.stdout, TextIOWrapper):  # a terminal need not know every character, and a box may send any
        sys.stdout.reconfigure(errors="backslashreplace")
    completions.prepare(app)
    try:
        app(args=rest, prog_name="selfhost", obj=profile)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


@contextmanager
def _told_as(json: bool) -> Iterator[None]:
    """With --json, a failure is on stdout too, for the program that reads it."""
    try:
        yield
    except SelfhostError as error:
        if json:
            from selfhost_cli.cli import render

            with suppress(OSError):  # that nobody reads it is no news beside what went wrong
                render.failed_as_json(error)
        raise


def _told(command: Callable[P, R]) -> Callable[P, R]:
    """A command whose --json goes for its failures, too; not while it prints line by line."""

    @functools.wraps(command)
    def telling(*args: P.args, **options: P.kwargs) -> R:
        with _told_as(bool(options.get("json") and not options.get("watch"))):
            return command(*args, **options)

    return telling


@app.callback()
def options(
    profile: Annotated[
        str,
        typer.Option(
            help="Set of state, config and cache to use; goes with every command.", autocompletion=completions.profiles
        ),
    ] = "default",
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=lambda on: _version(on), help="Print it and exit.")
    ] = False,
) -> None:
    """Claude Code on a rented GPU: up, claude, down. Never a forgotten bill."""


@app.command()
@_told
def up(
    ctx: typer.Context,
    claude_args: Annotated[list[str] | None, typer.Argument(help="Behind --: arguments for claude.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before renting.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Do not launch Claude Code.")] = False,
    api_key: Annotated[str | None, _setting("api_key")] = None,
    gpu: Annotated[str | None, _setting("gpu")] = None,
    region: Annotated[str | None, _setting("region")] = None,
    max_price: Annotated[float | None, _setting("max_price")] = None,
    model: Annotated[str | None, _setting("model")] = None,
    context: Annotated[int | None, _setting("context")] = None,
    slots: Annotated[int | None, _setting("slots")] = None,
    kv_cache_type: Annotated[str | None, _setting("kv_cache_type")] = None,
    small_context: Annotated[bool | None, _setting("small_context", "--small-context")] = None,
    engine: Annotated[str | None, _setting("engine")] = None,
    disk: Annotated[float | None, _setting("disk")] = None,
    hours: Annotated[float | None, _setting("hours")] = None,
    max_spend: Annotated[float | None, _setting("max_spend")] = None,
    idle: Annotated[float | None, _setting("idle")] = None,
    attempts: Annotated[int | None, _setting("attempts")] = None,
    port: Annotated[int | None, _setting("port")] = None,
    pick: Annotated[
        int | None, typer.Option(help="Rent this number of the ranking shown last, and no other.", show_default=False)
    ] = None,
    unguarded: Annotated[bool | None, _setting("unguarded", "--unguarded")] = None,
    boxes: Annotated[
        str,
        typer.Option(
            help="So many boxes, or 1..3 for more while requests wait; --max-spend is for all together.",
            metavar="N|MIN..MAX",
            show_default=False,
        ),
    ] = "",
    machine: Annotated[
        str,
        typer.Option("--ssh", help="Rent nothing: install on this machine of your own.", metavar="USER@HOST"),
    ] = "",
    name: Annotated[str, typer.Option(help="With --ssh: what to call it.")] = "",
    trace: Annotated[
        bool, typer.Option("--trace", help="At the end, tell on stderr where the time went; with --json also in it.")
    ] = False,
    json: Json = False,
) -> None:
    """Rent a box, or resume the one already paid for, and launch Claude Code against it."""
    from selfhost_cli import fleet, lifecycle, old_variables
    from selfhost_cli.cli import launch as launching
    from selfhost_cli.cli import offers, progress, render, wiring, words

    interactive = _is_terminal(sys.stdin) and _is_terminal(sys.stdout)
    if not interactive and not yes and not machine:
        raise UsageError("`selfhost up` asks before it rents, and this is no terminal", "Pass --yes.")
    flags: dict[str, Any] = {"gpu": gpu, "region": region, "max_price": max_price, "model": model, "engine": engine}
    flags |= {
        "api_key": api_key,
        "context": context,
        "slots": slots,
        "kv_cache_type": kv_cache_type,
        "small_context": small_context,
        "disk": disk,
        "hours": hours,
        "max_spend": max_spend,
        "idle": idle,
        "attempts": attempts,
        "port": port,
        "unguarded": unguarded,
    }
    settings = _settings(ctx, flags)
    launch = interactive and not detach and not json
    if machine:
        _up_on(settings, machine, name, trace=trace, json=json)
        if launch:
            launching.claude(settings.profile, claude_args or [])
        return
    wanted = offers.picked(settings, pick)
    least, most = fleet.parse(boxes) if boxes else (1, 0)

    def confirm(plan: lifecycle.Plan) -> bool:
        with talk.aside():
            offers.show_plan(settings, plan)
            try:
                return yes or typer.confirm("Rent it?", default=False, err=True)
            except typer.Abort:
                render.err.print()  # the question has no end of line
                raise KeyboardInterrupt from None

    with _signals_interrupt(), progress.Talk(trace=trace) as talk, wiring.world(settings, talk) as world:
        if remark := old_variables.remark(os.environ, settings.paths.state):
            words.say(words.in_profile(f"selfhost: {remark}", settings.profile))
        world = dataclasses.replace(world, pick=wanted)
        rentals = lifecycle.up_all(world, confirm, least, most, needs_claude=launch)
        url = world.keeper.start().url
        talk.settle()
        if json:  # in here: where it cannot be written, a box is billed
            told: dict[str, Any] = {"rental": rentals[0], "url": url}
            told |= {"boxes": rentals} if len(rentals) > 1 else {}
            render.as_json(told | ({"trace": talk.trace()} if trace else {}))
        else:
            for rental in rentals:
                render.ready(rental, url)
    if launch:
        launching.claude(settings.profile, claude_args or [])


def _up_on(settings: Any, destination: str, name: str, *, trace: bool, json: bool) -> None:
    """`up` without a rental."""
    from selfhost_cli.cli import machine, progress, render

    with _signals_interrupt(), progress.Talk(trace=trace) as talk:
        backend, front = machine.up(settings, destination, name, talk)
    if json:
        told = {"name": backend.name, "model": backend.model, "context": backend.context}
        render.as_json({"machine": told, "url": front.url} | ({"trace": talk.trace()} if trace else {}))
    else:
        render.machine_ready(destination, backend.name, backend.model, front.url)


@app.command()
def offers(
    ctx: typer.Context,
    refused: Annotated[bool, typer.Option("--refused", help="Also what does not fit, each with the reason.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="The whole ranking, however long.")] = False,
    api_key: Annotated[str | None, _setting("api_key")] = None,
    gpu: Annotated[str | None, _setting("gpu")] = None,
    region: Annotated[str | None, _setting("region")] = None,
    max_price: Annotated[float | None, _setting("max_price")] = None,
    model: Annotated[str | None, _setting("model")] = None,
    engine: Annotated[str | None, _setting("engine")] = None,
    disk: Annotated[float | None, _setting("disk")] = None,
    hours: Annotated[float | None, _setting("hours")] = None,
    max_spend: Annotated[float | None, _setting("max_spend")] = None,
    json: Json = False,
) -> None:
    """What could be rented now, ranked by what it really costs; `up --pick N` takes one of them."""
    from selfhost_cli.cli import offers as command

    flags = {"api_key": api_key, "gpu": gpu, "region": region, "max_price": max_price, "model": model}
    flags |= {"engine": engine, "disk": disk, "hours": hours, "max_spend": max_spend}
    with _signals_interrupt():
        with _told_as(json):
            value = command.look(_settings(ctx, flags), refused=refused)
        command.show(value, everything=everything, refused=refused, json=json)


@app.command()
@_told
def down(
    ctx: typer.Context,
    everything: Annotated[bool, typer.Option("--all", help="Also boxes of other selfhost installations.")] = False,
    api_key: Annotated[str | None, _setting("api_key")] = None,
    own: Annotated[
        str, typer.Option("--ssh", help="Stop this machine of your own, and nothing else.", metavar="USER@HOST|NAME")
    ] = "",
    wipe: Annotated[bool, typer.Option("--wipe", help="With --ssh: also remove ~/.selfhost there.")] = False,
    json: Json = False,
) -> None:
    """Destroy every box, prove by listing that nothing is left, print the invoice."""
    from selfhost_cli import lifecycle
    from selfhost_cli.cli import machine, progress, render, wiring

    if wipe and not own:
        raise UsageError("--wipe is for a machine of your own", "Pass --ssh, too; a rented box is destroyed as a whole")
    if own:
        with _signals_interrupt():
            machine.down(_settings(ctx), own, wipe=wipe)
        if json:
            render.as_json({"machine": own, "wiped": wipe})
        return
    with _signals_interrupt(), progress.Talk() as talk:
        settings = _settings(ctx, {"api_key": api_key})
        with wiring.world(settings, talk, needs_ledger=False) as world:
            ended = lifecycle.down(world, everything=everything)
    render.as_json(ended) if json else render.ended(ended)
    machine.remind(settings)


@app.command()
@_told
def reap(
    ctx: typer.Context,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="End what nobody of this installation looks after.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="With --yes: also other installations' boxes.")] = False,
    api_key: Annotated[str | None, _setting("api_key")] = None,
    json: Json = False,
) -> None:
    """List the boxes on the account that nobody looks after; --yes ends them and proves it."""
    from selfhost_cli.cli import reap as command

    if everything and not yes:
        raise UsageError("--all goes with --yes", "Without it, `selfhost reap` shows other installations' boxes too.")
    with _signals_interrupt():
        code = command.run(_settings(ctx, {"api_key": api_key}), yes=yes, everything=everything, json=json)
    raise typer.Exit(code)


@app.command()
@_told
def status(
    ctx: typer.Context,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Again and again until Ctrl-C; without a terminal, each change.")
    ] = False,
    json: Json = False,
) -> None:
    """What is rented, whether it answers, and what it has cost so far."""
    from selfhost_cli.cli import render
    from selfhost_cli.cli import watch as watching

    settings = _settings(ctx)
    if watch:
        with _signals_interrupt():
            watching.run(lambda: watching.look(settings), json=json)
        return
    values = watching.look(settings)
    if json:
        render.as_json(values)
        return
    from selfhost_cli.cli import backends as choosing

    choosing.serving(settings)
    render.status(values)


@app.command()
def logs(
    ctx: typer.Context,
    parts: Annotated[
        list[str] | None,
        typer.Argument(
            help="onstart, install, engine, proxy, watchdog, keeper; default: all.", autocompletion=completions.parts
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C, or until the box ends.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Of each part, from its end.")] = 50,
    json: Annotated[bool, typer.Option("--json", help="Print each line as a JSON object.")] = False,
) -> None:
    """What the parts on the box, and the keeper on this machine, write of themselves; without secrets."""
    from selfhost_cli.cli import logs as command

    command.run(_settings(ctx), parts or [], follow=follow, lines=lines, json=json)


@app.command()
@_told
def cost(
    ctx: typer.Context,
    month: Annotated[str | None, typer.Option(help="YYYY-MM; default: this month.", show_default=False)] = None,
    list_price_in: Annotated[float | None, _setting("list_price_in")] = None,
    list_price_cached: Annotated[float | None, _setting("list_price_cached")] = None,
    list_price_out: Annotated[float | None, _setting("list_price_out")] = None,
    json: Json = False,
) -> None:
    """What this rental and this month cost, per million tokens too, and the same tokens at a list price."""
    from selfhost_cli.cli import cost as command

    prices = {"in": list_price_in, "cached": list_price_cached, "out": list_price_out}
    flags = {f"list_price_{kind}": price for kind, price in prices.items()}
    command.run(_settings(ctx, flags), month, json=json)


@app.command()
@_told
def extend(
    ctx: typer.Context,
    hours: Annotated[str | None, _total("hours since it was rented, as with `up`")] = None,
    max_spend: Annotated[str | None, _total("dollars, as with `up`")] = None,
    idle: Annotated[str | None, _total("minutes without a request, as with `up`")] = None,
    json: Json = False,
) -> None:
    """Move what ends the box by itself, before it does."""
    from selfhost_cli.cli import render, wiring
    from selfhost_cli.lifecycle import extending

    wish = extending.Wish(
        extending.amount("--hours", hours),
        extending.amount("--max-spend", max_spend),
        extending.amount("--idle", idle),
    )
    with wiring.reach(_settings(ctx)) as (ledger, reach):
        value = extending.extend(ledger, reach, wish, now=time.time())
    render.as_json(value) if json else render.extended(value)


@app.command()
def ssh(
    ctx: typer.Context,
    command: Annotated[list[str] | None, typer.Argument(help="Behind --: what to run there.")] = None,
    fragment: Annotated[
        bool, typer.Option("--config", help="Print an ssh_config for editors instead: Host selfhost.")
    ] = False,
) -> None:
    """Log in to the box with the system's OpenSSH and the host key that the ledger has, or run a command there."""
    from selfhost_cli.cli import ssh as logging_in

    if fragment and command:
        raise UsageError("--config goes without a command")
    if fragment:
        print(logging_in.fragment(_settings(ctx)))
    else:
        logging_in.run(_settings(ctx), command or [])


@app.command()
@_told
def env(ctx: typer.Context, json: Json = False) -> None:
    """What `selfhost claude` sets, as shell lines: `eval "$(selfhost env)"` makes other clients use the same box."""
    from selfhost_cli.cli import launch, render

    values = launch.environment(_settings(ctx))
    if json:
        render.as_json(values)
        return
    import shlex

    from selfhost_cli import claude as code

    for name in code.in_the_way(os.environ):
        if name not in values:
            print(f"unset {name}")
    for name, value in sorted(values.items()):
        print(f"export {name}={shlex.quote(value)}")


@app.command()
@_told
def ask(
    ctx: typer.Context,
    question: Annotated[list[str] | None, typer.Argument(help="Default: stdin.", show_default=False)] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Where the answer is cut.")] = 4096,
    json: Json = False,
) -> None:
    """Ask the box's model one plain question, without tools and without Claude Code."""
    from selfhost_cli.cli import ask as command

    command.run(_settings(ctx), question or [], max_tokens=max_tokens, as_json=json)


@app.command()
def batch(
    ctx: typer.Context,
    tasks: Annotated[
        str,
        typer.Argument(help='A file: one a line, a prompt or {"id", "prompt", "system", "max_tokens"}; - is stdin.'),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Where the results go, one a line; default: beside the tasks.", show_default=False),
    ] = None,
    at_once: Annotated[
        int | None,
        typer.Option(min=1, help="Requests at once; default: what the engine has slots for.", show_default=False),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Where an answer is cut.")] = 4096,
    ends: Annotated[bool, typer.Option("--down", help="When all is done, end what is rented.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Also print each result, as it comes.")] = False,
) -> None:
    """Ask many prompts, a few at a time; after a kill, the same command goes on with those that have no answer yet."""
    from selfhost_cli.cli import batch as command

    settings = _settings(ctx)
    with _signals_interrupt():
        failed: SelfhostError | None = None
        try:
            command.run(settings, tasks, out, at_once=at_once, max_tokens=max_tokens, json=json)
        except command.SomeFailed as error:
            failed = error  # they were asked often enough: the box is of no more use to them
    if ends:
        down(ctx)
    if failed:
        raise failed


@app.command()
def bench(
    ctx: typer.Context,
    lengths: Annotated[
        str, typer.Option(help="Tokens of the prompts, such as 1k,4k,16k; default: what fits, and the time allows.")
    ] = "",
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Of each measurement, at most; default: 3, --quick 1.", show_default=False),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Once, and short prompts only.")] = False,
    svg: Annotated[
        Path | None, typer.Option(help="Draw it over the length of the prompt, into this file.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """How fast the box is: first token, prefill, decode, requests at once, a tool session, $ per million tokens."""
    from selfhost_cli.cli import bench as command

    with _signals_interrupt():
        with _told_as(json):
            value = command.prepare(_settings(ctx), lengths=lengths, rounds=rounds, quick=quick, svg=svg)
        command.run(value, json=json)


@app.command()
@_told
def use(
    ctx: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(
            help="Of a backend; without it, those that there are.",
            autocompletion=completions.backends,
            show_default=False,
        ),
    ] = None,
    then: Annotated[
        list[str] | None,
        typer.Option(
            "--then", help="Serves when those before it cannot; may be repeated.", autocompletion=completions.backends
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Which backend serves Claude Code, and switching to another one while it runs."""
    from selfhost_cli.cli import backends as command

    settings = _settings(ctx)
    if name is None and then:
        raise UsageError("--then goes with a name", "Such as `selfhost use vast --then cerebras`.")
    if name is not None:
        command.use(settings, [name, *(then or [])])
    if name is None or json:
        command.show(settings, json=json)


@engines.callback(invoke_without_command=True)
@_told
def backends(ctx: typer.Context, json: Json = False) -> None:
    """The engines that one can choose: the rented box, one's own, sold ones."""
    if ctx.invoked_subcommand:
        return
    from selfhost_cli.cli import backends as command

    command.show(_settings(ctx), json=json)


@engines.command("add")
def backends_add(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="What to call it, or the name of a preset.", metavar="NAME")],
    url: Annotated[str | None, typer.Option(help="Of the server.", show_default=False)] = None,
    preset: Annotated[str, typer.Option(help="Begin with what is known of it: cerebras, runpod, anthropic.")] = "",
    kind: Annotated[
        Literal["local", "openai", "anthropic"] | None,
        typer.Option(help="A server of one's own, or the dialect of one that is sold.", show_default=False),
    ] = None,
    engine: Annotated[
        Literal["ollama", "llamacpp", "openai"] | None,
        typer.Option(help="Of a server of one's own; default: what answers there.", show_default=False),
    ] = None,
    model: Annotated[str | None, typer.Option(help="As that server calls it.", show_default=False)] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens, where the server does not tell.", min=1, show_default=False)
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="Where its key is: env:NAME, file or keyring.", show_default=False)
    ] = None,
    endpoint: Annotated[str, typer.Option(help="The part of the URL that is one's own, at runpod.")] = "",
    plain_http: Annotated[
        bool | None, typer.Option("--plain-http", help="Allow http:// over a network.", show_default=False)
    ] = None,
    slots: Annotated[int | None, typer.Option(help="Requests at once.", min=1, show_default=False)] = None,
    price_in: Annotated[float | None, typer.Option(help="$ per million tokens read.", show_default=False)] = None,
    price_cached: Annotated[float | None, typer.Option(help="$ of those read before.", show_default=False)] = None,
    price_out: Annotated[float | None, typer.Option(help="$ of those written.", show_default=False)] = None,
    per_day: Annotated[
        float | None, typer.Option(help="Most $ between two midnights; then it is passed over.", show_default=False)
    ] = None,
) -> None:
    """Add a backend, or change one; what is not given stays, or comes from the preset of that name."""
    from selfhost_cli.cli import backends as command

    given: dict[str, Any] = {"url": url, "kind": kind, "engine": engine, "model": model, "context": context, "key": key}
    given |= {"plain_http": plain_http, "slots": slots, "price_in": price_in, "price_cached": price_cached}
    given |= {"price_out": price_out, "per_day": per_day}
    command.add(_settings(ctx), name, given, endpoint=endpoint, preset=preset)


@engines.command("key")
def backends_key(
    ctx: typer.Context,
    name: Backend,
    keyring: Annotated[bool, typer.Option("--keyring", help="In the system's keyring, not in a file.")] = False,
) -> None:
    """Keep a backend's key; it is read from stdin, unseen."""
    from selfhost_cli.cli import backends as command

    command.key(_settings(ctx), name, "keyring" if keyring else "file")


@engines.command("test")
@_told
def backends_test(ctx: typer.Context, name: Backend, json: Json = False) -> None:
    """Ask a backend for a token, whether it is in use or not."""
    from selfhost_cli.cli import backends as command

    with _signals_interrupt():
        command.test(_settings(ctx), name, json=json)


@engines.command("remove")
def backends_remove(ctx: typer.Context, name: Backend) -> None:
    """Forget a backend, and its key where selfhost keeps that."""
    from selfhost_cli.cli import backends as command

    command.remove(_settings(ctx), name)


@engines.command("import")
def backends_import(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(help="The old system's .llmrc.json.")] = Path("~/.llmrc.json"),
) -> None:
    """Take over the old system's backends; their keys go into files of their own."""
    from selfhost_cli.cli import backends as command

    command.take_over(_settings(ctx), file.expanduser())


@catalogue.callback(invoke_without_command=True)
@_told
def models(ctx: typer.Context, json: Json = False) -> None:
    """Current coding models, with the largest context that each has on a card; `models fit` counts one of them."""
    if ctx.invoked_subcommand:
        return
    from selfhost_cli.cli import models as command

    command.show(_settings(ctx), json=json)


@catalogue.command("fit")
def models_fit(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(help="A tag of Ollama's, or a GGUF file.", autocompletion=completions.models, metavar="NAME"),
    ],
    gpu: Annotated[
        str | None,
        typer.Option(
            help="The card, as the market names it, or with _ for a space; default: that of the settings.",
            autocompletion=completions.cards,
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        float | None, typer.Option(help="GiB of the card, where its name is not known.", show_default=False)
    ] = None,
    context: Annotated[int | None, _setting("context")] = None,
    kv: Annotated[str | None, _setting("kv_cache_type", "--kv", "--kv-cache-type")] = None,
    slots: Annotated[int | None, _setting("slots")] = None,
    json: Json = False,
) -> None:
    """Whether a model fits on a card, line by line, and what does; nothing is rented or downloaded."""
    from selfhost_cli.cli import models as command

    with _told_as(json):
        flags = {"gpu": gpu, "context": context, "kv_cache_type": kv, "slots": slots}
        value = command.count(_settings(ctx, flags), model, memory)
    command.show_fit(value, json=json)


@catalogue.command("use")
@_told
def models_use(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="A tag of Ollama's.", autocompletion=completions.models, metavar="NAME")],
    context: Annotated[int | None, _setting("context")] = None,
    small_context: Annotated[bool | None, _setting("small_context", "--small-context")] = None,
    json: Json = False,
) -> None:
    """Serve another model on the box that is up; Claude Code goes on, and waits meanwhile."""
    from selfhost_cli.cli import progress, render, wiring
    from selfhost_cli.lifecycle import switching

    settings = _settings(ctx, {"model": model, "context": context, "small_context": small_context})
    with _signals_interrupt(), progress.Talk() as talk, wiring.world(settings, talk) as world:
        rental = switching.use_model(world)
        url = world.keeper.start().url
    render.as_json({"rental": rental, "url": url}) if json else render.ready(rental, url)


@answers.command("stats")
@_told
def cache_stats(ctx: typer.Context, json: Json = False) -> None:
    """Hits, what they saved, and what is kept."""
    from selfhost_cli.cli import cache as command

    command.stats(_settings(ctx), json=json)


@answers.command("flush")
@_told
def cache_flush(
    ctx: typer.Context,
    model: Annotated[str, typer.Option(help="Only what this model answered.", show_default=False)] = "",
    scope: Annotated[str | None, typer.Option(help="Of this scope; default: ours.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Forget the answers of a scope."""
    from selfhost_cli.cli import cache as command

    command.flush(_settings(ctx, {"cache_scope": scope}), model, json=json)


@answers.command("show")
@_told
def cache_show(
    ctx: typer.Context,
    hash: Annotated[str, typer.Argument(help="The beginning of an answer's hash.", show_default=False)] = "",
    json: Json = False,
) -> None:
    """The newest answers, or one of them whole."""
    from selfhost_cli.cli import cache as command

    command.show(_settings(ctx), hash, json=json)


@answers.command("key")
def cache_key(ctx: typer.Context) -> None:
    """Print the scope and the secret key: what another laptop needs to share a Redis with this one."""
    from selfhost_cli.cli import cache as command

    command.share(_settings(ctx))


@configuration.command("show")
@_told
def config_show(ctx: typer.Context, json: Json = False) -> None:
    """Every setting: its value, where that comes from, what it is. Secrets are hidden."""
    from selfhost_cli.cli import configure

    configure.show(_settings(ctx), json=json)


@configuration.command("get")
@_told
def config_get(ctx: typer.Context, name: Name, json: Json = False) -> None:
    """The value of one setting, whatever sets it."""
    from selfhost_cli.cli import configure

    configure.get(_settings(ctx), name, json=json)


@configuration.command("set")
def config_set(
    ctx: typer.Context,
    name: Name,
    value: Annotated[str | None, typer.Argument(help="Without it, a line is read from stdin: for secrets.")] = None,
) -> None:
    """Write one setting into config.toml, which keeps all else that it holds."""
    from selfhost_cli.cli import configure

    configure.put(ctx.obj, name, value)


@configuration.command("unset")
def config_unset(ctx: typer.Context, name: Name) -> None:
    """Take one setting out of config.toml, which keeps all else that it holds."""
    from selfhost_cli.cli import configure

    configure.take_out(ctx.obj, name)


@configuration.command("path")
def config_path(ctx: typer.Context) -> None:
    """Where config.toml is, or would be."""
    print(config.paths(ctx.obj, os.environ).config_file)


@app.command()
def completion(
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(help="Whose.", show_choices=True)],
) -> None:
    """Print a script for the shell to evaluate: it completes commands, options, profiles and settings."""
    print(completions.script(shell))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def claude(ctx: typer.Context) -> None:
    """Run Claude Code against the box; every argument passes through untouched."""
    from selfhost_cli.cli import launch

    launch.claude(_settings(ctx).profile, ctx.args)


@app.command()
@_told
def doctor(
    ctx: typer.Context,
    api_key: Annotated[str | None, _setting("api_key")] = None,
    json: Json = False,
) -> None:
    """Check laptop, rental and box, and print a report without secrets, to be put into an issue."""
    from selfhost_cli.cli import doctor as command

    raise typer.Exit(command.run(ctx.obj, {"api_key": api_key}, json=json))


@app.command()
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave the box up, to try the other commands on it.")] = False,
    engine: Annotated[
        str, typer.Option(help="llamacpp, or the real ollama, which scripts/ollama builds.")
    ] = "llamacpp",
) -> None:
    """The whole way on this machine, without an account: a sandbox market, a real box, a real model."""
    from selfhost_cli.cli import demo as command

    with _signals_interrupt():
        command.run(keep=keep, engine=engine)


def _settings(ctx: typer.Context, flags: dict[str, Any] | None = None) -> Any:
    from selfhost_cli.cli import exposed, words

    settings = config.load(ctx.obj, flags=flags)
    if warning := exposed.warning(settings.paths):
        words.say(f"selfhost: {warning}")
    return settings


def _take_profile(argv: list[str]) -> tuple[str, list[str]]:
    """`--profile NAME` may stand anywhere before `--`; returns the name and the other arguments."""
    profile = os.environ.get("SELFHOST_PROFILE") or "default"
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--":
            rest += [word, *words]
        elif word == "--profile":
            try:
                profile = next(words)
            except StopIteration:
                raise UsageError("--profile needs a name") from None
        elif word.startswith("--profile="):
            profile = word.partition("=")[2]
        else:
            rest.append(word)
    return profile, rest


def _is_terminal(stream: IO[str] | None) -> bool:
    return stream is not None and stream.isatty()  # None: it was closed when we started


def _version(on: bool) -> None:
    if on:
        print(__version__)
        raise typer.Exit


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP end a command as Ctrl-C does: with the clean-up."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {sign: signal.getsignal(sign) for sign in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for sign, handler in before.items():
            if handler is not signal.SIG_IGN:  # nohup's wish
                signal.signal(sign, interrupt)
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
