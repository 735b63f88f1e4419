"""Chapter 09's panel: a page that is not writable, and what it takes to give W back, or to take MMU-writable away."""

from __future__ import annotations

from itertools import pairwise

from kvmbook.scenes import ACTS, BY_RULES, CARELESS, ENABLES, GUARDS, NOT_WRITABLE, Act, Stage, give_back
from kvmbook.views.drawing import INK, LOOK, LOST, Picture, block, box, svg, text
from kvmbook.views.panel import Panel, View

SIZE, ROW, TOP = 15, 23, 42
WHO, WHAT = 72, 290  # widths of the columns: who acts, what; then lock, chain, R and X, TLB
LOCK, LINK, GAP, RIGHTS, TLB = 56, 32, 14, 44, 76
CHAIN_AT = LOCK + 10
RIGHTS_AT = CHAIN_AT + 3 * LINK + 2 * GAP + 6
TLB_AT = RIGHTS_AT + RIGHTS + 4
CELLS = TLB_AT + TLB
LOCKED = LOOK["read-only"][0]
LIT = {"HW": LOCKED, "MW": LOCKED, "W": LOOK["writable"][0]}
LEGEND = "⟳ TLBs flushed; broken frame: stale"


def _band(row: Stage, before: Stage | None, high: float) -> list[str]:
    """mmu_lock while it is held: one band down the rows."""
    if not row.lock:
        return []
    begins = before is None or not before.held
    top = 2 if begins else 0
    bottom = high + 0.6 if row.held else high - 3  # pieces overlap a little: no seams
    parts = [f'<rect x="2" y="{top}" width="{LOCK - 4}" height="{bottom - top:g}" fill="{LOCKED}"/>']
    return [*parts, text(LOCK / 2, high - 7, row.lock, size=SIZE, fill=INK)] if begins else parts


def _chain(row: Stage, before: Stage | None) -> list[str]:
    """HW -> MW -> W: what is 1 is filled, what has changed has a thick frame."""
    if not row.rights:
        return [text(CHAIN_AT + 1.5 * LINK + GAP, 17, "not mapped", size=SIZE)]
    parts = []
    for number, (name, on) in enumerate(zip(LIT, row.chain, strict=True)):
        x, changed = CHAIN_AT + number * (LINK + GAP), before is not None and before.chain[number] != on
        extra = ' stroke-width="3"' if changed else ' stroke-opacity="0.5"'
        parts.append(box(x, 2, LINK, ROW - 4, LIT[name] if on else "none", extra=extra))
        parts.append(text(x + LINK / 2, 17, str(int(on)), size=SIZE, bold=changed, fill=INK if on else ""))
        if number:
            arrow = f"M{x - GAP + 2:g} 12h{GAP - 4:g}m-4 -3l4 3l-4 3"
            parts.append(f'<path d="{arrow}" stroke="currentColor" fill="none"/>')
    return parts


def _tlb(row: Stage) -> list[str]:
    """What vCPU 0 remembers; a broken frame if it lets a write pass that the SPTE would stop."""
    said = "⟳ " * row.flushed + row.tlb
    if row.tlb == "empty":
        return [text(TLB_AT + TLB / 2, 17, said, size=SIZE, bold=row.flushed)]
    fill = LOOK["writable" if "W" in row.tlb else "write-protected"][0]
    look = (LOST, ' stroke-width="3" stroke-dasharray="6 3"') if row.stale else ("currentColor", "")
    frame = box(TLB_AT + 2, 2, TLB - 4, ROW - 4, fill, stroke=look[0], extra=look[1])
    return [frame, text(TLB_AT + TLB / 2, 17, said, size=SIZE, bold=row.stale, fill=INK)]


def _row(row: Stage, before: Stage | None, number: int, harmed: bool) -> list[str]:
    """One step, in one line or (narrow) in two."""
    y, low = TOP + number * ROW, TOP + number * 2 * ROW
    guest = row.who.startswith("vCPU")
    bold, what = guest or row.flushed, row.what + f": {row.note}" * guest
    wide = [text(WHO - 6, y + 17, row.who, size=SIZE, anchor="end", bold=guest)]
    wide.append(text(WHO, y + 17, what, size=SIZE, anchor="start", bold=bold))
    short = f"{row.who} " * guest + what + " ✕" * harmed
    narrow = [text(LOCK + 8, low + 17, short, size=SIZE, anchor="start", bold=bold)]
    if harmed:
        wide.append(text(WHO + WHAT + CELLS + 12, y + 17, "✕", size=17, bold=True, fill=LOST))
    wide.append(block(_band(row, before, ROW), (WHO + WHAT, y)))
    narrow.append(block(_band(row, before, 2 * ROW), (0, low)))
    changed = before is not None and before.rights != row.rights
    rights = text(RIGHTS_AT + RIGHTS / 2, 17, row.rights, size=SIZE, bold=changed)
    cells = [*_chain(row, before), rights, *_tlb(row)]
    return [
        block(wide, look="wide"),
        block(narrow, look="narrow"),
        block(cells, (WHO + WHAT, y), (0, low + ROW)),
    ]


