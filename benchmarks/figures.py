"""What every benchmark here prints: figures as a table, or as JSON with what missed its goal first.

    .venv/bin/python benchmarks/figures.py

prints the machine that they are measured on.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """One measured number. `spread` is the interquartile range; `goal` is None for what is not ours."""

    figure: str
    value: float
    unit: str
    spread: float
    goal: float | None
    met: bool | None


def figure(name: str, values: Sequence[float], unit: str, goal: float | None = None, *, more: bool = False) -> Figure:
    """The median of the rounds. The goal is the most it may be; with `more`, the least."""
    value = statistics.median(values)
    quarters = statistics.quantiles(values, n=4) if len(values) > 1 else [value] * 3
    met = None if goal is None else (value >= goal if more else value <= goal)
    return Figure(name, round(value, 3), unit, round(quarters[2] - quarters[0], 3), goal, met)


def in_order(figures: Sequence[Figure]) -> list[Figure]:
    """Misses first, what has no goal last."""
    return sorted(figures, key=lambda one: (one.met is None, one.met))


def as_json(figures: Sequence[Figure]) -> str:
    return json.dumps([asdict(one) for one in in_order(figures)], indent=2)


def as_table(figures: Sequence[Figure]) -> str:
    rows: list[tuple[str, ...]] = [("figure", "median", "spread", "goal", "")]
    for one in in_order(figures):
        goal = (
            "" if one.goal is None else f"{'≤' if (one.value <= one.goal) == one.met else '≥'} {one.goal:g} {one.unit}"
        )
        met = {True: "met", False: "MISSED", None: ""}[one.met]
        rows.append((one.figure, f"{one.value:.2f} {one.unit}", f"{one.spread:.2f} {one.unit}", goal, met))
    return columns(rows)


def columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def machine() -> str:
    """One line: the day, the processor, its cores, the memory, the load of the last minute, system and Python."""
    model = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return ", ".join(
        [
            date.today().isoformat(),
            model[1] if model else platform.machine(),
            f"{len(os.sched_getaffinity(0))} cores",
            f"{memory:.0f} GB",
            f"load {os.getloadavg()[0]:.1f}",
            f"Linux {platform.release().partition('-')[0]}",
            f"Python {platform.python_version()}",
        ]
    )


if __name__ == "__main__":
    print(machine())
