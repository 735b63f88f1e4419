"""Trace replay: what a trace of KVM's events tells of each page, and what the model would disagree with.

Record it with the kernel's own tools: `perf record -e 'kvm:*,kvmmmu:*'` and `perf script`, trace-cmd, or ftrace's ``trace``
file; with the VM's threads alone (`perf record -p`), because no event names its VM. With a probe on kvm_flush_remote_tlbs
(`perf probe kvm_flush_remote_tlbs`) the trace also tells of flushes, for which KVM has no event.

What the events cannot show, so that nothing is said of it:

- The legacy MMU, which is the one of shadow paging, has no event for write protection, ageing, clearing dirty and zapping a
  single page. One sees a leaf made, and later made again; what was between is inferred from the fault, and marked so.
- fast_page_fault reads its new value again after the exchange: another CPU may have been quicker. So what it has more or less
  in A and D, or a page that has gone by then, is no disagreement.
- kvm_tdp_mmu_spte_changed does not say of which root. What fits no value known of the page may be another root's.
- A and D are set by hardware; a frozen entry becomes empty; nobody traces it.
- Which slot logs: the events do not say it, so a page that became writable and was not marked cannot be told from a slot that
  does not log. Nor where slots lie: give ``slots`` and the rings' entries find their pages. Nor what TLBs hold.
- Zapped leaves at the end of a VM need no flush: a missing one is told only where another frame comes in their place.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvmbook.model import PG_LEVEL_4K, Hardware, Kernel, SpteFormat
from kvmbook.real import traced_sptes as words
from kvmbook.real.judging import Disagreement
from kvmbook.real.replaying import Replayer, Step
from kvmbook.real.tracepoints import Lost, Other, Traced, Unread, read_trace

# ---- what a trace has told -------------------------------------------------------------------------------------------

HEADINGS = ("line", "event", "old", "new", "what it tells")


@dataclass
class Replay:
    """A trace, read. ``steps`` are in the trace's order, ``pages`` are the same by gfn. ``events`` counts what was read,
    ``others`` the events that nothing here needs. ``lost``: events that the tracer dropped. ``unjudged``: changes that need a
    flush, in a trace that tells of none.

    `rows` are for a table of `views`: ``Table(HEADINGS, replayed.rows(0x100))``. Printed, it is a report."""

    hardware: Hardware
    steps: list[Step] = field(default_factory=list)
    pages: dict[int, list[Step]] = field(default_factory=lambda: defaultdict(list))
    disagreements: list[Disagreement] = field(default_factory=list)
    unread: list[Unread] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    unjudged: int = 0

    def rows(self, gfn: int | None = None) -> list[tuple[int, str, str, str, str]]:
        """A row for each step, of one page or of all: `HEADINGS` says of what."""
        return [
            (step.line, step.event, _word(step.old), _word(step.new), step.says)
            for step in (self.steps if gfn is None else self.pages.get(gfn, []))
        ]

    def __str__(self) -> str:
        return as_text(self)


# ---- the report ------------------------------------------------------------------------------------------------------

MOST = 40  # rows of each table that the report prints


def as_text(told: Replay, most: int = MOST) -> str:
    """The report: what was read, what the model would disagree with, and each page's last state."""
    has_sptes = any(step.new is not None or step.old is not None for step in told.steps)
    lines = [
        f"{sum(told.events.values()):,} events read, {sum(told.others.values()):,} of other kinds, "
        f"{len(told.unread):,} line(s) not read, {told.lost:,} lost; {told.hardware.name if has_sptes else 'no SPTE'}"
    ]
    lines += _table(("line", "not read because"), [(str(a), b) for a, b in told.unread], most)
    if told.unjudged:
        lines += [
            "",
            f"{told.unjudged:,} change(s) need a flush. The trace tells of none: probe kvm_flush_remote_tlbs.",
        ]
    found = [(str(d.line), _word(d.gfn), d.says) for d in told.disagreements]
    lines += _table(("line", "gfn", "the model disagrees"), found, most) or ["", "The model disagrees with nothing."]
    pages = [
        (f"{gfn:#x}", str(len(steps)), str(steps[-1].line), steps[-1].says) for gfn, steps in sorted(told.pages.items())
    ]
    return "\n".join(lines + _table(("gfn", "steps", "last line", "says"), pages, most))


