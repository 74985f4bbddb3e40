"""`up --ssh` and `down --ssh`: a GPU machine of one's own, which nobody rents."""

from __future__ import annotations

from collections.abc import Callable

from selfhost_cli import backends
from selfhost_cli.attach import Front
from selfhost_cli.backends import Backend, Kind, machines
from selfhost_cli.cli import wiring
from selfhost_cli.cli.words import in_profile, say
from selfhost_cli.config import Settings
from selfhost_cli.lifecycle import machine
from selfhost_cli.model import Event


def up(settings: Settings, destination: str, name: str, report: Callable[[Event], None]) -> tuple[Backend, Front]:
    """Raises like `machine.up`, and what keeps us from logging in."""
    settings.paths.make()
    name = name or _known(settings, destination) or machines.name_for(destination)
    return machine.up(settings, name, destination, lambda: wiring.machine(settings, destination), report)


def down(settings: Settings, where: str, *, wipe: bool) -> None:
    """`where`: the backend's name, or the destination as it was given to `up`."""
    settings.paths.make()
    known = backends.load(settings.paths).get(where)
    destination = known.url if known and known.kind is Kind.SSH else where
    name = _known(settings, destination) or machines.name_for(destination)
    machine.down(settings, name, destination, lambda: wiring.machine(settings, destination), wipe=wipe)
    told = "nothing of ours is left there" if wipe else "what we installed stays there; --wipe removes it"
    say(f"selfhost: {destination} is stopped; {told}")


def remind(settings: Settings) -> None:
    """Of machines that go on after a `down` of what is rented."""
    for one in backends.serving(settings.paths):
        if one.kind is Kind.SSH:
            say(
                in_profile(
                    f"selfhost: {one.url} is your own and goes on: `selfhost down --ssh {one.name}` stops it",
                    settings.profile,
                )
            )


def _known(settings: Settings, destination: str) -> str:
    """What it is called, if it is."""
    known = backends.load(settings.paths).values()
    return next((one.name for one in known if one.kind is Kind.SSH and one.url == destination), "")
