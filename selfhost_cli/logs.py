"""What the parts write of themselves: those on the box over ssh, the keeper's on this machine. Reads only.

Each log is read from an offset in bytes that is kept here, so that nothing is told twice, however often the connection
breaks. What comes is a stranger's: bounded, made plain, and without our secrets.
"""

from __future__ import annotations

import base64
import binascii
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from selfhost_cli.errors import NotSetUp, SelfhostError, UsageError
from selfhost_cli.ledger import Ledger
from selfhost_cli.lifecycle.reaching import Reach, meet
from selfhost_cli.model import Endpoint, Rental, State
from selfhost_cli.remote import ConnectionLost, Remote

KEEPER = "keeper"
ON_THE_BOX = ("onstart", "install", "engine", "proxy", "watchdog")
PARTS = (*ON_THE_BOX, KEEPER)

RECENT = 65_536
"""Bytes of each log that are looked at for its recent lines."""
MOST = 262_144
"""Bytes of each log in one look while it is followed; of more, the last ones."""
LONGEST = 2_000
"""Characters of a line."""
ANSWER_S = 20.0
EVERY_S = 1.0
AGAIN_S = 5.0
"""Between two attempts to reach a box."""
MARKET_S = 60.0
"""Between two questions to the market, where a box is that cannot be reached."""
ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\^_])")

# base64, because a log may hold any bytes and the offset is in bytes. A negative offset counts from the end.
READ = f"""cd ~/.selfhost/log || exit
part() {{
  s=$(stat -c %s "$1.log" 2>/dev/null) || return
  o=$(($2 < 0 ? s + $2 : $2))
  o=$((o > s ? s : o < s - {MOST} ? s - {MOST} : o))
  o=$((o < 0 ? 0 : o))
  printf '%s %s ' "$1" "$o"
  tail -c "+$((o + 1))" "$1.log" | head -c "$((s - o))" | base64 -w 0
  echo
}}
"""


@dataclass(frozen=True)
class Line:
    """One line of one part's log."""

    part: str
    line: str


@dataclass(frozen=True)
class Note:
    """What we say ourselves of the following."""

    text: str


Hide = Callable[[str], str]


class Cursor:
    """How far one log was told."""

    def __init__(self, part: str) -> None:
        self.part = part
        self.offset = -RECENT
        self._rest = b""
        self._skips = False

    def feed(self, start: int, data: bytes) -> list[str]:
        """The lines that are whole now. `start`: where in the log `data` begins, which is not always where we were."""
        lines: list[str] = []
        if start != self.offset:
            self._rest, self._skips = b"", start > 0
            if 0 <= self.offset < start:
                lines.append(f"({start - self.offset} bytes left out)")
            elif 0 <= start < self.offset:
                lines.append("(the log was cut)")
                self._skips = False
        self.offset = start + len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        if self._skips and whole:  # it began before we looked
            whole, self._skips = whole[1:], False
        if len(self._rest) > 4 * LONGEST:
            whole.append(self._rest)
            self._rest, self._skips = b"", True
        return lines + [tidy(line.decode(errors="replace")) for line in whole]

    def begin(self) -> None:
        """The first look is over: a log that was not there yet is told from its beginning."""
        self.offset = max(0, self.offset)

    def finish(self) -> list[str]:
        """What is there of a line that has no end yet."""
        rest, self._rest = self._rest, b""
        return [tidy(rest.decode(errors="replace"))] if rest and not self._skips else []


class Box:
    """The box's logs, over a connection that is made when needed and made again when it broke."""

    def __init__(self, rental: Rental, reach: Reach, clock: Callable[[], float] = time.monotonic) -> None:
        self.rental = rental
        self._reach, self._clock = reach, clock
        self._remote: Remote | None = None
        self._asked_at = float("-inf")

    def read(self, offsets: Mapping[str, int]) -> dict[str, tuple[int, bytes]]:
        """Of each part that has a log: where what was read begins, and what was read. Raises SelfhostError."""
        if not offsets:
            return {}
        self._remote = self._remote or self._connect()
        command = READ + "".join(f"part {part} {offset}\n" for part, offset in offsets.items())
        try:
            result = self._remote.run(command, timeout=ANSWER_S)
        except ConnectionLost:
            self.close()
            raise
        return _parse(result.out, offsets)

    def close(self) -> None:
        remote, self._remote = self._remote, None
        if remote:
            remote.close()

    def _connect(self) -> Remote:
        if self.rental.state not in (State.INSTALLING, State.READY):
            raise SelfhostError(f"nobody can log in to a box that is {self.rental.state}")
        return meet(self.rental, replace(self._reach, endpoints=self._endpoints))[0]

    def _endpoints(self, rental: Rental) -> Sequence[Endpoint]:
        """The market is not asked at each attempt."""
        if self._clock() - self._asked_at < MARKET_S:
            return ()
        self._asked_at = self._clock()
        return self._reach.endpoints(rental)


