"""What the benchmarks share: a line that says how far they are, the tables they print, and where README has them."""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ratio(pairs: Iterable[tuple[float, float]]) -> float:
    """The median of the first seconds, as a multiple of the median of the second."""
    ours, theirs = zip(*pairs, strict=True)
    return statistics.median(ours) / statistics.median(theirs)


def progress(text: str = "") -> None:
    """Say on a terminal what is measured now; nothing there wipes the line out."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{text[:100]:100}" + "\r" * (not text))
        sys.stderr.flush()


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown that can be read as it is: columns are as wide as what stands in them."""
    lines = [list(map(str, row)) for row in (head, ["-"] * len(head), *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines[1] = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def in_readme(part: str) -> re.Pattern[str]:
    """What README has between the two marks of a part, marks and all."""
    return re.compile(rf"<!-- make benchmark {part} -->\n(.*?)<!-- end -->", re.DOTALL)


def store(part: str, text: str) -> None:
    """Put what a part has measured in its place in README. ValueError if there is none."""
    readme = README.read_text()
    if (place := in_readme(part).search(readme)) is None:
        raise ValueError(f"README.md has no place for {part}")
    README.write_text(f"{readme[: place.start(1)]}\n{text}\n\n{readme[place.end(1) :]}")
