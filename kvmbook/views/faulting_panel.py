"""The panel of chapter 07: one access followed through walk, fast path and slow path, with the lock that each step holds."""

from __future__ import annotations

from itertools import pairwise

from kvmbook.scenes import ACCESSES, FAULTS_ON, MEANWHILE, AccessPath, FaultStep, follow
from kvmbook.views.drawing import INK, LOOK, LOST, Picture, block, box, svg, text
from kvmbook.views.panel import Panel, View
from kvmbook.views.run_figures import LOSS

SIZE, ROW, TOP = 15, 24, 24
LANES = ("guest", "fast", "slow", "other")
LANE, TAG = 14, 48  # an actor's lane, and the mark in it
STEP = 56  # from the tag to the step's name
SAID, LOCK, SPTE, BIT, WIDE = 298, 636, 700, 862, 894  # where the columns begin, and where all ends
LOCK_WIDE, SPTE_WIDE, BIT_WIDE = 58, 158, 28
NARROW_SPTE, NARROW = 110, 342  # the narrow form has two or three lines a row: step; result, if any; lock and page
GREY = LOOK["read-only"][0]


def _step(step: FaultStep) -> list[str]:
    """Who acts (a guest's tag is round), and what the step is called."""
    shape = f'width="{TAG}" height="19" rx="{8 if step.lane == "guest" else 2}" fill="{GREY}" stroke="currentColor"'
    tag = text(TAG / 2, 17, step.lane, size=SIZE, fill=INK, bold=step.lane in ("fast", "slow"))
    return [f'<rect y="2" {shape}/>', tag, text(STEP, 17, step.step, size=SIZE, anchor="start")]


def _lock(lock: str) -> list[str]:
    """A thick frame: held for write, so nobody else has it."""
    if not lock:
        return []
    frame = ' stroke-width="3"' * (lock == "write")
    return [box(0, 2, LOCK_WIDE, 20, GREY, extra=frame), text(LOCK_WIDE / 2, 17, lock, size=SIZE, fill=INK)]


def _page(step: FaultStep, before: FaultStep | None) -> list[str]:
    """SPTE and bit after a step: a thick frame where the step has changed them, an SPTE's name where it begins."""
    spte, bit = (
        ("2M " * step.huge + step.spte, LOOK.get(step.spte, ("none", ""))[0]),
        LOOK["reported"][0] * step.bit or "none",
    )
    new = before is None or (before.spte, before.huge) != (step.spte, step.huge)
    marked = before is not None and before.bit != step.bit
    thick = ' stroke-width="3"'
    page = [box(0, 2, SPTE_WIDE, 20, spte[1], extra=thick * (new and before is not None))]
    if new:
        page.append(
            text(SPTE_WIDE / 2, 17, spte[0], size=SIZE, bold=before is not None, fill=INK if spte[1] != "none" else "")
        )
    x = BIT - SPTE
    log = [box(x, 2, BIT_WIDE, 20, bit, extra=thick * marked)]
    log.append(text(x + BIT_WIDE / 2, 17, str(int(step.bit)), size=SIZE, bold=marked, fill=INK * step.bit))
    same = [*page * (not new), *log * (not marked)]
    return [*page * new, *log * marked, *[block(same, look="same")] * bool(same)]


def _result(step: FaultStep) -> str:
    """What came of a step."""
    return ", ".join(filter(None, [step.said, "⟳ flush" * step.flushed]))


def _lines(step: FaultStep) -> int:
    """How many lines it takes in the narrow form."""
    return 3 if _result(step) else 2


def _row(step: FaultStep, before: FaultStep | None) -> list[str]:
    """One step: who, what came of it, the lock it holds, and how the page looks after it."""
    said, low = _result(step), (_lines(step) - 1) * ROW
    result = [text(0, 17, said, size=SIZE, anchor="start")]
    return [
        block(_step(step), (4 + LANES.index(step.lane) * LANE, 0), (4, 0)),
        *[block(result, (SAID, 0), (4, ROW))] * bool(said),
        *[block(_lock(step.lock), (LOCK, 0), (4, low))] * bool(step.lock),
        block(_page(step, before), (SPTE, 0), (NARROW_SPTE, low)),
    ]


