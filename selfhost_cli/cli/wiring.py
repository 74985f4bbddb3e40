"""The command line's composition root: settings -> the concrete parts, each loaded only by commands that need it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from selfhost_cli import attach, claude, lifecycle
from selfhost_cli.attach import Front
from selfhost_cli.config import LIVE_MARKET, Settings
from selfhost_cli.errors import MarketError, MayBeBilling, NotSetUp
from selfhost_cli.ledger import Ledger
from selfhost_cli.model import Event
from selfhost_cli.providers import Provider


@contextmanager
def world(settings: Settings, report: Callable[[Event], None]) -> Iterator[lifecycle.World]:
    """Everything that `up` and `down` work with. Raises NotSetUp, or MayBeBilling while a rental is live."""
    from selfhost_cli.remote import ssh

    settings.paths.make()
    ledger = Ledger(settings.paths.ledger)
    try:
        yield lifecycle.World(
            settings=settings,
            provider=_provider(settings, ledger),
            ledger=ledger,
            keeper=_Keeper(settings),
            connect=ssh.connect,
            make_key=ssh.make_key,
            find_claude=lambda: claude.find(settings.claude, os.environ),
            report=report,
        )
    finally:
        ledger.close()


def _provider(settings: Settings, ledger: Ledger) -> Provider:
    from selfhost_cli.providers.vast import VastProvider, cli_key

    # The vast command line's own key is for vast.ai and goes nowhere else.
    key = settings.api_key or (cli_key(os.environ) if settings.market_url == LIVE_MARKET else "")
    if key:
        return VastProvider(key, settings.market_url)
    missing = NotSetUp(
        "no vast.ai account key",
        "Make one at https://cloud.vast.ai/manage-keys/ and put it into SELFHOST_API_KEY or "
        f'{settings.paths.config_file} (api_key = "…").\nWithout an account, try `selfhost demo`.',
    )
    if live := ledger.live():
        raise MayBeBilling(f"{live[0]} MAY STILL BE BILLING: {missing.message}", missing.remedy) from missing
    raise missing


@contextmanager
def billing_headline(ledger_path: Path) -> Iterator[None]:
    """Turn "the market cannot be asked" into "may still be billing" while the ledger has a live rental."""
    try:
        yield
    except MarketError as error:
        ledger = Ledger(ledger_path)
        live = ledger.live()
        ledger.close()
        if live:
            raise MayBeBilling(f"{live[0]} MAY STILL BE BILLING: {error.message}", error.remedy) from error
        raise


class _Keeper:
    """`lifecycle.Keeper` over the keeper's local listener."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def start(self) -> Front:
        return attach.ensure(self._settings)

    def watched(self) -> set[str]:
        rows = attach.call(self.start(), "watch").get("rentals", [])
        return {str(row["label"]) for row in rows}

    def tunnel(self, label: str) -> tuple[str, str]:
        rows = attach.call(self.start(), "watch").get("rentals", [])
        return next(((row["state"], row["reason"]) for row in rows if row["label"] == label), ("not watched", ""))
