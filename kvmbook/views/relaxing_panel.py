"""The panel of chapter 14: one relaxation, with the flush of enabling or without it: the run, or the proof."""

from __future__ import annotations

from kvmbook.scenes import FLUSHES, RELAXATIONS, RELAXED_ON, TAKEN, judge, relaxed, run_under
from kvmbook.views.drawing import Picture, block, svg, text
from kvmbook.views.panel import Panel, View
from kvmbook.views.run_figures import trace_picture

WIDE, HIGH = 820, 300  # about those of a run, so that nothing jumps when one is chosen
NARROW, LOW, SIZE = 372, 84, 17


def proof_picture(states: int) -> Picture:
    """Nothing to draw: every state was visited, and in none a write is lost."""
    lines = ["✓ no run loses a write", f"{states:,} states, each of them visited", "nor with the flush the other way"]
    said = [text(0, 24 * n, line, size=SIZE, bold=n == 0) for n, line in enumerate(lines)]
    alt = f"No run loses a write: all {states:,} states were visited. With the flush the other way none does, either."
    parts = [block(said, (WIDE / 2, HIGH / 2 - 20), (NARROW / 2, 26))]
    return Picture(svg(WIDE, HIGH, alt, parts, (NARROW, LOW)), alt)


def take_the_flush_away() -> Panel:
    """Chapter 14: a relaxation, the flush of enabling taken away or kept, and the hardware. Kept, what would be lost is
    cured; where nothing would be lost there is only the proof."""

    def show(relaxation: str, flush: str, hardware: str) -> View:
        kind, rule = RELAXED_ON[hardware], FLUSHES[flush]
        judged = judge(relaxed(relaxation, rule), kind)
        if judged.trace is not None:
            said = f"A write is lost, in {len(judged.trace)} steps: no run loses one sooner."
            return View(trace_picture(run_under(relaxation, rule, kind)), said)
        said = f"No run loses a write: all {judged.states:,} states were visited."
        if not judge(relaxed(relaxation, TAKEN), kind).lost:
            return View(proof_picture(judged.states), said)
        return View(
            trace_picture(run_under(relaxation, rule, kind)), f"{said} Here the same calls, and the write is noted."
        )

    settings = {"v6.12, but": list(RELAXATIONS), "the flush": list(FLUSHES), "hardware": list(RELAXED_ON)}
    return Panel("Take the flush away", settings, show)