def give_back_picture(act: Act) -> Picture:
    """The steps from top to bottom: who acts, mmu_lock, the chain of the SPTE, and the TLB of vCPU 0."""
    heads = [text(LOCK / 2, 34, "lock", size=SIZE, bold=True)]
    heads += [
        text(CHAIN_AT + number * (LINK + GAP) + LINK / 2, 34, name, size=SIZE, bold=True)
        for number, name in enumerate(LIT)
    ]
    heads.append(text(RIGHTS_AT + RIGHTS / 2, 34, "R X", size=SIZE, bold=True))
    heads += [text(TLB_AT + TLB / 2, 16, "TLB of", size=SIZE, bold=True)]
    heads += [text(TLB_AT + TLB / 2, 34, "vCPU 0", size=SIZE, bold=True)]
    parts, told = [block(heads, (WHO + WHAT, 0), (0, 0))], list[str]()
    for number, (before, row) in enumerate(pairwise([None, *act.rows])):
        assert row is not None
        parts.append(block(_row(row, before, number, number == act.harmed), moment=number))
        told.append(sentence(row))
    high = TOP + len(act.rows) * ROW + 20
    size, narrow = (WHO + WHAT + CELLS + 26, high), (CELLS + 4, high + len(act.rows) * ROW)
    legend = text(0, -6, LEGEND, size=SIZE, anchor="start")
    parts.append(block([legend], (WHO, high), (2, narrow[1])))
    alt = f"{' '.join(told)} {f'Harm: {act.harm}' if act.harm else 'No harm is done'}."
    return Picture(svg(*size, alt, parts, narrow), alt, told)


def sentence(row: Stage) -> str:
    """One step in words."""
    who = f"{row.who} {row.what}".strip().replace("at the", "At the")
    note = f" ({row.note})" * bool(row.note)
    lock = f", mmu_lock held for {row.lock}" * bool(row.lock)
    chain = "HW {}, MW {}, W {}".format(*map(int, row.chain)) if row.rights else "not mapped"
    tlb = f"{'stale ' * row.stale}{row.tlb}"
    return f"{who}{note}{lock}{', all TLBs flushed' * row.flushed}: {chain}; TLB {tlb}."


def finding(act: Act, what: str, how: str) -> str:
    """What the run shows, in a sentence."""
    careless, back = how == CARELESS, act.gives_back
    if what == GUARDS:
        if act.harm:
            return f"The lock is dropped before the flush: {act.harm}."
        if not act.rows[0].chain[1]:
            return "MMU-writable was 0 already, so no TLB can write, and nothing is flushed."
        if careless:
            return "The flush comes after the lock. No TLB held the page, so it went well, this time."
        return "MMU-writable goes to 0, and all TLBs forget before mmu_lock is dropped."
    if what == ENABLES:
        if act.harm:
            return f"The pass finds W=0, and asks for no flush: {act.harm}."
        if careless:
            return "The pass finds W=0, and asks for no flush. No TLB could write, so no write is missed."
        return "The flush comes after the lock, and before user space is told: early enough for a log."
    if act.harm:
        return f"The fast path has not asked for MMU-writable: {act.harm}."
    if back is None:
        return "W stays 0: KVM does the write itself, and so sees it."
    if back.lock:
        return "W comes back under mmu_lock, in a frame that is the guest's own."
    return f"MMU-writable is 1, so W comes back without mmu_lock{', asked or not' * careless}; no harm is done."


def may_w_come_back() -> Panel:
    """Chapter 09: a page with W=0 for each of the reasons, who wants to change that, and KVM by its rules or careless."""

    def show(page: str, what: str, how: str) -> View:
        act = give_back(page, what, how)
        return View(give_back_picture(act), finding(act, what, how))

    settings = {"W is 0 because of": list(NOT_WRITABLE), "then": list(ACTS), "KVM acts": [BY_RULES, CARELESS]}
    return Panel("May W come back?", settings, show, unlock=["then", "KVM acts"])
