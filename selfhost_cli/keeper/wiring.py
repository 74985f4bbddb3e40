"""The keeper's composition root: settings -> the concrete parts it works with."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable

from selfhost_cli import caching, lifecycle
from selfhost_cli.config import Settings
from selfhost_cli.errors import NotSetUp, SelfhostError
from selfhost_cli.keeper.links import Line
from selfhost_cli.ledger import Ledger
from selfhost_cli.model import Endpoint, Rental
from selfhost_cli.providers import Provider
from selfhost_cli.proxy.cache.cache import Cache
from selfhost_cli.remote import openssh, ssh, tunnel

log = logging.getLogger("selfhost.keeper")


def open_line(settings: Settings, rental: Rental, endpoint: Endpoint, sock: socket.socket) -> Line:
    """Log in to a rental's box, and forward to its proxy once that has a port. Raises NotYet and NotSetUp."""
    remote = ssh.log_in(sock, endpoint, rental.host_keys, settings.paths.login_key)
    return remote if rental.proxy_port is None else tunnel.Tunnel(remote, rental.proxy_port)


def forward(settings: Settings, destination: str, port: int, remote_port: int) -> list[str]:
    """The program that brings a port of a machine of one's own here."""
    return openssh.forward(destination, settings.ssh_config, port, remote_port)


def provider(settings: Settings) -> Provider:
    """The market. The SDK is loaded here, because most keepers never need it. Raises NotSetUp without a key."""
    from selfhost_cli.providers.pacing import Pacer
    from selfhost_cli.providers.vast import VastProvider, account_key

    key = account_key(settings, os.environ)
    if not key:
        raise NotSetUp("the account key is gone", "Set SELFHOST_API_KEY and run `selfhost down`.")
    pacer = Pacer(settings.paths.turns, settings.market_url, settings.pace)
    return VastProvider(key, settings.market_url, pacer=pacer)


def cache(settings: Settings, rental: Callable[[], str]) -> Cache | None:
    """The cache of answers; without it when it cannot be set up: whoever pays for a box shall be able to use it."""
    try:
        return caching.cache(settings, os.environ, rental)
    except (SelfhostError, OSError) as error:
        log.error("no answers are cached: %s", error)
        return None


def books(settings: Settings, ledger: Ledger, report: lifecycle.Report) -> lifecycle.Books:
    """What it takes to end a box."""
    return lifecycle.Books(settings=settings, provider=provider(settings), ledger=ledger, report=report)
