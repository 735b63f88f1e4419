"""The pictures and panels of chapter 02: which errno a memslot call gets, and a harvest word by word."""

from __future__ import annotations

from collections.abc import Sequence

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
from kvmbook.views.drawing import INK, LOOK, LOST, Picture, box, svg, text
from kvmbook.views.panel import Panel, View, counted

# ---- which errno? ----------------------------------------------------------------------------------------------------

FIRST_GFN, MEMORY_LEFT, GFN_WIDTH = 0xC0, 96, 0.93  # where guest memory begins in the picture, and a page's width
TICKS = (0x100, 0x180, 0x1C0, 0x200, 0x240, 0x300, 0x380)


def _x(gfn: float) -> float:
    return MEMORY_LEFT + (gfn - FIRST_GFN) * GFN_WIDTH


def slot_parts(slot: MemorySlot, top: float) -> list[str]:
    """One slot in the bar of guest memory."""
    x, width = _x(slot.base_gfn), slot.npages * GFN_WIDTH
    fill = LOOK["read-only"][0] if slot.readonly else "none"
    ink, mark = (INK if slot.readonly else ""), "logs" if slot.logs_dirty else "read-only" if slot.readonly else ""
    parts = [box(x, top, width, 42, fill), text(x + width / 2, top + (18 if mark else 26), f"slot {slot.id}", fill=ink)]
    return parts + [text(x + width / 2, top + 35, mark, size=13, fill=ink)] * bool(mark)


def asked_parts(asked: Ask, top: float) -> list[str]:
    """The range that the call asks for, and its answer."""
    gfn, pages = asked.call.guest_phys_addr / PAGE_SIZE, asked.call.memory_size / PAGE_SIZE
    said = f"✕ {asked.error}" if asked.error else "✓ done"
    if not pages:
        return [text(MEMORY_LEFT, top + 27, f"no range, the size is 0: {said}", anchor="start", bold=True)]
    colour = LOST if asked.error else "currentColor"
    dashes = ' stroke-width="3"' + ' stroke-dasharray="6 3"' * bool(asked.error)
    middle = _x(gfn + pages / 2)
    return [box(_x(gfn), top, pages * GFN_WIDTH, 42, "none", stroke=colour, extra=dashes)] + [
        text(middle, top + 27, said, bold=True, size=13 if pages < 100 else 14)
    ]


def check_parts(asked: Ask, top: float) -> list[str]:
    """The kernel's checks in its order: taken, refusing, never reached."""
    parts = []
    for number, rule in enumerate(RULES, 1):
        column, line = divmod(number - 1, 7)
        x, y = 8 + column * 436, top + line * 28
        refuses = bool(asked.error) and number == asked.checks
        mark = "✕" if refuses else "✓" if number <= asked.checks else " "
        if refuses:
            parts.append(box(x, y - 18, 428, 26, LOOK["missed"][0]))
        ink = INK if refuses else ""
        parts.append(text(x + 26, y, str(number), anchor="end", fill=ink, bold=refuses))
        parts.append(text(x + 42, y, mark, fill=ink, bold=True))
        parts.append(text(x + 56, y, rule.asks, anchor="start", fill=ink, bold=refuses))
    return parts