def page_as_text(told: Replay, gfn: int) -> str:
    """All that is told of one page."""
    rows = [tuple(map(str, row)) for row in told.rows(gfn)]
    return "\n".join(_table(HEADINGS, rows, len(rows))[1:]) or f"The trace tells nothing of gfn {gfn:#x}."


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]], most: int) -> list[str]:
    if not rows:
        return []
    shown = [headings, *rows[:most]]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown]
    return ["", *lines, *[f"and {len(rows) - most:,} more"] * (len(rows) > most)]


def _word(spte: int | None) -> str:
    return "" if spte is None else f"{spte:#x}"


# ---- a trace is read --------------------------------------------------------------------------------------------------


def replay(
    trace: str | os.PathLike[str] | Iterable[str],
    hardware: Hardware | None = None,
    kernel: Kernel = Kernel.v6_0,
    slots: Mapping[int, int] | None = None,
) -> Replay:
    """Read a trace: its text, its lines, or (a `Path`) its file.

    ``hardware``: that of the machine that was traced; by default guessed from the SPTEs. ``kernel``: whose SPTE helpers and
    fast path the model stands by. ``slots``: the base_gfn of each memslot id, to find the pages of dirty rings.

    Torn lines are listed, unknown events counted; neither raises. OSError if there is no such file."""
    if isinstance(trace, os.PathLike):
        trace = Path(trace).read_text(errors="replace")
    lines = trace.splitlines() if isinstance(trace, str) else trace
    read = list(read_trace(lines))
    if hardware is None:
        hardware = guess_hardware([event for event in read if isinstance(event, Traced)])
    told, replayer = Replay(hardware), Replayer(hardware, kernel, dict(slots or {}))
    for event in read:
        if isinstance(event, Traced):
            told.events[event.name] += 1
            replayer.take(event)
        elif isinstance(event, Other):
            told.others[event.name] += 1
        elif isinstance(event, Lost):
            told.lost += event.events
            replayer.forget()
        else:
            told.unread.append(event)
    told.unjudged = replayer.settle()
    told.steps, told.disagreements = replayer.steps, replayer.disagreements
    for step in told.steps:
        if step.gfn is not None:
            told.pages[step.gfn].append(step)
    told.unread = sorted(told.unread + replayer.torn)
    told.events -= Counter(kvm_mmu_set_spte=len(replayer.torn))
    return told


def guess_hardware(events: Iterable[Traced]) -> Hardware:
    """The CPU that the SPTEs and the events of a trace speak of."""
    seen: Counter[str] = Counter()
    words_seen = set()
    for event in events:
        seen[event.name] += 1
        if event.name in SPTE_EVENTS:
            level = event.fields.get("level", PG_LEVEL_4K)
            words_seen |= {(words.without_address(event.fields.get(name, 0)), level) for name in ("old", "new")}
    patterns = {spte for spte, level in words_seen if words.maps_page(FORMAT_FREE, spte, level)}
    tdp_mmu = seen["kvm_tdp_mmu_spte_changed"] > 0
    tdp = tdp_mmu or seen["fast_page_fault"] > 0 or seen["kvm_mmu_pagetable_walk"] == 0
    return words.likely_hardware(words.guess_format(patterns, tdp), tdp_mmu)


FORMAT_FREE = SpteFormat.npt()  # what it says of presence and size all formats say
SPTE_EVENTS = ("kvm_mmu_set_spte", "kvm_tdp_mmu_spte_changed", "fast_page_fault", "kvm_mmu_split_huge_page")


# ---- python -m kvmbook.real trace FILE -------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="what ftrace, trace-cmd report or perf script printed")
    parser.add_argument("--gfn", type=_hexadecimal, help="tell all of this page, e.g. 0x100")
    parser.add_argument(
        "--slot",
        type=_slot,
        action="append",
        default=[],
        metavar="ID=GFN",
        help="where a memslot lies, for dirty rings",
    )


def show_trace(arguments: argparse.Namespace) -> int:
    """what a trace of KVM's events tells, and what the model disagrees with (then the exit code is 1)"""
    try:
        told = replay(arguments.file, slots=dict(arguments.slot))
    except OSError as error:
        print(f"{arguments.file}: {error.strerror}", file=sys.stderr)
        return 2
    print(as_text(told) if arguments.gfn is None else page_as_text(told, arguments.gfn))
    return 1 if told.disagreements else 0


def _hexadecimal(text: str) -> int:
    return int(text, 16)


def _slot(text: str) -> tuple[int, int]:
    slot, gfn = text.split("=")
    return int(slot), int(gfn, 16)
