"""Chapter 04's panel: who remembers what of one page, moment by moment."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from kvmbook.scenes import FIRST, LOWERED, NEXT, REMEMBERING, Recall, Remembered, who_remembers
from kvmbook.views.drawing import INK, LOOK, LOST, Picture, block, box, svg, text
from kvmbook.views.panel import Panel, View

COLUMN, LEFT, SIZE = 160, 84, 15
ROWS = (44, 94, 144)  # down to the TLB of vCPU 0, of vCPU 1, and the SPTE
KVM_AT, BELOW = 206, 218
A_ROW = 2  # moments beside each other in the narrow form


def _cell(y: float, fill: str, said: str, under: str, frame: str, bold: bool, lit: bool) -> str:
    """An entry or the SPTE: what it is, and below it the verdict or the bits. ``lit``: the moment is about it."""
    middle, ink = COLUMN / 2 + 5, INK if fill != "none" else ""
    parts = [box(12, y, COLUMN - 14, 42, fill, stroke=LOST if "dasharray" in frame else "currentColor", extra=frame)]
    if under:
        parts.append(text(middle, y + 18, said, size=SIZE, bold=bold, fill=ink))
        parts.append(text(middle, y + 36, under, size=SIZE, bold=under == "stale, matters", fill=ink))
    else:
        parts.append(text(middle, y + 26, said, size=SIZE, bold=bold, fill=ink))
    return block(parts, look="" if lit else "same")


def _entry(y: float, now: Remembered, before: Remembered | None, acts: bool) -> str:
    """What a vCPU remembers. A thick frame: changed; a broken one: stale, and it matters."""
    changed = before is None or (now.state, now.rights) != (before.state, before.rights)
    frame = ' stroke-width="3"' if changed else ' stroke-width="1"'
    if now.verdict == "stale, matters":
        frame = ' stroke-width="3" stroke-dasharray="6 3"'
    return _cell(y, LOOK[now.state][0], now.rights or "nothing", now.verdict, frame, changed, acts or now != before)


def _arrow(vcpu: int, answered: str) -> list[str]:
    """How far down an access had to go, from the TLB of the vCPU that makes it."""
    begin = ROWS[vcpu]
    end = {"TLB": begin + 21, "SPTE": ROWS[2] + 21, "KVM": KVM_AT - 5}[answered]
    look = 'stroke="currentColor" stroke-width="2"'
    dot = f'<circle cx="5" cy="{begin - 1}" r="3" {look}/>'
    return [dot, f'<path d="M5 {begin + 2}V{end}h6m-5 -5l5 5l-5 5" {look} fill="none"/>']


def _escaped(now: Recall, before: Recall | None) -> bool:
    """Whether this moment is a write that nobody but the TLB has seen."""
    return now.answered == "TLB" and before is not None and before.tlbs[int(now.who[-1])].verdict == "stale, matters"


def moment_parts(now: Recall, before: Recall | None) -> list[str]:
    """One column: who does what, both TLB entries, the SPTE, what came of it."""
    lost, middle = _escaped(now, before), COLUMN / 2 + 5
    came = "✕ nobody notices" if lost else now.came
    parts = [text(middle, 16, now.who, size=SIZE), text(middle, 35, now.what, size=SIZE, bold=True)]
    if now.answered:
        parts += _arrow(int(now.who[-1]), now.answered)
    for vcpu, entry in enumerate(now.tlbs):
        acts = now.answered == "TLB" and now.who == f"vCPU {vcpu}"
        parts.append(_entry(ROWS[vcpu], entry, before.tlbs[vcpu] if before else None, acts))
    changed = before is None or (now.spte, now.rights) != (before.spte, before.rights)
    frame, lit = f' stroke-width="{3 if changed else 1}"', changed or now.answered == "SPTE"
    parts.append(_cell(ROWS[2], LOOK[now.spte][0], now.spte, now.rights, frame, changed, lit))
    parts.append(text(middle, KVM_AT, came, size=SIZE, bold=lost or now.flushed, fill=LOST if lost else ""))
    return parts


def _row_names(row: int) -> str:
    """What the rows are; the narrow form has several such rows of moments, which come with their moments."""
    said = ("TLB of", 62), ("vCPU 0", 80), ("TLB of", 112), ("vCPU 1", 130), ("SPTE", 170), ("outcome", KVM_AT)
    parts = [text(LEFT - 12, y, name, size=SIZE, anchor="end", bold=True) for name, y in said]
    at = (0, row * BELOW)
    return block([block(parts, at, at, look="narrow" if row else "")], moment=row * A_ROW if row else None)


def sentences(moments: Sequence[Recall]) -> list[str]:
    """The run in words, one sentence or two a moment."""
    by = {"TLB": ": its TLB allows it", "SPTE": ": a walk", "KVM": ": a fault", "": ""}
    said = []
    for before, now in pairwise([None, *moments]):
        assert now is not None
        remember = []
        for vcpu, entry in enumerate(now.tlbs):
            what = f"{entry.rights}{f' ({entry.verdict})' * bool(entry.verdict)}" if entry.rights else "nothing"
            remember.append(f"vCPU {vcpu} remembers {what}")
        unseen = ", and nobody else notices" * _escaped(now, before)
        who = now.who[0].upper() + now.who[1:] if now.who[0] != "v" else now.who
        done = f"{who} {now.what}{by[now.answered]}{unseen}."
        said.append(f"{done} The SPTE: {now.spte}, {now.rights}. {', '.join(remember)}.")
    return said


def remembering_picture(moments: Sequence[Recall]) -> Picture:
    """Both TLBs and the SPTE of one page after each moment, side by side; in the narrow form two in a row."""
    rows = -(-len(moments) // A_ROW)
    parts = [_row_names(row) for row in range(rows)]
    for number, (before, now) in enumerate(pairwise([None, *moments])):
        assert now is not None
        narrow = LEFT + number % A_ROW * COLUMN, number // A_ROW * BELOW
        parts.append(block(moment_parts(now, before), (LEFT + number * COLUMN, 0), narrow, number))
    told = sentences(moments)
    width, narrow = LEFT + len(moments) * COLUMN + 6, (LEFT + A_ROW * COLUMN + 6, rows * BELOW)
    alt = " ".join(told)
    return Picture(svg(width, BELOW, alt, parts, narrow), alt, told)


def remembering_readout(moments: Sequence[Recall]) -> str:
    """How far vCPU 0's last write went, and why."""
    *_, before, last = moments
    entry = before.tlbs[0]
    if last.answered == "TLB":
        if entry.verdict == "stale, matters":
            return "vCPU 0's entry is stale, and it matters: the write passes, and neither SPTE nor KVM notices."
        return "vCPU 0's write passes its TLB; the SPTE would have let it pass, too."
    has = {"": "nothing", "clean": "a clean entry"}.get(entry.rights and entry.state, "no right to write")
    if last.answered == "SPTE":
        noted = "which notes it in D" if before.spte == "clean" else "whose D is set already"
        return f"vCPU 0 remembers {has}: its write has to walk to the SPTE, {noted}."
    if entry.verdict == "allows less":
        return "vCPU 0's entry allows less than the SPTE: its write faults, though there is nothing to repair."
    return f"vCPU 0 remembers {has}: its write faults, and KVM sees it."


def who_remembers_what() -> Panel:
    """Chapter 04: two vCPUs and one page, whose SPTE comes to allow less than their TLBs do."""

    def show(ad_bits: str, first: str, lowered: str, then: str) -> View:
        moments = who_remembers(ad_bits, first, lowered, then)
        return View(remembering_picture(moments), remembering_readout(moments))

    settings = {
        "A/D bits": list(REMEMBERING),
        "vCPU 0 has": list(FIRST),
        "then": list(LOWERED),
        "and before it writes": list(NEXT),
    }
    return Panel("Who remembers what", settings, show, unlock=["A/D bits"])
