"""A lock that says which process holds it and that a SIGKILL frees."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from types import TracebackType

LOOKS, LOOK_S = 10, 0.01


class ProcessLock:
    """An advisory lock on a file that holds its owner's process id.

    The kernel drops the lock with the process, so a stale file never blocks anybody. The descriptor is not
    inherited: a child that outlives us does not keep the lock.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def acquire(self) -> bool:
        """Take the lock; False when another process has it. Raises OSError when the file cannot be written."""
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        for _ in range(LOOKS):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(LOOK_S)  # it may only have been somebody's look, see holder()
                continue
            try:
                os.ftruncate(fd, 0)
                os.write(fd, str(os.getpid()).encode())
            except OSError:
                os.close(fd)
                raise
            self._fd = fd
            return True
        os.close(fd)
        return False

    def release(self) -> None:
        if self._fd is not None:
            os.ftruncate(self._fd, 0)  # the next owner holds the lock a moment before its own id is in it
            os.close(self._fd)
            self._fd = None

    def holder(self) -> int | None:
        """The process that has the lock, None when nobody has. 0 when it has not written its id yet."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(os.read(fd, 20) or b"0")
        finally:
            os.close(fd)
        return None

    def __enter__(self) -> ProcessLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
