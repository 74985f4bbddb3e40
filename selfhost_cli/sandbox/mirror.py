"""The cache directory over HTTP, for the boxes: models, wheels, Ollama's archive, and the blobs that registry.py names.

With Range, ETag and switches; a query is ignored. The bytes sent are counted per box: the market bills them, and the
box sees them in its `net_dev`. All that one box downloads shares one link, as it does on a real machine.
"""

from __future__ import annotations

import asyncio
import html
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from aiohttp import web

from selfhost_cli.sandbox import image
from selfhost_cli.sandbox.instances import Instance, Instances

FOLDERS = r"models|wheels(?:/[\w-]+)?|ollama/\w[\w.-]*|registry/\w+/blobs"
"""What is served of the cache, as a pattern for routes."""
LOOKS, LOOK_S = 10, 0.05
"""The kernel's tables may skip a line while they change, and a box's process may only just have begun."""
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass
class Switches:
    """How transfers go wrong. None: not at all. Stall, cut and slow after so many bytes of an answer."""

    rate: float | None = None
    """Bytes/s of a box's link, whatever the number of its transfers."""
    slow_after: int | None = None
    slow_rate: float = 100_000.0
    """Bytes/s of an answer that has become slow; the next one is as fast as any."""
    slows: int | None = None
    """How many answers become slow; None: every one."""
    stall_after: int | None = None
    cut_after: int | None = None
    cuts: int | None = None
    """How many answers are cut; None: every one."""
    corrupt: bool = False
    """The right number of bytes, and some of them are wrong."""


class Link:
    """What a box has to the rest of the world: its transfers take turns."""

    BURST_S = 0.1
    """So much of what a timer overslept is made up for."""

    def __init__(self) -> None:
        self._free_at = float("-inf")

    async def carry(self, count: int, rate: float) -> None:
        """Returns when so many bytes are over, behind those that were here before."""
        now = asyncio.get_running_loop().time()
        self._free_at = max(self._free_at, now - self.BURST_S) + count / rate
        await asyncio.sleep(self._free_at - now)


@dataclass
class Answer:
    """One body on its way: over which link, how far, and whether it has become slow."""

    link: Link
    sent: int = 0
    slow: bool = False


