"""The panel of chapter 05: the same writes, caught in four ways, with PML's buffer, the bitmap and the exits counted."""

from __future__ import annotations

from kvmbook.scenes import PML_PLACES, WAYS, WRITE_TIMES, Caught, Counts, caught
from kvmbook.views.drawing import LOOK, Picture, block, box, svg, text
from kvmbook.views.figures import A_ROW, BELOW, COLUMN, LEFT, SIZE, narrow_size, sentences, timeline_parts
from kvmbook.views.panel import Panel, View

ROW = 36  # from one count to the next
DEEP = BELOW + 3 * ROW + 14  # a column of the timeline, and its counts


def counted(number: int, what: str) -> str:
    """A number of things in words."""
    return f"{number:,} {what}{'s' * (number != 1)}" if number else f"no {what}"


def _count(row: int, said: str, part: float | None, changed: bool) -> str:
    """One count: a number, over a bar that is full where all is (``part``: how much; None: there is no bar)."""
    y, wide = BELOW + row * ROW, COLUMN - 14
    parts = [text(COLUMN / 2 + 5, y + 18, said, size=SIZE, bold=changed)]
    if part is not None:
        parts.append(box(12, y + 24, wide, 7, "none"))
        parts += [box(12, y + 24, max(4, wide * part), 7, LOOK["reported"][0])] if part else []
    return block(parts, look="" if changed else "same")


def _counts(now: Counts, before: Counts | None, pages: int) -> list[str]:
    """What is noted after a moment: in the buffer, in the bitmap; and the exits."""
    none = now.buffer is None
    buffer = "no buffer" if none else f"{now.buffer} of {PML_PLACES}"
    new = [before is None or here != there for here, there in zip(now, before or now, strict=True)]
    return [
        _count(0, buffer, None if none else (now.buffer or 0) / PML_PLACES, new[0] and not none),
        _count(1, f"{now.bitmap} of {pages}", now.bitmap / pages, new[1]),
        _count(2, f"{now.exits:,}", None, new[2]),
    ]


def _names(row: int) -> str:
    """What the counts are, beside each row of moments; the narrow form has several."""
    names = enumerate(("buffer", "bitmap", "exits"))
    parts = [text(LEFT - 12, BELOW + n * ROW + 18, said, size=SIZE, anchor="end", bold=True) for n, said in names]
    at = (0, row * DEEP)
    return block([block(parts, at, at, look="narrow" if row else "")], moment=row * A_ROW if row else None)


def _sentence(said: str, now: Counts) -> str:
    """A moment in words, with its counts."""
    buffer = "" if now.buffer is None else f"{now.buffer} in the buffer, "
    return f"{said} {buffer}{now.bitmap} in the bitmap, {counted(now.exits, 'exit')} so far."


def caught_picture(seen: Caught) -> Picture:
    """TLB and SPTE of page 0 after each moment, and below them where the written pages are noted."""
    parts = timeline_parts(0, seen.moments, DEEP)
    parts += [_names(row) for row in range(-(-len(seen.moments) // A_ROW))]
    for number, now in enumerate(seen.counts):
        at, narrow = number * COLUMN, (number % A_ROW * COLUMN, number // A_ROW * DEEP)
        before = seen.counts[number - 1] if number else None
        parts.append(block(_counts(now, before, seen.pages), (LEFT + at, 0), (LEFT + narrow[0], narrow[1]), number))
    told = [_sentence(said, now) for said, now in zip(sentences(seen.moments), seen.counts, strict=True)]
    alt = f"{caught_readout(seen)} Page 0: {' '.join(told)}"
    width = LEFT + len(seen.moments) * COLUMN + 4
    return Picture(svg(width, DEEP, alt, parts, narrow_size(seen.moments, DEEP)), alt, told)


def caught_readout(seen: Caught) -> str:
    """What the writes cost, where they are noted when GET begins, and what it reports."""
    written = f"{counted(seen.pages * WRITE_TIMES, 'write')} to {counted(seen.pages, 'page')}"
    if seen.missed:
        return (
            f"{written}, no exit, and the report names {counted(seen.reported, 'page')}: KVM's log cannot know of them."
        )
    buffer = f", {seen.noted.buffer} in the buffer" if seen.noted.buffer else ""
    noted = f"Before GET {seen.noted.bitmap} are in the bitmap{buffer}"
    return f"{written}: {counted(seen.noted.exits, 'exit')}. {noted}; the report names {seen.reported}."


def one_write_four_ways() -> Panel:
    """Chapter 05: the same writes, caught by W, by D and PML, by emulation, or by nobody."""

    def show(way: str, pages: str) -> View:
        seen = caught(way, int(pages))
        return View(caught_picture(seen), caught_readout(seen))

    settings = {"caught by": list(WAYS), "pages written": ["600", "1", "512", "513"]}
    return Panel("One write, four ways", settings, show)
