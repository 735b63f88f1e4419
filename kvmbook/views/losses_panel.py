"""The panel of chapter 16: a word of a CLEAR, the border of a 2M page in it, and which rule overlooks which huge page."""

from __future__ import annotations

from kvmbook.model import Kernel
from kvmbook.scenes import BORDER, COMPARISONS, HUGE, NAMED, WORD, lost_by_model, named_bits, overlooked
from kvmbook.views.drawing import INK, LOOK, LOST, Picture, block, box, svg, text
from kvmbook.views.panel import Panel, View

BORDERS = {"1": 1, "32": 32, "63": 63, "0, as the word does": 0}
TODAY = "rounded up (since v5.14)"
SIZE, ROW = 15, 27
WIDE, NARROW = 736, 372  # widths of the two forms
PAGES = ("the 2M page before", "the 2M page from bit {}")
NAME_AT, STATE_AT, LOOKS_AT, STATE = 8, (228, 428), 640, 190  # in the wide form: where columns begin; a state's width
LOW_AT, LOW_STATE = (8, 192), 174  # in the narrow form, where a rule has two lines
LOW_ROW = 54


def _word(border: int, bits: list[int], width: float) -> list[str]:
    """64 places, one a page, those of the second 2M page grey; a dot in each that the CLEAR names."""
    step, parts = (width - 16) / WORD, list[str]()
    x = 8 + border * step
    for at, end, fill in ((8.0, x, "none"), (x, width - 8, LOOK["read-only"][0])):
        parts.append(f'<rect x="{at:g}" y="0" width="{end - at:g}" height="26" fill="{fill}" stroke="currentColor"/>')
        ticks = "".join(f"M{8 + bit * step:g} 0v26" for bit in range(1, WORD) if at < 8 + bit * step < end)
        dots = "".join(f"M{8 + (bit + 0.5) * step:g} 13h0" for bit in bits if at <= 8 + (bit + 0.5) * step < end)
        ink = INK if fill != "none" else "currentColor"
        parts.append(f'<path d="{ticks}" stroke="{ink}" stroke-opacity="0.3"/>' * bool(ticks))
        parts.append(
            f'<path d="{dots}" stroke="{ink}" stroke-width="{step * 0.8:g}" stroke-linecap="round"/>' * bool(dots)
        )
    parts.append(f'<path d="M{x:g} -5V31" stroke="{LOST}" stroke-width="3"/>')
    under, half = f"bit {border}: a 2M page begins", 112
    parts.append(text(min(max(x, half), width - half), 50, under, size=SIZE, bold=True, fill=LOST))
    return parts


def _state(page: int, gfns: list[int], missed: set[int], at: float, width: float) -> list[str]:
    """What a rule leaves of one of the two 2M pages' SPTEs."""
    if page not in {gfn // HUGE for gfn in gfns}:
        return [text(at + width / 2, 0, "not named", size=SIZE, italic=True)]
    if page in missed:
        frame = ' stroke-width="3" stroke-dasharray="6 3"'
        shown = box(at, -18, width, 24, LOOK["writable"][0], stroke=LOST, extra=frame)
        return [shown, text(at + width / 2, 0, "✕ still writable", size=SIZE, bold=True, fill=INK)]
    shown = box(at, -18, width, 24, LOOK["write-protected"][0])
    return [shown, text(at + width / 2, 0, "write-protected", size=SIZE, fill=INK)]


def _rule(number: int, rule: str, gfns: list[int]) -> str:
    """One rule's row: what it leaves of the two, and at how many pages KVM looks."""
    missed, both = overlooked(rule, gfns), (BORDER // HUGE - 1, BORDER // HUGE)
    looks = f"{(count := len(COMPARISONS[rule](gfns)))} look{'s' * (count != 1)}"
    y, low = 150 + number * ROW, 158 + number * LOW_ROW
    wide = [part for page, at in zip(both, STATE_AT, strict=True) for part in _state(page, gfns, missed, at, STATE)]
    under = [part for page, at in zip(both, LOW_AT, strict=True) for part in _state(page, gfns, missed, at, LOW_STATE)]
    names = [
        text(NAME_AT, y, rule, size=SIZE, anchor="start", bold=rule == TODAY),
        text(LOOKS_AT, y, looks, size=SIZE, anchor="start"),
    ]
    low_names = [text(NAME_AT, low, f"{rule}: {looks}", size=SIZE, anchor="start", bold=rule == TODAY)]
    return "\n".join(
        [
            block([*names, block(wide, (0, y))], look="wide"),
            block([*low_names, block(under, (0, low + 26))], look="narrow"),
        ]
    )


def word_picture(border: int, bits: list[int]) -> Picture:
    """The word against the border of 2M pages, and below what each of `COMPARISONS` does with it."""
    gfns = [BORDER - border + bit for bit in bits]
    heads = [PAGES[0], PAGES[1].format(border)]
    wide = [text(at + STATE / 2, 118, said, size=SIZE, bold=True) for at, said in zip(STATE_AT, heads, strict=True)]
    low = [text(at + LOW_STATE / 2, 118, said, size=13, bold=True) for at, said in zip(LOW_AT, heads, strict=True)]
    title = "a word of a CLEAR: 64 pages; ● named"
    parts = [
        text(8, 18, title, size=SIZE, anchor="start"),
        block(_word(border, bits, WIDE), (0, 32), look="wide"),
        block(_word(border, bits, NARROW), (0, 32), look="narrow"),
        block(wide, look="wide"),
        block(low, look="narrow"),
        *(_rule(number, rule, gfns) for number, rule in enumerate(COMPARISONS)),
    ]
    misses = [rule for rule in COMPARISONS if overlooked(rule, gfns)]
    alt = f"A word of 64 pages; a 2M page begins at bit {border}; named: {', '.join(map(str, bits))}. "
    alt += f"A huge page is overlooked by: {', '.join(misses) or 'no rule'}."
    return Picture(
        svg(WIDE, 150 + len(COMPARISONS) * ROW - 8, alt, parts, (NARROW, 158 + len(COMPARISONS) * LOW_ROW - 18)), alt
    )


def which_word_loses() -> Panel:
    """Chapter 16: where the border lies in a word, and which of its pages a CLEAR names; what five rules make of it."""

    def show(begins: str, named: str) -> View:
        border = BORDERS[begins]
        bits = named_bits(border, named)
        lost = lost_by_model(border, bits)
        said = f"Asked for {Kernel.v6_18.name.removeprefix('Linux ')}, the model "
        said += f"loses the write to page {lost[0]} of the word." if lost else "loses no write."
        missed = [rule for rule in COMPARISONS if overlooked(rule, [BORDER - border + bit for bit in bits])]
        overlooks = f"Overlooked by: {', '.join(missed)}." if missed else "No rule overlooks a huge page."
        return View(word_picture(border, bits), f"{overlooks} {said}")

    settings = {"a 2M page begins at bit": list(BORDERS), "CLEAR names": list(NAMED)}
    return Panel("Which word loses?", settings, show)
