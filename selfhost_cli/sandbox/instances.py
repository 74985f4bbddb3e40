"""Rented machines: their stages, their boxes, their meters.

A boot goes null → created → loading → running; the container (its directory) is made at `created`, its processes
start at `running`. One asyncio task per instance moves it on; `end` tears everything down, whatever it was doing.
Without `real_boxes` instances are only told of: no directory, no process.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfhost_cli.errors import SelfhostError
from selfhost_cli.sandbox import image, processes
from selfhost_cli.sandbox.billing import Bill, Meter, disk_hour
from selfhost_cli.sandbox.catalogue import Catalogue, Row, template
from selfhost_cli.sandbox.faults import STAGES, Faults
from selfhost_cli.sandbox.timeline import Timeline


@dataclass
class Settings:
    """What can be switched while the market runs. Seconds."""

    stages: dict[str, float] = field(default_factory=lambda: {"null": 0.4, "created": 0.3, "loading": 1.0})
    sshd_first: bool = False
    gap_s: float = 2.0
    sshd_delay_s: float = 0.0
    credit: float = 25.0
    real_boxes: bool = True
    """Whether an instance that is rented from now on gets a box."""
    ollama: str = ""
    """The program that the image brings as `ollama`; none when empty."""


@dataclass(frozen=True)
class Order:
    """A valid create call."""

    image: str
    label: str | None
    disk_gb: float
    env: Mapping[str, str] = field(repr=False)
    onstart: str = field(repr=False)
    runtype: str


class Instance:
    """One rented machine, from the create call until it is destroyed."""

    def __init__(
        self, id: int, offer: Row, order: Order, account_keys: tuple[str, ...], box: Path | None, now: float
    ) -> None:
        self.id = id
        self.offer = offer
        self.order = order
        self.label = order.label
        self.key = secrets.token_hex(32)
        self.keys: list[str] = list(account_keys)
        self.status: str | None = None
        self.intended = "running"
        self.message: str | None = None
        self.created = now
        self.ended: float | None = None
        self.listed_from = now
        self.listed_until = float("inf")
        self.has_gpu = False
        self.halted = False
        """The host gave up on the container."""
        self.only: Mapping[str, Any] = {}
        """Which endpoint answers, as the fault says; empty: both."""
        self.box = box
        self.meter = Meter(
            gpu_hour=offer["dph_base"],
            disk_hour=disk_hour(offer["storage_cost"], order.disk_gb),
            down_per_gb=offer["inet_down_cost"],
            up_per_gb=offer["inet_up_cost"],
            since=now,
        )
        self._ports: dict[int, socket.socket] = {}
        """Those that are kept from everybody else; its sshd is at the last one."""
        self.move()
        self.process: asyncio.subprocess.Process | None = None
        self.task: asyncio.Task[None] | None = None
        self.built: asyncio.Future[None] | None = None
        self.later: set[asyncio.Task[None]] = set()
        """What the market still means to do with it: a queued start, a new price."""

    @property
    def port(self) -> int:
        """Where its sshd is."""
        return next(reversed(self._ports))

    def move(self) -> None:
        """Its sshd gets another port; nobody listens at the old one any more, and nobody else gets it."""
        reserved = _reserve_port()
        self._ports[reserved.getsockname()[1]] = reserved

    def release(self) -> None:
        for reserved in self._ports.values():
            reserved.close()

    def bill(self, now: float) -> Bill:
        return self.meter.bill(now)

    def pids(self) -> set[int]:
        """Everything that runs in its box."""
        if self.process is None or self.process.returncode is not None:
            return set()
        return processes.descendants(self.process.pid)

    def row(self, now: float) -> Row:
        """As the market lists it, with the whole key set of a real one."""
        row = template("instance")
        row |= {key: self.offer[key] for key in row.keys() & self.offer.keys() - _NOT_FROM_OFFER}
        running = self.status == "running"
        gpu, disk = self.meter.gpu_hour, self.meter.disk_hour
        state = "stopped" if self.intended == "stopped" else "running"
        direct, proxy = self._endpoints()
        mapped = running and direct is not None
        row |= {
            "id": self.id,
            "label": self.label,
            "actual_status": self.status,
            "intended_status": self.intended,
            "cur_state": "stopped" if self.halted or self.status == "stopped" else state,
            "next_state": state,
            "status_msg": self.message,
            "image_uuid": self.order.image,
            "image_runtype": "ssh ssh_direc ssh_proxy",
            "extra_env": [[name, value] for name, value in self.order.env.items()],
            "onstart": self.order.onstart,
            "public_ipaddr": "127.0.0.1",
            "ssh_host": "127.0.0.1" if proxy else None,
            "ssh_port": proxy,
            "ports": {"22/tcp": [{"HostIp": "0.0.0.0", "HostPort": str(direct)}]} if mapped else {},
            "direct_port_start": direct if mapped else -1,
            "direct_port_end": direct if mapped else -1,
            "gpu_totalram": self.offer["gpu_total_ram"],
            "mem_limit": round(self.offer["cpu_ram"] * self.offer["gpu_frac"] / 1024, 1),
            "disk_space": self.order.disk_gb,
            "start_date": self.created,
            "duration": self.offer["end_date"] - now,
            "dph_base": gpu,
            "dph_total": gpu + disk,
            "storage_total_cost": disk,
            "inet_down_billed": None,
            "inet_up_billed": None,
            "is_bid": False,
        }
        prices = {"gpuCostPerHour": gpu, "diskHour": disk, "totalHour": gpu + disk}
        row["search"] = row["instance"] = prices | {
            "discountTotalHour": 0,
            "discountedTotalPerHour": gpu + disk,
        }
        return row

    def _endpoints(self) -> tuple[int | None, int | None]:
        """The ports that the row tells: direct and by the market's proxy. Here both lead to the same sshd."""
        if not self.only:
            return self.port, self.port
        other = next(iter(self._ports)) if self.only["other"] == "closed" else None
        return (self.port, other) if self.only["only"] == "direct" else (other, self.port)


