"""The panel of chapter 14: one relaxation, with the flush of enabling or without it: the run, or the proof."""

from __future__ import annotations

from kvmbook.scenes import FLUSHES, RELAXATIONS, RELAXED_ON, judge, relaxed, run_under
from kvmbook.views.panel import Panel, View
from kvmbook.views.run_figures import trace_picture


def take_the_flush_away() -> Panel:
    """Chapter 14: a relaxation, the flush of enabling taken away or kept, and the hardware."""

    def show(relaxation: str, flush: str, hardware: str) -> View:
        kind, rule = RELAXED_ON[hardware], FLUSHES[flush]
        judged = judge(relaxed(relaxation, rule), kind)
        picture = trace_picture(run_under(relaxation, rule, kind))
        if judged.trace is not None:
            return View(picture, f"A write is lost, in {len(judged.trace)} steps: no run loses one sooner.")
        said = f"No run loses a write: all {judged.states:,} states were visited. Here the write is noted."
        return View(picture, said)

    settings = {"v6.12, but": list(RELAXATIONS), "the flush of enabling": list(FLUSHES), "hardware": list(RELAXED_ON)}
    return Panel("Take the flush away", settings, show)
