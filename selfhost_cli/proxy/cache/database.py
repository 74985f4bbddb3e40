"""A SQLite file that may be lost: its errors stay in it, and what cannot be read is put aside and begun anew.

All work is done by one thread of its own, in the order in which it was asked for: the event loop never waits for the
disk. Several processes may use the same file.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

Result = TypeVar("Result")
Job = Callable[[sqlite3.Connection], Result]

RETRY_S = 5.0
"""So long is a file left alone that could not be opened."""
LOCKED_S = 1.0
"""So long may another process's transaction take; ours take milliseconds."""
UNREADABLE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}

log = logging.getLogger("selfhost.proxy")


class Database:
    """One file, made with `schema` (which sets its user_version to `version`) and its owner's alone.

    `trouble` says why the last job was not done, "" when it was. `reader` is a second connection, for short questions
    in the event loop itself: half the price of one asked through the thread, and None while the file cannot be used.
    """

    def __init__(self, path: Path, schema: str, version: int) -> None:
        self.path = path
        self.trouble = "it is not open yet"
        self.reader: sqlite3.Connection | None = None
        self._schema, self._version = schema, version
        self._db: sqlite3.Connection | None = None
        self._identity = (0, 0)
        self._tried = -RETRY_S
        self._closed = False
        self._worker = ThreadPoolExecutor(1, f"selfhost-{path.name}")

    def do(self, job: Job[Result], otherwise: Result) -> asyncio.Future[Result]:
        """What the job returns, run in a transaction; `otherwise`, and nothing was changed, when that cannot be."""
        return self._begun("BEGIN IMMEDIATE", job, otherwise)

    def ask(self, job: Job[Result], otherwise: Result) -> asyncio.Future[Result]:
        """The same for a job that only reads: it waits for no other process."""
        return self._begun("BEGIN", job, otherwise)

    def failed(self, error: sqlite3.Error) -> None:
        """What came of using `reader`: a file that cannot be read is put aside before the next job."""
        if not self._closed:
            self._worker.submit(self._fail, error)

    async def close(self) -> None:
        """The reader first: who closes last empties the log into the file, which two at the same moment do not."""
        self._closed = True
        if self.reader:
            self.reader.close()
            self.reader = None
        await asyncio.get_running_loop().run_in_executor(self._worker, self._close)
        self._worker.shutdown()

    def _begun(self, begin: str, job: Job[Result], otherwise: Result) -> asyncio.Future[Result]:
        self._loop = asyncio.get_running_loop()
        if self._closed:
            nothing = self._loop.create_future()
            nothing.set_result(otherwise)
            return nothing
        return self._loop.run_in_executor(self._worker, self._run, begin, job, otherwise)

    # --- in the thread ---

    def _run(self, begin: str, job: Job[Result], otherwise: Result) -> Result:
        try:
            db = self._opened()
            with _transaction(db, begin):
                result = job(db)
        except (OSError, sqlite3.Error) as error:
            self._fail(error)
            return otherwise
        self._tell("")
        return result

    def _opened(self) -> sqlite3.Connection:
        """Raises OSError, sqlite3.Error."""
        if self._db and self._identity == _identity(self.path):
            return self._db
        self._close()  # people remove such a file, or another process put it aside
        if time.monotonic() - self._tried < RETRY_S:
            raise OSError(self.trouble)
        self._tried = time.monotonic()
        with _only_one(self.path.parent):
            if self._unreadable():
                put_aside(self.path)
            if not self.path.exists():
                _create(self.path, self._schema)
        self._db, self.reader = connect(self.path, LOCKED_S), connect(self.path, 0)
        self._identity = _identity(self.path)
        self._tried = -RETRY_S
        return self._db

    def _unreadable(self) -> bool:
        """Whether something is there that is of no use to us. Raises sqlite3.Error for what may pass."""
        if not self.path.exists():
            return False
        try:
            with closing(connect(self.path, LOCKED_S)) as db:
                return _version(db) != self._version
        except sqlite3.Error as error:
            if _code(error) in UNREADABLE:
                return True
            raise

    def _fail(self, error: OSError | sqlite3.Error) -> None:
        if isinstance(error, sqlite3.Error) and _code(error) in UNREADABLE and self._db:
            with suppress(OSError), _only_one(self.path.parent):
                if _identity(self.path) == self._identity:
                    put_aside(self.path)
            self._close()
        self._tell(str(error))

    def _tell(self, trouble: str) -> None:
        if trouble and trouble != self.trouble:
            log.warning("%s: %s", self.path, trouble)
        self.trouble = trouble

    def _close(self) -> None:
        if self.reader:
            reader, self.reader = self.reader, None
            self._loop.call_soon_threadsafe(reader.close)  # where nobody uses it at the same moment
        if self._db:
            self._db.close()
            self._db = None


def connect(path: Path, patience: float) -> sqlite3.Connection:
    """Opens one that is there, and waits so many seconds for other processes. Raises sqlite3.Error."""
    db = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=patience, isolation_level=None, check_same_thread=False
    )
    db.execute("PRAGMA synchronous = NORMAL")
    return db


def put_aside(path: Path) -> None:
    """It stays beside its place, as the last one that could not be read. Its log goes: it is of no use without it."""
    for name in (f"{path.name}-wal", f"{path.name}-shm"):
        path.with_name(name).unlink(missing_ok=True)
    path.replace(path.with_name(f"{path.name}.unreadable"))
    log.warning("%s could not be read, is %s.unreadable now and was begun anew", path, path.name)


def _create(path: Path, schema: str) -> None:
    """It appears whole, and is its owner's alone from its first byte."""
    for name in (f"{path.name}-wal", f"{path.name}-shm"):
        path.with_name(name).unlink(missing_ok=True)  # of one that was removed; SQLite would take it for the new one's
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        draft = Path(folder) / path.name
        os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        with closing(sqlite3.connect(draft, isolation_level=None)) as db:
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            db.execute("PRAGMA journal_mode = WAL")
            db.executescript(schema)
        draft.replace(path)


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Only one process makes or puts aside a file there. The lock is the folder's: one on the file is SQLite's."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


@contextmanager
def _transaction(db: sqlite3.Connection, begin: str) -> Iterator[None]:
    db.execute(begin)
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):  # some errors have ended it already
            db.execute("ROLLBACK")
        raise


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _identity(path: Path) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return (0, 0)
    return (found.st_dev, found.st_ino)


def _code(error: sqlite3.Error) -> int:
    """SQLite's own, without what it says beyond; 0: the error is not SQLite's."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF
