"""The command line's composition root: settings -> the concrete parts, each loaded only by commands that need it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec

from selfhost_cli import attach, claude, config, lifecycle, models
from selfhost_cli.attach import Front
from selfhost_cli.config import Settings
from selfhost_cli.errors import MarketUnreachable, MayBeBilling, NotSetUp, SelfhostError, UsageError
from selfhost_cli.ledger import Ledger, LedgerBroken
from selfhost_cli.lifecycle.reaching import Reach
from selfhost_cli.model import Endpoint, Event, Rental
from selfhost_cli.models.planner import Model
from selfhost_cli.providers import Provider
from selfhost_cli.remote import Remote


@contextmanager
def world(
    settings: Settings, report: Callable[[Event], None], *, needs_ledger: bool = True
) -> Iterator[lifecycle.World]:
    """Everything that `up` and `down` work with.

    Whatever goes wrong inside while a rental is live is raised as MayBeBilling: that it costs money is the news.
    Without `needs_ledger` a broken one is replaced by an empty one in memory, with a note; `down` works from labels.
    """
    from selfhost_cli.remote import ssh

    settings.paths.make()
    environment = dict(os.environ)
    ledger = _ledger(settings, report, needs_ledger)
    try:
        with _billing_headline(settings, ledger):
            yield lifecycle.World(
                settings=settings,
                provider=provider(settings),
                ledger=ledger,
                keeper=_Keeper(settings),
                connect=ssh.connect,
                make_key=ssh.make_key,
                public_half=ssh.public_half,
                find_claude=lambda: claude.find(settings.claude, environment),
                find_model=lambda: models.size(settings.model, settings.registry),
                find_shape=lambda: _shape(settings),
                spreads=lambda: find_spec("vllm_router") is not None,
                report=report,
            )
    finally:
        ledger.close()
        # What the SDK needed is not for Claude Code, which `up` becomes next.
        os.environ.clear()
        os.environ.update(environment)


def _shape(settings: Settings) -> Model | None:
    return models.find(settings.model, settings.registry, exact=True).model if settings.engine == "ollama" else None


def machine(settings: Settings, destination: str) -> Remote:
    """A login on a machine of the user's own, as they log in there. Raises NotSetUp and UsageError."""
    from selfhost_cli.remote import openssh

    return openssh.OpenSsh(destination, settings.ssh_config)


def books(settings: Settings, ledger: Ledger, report: Callable[[Event], None]) -> lifecycle.Books:
    """What it takes to ask the market about old rentals. Raises NotSetUp without a key."""
    return lifecycle.Books(settings=settings, provider=provider(settings), ledger=ledger, report=report)


@contextmanager
def reach(settings: Settings) -> Iterator[tuple[Ledger, Reach]]:
    """What it takes to tell a box something; the market is asked only for a box that has moved.

    Raises NotSetUp where nothing was ever rented, and like `world` while a rental is live.
    """
    from selfhost_cli.remote import ssh

    def endpoints(rental: Rental) -> Sequence[Endpoint]:
        box = provider(settings).get(rental.instance_id or 0)
        return box.endpoints if box else ()

    if not settings.paths.ledger.exists():
        raise NotSetUp("there is no box", "Rent one: `selfhost up`.")
    ledger = Ledger(settings.paths.ledger)
    try:
        with _billing_headline(settings, ledger):
            yield ledger, Reach(ssh.connect, settings.paths.login_key, endpoints)
    finally:
        ledger.close()


def _ledger(settings: Settings, report: Callable[[Event], None], needed: bool) -> Ledger:
    try:
        return Ledger(settings.paths.ledger)
    except LedgerBroken as error:
        if needed:
            raise
        lost = "asking the market itself, without what it knew of boxes and machines"
        report(Event("ledger", "note", f"{error.message}; {lost}"))
        return Ledger.in_memory(broken=error.message)


def provider(settings: Settings) -> Provider:
    from selfhost_cli.providers.pacing import Pacer
    from selfhost_cli.providers.vast import VastProvider, account_key

    key = account_key(settings, os.environ)
    if key:
        pacer = Pacer(settings.paths.turns, settings.market_url, settings.pace)
        return VastProvider(key, settings.market_url, pacer=pacer)
    raise NotSetUp(
        "no vast.ai account key",
        "Make one at https://cloud.vast.ai/manage-keys/ and put it into SELFHOST_API_KEY, or into "
        f"{settings.paths.config_file} with `selfhost config set api_key`.\nWithout an account, try `selfhost demo`.",
    )


@contextmanager
def _billing_headline(settings: Settings, ledger: Ledger) -> Iterator[None]:
    try:
        yield
    except (SelfhostError, KeyboardInterrupt, OSError) as error:
        if settings.sandbox and isinstance(error, MarketUnreachable):
            error.remedy = "The sandbox's market may have ended, and its boxes with it: `selfhost demo` starts afresh."
        if isinstance(error, MayBeBilling | UsageError):
            raise
        live = ledger.live()
        if live:
            more = f" and {len(live) - 1} more" if len(live) > 1 else ""
            what = f"{live[0]}{more} is {live[0].state} and"
        elif ledger.broken or (config.installed(settings.paths) and not ledger.vouches()):
            what = "what the ledger knew is lost, and a box of this installation"
        else:
            raise
        why = error.message if isinstance(error, SelfhostError) else str(error) or "interrupted"
        remedy = error.remedy if isinstance(error, SelfhostError) else ""
        if "selfhost down" not in remedy:
            remedy = f"{remedy}\n`selfhost down` ends it.".lstrip()
        raise MayBeBilling(f"{what} MAY STILL BE BILLING: {why}", remedy) from error


class _Keeper:
    """`lifecycle.Keeper` over the keeper's local listener."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def start(self) -> Front:
        return attach.ensure(self._settings)

    def watched(self) -> set[str]:
        rows = attach.call(self.start(), "watch").get("rentals", [])
        return {str(row["label"]) for row in rows}

    def prewarm(self, rental: Rental) -> None:
        told = {"directory": os.getcwd(), "model": rental.model, "context": rental.context}
        with suppress(SelfhostError, OSError):  # a keeper of an older version, say: the first turn is a cold one then
            attach.call(self.start(), "prewarm", told)

    def tunnel(self, label: str) -> tuple[str, str]:
        rows = attach.call(self.start(), "watch").get("rentals", [])
        return next(((row["state"], row["reason"]) for row in rows if row["label"] == label), ("not watched", ""))
