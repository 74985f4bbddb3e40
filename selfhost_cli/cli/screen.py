"""What is drawn again and again in place on a terminal: whatever the window, and Ctrl-Z, do to it meanwhile."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

from rich.cells import cell_len
from rich.console import ConsoleRenderable, RenderableType
from rich.live import Live
from rich.text import Text

SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"
UP, ERASE = "\x1b[1A", "\r\x1b[2K"
LOCK_S = 0.5
"""A signal may come while whoever draws waits for us: then it is not waited for."""


class Redrawn(Live):
    """Rich's live display of a Text with unwrapped lines.

    Rich counts the rows that it drew. A window that became narrower has wrapped them into more, as today's terminals
    do: those are counted here, at the width of now. When Ctrl-Z stops us, the display goes and the cursor comes back;
    after `fg` it is drawn anew, below what the shell wrote.
    """

    def __init__(self, renderable: Text | None = None, **options: Any) -> None:
        super().__init__(renderable, **options)
        self._shown = ""
        self._drawn: list[int] = []
        """Columns of each line on the screen."""
        self._before: dict[int, Any] = {}

    def start(self, refresh: bool = False) -> None:
        super().start(refresh)
        if threading.current_thread() is threading.main_thread():
            self._handle(signal.SIGTSTP, self._stop_here)
            self._handle(signal.SIGCONT, self._go_on)

    def stop(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
        super().stop()

    def get_renderable(self) -> RenderableType:
        renderable = super().get_renderable()
        self._shown = renderable.plain if isinstance(renderable, Text) else ""
        return renderable

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        self._live_render._shape = (0, self._rows()) if self._drawn else None
        processed = super().process_renderables(renderables)
        self._drawn = [cell_len(line) for line in self._shown.split("\n")] if self._shown else []
        return processed

    def _rows(self) -> int:
        return rows(self._drawn, self.console.width)

    def _handle(self, number: signal.Signals, handler: Any) -> None:
        if signal.getsignal(number) in (signal.SIG_DFL, None):  # else somebody wishes otherwise
            self._before[number] = signal.signal(number, handler)

    def _stop_here(self, number: int, frame: FrameType | None) -> None:
        held = self._lock.acquire(timeout=LOCK_S)
        try:
            self._write(ERASE + (UP + ERASE) * (self._rows() - 1 if self._drawn else 0) + SHOW_CURSOR)
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)  # returns when we are continued, at once where no shell could do that
            signal.signal(number, self._stop_here)
            self._go_on(number, frame)
        finally:
            if held:
                self._lock.release()

    def _go_on(self, number: int, frame: FrameType | None) -> None:
        """Also after a SIGSTOP, which nobody can prepare for."""
        self._drawn = []
        self._write(HIDE_CURSOR)

    def _write(self, text: str) -> None:
        """Past Rich and Python's buffers: both may be in the middle of something where a signal finds us."""
        try:
            os.write(self.console.file.fileno(), text.encode())
        except (OSError, ValueError):
            pass  # nobody looks any more


def rows(lines: Sequence[int], width: int) -> int:
    """That lines of so many columns take in a window of `width`, once it has wrapped them."""
    return sum(max(1, -(-columns // max(1, width))) for columns in lines)
