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
FIRST_GFN, MEMORY_LEFT, GFN_WIDTH = 0xC0, 104, 1.08  # where guest memory begins in the picture, and a page's width
TICKS = (0x100, 0x180, 0x1C0, 0x200, 0x240, 0x300, 0x380)


def _x(gfn: float) -> float:
    return MEMORY_LEFT + (gfn - FIRST_GFN) * GFN_WIDTH


def slot_parts(slot: MemorySlot, top: float) -> list[str]:
    """One slot in the bar of guest memory."""
    fill = LOOK["read-only"][0] if slot.readonly else "none"
    mark = ", logs" if slot.logs_dirty else ", read-only" if slot.readonly else ""
    long = slot.npages * GFN_WIDTH > 90
    said = f"slot {slot.id}{mark}" if long else f"slot {slot.id}"
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


def check_parts(asked: Ask, top: float) -> list[str]:
    """The kernel's checks in its order: taken, refusing, never reached."""
    parts = []
    for number, rule in enumerate(RULES, 1):
        column, line = divmod(number - 1, 7)
        x, y = 8 + column * CHECK, top + line * 23
        refuses = bool(asked.error) and number == asked.checks
        mark = "✕" if refuses else "✓" if number <= asked.checks else " "
        if refuses:
            parts.append(box(x, y - 16, CHECK - 8, 22, LOOK["missed"][0]))
        ink = INK if refuses else ""
        parts.append(text(x + 26, y, str(number), size=SIZE, anchor="end", fill=ink, bold=refuses))
        parts.append(text(x + 42, y, mark, size=SIZE, fill=ink, bold=True))
        parts.append(text(x + 56, y, rule.asks, size=SIZE, anchor="start", fill=ink, bold=refuses))
    return parts


CHECK = 494  # the width of a column of checks


def ask_picture(asked: Ask) -> Picture:
    """Guest memory before the call and after it, what is asked for, and how far the checks go."""
    r = asked.call
    call = f"slot {r.slot}, flags {r.flags}, guest_phys_addr {r.guest_phys_addr:#x}, memory_size {r.memory_size:#x}"
    parts = [text(8, 18, call, size=SIZE, anchor="start", bold=True)]
    for label, y in (("before", 30), ("asked for", 66), ("after", 102)):
        parts.append(text(MEMORY_LEFT - 8, y + 20, label, size=SIZE, anchor="end"))
    parts += [part for slot in asked.before for part in slot_parts(slot, 30)]
    parts += asked_parts(asked, 66)
    parts += [part for slot in asked.after for part in slot_parts(slot, 102)]
    parts += [text(_x(tick), 150, f"{tick:#x}", size=SIZE) for tick in TICKS]
    parts.append(text(MEMORY_LEFT - 8, 150, "gfn", size=SIZE, anchor="end"))
    legend = "checks: ✓ passed or does not apply, ✕ refuses, no mark: not reached"
    parts.append(text(8, 178, legend, size=SIZE, anchor="start", bold=True))
    answer = f"refused with {asked.error} by check {asked.checks}" if asked.error else f"accepted: {asked.says}"
    alt = f"KVM_SET_USER_MEMORY_REGION with {call}: {answer}."
    return Picture(svg(2 * CHECK + 8, 356, alt, parts + check_parts(asked, 204)), alt)


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


def word_hex(word: int) -> str:
    """A word of the bitmap in as few letters as fit."""
    return "ff…ff" if word == 2**64 - 1 else f"{word:x}"


def _cells(row: Row) -> list[tuple[int, int, str]]:
    """(left, width, what is in it) of each cell of a row."""
    cells = [(LIVE + n * WORD, WORD, word_hex(word)) for n, word in enumerate(row.live)]
    cells += [(BUFFER + n * WORD, WORD, word_hex(word)) for n, word in enumerate(row.buffer)]
    cells += [(SPTE + n * LETTER, LETTER, "W" if w else "–") for n, w in enumerate(row.spte)]
    letters = {None: " ", True: "W", False: "–"}
    return cells + [(TLB + n * LETTER, LETTER, letters[w]) for n, w in enumerate(row.tlb)]


def row_parts(row: Row, before: Row | None) -> list[str]:
    """One line: what changed is framed; a TLB entry that allows more than its SPTE has a broken frame."""
    said = f"⟳ {row.what}" if row.flushed else row.what
    guest = row.who.startswith("vCPU")
    parts = [
        text(WHO - 6, 0, row.who, size=SIZE, anchor="end", bold=guest),
        text(WHO + 2, 0, said, size=SIZE, anchor="start", bold=guest or row.flushed),
    ]
    same: list[str] = []
    was = [None] * 12 if before is None else [cell[2] for cell in _cells(before)]
    for number, (x, width, said) in enumerate(_cells(row)):
        changed = before is not None and said != was[number]
        stale = number >= 9 and said == "W" and not row.spte[number - 9]
        if stale:
            extra = ' stroke-width="2.5" stroke-dasharray="5 3"'
            parts.append(box(x + 2, -16, width - 4, 21, "none", stroke=LOST, extra=extra))
        elif changed:
            parts.append(box(x + 2, -16, width - 4, 21, "none"))
        if said != " ":
            (parts if changed or before is None else same).append(text(x + width / 2, 0, said, size=SIZE, bold=changed))
    return [*parts, block(same, look="same")]


def _headings() -> list[str]:
    parts = []
    for left, said in ((LIVE, "live bits"), (BUFFER, "buffer")):
        parts.append(text(left + 1.5 * WORD, 16, said, size=SIZE, bold=True))
        parts += [text(left + (n + 0.5) * WORD, 34, f"word {n}", size=SIZE) for n in range(3)]
    for left, said in ((SPTE, "SPTE"), (TLB, "TLB")):
        parts.append(text(left + 1.5 * LETTER, 16, said, size=SIZE, bold=True))
        parts += [text(left + (n + 0.5) * LETTER, 34, str(page), size=SIZE) for n, page in enumerate(SEEN_PAGES)]
    return [*parts, text(SPTE - 2, 34, "page", size=SIZE, anchor="end")]


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
        parts.append(block(row_parts(row, before), (0, 56 + number * ROW), moment=number))
        told.append(f"{row.who} {row.what}".strip() + ".")
    bottom = 52 + len(seen.rows) * ROW
    legend = "frame: changed by this step; broken frame: stale, the TLB still allows what the SPTE does not"
    parts.append(text(8, bottom + 8, legend, anchor="start", size=SIZE))
    alt = f"This report: {pages_said(seen.now)}. The next: {pages_said(seen.next)}. Step by step: {' '.join(told)}"
    return Picture(svg(TLB + 3 * LETTER + 10, bottom + 16, alt, parts), alt, told)


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
