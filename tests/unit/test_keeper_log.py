"""The keeper's log is cut in place, under those who write and those who follow it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from selfhost_cli import logs
from selfhost_cli.keeper import log as keeper_log
from selfhost_cli.keeper.log import Log, cut


def test_the_end_of_a_large_log_stays_in_whole_lines_and_what_comes_follows_it(tmp_path: Path) -> None:
    path = tmp_path / "keeper.log"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        for number in range(100):
            os.write(descriptor, f"line {number:3}\n".encode())
        cut(path, descriptor, largest=900, kept=95)
        assert path.stat().st_size == 900, "not larger than it may be"
        cut(path, descriptor, largest=899, kept=95)
        os.write(descriptor, b"after\n")
    finally:
        os.close(descriptor)
    assert path.read_text().splitlines() == [f"line {number:3}" for number in range(90, 100)] + ["after"]


def test_a_file_that_is_not_what_we_write_to_is_left_alone(tmp_path: Path) -> None:
    ours, other = tmp_path / "ours", tmp_path / "other"
    other.write_text("x" * 100)
    with ours.open("ab") as file:
        file.write(b"y" * 100)
        file.flush()
        cut(other, file.fileno(), largest=10, kept=5)
    assert (len(ours.read_text()), len(other.read_text())) == (100, 100)


def test_who_follows_it_is_told_of_the_cut_and_reads_on(tmp_path: Path) -> None:
    path = tmp_path / "keeper.log"
    handler = Log()
    with path.open("a") as file:
        handler.setStream(file)
        handler.bound(path)
        log = logging.Logger("keeper")
        log.addHandler(handler)
        cursor = logs.Cursor(logs.KEEPER)

        def told() -> list[str]:
            return cursor.feed(*logs._local(path, cursor.offset)[logs.KEEPER])

        file.write("x" * 99 + "\n")
        file.write(("y" * 999 + "\n") * (keeper_log.LARGEST // 1000))
        file.flush()
        told()
        log.info("this one goes beyond")
        assert path.stat().st_size < keeper_log.KEPT + 100
        assert told() == ["(the log was cut)"]
        log.info("and this one is new")
        assert told() == ["and this one is new"]
        assert path.read_text().endswith("this one goes beyond\nand this one is new\n")
