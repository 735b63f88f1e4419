"""Chapter 13: the twelve exhibits, grouped by what was confused, and the panel that shows each one's run or proof."""

from __future__ import annotations

import textwrap

from kvmbook.scenes import retell_exhibit
from kvmbook.search import BUG, CONFUSIONS, EXHIBITS, Exhibit
from kvmbook.views.drawing import INK, LOOK, LOST, Picture, block, box, svg, text
from kvmbook.views.panel import Panel, View
from kvmbook.views.run_figures import trace_picture

WIDE, NARROW, SIZE = 760, 372, 15
BOX, HIGH, ROW = 244, 46, 96  # a box's width and height; a confusion's, with its heading
LOW_ROW = 30 + 3 * (HIGH + 6) + 14
SEED = 11


def _room(shown: Exhibit) -> list[str]:
    """One exhibit: number and release over its title; a frame for a bug, none for an optimisation, thick for the seed."""
    fill = LOOK["missed" if shown.kind == BUG else "read-only"][0]
    extra = ' stroke-width="4"' if shown.number == SEED else ""
    head = f"{shown.number} · {shown.release} · {'bug' if shown.kind == BUG else 'optimisation'}"
    return [
        box(0, 0, BOX, HIGH, fill, stroke=LOST if shown.number == SEED else "currentColor", extra=extra),
        text(BOX / 2, 19, head, size=SIZE, fill=INK),
        text(BOX / 2, 38, shown.title, size=SIZE, bold=True, fill=INK),
    ]


def confusions_picture() -> Picture:
    """The twelve in four rows, one for each confusion."""
    parts, said = list[str](), list[str]()
    for row, confusion in enumerate(CONFUSIONS):
        rooms = [shown for shown in EXHIBITS if shown.confusion == confusion]
        y, low = row * ROW, row * LOW_ROW
        heading = text(4, 0, f"“{confusion}”", size=16, anchor="start", bold=True)
        parts.append(block([heading], (0, y + 22), (0, low + 22)))
        for column, shown in enumerate(rooms):
            parts.append(block(_room(shown), (4 + column * (BOX + 8), y + 32), (4, low + 30 + column * (HIGH + 6))))
        said.append(f"{confusion}: " + ", ".join(f"{shown.number} {shown.title}" for shown in rooms))
    alt = f"The twelve exhibits by what was confused. {'; '.join(said)}."
    return Picture(svg(WIDE, len(CONFUSIONS) * ROW, alt, parts, (NARROW, len(CONFUSIONS) * LOW_ROW)), alt)


def proof_picture(shown: Exhibit, fixed: bool, elsewhere: bool) -> Picture:
    """That no run does harm: what was searched, and how much that is."""
    found = shown.look(fixed, elsewhere)
    hardware = (shown.elsewhere if elsewhere else shown.hardware).name
    lines = [
        f"{hardware}; {'with' if fixed else 'without'} the repair",
        f"{found.states:,} states, {found.transitions:,} transitions: all of them",
        *textwrap.wrap(shown.space.words, 46),
    ]
    high, parts = 60 + 22 * len(lines), list[str]()
    for wide, look in ((WIDE, "wide"), (NARROW, "narrow")):
        said = [text(wide / 2, 30, "✓ no run does harm", size=17, bold=True, fill=INK)]
        said += [text(wide / 2, 58 + 22 * row, line, size=SIZE - 2, fill=INK) for row, line in enumerate(lines)]
        parts.append(block([box(2, 2, wide - 4, high - 10, LOOK["reported"][0]), *said], look=look))
    alt = f"No run does harm. {'; '.join(lines)}."
    return Picture(svg(WIDE, high, alt, parts, (NARROW, high)), alt)


def curator() -> Panel:
    """Chapter 13: choose an exhibit, its kernel and hardware, and see the run or the proof."""
    names = {f"{shown.number} {shown.title}": shown for shown in EXHIBITS}

    def show(name: str, kernel: str, where: str) -> View:
        shown, fixed, elsewhere = names[name], kernel == "repaired", where == "other hardware"
        found = shown.look(fixed, elsewhere)
        hardware = (shown.elsewhere if elsewhere else shown.hardware).name
        if found.run is None:
            said = f"On {hardware} no run does harm: {found.states:,} states, {shown.space.words}."
            return View(proof_picture(shown, fixed, elsewhere), said)
        said = f"On {hardware}, in {len(found.run)} steps: {shown.harm}."
        return View(trace_picture(retell_exhibit(shown, fixed, elsewhere)), said)

    settings = {"exhibit": list(names), "kernel": ["bad", "repaired"], "hardware": ["its own", "other hardware"]}
    return Panel("Curator", settings, show)