def _sentence(step: FaultStep) -> str:
    """A row in words."""
    who = {"guest": "vCPU 0 ", "other": ""}.get(step.lane, "KVM: ")
    what = f"{who}{step.step}{f': {step.said}' * bool(step.said)}.{' Flush.' * step.flushed}"
    lock = f" mmu_lock held for {step.lock}." if step.lock else ""
    first = what[0] if what.startswith("vCPU") else what[0].upper()
    return f"{first}{what[1:]}{lock} SPTE: {'2M ' * step.huge}{step.spte}; bit {step.bit:d}."


def _headings() -> list[str]:
    left = ((4, "step"), (SAID, "what comes of it"))
    over = ((LOCK + LOCK_WIDE / 2 - 6, "mmu_lock"), (SPTE + SPTE_WIDE / 2, "SPTE"), (BIT + BIT_WIDE / 2, "bit"))
    wide = [text(x, 16, said, size=SIZE, bold=True, anchor="start") for x, said in left]
    wide += [text(x, 16, said, size=SIZE, bold=True) for x, said in over]
    narrow = [text(4, 16, "mmu_lock", size=SIZE, bold=True, anchor="start")]
    narrow += [text(x - SPTE + NARROW_SPTE, 16, said, size=SIZE, bold=True) for x, said in over[1:]]
    return [block(wide, look="wide"), block(narrow, look="narrow")]


def path_picture(path: AccessPath) -> Picture:
    """An access step by step: lanes for the guest, the fast path, the slow path and who comes in between; the lock that is
    held, the SPTE, and the page's bit."""
    parts, rows, low = _headings(), len(path.steps), TOP
    for number, (before, step) in enumerate(pairwise([None, *path.steps])):
        assert step is not None
        parts.append(block(_row(step, before), (0, TOP + number * ROW), (0, low), number))
        low += _lines(step) * ROW
    if path.lost:
        for x, y, look in ((WIDE / 2, TOP + rows * ROW, "wide"), (NARROW / 2, low, "narrow")):
            said = text(x, y + 18, LOSS, size=17, bold=True, fill=LOST)
            parts.append(block([said], moment=rows - 1, look=look))
    below = 28 if path.lost else 4
    alt = " → ".join(step.step + f" ({step.said})" * bool(step.said) for step in path.steps)
    alt = f"{alt}. {'The write is lost.' if path.lost else 'Nothing is lost.'}"
    size, narrow = (WIDE, TOP + rows * ROW + below), (NARROW, low + below)
    return Picture(svg(*size, alt, parts, narrow), alt, [_sentence(step) for step in path.steps])


def path_readout(path: AccessPath, kind: str) -> str:
    """What was found: which way, with which lock, and why."""
    ways, said = path.ways, [step.said for step in path.steps]
    if ways == ("hit",):
        return f"No fault: the TLB allows a {kind}, so nobody looks at the SPTE."
    if ways == ("walk",):
        return f"No fault: the SPTE allows a {kind}, so the CPU's walk is all, and KVM is not asked."
    if ways[-1] == "emulated":
        return "Emulated: KVM writes the page itself, and marks it. No SPTE changes, and mmu_lock is not taken."
    began = "Fast, without mmu_lock"
    if "slow" in ways:
        tried = next((one.split(":")[0] for one in said if one.endswith(": slow path")), "")
        why = f"Slow, after the fast path gave up ({tried})" if tried else "Slow at once"
        began = f"{why}, with mmu_lock held for {path.lock}"
    after = ["One exchange failed."] * any(one.startswith("the SPTE changed") for one in said)
    after += ["One try came to nothing: the guest faults again."] * any(one.startswith("raced") for one in said)
    after += ["Somebody else had done the work: spurious."] * ("spurious" in said)
    if not after:
        after = ["The page is marked dirty." if path.steps[-1].bit else "R and X come back, W does not: no mark."]
    return f"{began}. {' '.join(after)}"


def follow_one_access() -> Panel:
    """Chapter 07: the way of one access to a page of a slot that logs, and the lock that each step holds."""

    def show(access: str, hardware: str, meanwhile: str) -> View:
        kind, page = ACCESSES[access]
        path = follow(hardware, page, kind, meanwhile)
        return View(path_picture(path), path_readout(path, kind))

    settings = {
        "vCPU 0": list(ACCESSES),
        "hardware": list(FAULTS_ON),
        "in between": list(MEANWHILE),
    }
    return Panel("Follow one access", settings, show, unlock=["hardware", "in between"])