def chosen(words: Sequence[str]) -> tuple[str, ...]:
    """The parts that were named, all when none was, in their order. Raises UsageError with the nearest name."""
    for word in words:
        if word not in PARTS:
            import difflib

            near = difflib.get_close_matches(word, PARTS, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise UsageError(f"no part {word!r} has a log", f"{hint}There are {', '.join(PARTS)}.")
    return tuple(part for part in PARTS if part in words or not words)


def recent(
    parts: Sequence[str], rental: Rental | None, reach: Reach, keeper_log: Path, hide: Hide, *, lines: int
) -> Iterator[Line]:
    """The last `lines` of each part. Raises SelfhostError behind the keeper's when the box cannot be reached."""
    cursors = {part: Cursor(part) for part in parts}
    problem: SelfhostError | None = None
    read: dict[str, tuple[int, bytes]] = {}
    if rental:
        box = Box(rental, reach)
        try:
            read = box.read({part: -RECENT for part in parts if part != KEEPER})
        except SelfhostError as error:
            problem = error
        finally:
            box.close()
    if KEEPER in parts:
        read |= _local(keeper_log, -RECENT)
    for part, (start, data) in read.items():
        cursor = cursors[part]
        told = cursor.feed(start, data) + cursor.finish()
        yield from _hidden(part, told[-lines:], hide)
    if problem:
        raise problem


def follow(
    parts: Sequence[str],
    ledger: Ledger,
    reach: Reach,
    keeper_log: Path,
    hide: Hide,
    *,
    lines: int,
    pause: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Line | Note]:
    """The recent lines, then each that is written, until the box has ended; where there is none, one is waited for."""
    cursors = {part: Cursor(part) for part in parts}
    new, looked = set(parts), {KEEPER}
    box, told, again_at = None, "", float("-inf")
    remote_parts = [part for part in parts if part != KEEPER]
    try:
        while True:
            read = _local(keeper_log, cursors[KEEPER].offset) if KEEPER in parts else {}
            rental = _current(ledger, box.rental if box else None) if remote_parts else None
            over = bool(box and not rental)
            if rental and not box:
                box = Box(rental, reach, clock)
            if rental and box and clock() >= again_at:
                box.rental = rental
                try:
                    read |= box.read({part: cursors[part].offset for part in remote_parts})
                    looked |= set(remote_parts)
                    if told:
                        yield Note(f"{rental} can be reached again")
                    told = ""
                except SelfhostError as error:
                    again_at = clock() + (0 if isinstance(error, ConnectionLost) else AGAIN_S)
                    if told != (told := _same(error.message)):
                        yield Note(f"{rental}: {error.message}; trying again")
            elif remote_parts and not rental and not box and told != (told := "none"):
                yield Note("there is no box; waiting for one")
            for part in [part for part in parts if part in read]:
                found = cursors[part].feed(*read[part])
                yield from _hidden(part, found[-lines:] if part in new else found, hide)
            for part in new & looked:
                cursors[part].begin()
            new -= looked
            if over:
                assert box
                yield Note(f"{box.rental} has ended")
                return
            pause(EVERY_S)
    finally:
        if box:
            box.close()


def the_box(ledger: Ledger, parts: Sequence[str]) -> Rental | None:
    """Whose logs they are; None when the keeper's alone are asked for. Raises NotSetUp when a part has no box."""
    live = ledger.live()
    if parts == (KEEPER,):
        return None
    if not live and KEEPER not in parts:
        raise NotSetUp("there is no box", "Its logs went with it. Rent one: `selfhost up`.")
    return live[-1] if live else None


def _current(ledger: Ledger, held: Rental | None) -> Rental | None:
    """The rental as it stands, None once it is not there any more."""
    live = ledger.live()
    if held:
        return next((one for one in live if one.label == held.label), None)
    return live[-1] if live else None


def _parse(out: str, asked: Iterable[str]) -> dict[str, tuple[int, bytes]]:
    """What READ prints; whatever else a box says is nothing."""
    found: dict[str, tuple[int, bytes]] = {}
    for line in out.splitlines():
        part, _, rest = line.partition(" ")
        start, _, data = rest.partition(" ")
        if part not in asked or part in found or not (start.isascii() and start.isdigit() and len(start) < 16):
            continue
        try:
            found[part] = int(start), base64.b64decode(data, validate=True)[:MOST]
        except (binascii.Error, ValueError):
            continue
    return found


def _local(path: Path, offset: int) -> dict[str, tuple[int, bytes]]:
    """As READ does it, for the keeper."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            start = size + offset if offset < 0 else offset
            start = max(0, min(size, max(start, size - MOST)))
            file.seek(start)
            return {KEEPER: (start, file.read(size - start))}
    except OSError:
        return {}


def tidy(line: str) -> str:
    """What a terminal would leave of it, and not too much."""
    text = ESCAPES.sub("", line)
    text = next((piece for piece in reversed(text.split("\r")) if piece.strip()), "")
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def _hidden(part: str, lines: Sequence[str], hide: Hide) -> Iterator[Line]:
    """Together, because a secret may take several lines."""
    if lines:
        yield from (Line(part, line) for line in hide("\n".join(lines)).split("\n"))


def _same(reason: str) -> str:
    """A reason without the figures that change from one attempt to the next."""
    return re.sub(r"\d+", "", reason)
