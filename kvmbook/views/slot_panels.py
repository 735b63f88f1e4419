"""The pictures and panels of chapter 02: which errno a memslot call gets, and a harvest word by word."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from kvmbook.model import PAGE_SIZE, Change, MemorySlot
from kvmbook.scenes import (
    FLAGS,
    PLACES,
    PROTOCOLS,
    RULES,
    SEEN_PAGES,
    SIZES,
    SLOTS,
    WHEN,
    WRITTEN,
    Ask,
    Harvest,
    Row,
    ask_panel,
    harvest,
    listed,
)
from kvmbook.views.drawing import INK, LOOK, LOST, Picture, block, box, svg, text
from kvmbook.views.panel import Panel, View, counted

# ---- which errno? ----------------------------------------------------------------------------------------------------

SIZE = 15
FIRST_GFN, MEMORY_LEFT, GFN_WIDTH = 0x100, 124, 0.598  # where guest memory begins in the picture, and a page's width
TICKS = (0x100, 0x1C0, 0x240, 0x300, 0x380)
ROWS = {"slots before": 26, "asked for": 62, "slots after": 98}
MEMORY, CHECK, LINE = 530, 490, 23  # how wide guest memory and the checks are, how high a check is


def _x(gfn: float) -> float:
    return MEMORY_LEFT + (gfn - FIRST_GFN) * GFN_WIDTH


def slot_parts(slot: MemorySlot, top: float) -> list[str]:
    """One slot in the bar of guest memory."""
    fill = LOOK["read-only"][0] if slot.readonly else "none"
    long = slot.npages * GFN_WIDTH > 70
    said = f"{slot.id}{', logs' * (slot.logs_dirty and long)}"
    middle = _x(slot.base_gfn + slot.npages / 2)
    bar = box(_x(slot.base_gfn), top, slot.npages * GFN_WIDTH, 30, fill)
    return [bar, text(middle, top + 20, said, size=SIZE, fill=INK if slot.readonly else "")]


def asked_parts(asked: Ask, top: float) -> list[str]:
    """The range that the call asks for, and its answer."""
    gfn, pages = asked.call.guest_phys_addr / PAGE_SIZE, asked.call.memory_size / PAGE_SIZE
    said = f"✕ {asked.error}" if asked.error else "✓ done"
    if not pages:
        return [text(MEMORY_LEFT, top + 20, f"no range, the size is 0: {said}", size=SIZE, anchor="start", bold=True)]
    colour = LOST if asked.error else "currentColor"
    dashes = ' stroke-width="3"' + ' stroke-dasharray="6 3"' * bool(asked.error)
    bar = box(_x(gfn), top, pages * GFN_WIDTH, 30, "none", stroke=colour, extra=dashes)
    return [bar, text(_x(gfn + pages / 2), top + 20, said, bold=True, size=SIZE)]


def memory_parts(asked: Ask) -> list[str]:
    """Guest memory before the call, what is asked for, and guest memory after it."""
    parts = [text(MEMORY_LEFT - 24, y + 20, label, size=SIZE, anchor="end") for label, y in ROWS.items()]
    for label, slots in (("slots before", asked.before), ("slots after", asked.after)):
        parts += [part for slot in slots for part in slot_parts(slot, ROWS[label])]
    parts += asked_parts(asked, ROWS["asked for"])
    parts += [text(_x(tick), 146, f"{tick:#x}", size=SIZE) for tick in TICKS]
    parts.append(text(MEMORY_LEFT - 30, 146, "gfn", size=SIZE, anchor="end"))
    parts.append(text(8, 180, "checks: ✓ passed or does not apply", size=SIZE, anchor="start", bold=True))
    return [*parts, text(8, 202, "✕ refuses, no mark: not reached", size=SIZE, anchor="start", bold=True)]


def check_parts(asked: Ask) -> list[str]:
    """The kernel's checks in its order: taken, refusing, never reached."""
    parts = []
    for number, rule in enumerate(RULES, 1):
        y = number * LINE
        refuses = bool(asked.error) and number == asked.checks
        mark = "✕" if refuses else "✓" if number <= asked.checks else " "
        if refuses:
            parts.append(box(2, y - 16, CHECK - 4, 22, LOOK["missed"][0]))
        ink = INK if refuses else ""
        parts.append(text(30, y, str(number), size=SIZE, anchor="end", fill=ink, bold=refuses))
        parts.append(text(46, y, mark, size=SIZE, fill=ink, bold=True))
        parts.append(text(60, y, rule.asks, size=SIZE, anchor="start", fill=ink, bold=refuses))
    return parts


