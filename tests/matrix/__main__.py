"""The crash matrix on the command line: `scripts/crash-matrix --help`."""

# ruff: noqa: T201

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import IO, Any, NoReturn

from tests.matrix import broken
from tests.matrix.matrix import Group, groups, run_group
from tests.matrix.processes import fork_server

SHOWN = 20


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/crash-matrix",
        description="SIGKILL at every step of up, down and keeper, under every fault that matters there.",
    )
    parser.add_argument("--sample", type=int, metavar="N", help="about N of them, spread over all, always the same")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="only the I-th of N parts")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: cores)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a combination, then one with the sums")
    parser.add_argument("--markdown", action="store_true", help="the table as docs/crash-matrix.md has it")
    parser.add_argument(
        "--broken",
        choices=broken.RULES,
        metavar="RULE",
        help="break this money rule first, and stop where that is noticed",
    )
    options = parser.parse_args(argv)

    began = time.monotonic()
    part, parts = (int(number) for number in options.part.split("/"))
    if options.broken:
        rule = broken.RULES[options.broken]
        rule.apply()
        todo = [rule.group]
    else:
        todo = groups()[part - 1 :: parts]
    rows = sorted(
        _run(todo, options.workers, options.sample, first=bool(options.broken)),
        key=lambda row: (row["scenario"], row["fault"]),
    )
    sums = summary(rows) | {"seconds": round(time.monotonic() - began, 1)}
    if options.json:
        for row in rows:
            print(json.dumps(row))
        print(json.dumps(sums))
    else:
        _show(rows, sums, options.markdown)
    return 0 if rows and not sums["violations"] and not sums["billed"] and not sums["double_rents"] else 1


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `Show` asks for."""
    zero = max((row for row in rows if row["zero_s"] is not None), key=lambda row: row["zero_s"], default=None)
    return {
        "combinations": len(rows),
        "created": sum(row["created"] for row in rows),
        "billed": sum(row["billed"] for row in rows),
        "double_rents": sum(row["double_rents"] for row in rows),
        "longest_s": zero["zero_s"] if zero else 0.0,
        "violations": sum(bool(row["violations"]) for row in rows),
    }


def _run(todo: Sequence[Group], workers: int, sample: int | None, first: bool) -> Iterator[dict[str, Any]]:
    """All rows, from processes that take one group after the other from a pipe."""
    tickets, hand_out = os.pipe()
    os.write(hand_out, bytes(range(len(todo))) if len(todo) <= 256 else _too_many(todo))
    os.close(hand_out)
    results = []
    for _ in range(min(workers, len(todo))):
        results.append(tempfile.TemporaryFile("w+"))  # noqa: SIM115
        sys.stdout.flush()
        if not os.fork():
            _work(todo, tickets, results[-1], sample, first)
    for _ in results:
        _, status = os.wait()
        if status:
            raise SystemExit(f"a worker ended with {os.waitstatus_to_exitcode(status)}")
    for file in results:
        with file:
            file.seek(0)
            yield from (json.loads(line) for line in file)


def _too_many(todo: Sequence[Group]) -> bytes:
    raise ValueError(f"{len(todo)} groups do not fit into a byte each")


def _work(todo: Sequence[Group], tickets: int, out: IO[str], sample: int | None, first: bool) -> NoReturn:
    code = 1
    try:
        with fork_server() as scenes, out:
            while ticket := os.read(tickets, 1):
                for row in run_group(todo[ticket[0]], scenes, _choice(todo[ticket[0]], sample)):
                    print(json.dumps(row.as_dict()), file=out)
                    if first and row.violations:
                        break
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


TOTAL = 6700
"""About so many combinations there are; only --sample needs to know."""


def _choice(group: Group, sample: int | None) -> Any:
    share = 1.0 if sample is None else sample / TOTAL
    return lambda number, then: random.Random(f"{group}{number}{then}").random() < share


def _show(rows: Sequence[dict[str, Any]], sums: dict[str, Any], markdown: bool) -> None:
    table = _table(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for number, line in enumerate(table):
        padded = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        print(f"| {' | '.join(line)} |" if markdown else "  ".join(padded))
        if markdown and not number:
            print("| --- |" + " ---: |" * (len(line) - 1))
    print()
    bad = [row for row in rows if row["violations"]]
    for row in bad[:SHOWN]:
        print("BROKEN: {scenario} / {fault} / {kind} at step {number} {step}, then {then}:".format(**row))
        print(*(f"    {why}" for why in row["violations"]), sep="\n")
    if len(bad) > SHOWN:
        often = Counter(why for row in bad for why in row["violations"]).most_common(5)
        print(f"    and {len(bad) - SHOWN} more; most often: {often}")
    print(f"combinations run           {sums['combinations']}")
    print(f"boxes created              {sums['created']}")
    print(f"boxes billed after `down`  {sums['billed']}")
    print(f"double rents               {sums['double_rents']}")
    print(f"longest time to zero       {sums['longest_s']:.0f} s of the market's time")
    print(f"rules broken               {sums['violations']}")
    print(f"took                       {sums['seconds']:.0f} s")


def _table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    lines = [["what died, under which fault", "combinations", "created", "billed", "double", "longest to zero"]]
    for title, key in (("scenario", "scenario"), ("fault", "fault"), ("kind", "kind"), ("then", "then")):
        for value in dict.fromkeys(row[key] for row in rows):
            sums = summary([row for row in rows if row[key] == value])
            cells = [str(sums[name]) for name in ("combinations", "created", "billed", "double_rents")]
            lines.append([f"{title}: {value}", *cells, f"{sums['longest_s']:.0f} s"])
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
