"""The synopses of all chapters on one page, so that the book can be skimmed.

Usage: synopses.py OUT.md
"""

from __future__ import annotations

import json
import pathlib
import re
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.chapters import promise_of, synopsis_of, title_of  # noqa: E402

INTRODUCTION = """\
What each chapter promises, and what it comes to: five minutes to skim, ten to read. The chapters say all of it themselves; it
is put together when the book is built."""


def markdown(folder: pathlib.Path = ROOT / "notebooks") -> str:
    """The page. ValueError names a chapter without a promise or a synopsis."""
    return "\n".join(["# Synopses", "", INTRODUCTION, "", *sections(folder)])


def sections(folder: pathlib.Path) -> Iterator[str]:
    """A section for each chapter: its title, its promise, its points."""
    for path in sorted(folder.glob("[0-9]*.ipynb")):
        chapter = json.loads(path.read_text())
        try:
            promise, points = promise_of(chapter), synopsis_of(chapter)
        except ValueError as problem:
            raise ValueError(f"{path.name}: {problem}") from None
        yield from (f"## [{title_of(chapter)}](../notebooks/{path.name})", "")
        yield from (f"*{from_book(promise)}*", "", *(f"- {from_book(point)}" for point in points), "")


def from_book(text: str) -> str:
    """The links of a notebook, as they are from the folder book/."""
    text = re.sub(r"\]\((?=[\w-]+\.ipynb)", "](../notebooks/", text)
    return text.replace("](../book/", "](")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    pathlib.Path(sys.argv[1]).write_text(markdown())