_NOT_FROM_OFFER = {"id", "start_date", "duration", "search", "instance", "is_bid", "disk_space"}


def _reserve_port() -> socket.socket:
    """A loopback port that stays ours without listening: sshd, which sets SO_REUSEADDR too, can bind it meanwhile."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


class Instances:
    """All of the account's instances, those that are over too (their charges stay)."""

    def __init__(
        self, boxes: Path, catalogue: Catalogue, faults: Faults, settings: Settings, clock: Timeline, pid: int
    ) -> None:
        self._boxes = boxes
        self._catalogue = catalogue
        self._faults = faults
        self._settings = settings
        self._clock = clock
        self._pid = pid
        self._next_id = 50_000_000 + secrets.randbelow(9_000_000)
        self._all: dict[int, Instance] = {}
        self._endings: set[asyncio.Task[None]] = set()

    def get(self, id: int) -> Instance | None:
        """One that exists; None when it never did or is destroyed."""
        found = self._all.get(id)
        return found if found and found.ended is None else None

    def known(self, id: int) -> Instance | None:
        """One that exists or did."""
        return self._all.get(id)

    def listed(self) -> list[Instance]:
        """Those that the list shows now; it may lag behind at both ends."""
        now = self._clock()
        return [
            one
            for one in self._all.values()
            if one.listed_from <= now and (one.ended is None or now < one.listed_until)
        ]

    def alive(self) -> list[Instance]:
        """Every one that is not destroyed: each of them may cost money."""
        return [one for one in self._all.values() if one.ended is None]

    def ever(self) -> list[Instance]:
        return list(self._all.values())

    def credit(self) -> float:
        """What the account has left, in dollars."""
        now = self._clock()
        left = self._settings.credit - sum(one.bill(now).total for one in self._all.values())
        gone = self._faults.holding("credit_gone")
        return min(left, 0.0) if gone and now >= gone.since + gone.options["after"] else left

    async def watch_credit(self) -> None:
        """Stop what runs once the account has nothing left; to be cancelled."""
        while True:
            await self._clock.sleep(1.0)
            if self.credit() <= 0:
                for instance in self.alive():
                    if instance.intended == "running":
                        await self._interrupt(instance)

    @property
    def busy(self) -> bool:
        """Something is rented, or still being torn down."""
        return bool(self.alive() or self._endings)

    def create(self, offer: Row, order: Order, keys: tuple[str, ...], *, stopped: bool = False) -> Instance:
        """Rent; the boot goes on by itself. `stopped`: the offer was gone, only its disk is had (and billed)."""
        self._next_id += 1 + secrets.randbelow(40)
        box = self._boxes / f"box-{self._next_id}" if self._settings.real_boxes else None
        instance = Instance(self._next_id, offer, order, keys, box, self._clock())
        self._all[instance.id] = instance
        self._trouble(instance)
        if stopped:
            instance.status, instance.intended = "stopped", "stopped"
        else:
            instance.has_gpu = True
            self._catalogue.set_rented(offer["id"], True)
            instance.task = asyncio.create_task(self._boot(instance))
        return instance

    def _trouble(self, instance: Instance) -> None:
        """What the faults that are set have in store for a new instance."""
        offer = instance.offer["id"]
        if late := self._faults.take("listed_late", offer=offer):
            instance.listed_from += late["seconds"]
        if only := self._faults.take("one_endpoint", offer=offer):
            instance.only = only
            instance.move()  # the first port is the one where nobody listens
        if price := self._faults.take("price_rises", offer=offer):
            dearer = instance.meter.gpu_hour * price["factor"]
            if price["after"]:
                self._do_later(instance, price["after"], lambda: instance.meter.reprice(self._clock(), dearer))
            else:
                instance.meter.reprice(self._clock(), dearer)

    def _do_later(self, instance: Instance, seconds: float, act: Callable[[], object]) -> None:
        async def wait() -> None:
            await self._clock.sleep(seconds)
            act()

        task = asyncio.create_task(wait())
        instance.later.add(task)
        task.add_done_callback(instance.later.discard)

    def destroy(self, instance: Instance) -> None:
        """Over at once for the bill, for the listing as a rule; its processes and directory go in the background."""
        self._meter(instance, gpu=False, disk=False)
        instance.ended = instance.listed_until = self._clock()
        if long := self._faults.take("listed_long", offer=instance.offer["id"]):
            instance.listed_until += long["seconds"]
        for task in instance.later:
            task.cancel()
        if instance.has_gpu:
            self._catalogue.set_rented(instance.offer["id"], False)
        ending = asyncio.create_task(self._end(instance, keep=False))
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)

    async def stop(self, instance: Instance) -> None:
        """The processes die, the disk stays and is billed."""
        await self._halt(instance, "stopped")

    async def _interrupt(self, instance: Instance) -> None:
        """The market itself stops it: somebody bid more, or the account has nothing left."""
        await self._halt(instance, "exited")

    async def _halt(self, instance: Instance, status: str) -> None:
        instance.intended = "stopped"
        self._meter(instance, gpu=False, disk=True)
        await self._end(instance, keep=True)
        if instance.ended is None and instance.intended == "stopped":
            instance.status = status

    def start(self, instance: Instance) -> bool:
        """Nothing when it runs or boots already; else the container starts again, onstart included.

        False: it has no GPU, somebody else does (who may give it back later: a fault).
        """
        if not instance.has_gpu:
            return False
        if self._up(instance):
            return True
        queued = self._faults.take("start_queued", offer=instance.offer["id"])
        if queued is None:
            self._start(instance)
            return True
        instance.intended = "running"
        self._do_later(instance, queued["seconds"], lambda: self._fire(instance))
        return False

    def _up(self, instance: Instance) -> bool:
        booting = instance.task is not None and not instance.task.done()
        return instance.intended == "running" and (booting or instance.status == "running")

    def _fire(self, instance: Instance) -> None:
        """The start that was queued, unless it was stopped, or started, meanwhile."""
        if instance.intended == "running" and not self._up(instance):
            self._start(instance)

    def _start(self, instance: Instance) -> None:
        if self._faults.take("endpoint_moves", offer=instance.offer["id"]) is not None:
            instance.move()
        instance.intended = "running"
        instance.status = "created"
        instance.task = asyncio.create_task(self._run(instance, self._settings.stages["created"]))

    async def kill(self, instance: Instance, status: str) -> None:
        """The host dies: nothing answers any more, GPU (and, while it is offline, the disk) is not billed.

        Or, outbid, the host lives, and the market takes it away.
        """
        if status == "outbid":
            await self._interrupt(instance)
            return
        self._meter(instance, gpu=False, disk=status != "offline")
        instance.status = status
        await self._end(instance, keep=True)
        instance.status = status

    async def write_keys(self, instance: Instance) -> None:
        """Bring the box's authorized_keys up to date; before the container is made its keys just wait."""
        if instance.built is None or instance.box is None:
            return
        await asyncio.wait({instance.built})
        path = instance.box / "root/.ssh/authorized_keys"
        try:
            lines = path.read_text().splitlines()
            lines += [key for key in instance.keys if key not in lines]
            image.write(path, "".join(f"{line}\n" for line in lines), 0o600)
        except FileNotFoundError:
            pass  # destroyed meanwhile

    async def remove_key(self, instance: Instance, key: str) -> None:
        instance.keys.remove(key)
        if instance.built is None or instance.box is None:
            return
        await asyncio.wait({instance.built})
        path = instance.box / "root/.ssh/authorized_keys"
        lines = [line for line in path.read_text().splitlines() if line != key]
        image.write(path, "".join(f"{line}\n" for line in lines), 0o600)

    async def close(self) -> None:
        """Destroy everything and wait until it is gone."""
        for instance in self.alive():
            self.destroy(instance)
        while self._endings:
            await asyncio.wait(set(self._endings))

    def _meter(self, instance: Instance, *, gpu: bool, disk: bool) -> None:
        # What ends after the destroy must not start the disk's clock again.
        if instance.ended is None:
            instance.meter.switch(self._clock(), gpu=gpu, disk=disk)

    async def _boot(self, instance: Instance) -> None:
        try:
            await self._stages(instance)
        except (OSError, subprocess.SubprocessError, SelfhostError) as error:
            instance.status, instance.message = "exited", f"the sandbox could not make this box: {error}"
            sys.stderr.write(f"box {instance.id}: {error}\n")

    async def _stages(self, instance: Instance) -> None:
        offer = instance.offer["id"]
        fails = _FAILURES.get((self._faults.take("boot_fails", offer=offer) or {}).get("why", ""))
        slow = self._faults.take("slow_boot", offer=offer) or {}
        stuck = self._faults.take("boot_stuck", offer=offer) or {}
        for stage in STAGES:
            instance.status = None if stage == "null" else stage
            instance.message = _MESSAGES[stage]
            if stage == "created":
                await self._build(instance)
            if stuck.get("stage") == stage:
                await asyncio.Event().wait()
            chosen = slow.get(stage)
            await self._clock.sleep(self._settings.stages[stage] if chosen is None else chosen)
            if fails and fails.stage == stage:
                await self._fail(instance, fails)
        await self._run(instance, 0.0)

    async def _fail(self, instance: Instance, failure: _Failure) -> None:
        """The container never runs; the market stops trying after a while, and goes on billing the disk."""
        instance.status, instance.halted = failure.status, failure.halted
        instance.message = failure.message.format(image=instance.order.image)
        if failure.given_up:
            await self._clock.sleep(_GIVE_UP_S)
            instance.intended = "stopped"
        await asyncio.Event().wait()

    async def _build(self, instance: Instance) -> None:
        if instance.box is None:
            return
        if instance.built is None:
            work = asyncio.to_thread(image.build, instance.box, self._config(instance))
            instance.built = asyncio.ensure_future(work)
        # Shielded: a thread cannot be stopped, and the teardown must wait for what it still writes.
        await asyncio.shield(instance.built)

    async def _run(self, instance: Instance, delay: float) -> None:
        await self._clock.sleep(delay)
        await self._build(instance)
        if instance.process is not None:
            await instance.process.wait()  # a stop that is still under way
        offer = instance.offer["id"]
        if instance.box is not None:
            refuses = self._faults.take("ssh_refuses", offer=offer) or {}
            denies = self._faults.take("ssh_denies", offer=offer) or {}
            config = self._config(instance, sshd_delay_s=refuses.get("seconds"), deny_s=denies.get("seconds", 0.0))
            instance.process = await _supervise(instance.box, config)
        instance.status = "running"
        instance.message = f"success, running {instance.order.image.replace(':', '_')}/ssh\n"
        self._meter(instance, gpu=True, disk=True)
        dies = self._faults.take("host_dies", offer=offer)
        ends = [asyncio.ensure_future(_exit_of(instance.process))]
        if dies is not None:
            ends.append(asyncio.ensure_future(self._clock.sleep(dies["after"])))
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
        # Nobody asked for this end (whoever does so cancels this task first).
        instance.task = None
        await self.kill(instance, dies["status"] if dies else "exited")

    async def _end(self, instance: Instance, *, keep: bool) -> None:
        """End task and processes; without `keep` the directory and the port too."""
        if instance.task is not None and instance.task is not asyncio.current_task():
            instance.task.cancel()
            await asyncio.wait({instance.task})
        if instance.built is not None:
            await asyncio.wait({instance.built})
        if instance.process is not None:
            await _finish(instance.process, signal.SIGUSR1 if keep else signal.SIGTERM)
        if not keep:
            if instance.box is not None:
                # What is left when the supervisor itself was killed.
                await asyncio.to_thread(_sweep_one, instance.box)
            instance.release()

    def _config(self, instance: Instance, *, sshd_delay_s: float | None = None, deny_s: float = 0.0) -> image.BoxConfig:
        settings = self._settings
        return image.BoxConfig(
            id=instance.id,
            port=instance.port,
            env=self._environment(instance),
            onstart=instance.order.onstart,
            authorized_keys=tuple(instance.keys),
            sshd_first=settings.sshd_first,
            gap_s=settings.gap_s,
            sshd_delay_s=settings.sshd_delay_s if sshd_delay_s is None else sshd_delay_s,
            deny_s=deny_s,
            market_pid=self._pid,
            ollama=settings.ollama,
        )

    def _environment(self, instance: Instance) -> dict[str, str]:
        """What the market adds to the container's environment, and what the create call asked for."""
        own = {name: value for name, value in instance.order.env.items() if not name.startswith("-")}
        return {
            **own,
            "CONTAINER_ID": str(instance.id),
            "CONTAINER_API_KEY": instance.key,
            "VAST_CONTAINERLABEL": f"C.{instance.id}",
            "PUBLIC_IPADDR": "127.0.0.1",
            "VAST_TCP_PORT_22": str(instance.port),
            "SSH_PUBLIC_KEY": "\n".join(instance.keys),
            "GPU_COUNT": str(instance.offer["num_gpus"]),
        }


