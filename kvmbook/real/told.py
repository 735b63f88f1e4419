"""What a trace has told: a step for each line, by page, what the model disagrees with, and the report of both.

Plain records, for a table, a picture or a test; `trace` makes them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvmbook.model import Hardware
from kvmbook.real.tracepoints import Unread


class Step(NamedTuple):
    """What one line tells. ``gfn`` is None where the event does not say it; ``level``, ``old`` and ``new`` where it is
    about no SPTE, or does not tell."""

    line: int
    time: float
    task: str
    event: str
    gfn: int | None
    level: int | None
    old: int | None
    new: int | None
    says: str


class Disagreement(NamedTuple):
    """What the model would not do, or no KVM should: the line, the page, and the rule that is broken."""

    line: int
    gfn: int | None
    says: str


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