def line_parts(first: str, second: str, y: float, low: float, bold: bool = False) -> list[str]:
    """A line at ``y``; in the narrow form two, from ``low`` on."""
    parts = [text(8, y, f"{first} {second}", size=SIZE, anchor="start", bold=bold)]
    halves = [
        text(8, low + 22 * n, said, size=SIZE, anchor="start", bold=bold) for n, said in enumerate((first, second))
    ]
    return [block(parts, look="wide"), block(halves, look="narrow")]


def ask_picture(asked: Ask) -> Picture:
    """Guest memory before the call and after it, what is asked for, and beside it how far the checks go; in the narrow form
    the checks stand below."""
    r, depth = asked.call, len(RULES) * LINE + 10
    call = f"slot {r.slot}, flags {r.flags},", f"guest_phys_addr {r.guest_phys_addr:#x}, memory_size {r.memory_size:#x}"
    parts = line_parts(*call, y=18, low=18, bold=True)
    parts += [block(memory_parts(asked), (0, 6), (0, 28)), block(check_parts(asked), (MEMORY, 22), (0, 236))]
    answer = f"refused with {asked.error} by check {asked.checks}" if asked.error else f"accepted: {asked.says}"
    alt = f"KVM_SET_USER_MEMORY_REGION with {' '.join(call)}: {answer}."
    return Picture(svg(MEMORY + CHECK, 22 + depth, alt, parts, (MEMORY, 236 + depth)), alt)


def ask_readout(asked: Ask) -> str:
    """The answer in a sentence: errno and the rule that was broken, or what was done."""
    if asked.error:
        return f"{asked.error}: {asked.says.split(': ', 1)[1]}."
    slots = ", ".join(f"{slot.id} ({slot.npages} pages from gfn {slot.base_gfn:#x})" for slot in asked.after)
    what = "Accepted, and nothing is done" if asked.change is Change.NONE else f"Done: {asked.says}"
    return f"{what}. The slots now: {slots}."


def which_errno() -> Panel:
    """Chapter 02: a KVM_SET_USER_MEMORY_REGION call of the reader's making, and the check that refuses it."""

    def show(slot: str, flags: str, place: str, size: str) -> View:
        asked = ask_panel(slot, flags, place, size)
        return View(ask_picture(asked), ask_readout(asked))

    settings = {
        "slot": list(SLOTS),
        "flags": list(FLAGS),
        "first gfn": list(PLACES),
        "size": list(SIZES),
    }
    return Panel("Which errno?", settings, show)


# ---- a harvest -------------------------------------------------------------------------------------------------------

ROW = 24
WHO, LIVE, BUFFER, SPTE, TLB = 72, 326, 506, 726, 846  # where each group of columns begins, "who" ends
WORD, LETTER = 58, 36  # widths of their cells
# In the narrow form a step has two lines: who does what, SPTE and TLB; below, the words of the bitmap.
LABEL_AT, WORDS_AT, LETTERS_AT = (-4, 0), (8 - LIVE, 21), (288 - SPTE, 0)
NARROW_WIDE, NARROW_ROW = 520, 54


def word_hex(word: int) -> str:
    """A word of the bitmap in as few letters as fit."""
    return "ff…ff" if word == 2**64 - 1 else f"{word:x}"


def _cells(row: Row) -> list[tuple[int, int, str]]:
    """(left, width, what is in it) of each cell of a row: six words, then six letters."""
    cells = [(LIVE + n * WORD, WORD, word_hex(word)) for n, word in enumerate(row.live)]
    cells += [(BUFFER + n * WORD, WORD, word_hex(word)) for n, word in enumerate(row.buffer)]
    cells += [(SPTE + n * LETTER, LETTER, "W" if w else "–") for n, w in enumerate(row.spte)]
    letters = {None: " ", True: "W", False: "–"}
    return cells + [(TLB + n * LETTER, LETTER, letters[w]) for n, w in enumerate(row.tlb)]


