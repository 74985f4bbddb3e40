"""The host key that travelled in onstart, where the market can read it, gives way to one that the box makes itself.

1. The box makes the new key beside the old one. 2. The ledger has its public half. 3. sshd shows it. 4. The first
connection that sees it, and accepts no other, makes it the only one. Every step may be the last of this process, and
done again changes nothing; from 2 to 4 either key is the box's.
"""

from __future__ import annotations

import re

from selfhost_cli import install, payload
from selfhost_cli.errors import BoxFailed
from selfhost_cli.lifecycle.world import World
from selfhost_cli.model import Event, Rental
from selfhost_cli.remote import ConnectionLost, NotYet, OtherKey, Remote, Result
from selfhost_cli.wait import Pending, TimedOut, until

SHOWN_S = 15.0
TIMES = 3
"""So often sshd is told: it may have been busy with being told something else."""
EVERY_S = 0.25
KEY = re.compile(r"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI[A-Za-z0-9+/]{43}")


def replace_bootstrap(world: World, rental: Rental, remote: Remote) -> tuple[Rental, Remote]:
    """The rental with the box's own host key, and a connection that saw it; `remote` stays open only when this fails.

    Raises BoxFailed when the box does not do its part, ConnectionLost (also when a third key is shown: whose that is,
    connecting anew will tell), and Superseded once `down` has come.
    """
    world.report(Event("identity", "start", "the box makes a host key of its own"))
    remote.put(payload.script("hostkey.sh"), f"{install.ROOT}/bin/hostkey.sh", mode=0o700)
    new = _make(remote, rental.host_key)
    if new != rental.next_host_key:
        rental = world.ledger.note(rental, next_host_key=new)
    seen = _switch(world, rental, remote, new)
    try:
        rental = world.ledger.note(rental, host_key=new, next_host_key="", bootstrap=False)
    except BaseException:
        seen.close()
        raise
    remote.close()
    world.report(Event("identity", "done", "the host key that the market knew is refused from now on"))
    return rental, seen


def replace_at_last(world: World, rental: Rental) -> Rental:
    """Gives a ready box of an older version, which still shows the bootstrap key, its own; others are as they are.

    What keeps it from that is told, and costs nobody the box. Raises Superseded once `down` has come.
    """
    if not rental.bootstrap or rental.endpoint is None:
        return rental
    try:
        remote = world.connect(rental.endpoint, rental.host_keys, world.settings.paths.login_key)
        try:
            rental, seen = replace_bootstrap(world, rental, remote)
        finally:
            remote.close()
        seen.close()
        return rental
    except (NotYet, ConnectionLost, BoxFailed) as error:
        why = f"{error.message}; until a later `selfhost up` changes that, its host key is one that the market knows"
        world.report(Event("identity", "note", why))
    return world.ledger.note(rental)  # either key, when only the last step is missing


def _make(remote: Remote, old: str) -> str:
    result = remote.run(f"{install.HOST_KEY} make '{_bare(old)}'")
    new = result.out.strip()
    if result.code or not KEY.fullmatch(new) or new == _bare(old):
        raise BoxFailed(f"the box does not make a host key of its own: {_said(result)}", "Run `selfhost up` again.")
    return new


def _switch(world: World, rental: Rental, remote: Remote, new: str) -> Remote:
    """Tell sshd, until a connection that accepts the new key alone is there."""
    endpoint, login = rental.endpoint, world.settings.paths.login_key
    assert endpoint is not None

    def ask() -> Remote | Pending:
        try:
            return world.connect(endpoint, (new,), login)
        except NotYet as error:
            world.ledger.note(rental)  # raises Superseded once `down` has come
            if isinstance(error, OtherKey):
                _still_the_old_one(world, rental)
            return Pending(error.message)

    why = ""
    for _ in range(TIMES):
        result = remote.run(f"{install.HOST_KEY} switch '{new}'")
        try:
            return until(ask, what="the new host key", seconds=SHOWN_S, every=EVERY_S, clock=world.clock)
        except TimedOut as error:
            why = f"{error.message}; {_said(result)}" if result.code else error.message
    raise BoxFailed(f"the box does not show its own host key: {why}", "Run `selfhost up` again.")


def _still_the_old_one(world: World, rental: Rental) -> None:
    """Raises ConnectionLost when the box shows neither the old key nor the new one."""
    assert rental.endpoint is not None
    try:
        world.connect(rental.endpoint, rental.host_keys, world.settings.paths.login_key).close()
    except OtherKey as error:
        raise ConnectionLost(error.message, error.remedy) from error
    except NotYet:
        pass  # it is just beginning to listen again


def _bare(line: str) -> str:
    """Type and key, without a comment."""
    return " ".join(line.split()[:2])


def _said(result: Result) -> str:
    """A stranger's machine said it."""
    return (result.err or result.out).strip()[-200:] or f"status {result.code}"
