"""The map of the book: which chapter asks for which, taken from the chapters' own lines, and how long a way through it is."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from kvmbook.scenes import listed
from kvmbook.views.drawing import LETTER, Picture, block, box, svg, text
from kvmbook.views.panel import Panel, View

# A line of the index: number, title, file, minutes.
ROW = re.compile(r"^\| (\d+) \| \[([^\]]+)\]\(([^)]+)\) \| (\d+) \|", re.M)
BEFORE = "*Before you read:*"
WHOLE = "the whole book"


class Chapter(NamedTuple):
    """One chapter: its title, the minutes that it takes, and the numbers of the chapters that it asks for itself."""

    title: str
    minutes: int
    asks_for: frozenset[int]


def paragraphs(path: pathlib.Path) -> Iterator[str]:
    """The paragraphs of a notebook's prose."""
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "markdown":
            yield from "".join(cell["source"]).split("\n\n")


def chapters_in(folder: pathlib.Path) -> dict[int, Chapter]:
    """The chapters by number, as ``folder``'s index lists them; what one asks for is what its line "Before you read" links
    to. ValueError for a chapter without that line, or one that asks for a later chapter."""
    found: dict[int, Chapter] = {}
    for number, title, file, minutes in ROW.findall("\n\n".join(paragraphs(folder / "index.ipynb"))):
        line = next((said for said in paragraphs(folder / file) if said.startswith(BEFORE)), None)
        if line is None:
            raise ValueError(f"{file} does not say what to read before it: {BEFORE}")
        asks_for = frozenset(int(other) for other in re.findall(r"\]\((\d\d)-[^)]*\.ipynb", line))
        if unknown := asks_for - set(found):
            raise ValueError(f"{file} asks for chapter {min(unknown)}, which does not come before it")
        found[int(number)] = Chapter(title, int(minutes), asks_for)
    return found


def way_to(chapters: Mapping[int, Chapter], number: int) -> list[int]:
    """The chapters to read for chapter ``number``, itself the last, in the order of the book."""
    asked = {number}
    for other in sorted(chapters, reverse=True):  # what a chapter asks for comes before it
        asked |= chapters[other].asks_for if other in asked else set()
    return sorted(asked)


# ---- the picture -----------------------------------------------------------------------------------------------------

ROW_HIGH, BOX_HIGH, SIZE, WIDTH = 38, 30, 15, 760
ARC = 0.75  # of what its two control points are away, a curve is


def _arc(above: int, below: int, left: float, lit: bool) -> str:
    """From a chapter to one that asks for it."""
    start, end = (row * ROW_HIGH + BOX_HIGH / 2 for row in (above, below))
    away = left - 12 - _out(below - above) / ARC
    look = 'stroke="currentColor" fill="none" ' + ('stroke-width="3"' if lit else 'stroke-opacity="0.45"')
    return f'<path d="M{left:g} {start:g}C{away:g} {start:g} {away:g} {end:g} {left - 3:g} {end:g}m-8 -4l8 4l-8 4" {look}/>'


def _out(rows: int) -> float:
    """How far an arc over so many rows goes to the left."""
    return 6 + 7 * rows


def map_picture(chapters: Mapping[int, Chapter], way: list[int]) -> Picture:
    """All chapters, one below the other, and arcs from each to those that ask for it; ``way`` is lit."""
    rows = {number: row for row, number in enumerate(chapters)}
    arcs = [(asked, number) for number, chapter in chapters.items() for asked in sorted(chapter.asks_for)]
    left = 18 + max((_out(rows[number] - rows[asked]) for asked, number in arcs), default=0)
    wide = max(len(f"{number}. {chapter.title}") for number, chapter in chapters.items()) * SIZE * LETTER + 14
    parts = [_arc(rows[a], rows[b], left, {a, b} <= set(way) and len(way) < len(rows)) for a, b in arcs]
    for number, chapter in chapters.items():
        lit, y = number in way, rows[number] * ROW_HIGH + 1.5
        frame = ' stroke-width="3"' if lit else ' stroke-opacity="0.45"'
        parts.append(box(left, y, wide, BOX_HIGH - 3, "none", extra=frame))
        said = f"{number}. {chapter.title}"
        parts.append(text(left + 10, y + 19, said, size=SIZE, anchor="start", bold=lit))
        minutes = text(left + wide + 70, y + 19, f"{chapter.minutes} min", size=SIZE, anchor="end", bold=lit)
        parts.append(block([minutes], look="wide"))
    told = [
        f"{number}. {chapter.title}" + f", asks for {_numbers(chapter.asks_for)}" * bool(chapter.asks_for)
        for number, chapter in chapters.items()
    ]
    alt, high = f"The chapters, and which asks for which. {'; '.join(told)}.", len(rows) * ROW_HIGH
    return Picture(svg(max(WIDTH, left + wide + 76), high, alt, parts, (left + wide + 4, high)), alt)


def _numbers(chapters: Iterable[int]) -> str:
    return listed([str(number) for number in sorted(chapters)])


def book_map(folder: str | pathlib.Path = ".") -> Panel:
    """Which chapters a chapter asks for, and those in turn; ``folder`` has the notebooks. Errors as `chapters_in`."""
    chapters = chapters_in(pathlib.Path(folder))

    def show(wanted: str) -> View:
        whole = wanted == WHOLE
        way = list(chapters) if whole else way_to(chapters, int(wanted))
        minutes = sum(chapters[number].minutes for number in way)
        if whole:
            said = f"All {len(way)} chapters, in the order of their numbers: {minutes} minutes."
        elif way[:-1]:
            said = f"For chapter {wanted} read {_numbers(way[:-1])} before: {minutes} minutes with it."
        else:
            said = f"Chapter {wanted} asks for no other: {minutes} minutes."
        return View(map_picture(chapters, way), said)

    return Panel("The way to a chapter", {"you want to read": [WHOLE, *map(str, chapters)]}, show)
