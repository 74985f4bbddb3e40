"""What is the matter? Checks of laptop, rental and box: bounded in time, none in another's way. Only looks.

What comes out can be shown to strangers: every text of a check has passed `secrets`.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import closing

from selfhost_cli import __version__
from selfhost_cli.config import Settings
from selfhost_cli.doctor import box, laptop, rental
from selfhost_cli.doctor.checks import PARTS, Case, Check, Finding, Line, Report, Verdict, examine, ok
from selfhost_cli.doctor.secrets import Secrets, known
from selfhost_cli.errors import MayBeBilling, plain
from selfhost_cli.ledger import Ledger
from selfhost_cli.model import Rental

__all__ = ["Case", "Check", "Report", "Verdict", "look"]

BOOKS_S = 15.0
"""SQLite itself waits for ten seconds when somebody holds the file."""


def look(case: Case) -> Report:
    """Look at everything. What cannot be looked at is a finding, too."""
    began, at = time.monotonic(), time.time()
    books = _Books(case)
    # All others depend on what these two find.
    found = examine(
        [
            Line("laptop", ("config",), books.read_settings, BOOKS_S),
            Line("rental", ("ledger",), books.read_ledger, BOOKS_S),
        ]
    )
    settings, rentals = books.settings, books.live
    found += examine(
        [
            *laptop.lines(case, settings),
            *rental.lines(case, settings, rentals),
            *box.lines(case, settings, rentals),
        ]
    )
    key = settings.api_key if settings else ""
    hide = Secrets(known(case.paths, case.env, key, books.tokens), case.env).hide
    checks = tuple(check.with_texts(hide) for check in sorted(found, key=lambda check: PARTS.index(check.part)))
    return Report(
        version=__version__,
        profile=case.profile,
        platform=plain(platform.platform()),
        at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at)),
        checks=checks,
        seconds=round(time.monotonic() - began, 3),
        exit_code=exit_code(checks, billed=bool(rentals) or books.unknown),
    )


def exit_code(checks: tuple[Check, ...], *, billed: bool) -> int:
    """0 without a failure; with one 5 while something may be billed, else the highest of theirs."""
    codes = [check.exit_code for check in checks if check.verdict is Verdict.FAILED]
    return MayBeBilling.exit_code if codes and billed else max(codes, default=0)


class _Books:
    """Settings and ledger, each read once. `unknown`: what the ledger would tell may be billed."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self.settings: Settings | None = None
        self.live: list[Rental] = []
        self.tokens: list[str] = []
        self.unknown = False

    def read_settings(self) -> Iterator[Finding]:
        finding, self.settings = laptop.config(self._case)
        yield finding

    def read_ledger(self) -> Iterator[Finding]:
        path = self._case.paths.ledger
        if not path.exists():  # asking makes nothing
            yield ok("none: nothing was ever rented with this profile")
            return
        self.unknown = True
        with closing(Ledger(path)) as ledger:  # LedgerBroken has its own exit code
            rentals, self.live = ledger.all(), ledger.live()
        self.tokens = [one.box_token for one in rentals]
        self.unknown = False
        told = ", ".join(f"{one} is {one.state}" for one in self.live)
        yield ok(f"{told or 'none is live'}; {len(rentals)} in all")
