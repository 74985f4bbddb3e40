"""The figures over the length of the prompt, as an SVG. leather comes with the extra `plot`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from selfhost_cli.bench.figures import AtLength, Number
from selfhost_cli.errors import NotSetUp

WIDTH, HEIGHT = 1200, 800
CHARTS: tuple[tuple[str, Callable[[AtLength], Number | None]], ...] = (
    ("Time to first token, cold (s)", lambda one: one.cold),
    ("Time to first token, warm (s)", lambda one: one.warm),
    ("Prefill (tokens/s)", lambda one: one.prefill),
    ("Decode (tokens/s)", lambda one: one.decode),
)


def check() -> None:
    """Raises NotSetUp without the extra, before anything is measured."""
    try:
        import leather  # noqa: F401
    except ImportError as error:
        raise NotSetUp(
            "--svg needs a package that is not installed", "pip install 'selfhost-cli[plot]', or leave out --svg."
        ) from error


def draw(lengths: Sequence[AtLength], model: str, path: Path) -> None:
    """Four charts in one picture. Raises OSError."""
    import leather

    grid = leather.Grid()
    for title, of in CHARTS:
        points = [(one.prompt.value, number.value) for one in lengths if (number := of(one))]
        if not points:
            continue
        chart = leather.Chart(f"{title}, {model}")
        chart.add_x_scale(0, max(x for x, _ in points) * 1.05)
        chart.add_y_scale(0, max(y for _, y in points) * 1.05)
        chart.add_x_axis(name="tokens of the prompt")
        chart.add_line(points) if len(points) > 1 else chart.add_dots(points)
        grid.add_one(chart)
    path.write_text(grid.to_svg(width=WIDTH, height=HEIGHT), encoding="utf-8")