_MESSAGES: Mapping[str, str | None] = {
    "null": None,
    "created": None,
    "loading": "4c7d45f7c63c: Download complete",
}


@dataclass(frozen=True)
class _Failure:
    """A host that cannot run the container: after which stage it shows, and how."""

    stage: str
    status: str
    message: str
    halted: bool = True
    given_up: bool = False


_GIVE_UP_S = 420.0
_OCI = (
    "Error response from daemon: failed to create task for container: failed to create shim task: "
    "OCI runtime create failed: "
)
_CDI = (
    _OCI + "could not apply required modification to OCI specification: error modifying OCI spec: "
    "failed to inject CDI devices: unresolvable CDI devices nvidia.com/gpu=0: unknown"
)
_FAILURES = {
    "cdi": _Failure("created", "created", _CDI),
    "oci": _Failure("created", "created", _OCI + "runc create failed: unable to start container process: unknown"),
    "cdi_running": _Failure("loading", "running", _CDI, halted=False),
    "manifest": _Failure(
        "loading",
        "loading",
        "Error response from daemon: manifest for {image} not found: manifest unknown",
        halted=False,
        given_up=True,
    ),
    "pull_denied": _Failure(
        "loading",
        "loading",
        "Error response from daemon: pull access denied for {image}, repository does not exist or may require login",
        halted=False,
        given_up=True,
    ),
    "other": _Failure(
        "loading", "loading", "Error response from daemon: no luck with {image} today", halted=False, given_up=True
    ),
}
"""The messages are Docker's, shortened."""