def _cells_parts(row: Row, before: Row | None, numbers: range) -> list[str]:
    """Some cells of a row: framed if they changed; with a broken frame what a TLB allows more than its SPTE."""
    was, parts, same = before and _cells(before), list[str](), list[str]()
    for number in numbers:
        x, width, said = _cells(row)[number]
        changed = was is not None and said != was[number][2]
        if number >= 9 and said == "W" and not row.spte[number - 9]:
            extra = ' stroke-width="2.5" stroke-dasharray="5 3"'
            parts.append(box(x + 2, -16, width - 4, 21, "none", stroke=LOST, extra=extra))
        elif changed:
            parts.append(box(x + 2, -16, width - 4, 21, "none"))
        if said != " ":
            written = text(x + width / 2, 0, said, size=SIZE, bold=changed)
            (parts if changed or was is None else same).append(written)
    return [*parts, block(same, look="same")] if same else parts


def row_parts(row: Row, before: Row | None) -> list[str]:
    """A step: who does what, and the cells after it."""
    guest = row.who.startswith("vCPU")
    what = f"⟳ {row.what}" if row.flushed else row.what
    label = [
        text(WHO - 6, 0, row.who, size=SIZE, anchor="end", bold=guest),
        text(WHO + 2, 0, what, size=SIZE, anchor="start", bold=guest or row.flushed),
    ]
    return [
        block(label, narrow=LABEL_AT),
        block(_cells_parts(row, before, range(6)), narrow=WORDS_AT),
        block(_cells_parts(row, before, range(6, 12)), narrow=LETTERS_AT),
    ]


def _headings() -> list[str]:
    words, letters = list[str](), [text(SPTE - 2, 34, "page", size=SIZE, anchor="end")]
    for left, said in ((LIVE, "live bits"), (BUFFER, "buffer")):
        words.append(text(left + 1.5 * WORD, 16, said, size=SIZE, bold=True))
        words += [text(left + (n + 0.5) * WORD, 34, f"word {n}", size=SIZE) for n in range(3)]
    for left, said in ((SPTE, "SPTE"), (TLB, "TLB")):
        letters.append(text(left + 1.5 * LETTER, 16, said, size=SIZE, bold=True))
        letters += [text(left + (n + 0.5) * LETTER, 34, str(page), size=SIZE) for n, page in enumerate(SEEN_PAGES)]
    return [block(words, narrow=(WORDS_AT[0], 40)), block(letters, narrow=LETTERS_AT)]


def pages_said(pages: Sequence[int]) -> str:
    """Page numbers in words."""
    if len(pages) > 5:
        return f"all {len(pages)} pages"
    return f"page{'s' * (len(pages) > 1)} {listed([str(page) for page in pages])}" if pages else "no page"


def harvest_picture(seen: Harvest) -> Picture:
    """The bitmap's words, W in SPTEs and TLB, after each step."""
    parts, told = _headings(), list[str]()
    for number, (before, row) in enumerate(pairwise([None, *seen.rows])):
        assert row is not None
        places = (0, 56 + number * ROW), (0, 102 + number * NARROW_ROW)
        parts.append(block(row_parts(row, before), *places, moment=number))
        told.append(f"{row.who} {row.what}".strip() + ".")
    bottom, low = 52 + len(seen.rows) * ROW, 88 + len(seen.rows) * NARROW_ROW
    stale = "broken frame: the TLB allows what the SPTE does not"
    parts += line_parts("frame: changed by this step;", stale, y=bottom + 8, low=low + 12)
    alt = f"This report: {pages_said(seen.now)}. The next: {pages_said(seen.next)}. Step by step: {' '.join(told)}"
    size, narrow = (TLB + 3 * LETTER + 10, bottom + 16), (NARROW_WIDE, low + 42)
    return Picture(svg(*size, alt, parts, narrow), alt, told)


def harvest_readout(seen: Harvest) -> str:
    """What each report names, and what it cost."""
    lost = f"Missed: {pages_said(seen.missed)}." if seen.missed else "No write is missed."
    reports = f"This report: {pages_said(seen.now)}. The next one: {pages_said(seen.next)}."
    return f"{reports} {counted(seen.flushes).capitalize()} in this harvest. {lost}"


def word_by_word() -> Panel:
    """Chapter 02: a harvest's steps, with a write to page 1 at a moment of the reader's choice."""

    def show(protocol: str, written: str, when: str) -> View:
        seen = harvest(protocol, written, when)
        return View(harvest_picture(seen), harvest_readout(seen))

    settings = {
        "protocol": list(PROTOCOLS),
        "written before": list(WRITTEN),
        "page 1 is written (again)": list(WHEN),
    }
    return Panel("A harvest, word by word", settings, show, unlock=["protocol"])