class Mirror:
    """Serves GET and HEAD below its prefix."""

    def __init__(self, cache: Path | None, instances: Instances) -> None:
        self._cache = cache
        self._instances = instances
        self.switches = Switches()
        self._links: dict[int | None, Link] = {}
        """Of each instance; None: of whoever is no box."""
        self.served: list[tuple[str, int]] = []
        """(path, bytes sent) of every answer."""

    async def index(self, request: web.Request) -> web.StreamResponse:
        """Links for `pip --find-links`."""
        folder = self._folder(request)
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_file()) if folder.is_dir() else []
        links = "".join(f'<a href="{quote(name)}">{html.escape(name)}</a><br>\n' for name in names)
        return web.Response(text=f"<!DOCTYPE html><html><body>\n{links}</body></html>\n", content_type="text/html")

    async def file(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        path = self._folder(request) / name
        # A name that was escaped may still be a path.
        if "/" in name or name in (".", "..") or not path.is_file():
            raise web.HTTPNotFound(text=f"the mirror has no {name}\n")
        state = path.stat()
        etag = f'"{state.st_size:x}-{state.st_mtime_ns:x}"'
        headers = {"Accept-Ranges": "bytes", "ETag": etag, "Content-Type": "application/octet-stream"}
        if request.headers.get("If-None-Match") == etag:
            return web.Response(status=304, headers={"ETag": etag})
        first, last = 0, state.st_size - 1
        status = 200
        if "Range" in request.headers and request.headers.get("If-Range", etag) == etag:
            wanted = _range(request.headers["Range"], state.st_size)
            if wanted is None:
                return web.Response(status=416, headers={"Content-Range": f"bytes */{state.st_size}"})
            first, last = wanted
            status = 206
            headers["Content-Range"] = f"bytes {first}-{last}/{state.st_size}"
        headers["Content-Length"] = str(last - first + 1)
        response = web.StreamResponse(status=status, headers=headers)
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        box = await asyncio.to_thread(self._who, request)
        link = self._links.setdefault(box.id if box else None, Link())
        await self._send(request, response, path, first, last - first + 1, Answer(link), self._counter(box))
        return response

    def _folder(self, request: web.Request) -> Path:
        folder = request.match_info["folder"]
        if self._cache is None:
            raise web.HTTPNotFound(text=f"the mirror has no {folder}\n")
        return self._cache / folder

    async def _send(
        self,
        request: web.Request,
        response: web.StreamResponse,
        path: Path,
        first: int,
        length: int,
        answer: Answer,
        count: Callable[[int, bool], None],
    ) -> None:
        try:
            with path.open("rb") as file:
                file.seek(first)
                while answer.sent < length:
                    room = await self._room(request, answer, length - answer.sent)
                    chunk = file.read(room)
                    if not chunk:
                        break
                    await response.write(_spoilt(chunk) if self.switches.corrupt else chunk)
                    answer.sent += len(chunk)
                    count(len(chunk), False)
            await response.write_eof()
        except ConnectionError:
            pass  # the box hung up, was destroyed, or the cut switch did it
        finally:
            count(0, True)
            self.served.append((request.path, answer.sent))

    async def _room(self, request: web.Request, answer: Answer, left: int) -> int:
        """How many bytes may be sent now; waits as the switches, which can change meanwhile, say."""
        while True:
            sent = answer.sent
            if request.transport is None or request.transport.is_closing():
                raise ConnectionResetError("the client is gone")
            switches = self.switches
            if switches.cut_after is not None and sent >= switches.cut_after:
                if switches.cuts is not None:
                    switches.cuts -= 1
                    if switches.cuts <= 0:
                        switches.cut_after = None
                request.transport.abort()
                raise ConnectionAbortedError("cut, as switched")
            if switches.stall_after is not None and sent >= switches.stall_after:
                await asyncio.sleep(0.05)
                continue
            break
        limits = (switches.stall_after, switches.cut_after, None if answer.slow else switches.slow_after)
        room = min([1 << 20, left, *(limit - sent for limit in limits if limit is not None and limit > sent)])
        if switches.slow_after is not None and sent >= switches.slow_after and not answer.slow and switches.slows != 0:
            answer.slow = True
            switches.slows = None if switches.slows is None else switches.slows - 1
        if answer.slow and switches.slow_after is not None:
            room = max(1, min(room, int(switches.slow_rate / 20)))
            await asyncio.sleep(room / switches.slow_rate)
        elif switches.rate is not None:
            room = max(1, min(room, int(switches.rate / 20)))
            await answer.link.carry(room, switches.rate)
        return room

    def _counter(self, instance: Instance | None) -> Callable[[int, bool], None]:
        if instance is None:
            return lambda length, over: None
        told = asyncio.get_running_loop().time()

        def count(length: int, over: bool) -> None:
            nonlocal told
            instance.meter.down_bytes += length
            now = asyncio.get_running_loop().time()
            if (over or now - told > 0.5) and instance.ended is None and instance.box is not None:
                told = now
                image.write_net_dev(instance.box, instance.meter.down_bytes, instance.meter.up_bytes)

        return count

    def _who(self, request: web.Request) -> Instance | None:
        """The box whose process holds the other end of the connection: on loopback they all have one address."""
        peer = request.transport.get_extra_info("peername") if request.transport else None
        boxes = self._instances.alive()
        for _ in range(LOOKS if boxes else 0):
            inode = _inode(peer[1]) if peer else None
            for instance in boxes if inode else ():
                if any(_holds(pid, inode) for pid in instance.pids()):
                    return instance
            time.sleep(LOOK_S)
        return None


def _spoilt(chunk: bytes) -> bytes:
    return bytes([chunk[0] ^ 0xFF]) + chunk[1:]


def _inode(port: int) -> str | None:
    """The socket inode of 127.0.0.1:port."""
    local = f"0100007F:{port:04X}"
    with open("/proc/net/tcp") as table:
        for line in table:
            fields = line.split()
            if fields[1] == local:
                return fields[9]
    return None


def _holds(pid: int, inode: str | None) -> bool:
    folder = f"/proc/{pid}/fd"
    try:
        names = os.listdir(folder)
    except OSError:
        return False
    for name in names:
        # One that was closed meanwhile says nothing about the others: a download opens and closes many.
        with suppress(OSError):
            if os.readlink(f"{folder}/{name}") == f"socket:[{inode}]":
                return True
    return False


def _range(text: str, size: int) -> tuple[int, int] | None:
    """First and last byte; None when it cannot be satisfied (several ranges are not offered)."""
    found = _RANGE.fullmatch(text.strip())
    if not found or found.groups() == ("", ""):
        return None
    start, end = found.groups()
    if not start:
        first, last = max(0, size - int(end)), size - 1
    else:
        first, last = int(start), min(int(end), size - 1) if end else size - 1
    return (first, last) if first <= last and first < size else None
