"""An SPTE as a picture: its hex digits over its bits, and the names of the bits."""

from __future__ import annotations

from collections.abc import Mapping

from kvmbook.model import SpteFormat
from kvmbook.scenes import ABOUT_KINDS, ADDRESS, FREE, HARDWARE_READS, KVM_READS, Field, fields, spte_state
from kvmbook.views.drawing import INK, LOOK, LOST, Picture, box, svg, text

KINDS = {HARDWARE_READS: "#f0e442", KVM_READS: "#b9a7e0", ADDRESS: "none", FREE: "none"}  # the colour of each
CELL, LEFT, FRAME_WIDTH = 27, 6, 220
WIDTH = LEFT + 24 * CELL + FRAME_WIDTH + LEFT


def _x(bit: int) -> float:
    """The left edge of a bit's cell. The frame's forty bits, 51 to 12, share one wide box."""
    if bit >= 52:
        return LEFT + (63 - bit) * CELL
    return LEFT + 12 * CELL + FRAME_WIDTH * (bit < 12) + (11 - min(bit, 11)) * CELL


def _cell(field: Field, bit: int, word: int, before: int, y: float) -> list[str]:
    on, flipped = word >> bit & 1, (word ^ before) >> bit & 1
    fill = KINDS[field.kind] if on else "none"
    frame = f' stroke-width="{3 if flipped else 1}"' + ' stroke-dasharray="2 3"' * (field.kind == FREE and not flipped)
    ink = INK if fill != "none" else ""
    return [
        box(_x(bit) + 1, y, CELL - 2, 28, fill, stroke=LOST if flipped else "currentColor", extra=frame),
        text(_x(bit) + CELL / 2, y + 20, str(on), size=17, bold=bool(on), fill=ink),
        *([text(_x(bit) + CELL / 2, y + 42, "▲", size=13, fill=LOST)] if flipped else []),
    ]


def _hex_parts(word: int, y: float) -> list[str]:
    """The sixteen hex digits, each over its four bits; the frame's ten over their box."""
    digits, parts = f"{word:016x}", []
    for number in (0, 1, 2, 13, 14, 15):
        high, middle = 63 - 4 * number, _x(63 - 4 * number) + 2 * CELL
        parts += [
            text(middle, y, digits[number], size=18, bold=True),
            f'<path d="M{_x(high) + 3:g} {y + 11:g}v-5h{4 * CELL - 6:g}v5" fill="none" stroke="currentColor"/>',
        ]
    return [*parts, text(_x(51) + FRAME_WIDTH / 2, y, " ".join(digits[3:13]), size=18, bold=True)]


def _word_parts(fmt: SpteFormat, label: str, word: int, before: int, y: float) -> list[str]:
    """One word: its label and state, its hex digits, and its bits; those that differ from ``before`` are framed."""
    state = spte_state(fmt, word)
    fill, wide = LOOK[state][0], 24 + 8.2 * len(state)
    parts = [
        text(LEFT, y + 17, label, size=15, bold=True, anchor="start"),
        box(WIDTH - LEFT - wide, y, wide, 23, fill),
        text(WIDTH - LEFT - wide / 2, y + 16, state, bold=True, fill=INK if fill != "none" else ""),
        *_hex_parts(word, y + 40),
    ]
    for field in fields(fmt):
        for bit in range(field.low, field.low + field.width):
            if field.kind != ADDRESS:
                parts += _cell(field, bit, word, before, y + 54)
    said = f"pfn {fmt.spte_to_pfn(word):#x}"
    return [*parts, box(_x(51) + 1, y + 54, FRAME_WIDTH - 2, 28, "none"), text(_x(51) + FRAME_WIDTH / 2, y + 73, said)]


def _names_parts(fmt: SpteFormat, y: float) -> list[str]:
    """Bit numbers, and under them the short names with a bar in the kind's colour."""
    parts = [text(_x(51) + FRAME_WIDTH / 2, y + 12, "51 … 12", size=13)]
    for field in fields(fmt):
        left = _x(field.low + field.width - 1)
        width = FRAME_WIDTH if field.kind == ADDRESS else field.width * CELL
        if field.kind != ADDRESS:
            parts += [
                text(_x(bit) + CELL / 2, y + 12, str(bit), size=13) for bit in range(field.low, field.low + field.width)
            ]
        if field.kind in (HARDWARE_READS, KVM_READS):
            parts.append(box(left + 1, y + 18, width - 2, 22, KINDS[field.kind]))
        said = "address of the page" if field.kind == ADDRESS else field.short
        said = field.name if field.kind != ADDRESS and 8 * len(field.name) < width else said
        ink = INK if field.kind in (HARDWARE_READS, KVM_READS) else ""
        parts.append(text(left + width / 2, y + 34, said, size=13, bold=len(said) != 2, fill=ink))
    return parts


def _legend(y: float, several: bool) -> list[str]:
    parts, x = [], float(LEFT)
    for kind in (HARDWARE_READS, KVM_READS):
        parts += [box(x, y, 18, 18, KINDS[kind]), text(x + 26, y + 14, ABOUT_KINDS[kind], anchor="start")]
        x += 190
    if several:
        parts += [box(x, y, 18, 18, "none", stroke=LOST, extra=' stroke-width="3"')]
        parts.append(text(x + 26, y + 14, "▲ differs from the word above", anchor="start"))
    return parts


def words_picture(fmt: SpteFormat, words: Mapping[str, int]) -> Picture:
    """Words under each other, each under its label: hex digits over bits, names at the foot. What differs from the word above
    is framed."""
    parts: list[str] = []
    before = next(iter(words.values()))
    for number, (label, word) in enumerate(words.items()):
        parts += _word_parts(fmt, label, word, before, 4 + 106 * number)
        before = word
    foot = 106 * len(words) - (2 if len(words) == 1 else -4)
    parts += [*_names_parts(fmt, foot), *_legend(foot + 50, several=len(words) > 1)]
    told = [f"{label}: {word:016x}, {spte_state(fmt, word)}" for label, word in words.items()]
    alt = f"{fmt.name}. {'; '.join(told)}"
    return Picture(svg(WIDTH, foot + 74, alt, parts), alt)


def formats_picture(formats: Mapping[str, SpteFormat]) -> Picture:
    """The names of the bits in several formats, under each other."""
    parts: list[str] = []
    for number, (label, fmt) in enumerate(formats.items()):
        parts.append(text(LEFT, 20 + 78 * number, label, size=15, bold=True, anchor="start"))
        parts += _names_parts(fmt, 26 + 78 * number)
    told = []
    for label, fmt in formats.items():
        names = [f"{f.low} {f.name}" for f in reversed(fields(fmt)) if f.kind in (HARDWARE_READS, KVM_READS)]
        told.append(f"{label}: {', '.join(names)}")
    alt = f"Lowest bit and name of each field. {'. '.join(told)}"
    height = 78 * len(formats) + 8
    return Picture(svg(WIDTH, height + 22, alt, [*parts, *_legend(height, several=False)]), alt)
