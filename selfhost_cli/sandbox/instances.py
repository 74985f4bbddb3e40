"""Rented machines: their stages, their boxes, their meters.

A boot goes null → created → loading → running; the container (its directory) is made at `created`, its processes
start at `running`. One asyncio task per instance moves it on; `end` tears everything down, whatever it was doing.
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

Clock = Callable[[], float]


@dataclass
class Settings:
    """What can be switched while the market runs. Seconds."""

    stages: dict[str, float] = field(default_factory=lambda: {"null": 0.4, "created": 0.3, "loading": 1.0})
    sshd_first: bool = False
    gap_s: float = 2.0
    sshd_delay_s: float = 0.0
    credit: float = 25.0
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
        self, id: int, offer: Row, order: Order, account_keys: tuple[str, ...], boxes: Path, now: float
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
        self.has_gpu = False
        self.box = boxes / f"box-{id}"
        self.meter = Meter(
            gpu_hour=offer["dph_base"],
            disk_hour=disk_hour(offer["storage_cost"], order.disk_gb),
            down_per_gb=offer["inet_down_cost"],
            up_per_gb=offer["inet_up_cost"],
            since=now,
        )
        self._reserved = _reserve_port()
        self.port: int = self._reserved.getsockname()[1]
        self.process: asyncio.subprocess.Process | None = None
        self.task: asyncio.Task[None] | None = None
        self.built: asyncio.Future[None] | None = None

    def release(self) -> None:
        self._reserved.close()

    def bill(self, now: float) -> Bill:
        return self.meter.bill(now)

    def pids(self) -> set[int]:
        """Everything that runs in the box."""
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
        row |= {
            "id": self.id,
            "label": self.label,
            "actual_status": self.status,
            "intended_status": self.intended,
            "cur_state": state,
            "next_state": state,
            "status_msg": self.message,
            "image_uuid": self.order.image,
            "image_runtype": "ssh ssh_direc ssh_proxy",
            "extra_env": [[name, value] for name, value in self.order.env.items()],
            "onstart": self.order.onstart,
            "public_ipaddr": "127.0.0.1",
            "ssh_host": "127.0.0.1",
            "ssh_port": self.port,
            "ports": _ports(self.port) if running else {},
            "direct_port_start": self.port if running else -1,
            "direct_port_end": self.port if running else -1,
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


_NOT_FROM_OFFER = {"id", "start_date", "duration", "search", "instance", "is_bid", "disk_space"}


def _ports(port: int) -> dict[str, list[dict[str, str]]]:
    return {"22/tcp": [{"HostIp": "0.0.0.0", "HostPort": str(port)}]}


def _reserve_port() -> socket.socket:
    """A loopback port that stays ours without listening: sshd, which sets SO_REUSEADDR too, can bind it meanwhile."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


class Instances:
    """All of the account's instances, those that are over too (their charges stay)."""

    def __init__(
        self, boxes: Path, catalogue: Catalogue, faults: Faults, settings: Settings, clock: Clock, pid: int
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

    def alive(self) -> list[Instance]:
        """Every one that is not destroyed: each of them may cost money."""
        return [one for one in self._all.values() if one.ended is None]

    def ever(self) -> list[Instance]:
        return list(self._all.values())

    @property
    def busy(self) -> bool:
        """Something is rented, or still being torn down."""
        return bool(self.alive() or self._endings)

    def create(self, offer: Row, order: Order, keys: tuple[str, ...], *, stopped: bool = False) -> Instance:
        """Rent; the boot goes on by itself. `stopped`: the offer was gone, only its disk is had (and billed)."""
        self._next_id += 1 + secrets.randbelow(40)
        instance = Instance(self._next_id, offer, order, keys, self._boxes, self._clock())
        self._all[instance.id] = instance
        if stopped:
            instance.status, instance.intended = "stopped", "stopped"
        else:
            instance.has_gpu = True
            self._catalogue.set_rented(offer["id"], True)
            instance.task = asyncio.create_task(self._boot(instance))
        return instance

    def destroy(self, instance: Instance) -> None:
        """Over at once for the listing and the bill; its processes and directory go in the background."""
        self._meter(instance, gpu=False, disk=False)
        instance.ended = self._clock()
        if instance.has_gpu:
            self._catalogue.set_rented(instance.offer["id"], False)
        ending = asyncio.create_task(self._end(instance, keep=False))
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)

    async def stop(self, instance: Instance) -> None:
        """The processes die, the disk stays and is billed."""
        instance.intended = "stopped"
        self._meter(instance, gpu=False, disk=True)
        await self._end(instance, keep=True)
        if instance.ended is None and instance.intended == "stopped":
            instance.status = "stopped"

    def start(self, instance: Instance) -> bool:
        """Nothing when it runs or boots already; else the container starts again, onstart included.

        False: it has no GPU, somebody else does.
        """
        if not instance.has_gpu:
            return False
        booting = instance.task is not None and not instance.task.done()
        if instance.intended == "running" and (booting or instance.status == "running"):
            return True
        instance.intended = "running"
        instance.status = "created"
        instance.task = asyncio.create_task(self._run(instance, self._settings.stages["created"]))
        return True

    async def kill(self, instance: Instance, status: str) -> None:
        """The host dies: nothing answers any more, GPU (and, while it is offline, the disk) is not billed."""
        self._meter(instance, gpu=False, disk=status != "offline")
        instance.status = status
        await self._end(instance, keep=True)
        instance.status = status

    async def write_keys(self, instance: Instance) -> None:
        """Bring the box's authorized_keys up to date; before the container is made its keys just wait."""
        if instance.built is None:
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
        if instance.built is None:
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
            await asyncio.sleep(self._settings.stages[stage] if chosen is None else chosen)
        await self._run(instance, 0.0)

    async def _build(self, instance: Instance) -> None:
        if instance.built is None:
            work = asyncio.to_thread(image.build, instance.box, self._config(instance))
            instance.built = asyncio.ensure_future(work)
        # Shielded: a thread cannot be stopped, and the teardown must wait for what it still writes.
        await asyncio.shield(instance.built)

    async def _run(self, instance: Instance, delay: float) -> None:
        await asyncio.sleep(delay)
        await self._build(instance)
        if instance.process is not None:
            await instance.process.wait()  # a stop that is still under way
        self._config(instance).save(instance.box)
        log = (instance.box / "var/log/box.log").open("ab")
        with log:
            command = [sys.executable, "-B", "-m", "selfhost_cli.sandbox.box", str(instance.box)]
            instance.process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        instance.status = "running"
        instance.message = f"success, running {instance.order.image.replace(':', '_')}/ssh\n"
        self._meter(instance, gpu=True, disk=True)
        watch = asyncio.ensure_future(instance.process.wait())
        dies = self._faults.take("host_dies", offer=instance.offer["id"])
        if dies is None:
            await watch
        else:
            await asyncio.wait({watch}, timeout=dies["after"])
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
            # What is left when the supervisor itself was killed.
            await asyncio.to_thread(_sweep_one, instance.box)
            instance.release()

    def _config(self, instance: Instance) -> image.BoxConfig:
        settings = self._settings
        return image.BoxConfig(
            id=instance.id,
            port=instance.port,
            env=self._environment(instance),
            onstart=instance.order.onstart,
            authorized_keys=tuple(instance.keys),
            sshd_first=settings.sshd_first,
            gap_s=settings.gap_s,
            sshd_delay_s=settings.sshd_delay_s,
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
        "box": str(instance.box),
        "supervisor": instance.process.pid if instance.process else None,
        "destroyed": instance.ended is not None,
    }
