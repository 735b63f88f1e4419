"""Chapter 06's panel: a page is aged, used, and asked about; its SPTE's bits, and what the host is told."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from kvmbook.model import SpteFormat
from kvmbook.scenes import AGED_ON, CALLS, USES, Ageing, age_touch_ask, fields
from kvmbook.views.drawing import INK, Picture, block, box, svg, text
from kvmbook.views.figures import A_ROW, BELOW, COLUMN, LEFT, SIZE, narrow_size, sentences, timeline_parts
from kvmbook.views.panel import Panel, View, counted
from kvmbook.views.word_figures import KINDS

DEEP = BELOW + 92  # a timeline with the word's bits under it
BIT, SAVED_AT, BITS_AT = 25, BELOW + 32, BELOW + 60  # a bit's width, and down to the two rows of bits
# Bits by their short names, each in its column: those that ageing saves stand over those that it takes.
PLACES: dict[str, tuple[float, float]] = {
    "sR": (0, SAVED_AT),
    "sX": (2, SAVED_AT),
    "R": (0, BITS_AT),
    "W": (1, BITS_AT),
    "X": (2, BITS_AT),
}
PLACES |= {"A": (3.2, BITS_AT), "MW": (4.25, BITS_AT)}


def bits_parts(fmt: SpteFormat, word: int, before: int | None) -> list[str]:
    """The SPTE's first and last digits, and the bits that ageing is about; a thick frame: changed."""
    digits = f"{word:016x}"
    new = before is not None and word != before
    parts = [text(COLUMN / 2 + 5, BELOW + 22, f"{digits[:3]} … {digits[-3:]}", size=SIZE, bold=new)]
    for field in fields(fmt):
        if field.short not in PLACES:
            continue
        column, y = PLACES[field.short]
        x, wide = 12 + column * BIT, BIT - 3 + 8 * (field.short == "MW")
        on, changed = bool(word & field.mask), before is not None and (word ^ before) & field.mask
        frame = f' stroke-width="{3 if changed else 1}"'
        parts.append(box(x, y, wide, 22, KINDS[field.kind] if on else "none", extra=frame))
        said = field.short.removeprefix("s") if on else "–"
        parts.append(text(x + wide / 2, y + 17, said, size=SIZE, bold=on, fill=INK if on else ""))
    return parts


def _row_names(row: int) -> str:
    """What the rows of digits and bits are; the narrow form has several, as the timeline has."""
    names = (("SPTE", BELOW + 22), ("saved", SAVED_AT + 17), ("bits", BITS_AT + 17))
    parts = [text(LEFT - 12, y, name, size=SIZE, anchor="end", bold=True) for name, y in names]
    at = (0, row * DEEP)
    return block([block(parts, at, at, look="narrow" if row else "")], moment=row * A_ROW if row else None)


def word_parts(fmt: SpteFormat, words: Sequence[int]) -> list[str]:
    """The bits of the SPTE under each moment of a timeline whose rows are `DEEP` apart."""
    parts = [_row_names(row) for row in range(-(-len(words) // A_ROW))]
    for number, (before, word) in enumerate(pairwise([None, *words])):
        assert word is not None
        narrow = (LEFT + number % A_ROW * COLUMN, number // A_ROW * DEEP)
        parts.append(block(bits_parts(fmt, word, before), (LEFT + number * COLUMN, 0), narrow, number))
    return parts


def ageing_picture(seen: Ageing) -> Picture:
    """The timeline of the page, and the bits of its SPTE under it."""
    moments = seen.moments
    said = [re.sub(r"^(\w+) host (\w+)", r"The host \2 by \1", sentence) for sentence in sentences(moments)]
    said = [sentence.replace("KVM: the CPU", "the CPU") for sentence in said]
    told = [f"{sentence} The word: {word:016x}." for sentence, word in zip(said, seen.words, strict=True)]
    alt = f"{seen.fmt.name}. {' '.join(told)}"
    parts = [*timeline_parts(0, moments, DEEP), *word_parts(seen.fmt, seen.words)]
    width = LEFT + len(USED) * COLUMN + 8  # as wide as the longest run, so that nothing moves
    return Picture(svg(width, DEEP, alt, parts, narrow_size(moments, DEEP)), alt, told)


USED = ("mapped", "aged", "used", "asked about")  # the moments, if somebody uses the page


def ageing_readout(seen: Ageing) -> str:
    """Whether the host is told the truth, and what it cost."""
    use = "The page was used" if seen.used else "Nobody used the page"
    told = "the host is told that it is " + ("in use" if seen.young else "idle")
    joined = f"{use}, and {told}" if seen.used == seen.young else f"{use}, but {told}"
    cost = f"{counted(seen.flushes).capitalize()}, {'one fault' if seen.faults else 'no fault'}."
    stale = " vCPU 0 can still write through its TLB." * seen.moments[-1].stale
    return f"{joined}. {cost}{stale}"


def age_touch_and_ask() -> Panel:
    """Chapter 06: age a page, let the guest use it, and ask."""

    def show(call: str, use: str, hardware: str) -> View:
        seen = age_touch_ask(hardware, call, use)
        return View(ageing_picture(seen), ageing_readout(seen))

    settings = {"the host ages by": list(CALLS), "then": list(USES), "hardware": list(AGED_ON)}
    return Panel("Age, touch, ask", settings, show, unlock=["hardware"])
