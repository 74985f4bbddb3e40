"""What Linux knows about processes: descendants, leftovers of dead boxes, private mounts.

Everything here reads /proc and calls libc directly, because it must also work for an ordinary user and without
psutil in a process that starts in milliseconds.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

MARKER = "SELFHOST_SANDBOX_BOX"
"""Every process of a box carries this variable; its value is the box's directory."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_CLONE_NEWNS = 0x00020000
_MS_RDONLY = 1
_MS_REMOUNT = 1 << 5
_MS_BIND = 1 << 12
_MS_REC = 1 << 14
_MS_PRIVATE = 1 << 18
# Not the supervisor's own log: a supervisor that is just starting does not hold its lock yet.
_INSIDE_A_BOX = re.compile(r"(/.*/boxes/box-\d+)/(?!var/log/box\.log)")
_PRIVSEP = Path("/run/sshd")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def become_subreaper() -> None:
    """Orphans among our descendants become our children, however they daemonise."""
    _check(_libc().prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl(PR_SET_CHILD_SUBREAPER)")


def die_with_parent(parent: int, sig: signal.Signals = signal.SIGTERM) -> None:
    """Get `sig` when our parent ends. Raises ProcessLookupError when it is not `parent` any more."""
    _check(_libc().prctl(_PR_SET_PDEATHSIG, int(sig), 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        raise ProcessLookupError(f"parent {parent} ended before we could watch it")


def _parents() -> Iterator[tuple[int, int, str]]:
    """(pid, parent, state letter) of every process."""
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            stat = Path("/proc", entry, "stat").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        # The name, in parentheses, may hold spaces and parentheses itself.
        state, parent = stat.rpartition(")")[2].split()[:2]
        yield int(entry), int(parent), state


def descendants(of: int) -> set[int]:
    """Living (not zombie) descendants of a process."""
    children: dict[int, list[int]] = {}
    zombies = set()
    for pid, parent, state in _parents():
        children.setdefault(parent, []).append(pid)
        if state in "ZX":
            zombies.add(pid)
    found: set[int] = set()
    queue = [of]
    while queue:
        for child in children.get(queue.pop(), []):
            if child not in found:
                found.add(child)
                queue.append(child)
    return found - zombies


def reap() -> dict[int, int]:
    """Exit codes (negative: signal) of the children that ended, by pid."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = os.waitstatus_to_exitcode(status)


def kill_all(pids: Iterable[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def end_descendants(seconds: float = 10.0) -> bool:
    """Kill every descendant of this subreaper, those that fork meanwhile too. False: some did not die."""
    deadline = time.monotonic() + seconds
    while True:
        reap()
        alive = descendants(os.getpid())
        if not alive:
            return True
        if time.monotonic() > deadline:
            return False
        kill_all(alive)
        time.sleep(0.005)


def _own() -> Iterator[Path]:
    me = os.getuid()
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            path = Path("/proc", entry)
            try:
                if path.stat().st_uid == me:
                    yield path
            except (FileNotFoundError, ProcessLookupError):
                pass


def _box_of(process: Path) -> str | None:
    """The box directory a process belongs to.

    By its environment, or, where that was emptied (`env -i`) or overwritten (sshd, by its title), by where it writes.
    """
    marker = f"{MARKER}=".encode()
    try:
        for entry in (process / "environ").read_bytes().split(b"\0"):
            if entry.startswith(marker):
                return os.fsdecode(entry[len(marker) :])
        for descriptor in ("1", "2"):
            inside = _INSIDE_A_BOX.match(os.readlink(process / "fd" / descriptor))
            if inside:
                return inside[1]
    except OSError:
        pass  # gone meanwhile, or not ours to look into: not a leftover that we could end anyway
    return None


def boxes_of_processes() -> dict[str, set[int]]:
    """pids of this user's processes that carry a box's mark, by box directory."""
    found: dict[str, set[int]] = {}
    for process in _own():
        box = _box_of(process)
        if box:
            found.setdefault(box, set()).add(int(process.name))
    return found


def hold(lock: Path) -> int | None:
    """Take an exclusive lock that ends with this process; None when somebody else holds it. Returns the descriptor."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _supervised(box: Path, pids: Iterable[int] = ()) -> bool:
    """Whether its supervisor lives. `pids`: of its processes, whose file system may show a box that ours does not."""
    return any(_is_held(root / box.relative_to("/") / "lock") for root in (Path("/"), *map(_root, pids)))


def _root(pid: int) -> Path:
    return Path(f"/proc/{pid}/root")


def _is_held(lock: Path) -> bool:
    try:
        descriptor = hold(lock) if lock.exists() else -1
    except OSError:  # gone meanwhile, or a process that lets nobody look through its eyes
        return False
    if descriptor is None:
        return True
    if descriptor >= 0:
        os.close(descriptor)
    return False


def sweep(boxes: Path) -> list[Path]:
    """End and remove what dead supervisors left: every marked process of ours, and the directories below `boxes`.

    A box whose supervisor lives (it holds the box's lock) is left alone, whichever market it belongs to.
    """
    swept: set[Path] = set()
    for _ in range(200):
        left = {Path(box): pids for box, pids in boxes_of_processes().items() if not _supervised(Path(box), pids)}
        if not left:
            break
        for box, pids in left.items():
            swept.add(box)
            # With their children: one of them may have emptied its environment.
            kill_all(pids.union(*(descendants(pid) for pid in pids)))
        time.sleep(0.01)
    for box in boxes.glob("box-*"):
        if not _supervised(box):
            swept.add(box)
            shutil.rmtree(box, ignore_errors=True)
    return sorted(swept)


def private_mounts(keep: Path) -> bool:
    """As root: give this process its own /run and /var/log, and make the machine's software read-only for it.

    So sshd finds its directory and writes no log of the machine's, and nothing in a box can change the machine by
    accident. The mounts end with the process and its children. False when the kernel or a container's rules do not
    allow it, or when `keep` lies below what would be hidden.
    """
    if any(keep.resolve().is_relative_to(hidden) for hidden in (Path("/run"), Path("/var/log"))):
        return False
    libc = _libc()

    def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
        encoded = [None if text is None else text.encode() for text in (source, target, kind, data)]
        _check(libc.mount(encoded[0], encoded[1], encoded[2], flags, encoded[3]), f"mount {target}")

    try:
        _check(libc.unshare(_CLONE_NEWNS), "unshare")
        mount("none", "/", None, _MS_REC | _MS_PRIVATE)
        run = os.open("/run", os.O_PATH | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        mount("tmpfs", "/var/log", "tmpfs", 0, "mode=755,size=4m")
        mount("tmpfs", "/run", "tmpfs", 0, "mode=755,size=4m")
        _PRIVSEP.mkdir(mode=0o755)
        # Name resolution of the machine often lives there.
        for resolver in ("systemd", "resolvconf", "NetworkManager"):
            if os.path.isdir(f"/proc/self/fd/{run}/{resolver}"):
                os.mkdir(f"/run/{resolver}")
                mount(f"/proc/self/fd/{run}/{resolver}", f"/run/{resolver}", None, _MS_BIND | _MS_REC)
        for software in ("/usr", "/etc", "/opt"):
            if os.path.isdir(software) and not keep.resolve().is_relative_to(software):
                mount(software, software, None, _MS_BIND | _MS_REC)
                mount("none", software, None, _MS_BIND | _MS_REMOUNT | _MS_RDONLY)
    except OSError:
        return False
    finally:
        os.close(run)
    return True


def privsep_ready() -> bool:
    """sshd started by root insists on this directory; started by anybody else it does not look."""
    return os.getuid() != 0 or _PRIVSEP.is_dir()


def can_have_private_mounts(keep: Path) -> bool:
    """Try it in a child that ends at once."""
    pid = os.fork()
    if pid == 0:
        ok = False
        try:
            ok = private_mounts(keep)
        finally:
            os._exit(0 if ok else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
