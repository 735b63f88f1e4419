"""The pages of the book that nobody writes: they are made of the package and of the chapters, whenever the book is."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable, Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import cheat_sheet, function_map, synopses  # noqa: E402

MADE: dict[str, Callable[[], str]] = {
    "book/synopses.md": synopses.markdown,
    "book/cheat-sheet.md": cheat_sheet.markdown,
    "book/function-map.md": function_map.markdown,
}


def made() -> Iterator[tuple[str, bytes]]:
    """Each page by its path in the book. SystemExit says what one of them cannot be made of."""
    for name, markdown in MADE.items():
        try:
            yield name, markdown().encode()
        except ValueError as problem:
            raise SystemExit(str(problem)) from None