def ask_picture(asked: Ask) -> Picture:
    """Guest memory before the call and after it, what is asked for, and how far the checks go."""
    r = asked.call
    call = f"slot {r.slot}, flags {r.flags}, guest_phys_addr {r.guest_phys_addr:#x}, memory_size {r.memory_size:#x}"
    parts = [text(8, 20, call, anchor="start", bold=True)]
    for label, y in (("before", 40), ("asked for", 90), ("after", 140)):
        parts.append(text(MEMORY_LEFT - 8, y + 27, label, anchor="end"))
    parts += [part for slot in asked.before for part in slot_parts(slot, 40)]
    parts += asked_parts(asked, 90)
    parts += [part for slot in asked.after for part in slot_parts(slot, 140)]
    parts += [text(_x(tick), 202, f"{tick:#x}", size=13) for tick in TICKS]
    parts.append(text(MEMORY_LEFT - 8, 202, "gfn", anchor="end", size=13))
    parts.append(
        text(8, 234, "checks: ✓ passed or does not apply, ✕ refuses, no mark: not reached", anchor="start", bold=True)
    )
    answer = f"refused with {asked.error} by check {asked.checks}" if asked.error else f"accepted: {asked.says}"
    alt = f"KVM_SET_USER_MEMORY_REGION with {call}: {answer}."
    return Picture(svg(880, 452, alt, parts + check_parts(asked, 262)), alt)


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

ROW = 28
LIVE, BUFFER, SPTE, TLB = 288, 460, 664, 776  # where each group of columns begins
WORD, LETTER = 54, 32  # widths of their cells


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


def row_parts(row: Row, before: Row | None, y: float) -> list[str]:
    """One line: what changed is framed; a TLB entry that allows more than its SPTE has a broken frame."""
    said = f"⟳ {row.what}" if row.flushed else row.what
    guest = row.who.startswith("vCPU")
    parts = [
        text(58, y, row.who, anchor="end", bold=guest),
        text(66, y, said, anchor="start", bold=guest or row.flushed),
    ]
    was = [None] * 12 if before is None else [cell[2] for cell in _cells(before)]
    for number, (x, width, said) in enumerate(_cells(row)):
        changed = before is not None and said != was[number]
        stale = number >= 9 and said == "W" and not row.spte[number - 9]
        if stale:
            extra = ' stroke-width="2.5" stroke-dasharray="5 3"'
            parts.append(box(x + 2, y - 17, width - 4, 23, "none", stroke=LOST, extra=extra))
        elif changed:
            parts.append(box(x + 2, y - 17, width - 4, 23, "none"))
        if said != " ":
            parts.append(text(x + width / 2, y, said, bold=changed))
    return parts


def _headings() -> list[str]:
    parts = []
    for left, said in ((LIVE, "live bits"), (BUFFER, "buffer")):
        parts.append(text(left + 1.5 * WORD, 18, said, bold=True))
        parts += [text(left + (n + 0.5) * WORD, 36, f"word {n}", size=13) for n in range(3)]
    for left, said in ((SPTE, "SPTE"), (TLB, "TLB")):
        parts.append(text(left + 1.5 * LETTER, 18, said, bold=True))
        parts += [text(left + (n + 0.5) * LETTER, 36, str(page), size=13) for n, page in enumerate(SEEN_PAGES)]
    return [*parts, text(SPTE - 2, 36, "page", size=13, anchor="end")]


def pages_said(pages: Sequence[int]) -> str:
    """Page numbers in words."""
    if len(pages) > 5:
        return f"all {len(pages)} pages"
    return f"page{'s' * (len(pages) > 1)} {listed([str(page) for page in pages])}" if pages else "no page"


def harvest_picture(seen: Harvest) -> Picture:
    """The bitmap's words, W in SPTEs and TLB, after each step."""
    parts = _headings()
    for number, row in enumerate(seen.rows):
        parts += row_parts(row, seen.rows[number - 1] if number else None, 62 + number * ROW)
    bottom = 66 + len(seen.rows) * ROW
    legend = "frame: changed by this step; broken frame: stale, the TLB still allows what the SPTE does not"
    parts.append(text(8, bottom + 8, legend, anchor="start", size=13))
    told = "; ".join(f"{row.who} {row.what}".strip() + " (flush)" * row.flushed for row in seen.rows)
    alt = f"This report: {pages_said(seen.now)}. The next: {pages_said(seen.next)}. Step by step: {told}."
    return Picture(svg(880, bottom + 20, alt, parts), alt)


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
    return Panel("A harvest, word by word", settings, show)
