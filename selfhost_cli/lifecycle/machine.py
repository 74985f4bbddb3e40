"""A GPU machine of one's own: what `up` puts on a box, kept to ~/.selfhost there, without root and without a bill."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from selfhost_cli import __version__, archive, attach, backends, claude, health, install
from selfhost_cli.attach import Front
from selfhost_cli.backends import Backend, Kind, machines
from selfhost_cli.config import Settings
from selfhost_cli.errors import NotServable, SelfhostError, UsageError
from selfhost_cli.model import Event
from selfhost_cli.remote import Remote
from selfhost_cli.wait import Pending, until

KNOCK_S = 0.5
TUNNEL_S = 60.0
OWNER = (
    "cd ~/.selfhost/run 2>/dev/null && [ -e install.env ] &&"
    " sed -n \"s/^SELFHOST_TOKEN='\\(.*\\)'$/\\1/p\" install.env | tr -d '\\n' | sha256sum"
)
"""Whose installation is there, without telling its token. Fails where there is none."""
STOP = "[ ! -e ~/.selfhost/bin/stop.sh ] || sh ~/.selfhost/bin/stop.sh"
WIPE = "[ ! -e ~/.selfhost/bin/stop.sh ] || rm -rf ~/.selfhost"


def up(
    settings: Settings,
    name: str,
    destination: str,
    connect: Callable[[], Remote],
    report: Callable[[Event], None],
) -> tuple[Backend, Front]:
    """Install on it, choose it and prove that it answers; doing it again changes nothing.

    Raises UsageError when the name, or ~/.selfhost there, is somebody else's, NotServable when it does not answer
    as it should; then the backends that served before go on.
    """
    paths = settings.paths
    taken = backends.load(paths).get(name)
    if taken and (taken.kind is not Kind.SSH or taken.url != destination):
        raise UsageError(f"there is a backend {name} already: {taken.url or taken.kind}", "Pass another --name.")
    known = machines.recall(paths, name)
    token = known.token if known else secrets.token_urlsafe(32)
    spec = _spec(settings, token)
    backend = Backend(
        name, Kind.SSH, destination, settings.model, settings.context, settings.engine, slots=settings.slots
    )
    remote = connect()
    try:
        _refuse_anothers(remote, destination, token)
        # Before there is anything: an install that breaks off is ours the next time, too.
        machines.keep(paths, name, known or machines.Machine(token, 0))
        installed = install.apply(remote, spec, report)

        def settled() -> bool | Pending:
            return install.settled(remote) or Pending("the engine tries how much context fits into the card")

        until(settled, what="the engine", seconds=settings.load_timeout * 60, every=KNOCK_S)
    finally:
        remote.close()
    machines.keep(paths, name, machines.Machine(token, installed.proxy_port))
    before = backends.chain(paths)
    backends.add(paths, backend)
    backends.use(paths, [name])
    try:
        front = attach.ensure(settings)
        _tunnel(front, report)
        wished = {"directory": os.getcwd(), "model": backend.model, "context": backend.context}
        attach.call(front, "prewarm", wished)
        real = _healthy(settings, front, report)
    except BaseException:
        backends.use(paths, before)
        raise
    finally:
        _tell_keeper(settings)
    if real < backend.context:
        backend = replace(backend, context=real)
        backends.add(paths, backend)
    return backend, front


def down(settings: Settings, name: str, destination: str, connect: Callable[[], Remote], *, wipe: bool) -> None:
    """Stop what we started there, and choose it no more; `wipe`: leave nothing of ours there, or of it here."""
    paths = settings.paths
    left = [one for one in backends.chain(paths) if one != name]
    backends.use(paths, left or [backends.VAST])
    _tell_keeper(settings)
    remote = connect()
    try:
        for command in (STOP, WIPE) if wipe else (STOP,):
            result = remote.run(command)
            if result.code:
                raise SelfhostError(
                    f"{destination} did not stop: {result.err.strip() or f'status {result.code}'}",
                    f"Log in with `ssh {destination}` and end what runs below ~/.selfhost.",
                )
    finally:
        remote.close()
    if wipe:
        machines.forget(paths, name)
        if name in backends.load(paths):
            backends.remove(paths, name)


def _spec(settings: Settings, token: str) -> install.InstallSpec:
    return install.InstallSpec(
        engine=settings.engine,
        model=settings.model,
        context=settings.context,
        slots=settings.slots,
        kv_cache_type=settings.kv_cache_type,
        token=token,
        version=__version__,
        url=settings.model_url,
        sha256=settings.model_sha256,
        size=settings.model_bytes,
        pip_args=settings.pip_args,
        proxy_requirements=settings.proxy_requirements,
        engine_requirements=settings.engine_requirements,
        ollama_url=settings.ollama_url,
        ollama_version=settings.ollama_version,
        archive=archive.recall(settings.paths.archives, settings.archive_url(), settings.ollama_version),
        registry=settings.registry,
        packages=False,
    )


def _refuse_anothers(remote: Remote, destination: str, token: str) -> None:
    found = remote.run(OWNER)
    if found.code == 0 and found.out.split()[:1] != [hashlib.sha256(token.encode()).hexdigest()]:
        raise UsageError(
            f"~/.selfhost on {destination} belongs to another installation or profile of selfhost",
            f"Use another user there, or take it away: `selfhost down --ssh {destination} --wipe`.",
        )


def _tunnel(front: Front, report: Callable[[Event], None]) -> None:
    def ask() -> bool | Pending:
        told: Any = attach.call(front, "use", {"keys": {}})
        first = told["chain"][0]
        return first["state"] == "up" or Pending(f"{first['state']} {first['reason']}".strip())

    report(Event("tunnel", "start"))
    until(ask, what="the tunnel", seconds=TUNNEL_S, every=KNOCK_S)
    report(Event("tunnel", "done", front.url))


def _healthy(settings: Settings, front: Front, report: Callable[[Event], None]) -> int:
    """The context that it really has, in tokens."""
    least = settings.context // 2 if settings.small_context else claude.least_context()
    found = health.check(
        front,
        model=settings.model,
        context=settings.context,
        gpu=False,  # what stands there is known to its owner, and a model that fits in part is theirs to choose
        least=min(settings.context, least),
        report=report,
        token_s=settings.token_timeout * 60,
    )
    if failed := found.failed:
        raise NotServable(f"health: {failed.name}: {failed.detail}", failed.remedy)
    return found.context if found.context is not None else settings.context


def _tell_keeper(settings: Settings) -> None:
    """That something else was chosen. One that is not there will read it."""
    if front := attach.find(settings.paths):
        try:
            attach.call(front, "use", {"keys": {}})
        except SelfhostError:
            pass  # it reads it within a second
