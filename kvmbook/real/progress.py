"""How far a long command is: one line, drawn again and again on a terminal, and now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

WIDTH = 20
OFTEN, SELDOM = 0.2, 30.0  # seconds between two lines, on a terminal and elsewhere


class Progress:
    """A bar for ``total`` things to do."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self.total, self.stream = total, stream or sys.stderr
        self._terminal = self.stream.isatty()
        self._began = self._last = time.monotonic()
        self._width = 0

    def show(self, done: int, said: str = "") -> None:
        """``done`` of them are done. Draws if it is time, and at the end."""
        now, pause = time.monotonic(), OFTEN if self._terminal else SELDOM
        if now - self._last < pause and done < self.total:
            return
        self._last = now
        left = (now - self._began) / max(done, 1) * (self.total - done)
        bar = "#" * (WIDTH * done // max(self.total, 1))
        line = f"[{bar:.<{WIDTH}}] {done:,} of {self.total:,}, {said}, {left // 60:.0f}:{left % 60:02.0f} left"
        self.stream.write("\r" + line.ljust(self._width) if self._terminal else line + "\n")
        self.stream.flush()
        self._width = len(line)

    def end(self) -> None:
        if self._terminal and self._width:
            self.stream.write("\n")