async def _supervise(box: Path, config: image.BoxConfig) -> asyncio.subprocess.Process:
    """Start the box's supervisor."""
    config.save(box)
    with (box / "var/log/box.log").open("ab") as log:
        command = [sys.executable, "-B", "-m", "selfhost_cli.sandbox.box", str(box)]
        return await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


async def _exit_of(process: asyncio.subprocess.Process | None) -> None:
    """Its end; without one, never."""
    if process is None:
        await asyncio.Event().wait()
    else:
        await process.wait()


async def _finish(process: asyncio.subprocess.Process, asked: signal.Signals) -> None:
    if process.returncode is None:
        process.send_signal(asked)
    try:
        await asyncio.wait_for(process.wait(), 15.0)
    except TimeoutError:
        process.kill()
        await process.wait()


def _sweep_one(box: Path) -> None:
    for _ in range(200):
        left = processes.boxes_of_processes().get(str(box))
        if not left:
            break
        processes.kill_all(left)
    shutil.rmtree(box, ignore_errors=True)


def describe(instance: Instance) -> dict[str, Any]:
    """For the control endpoint."""
    return {
        "id": instance.id,
        "label": instance.label,
        "status": instance.status,
        "offer": instance.offer["id"],
        "machine_id": instance.offer["machine_id"],
        "port": instance.port,
        "box": str(instance.box) if instance.box else None,
        "supervisor": instance.process.pid if instance.process else None,
        "destroyed": instance.ended is not None,
    }
