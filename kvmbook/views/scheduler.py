"""The panel "You are the scheduler": the reader chooses each step of a tiny VM, and tries to lose a write.

The panel carries the whole graph of the VM for each combination of its settings, found by `kvmbook.scenes.graph_of`; so
it works without a kernel behind it, and it knows from everywhere how far the nearest loss is.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from typing import Any

import traitlets

from kvmbook.model import FlushPolicy, Kernel
from kvmbook.scenes import HARDWARE, Graph, Now, graph_of, label, what_of
from kvmbook.search import Grain, explore
from kvmbook.views.drawing import INK, LOOK, Picture, framed
from kvmbook.views.panel import WHOLE, Panel, View
from kvmbook.views.run_figures import trace_picture
from kvmbook.views.scripts import script, style

SETTINGS = {"A/D bits": list(HARDWARE), "flush rule": ["if changed", "always"]}
ACTORS = ("vCPU0", "KVM for vCPU0", "host", "user space")
SENTENCES = {
    "start": "Nothing is lost. Choose a step.",
    "going": "Nothing is lost. Steps so far: {steps}.",
    "lost": "The write to page 0 is lost: no report will name it, unless the page is written again. "
    "Steps so far: {steps}, lost by step {lost}; the shortest run that loses a write has {shortest}.",
    "covered": "Step {lost} lost a write; a later write put the page into the log. Steps so far: {steps}.",
    "safe": "With one page and one vCPU, cut by fault, no run loses a write: all {states} states were visited.",
    "hint": "From here the soonest loss takes {distance} more step(s).",
    "no hint": "From here no run of this small VM loses a write.",
}
WRITTEN = {
    "none": 'Step {step}, "{line}", is not the name of a step that is possible here. Possible: {names}.',
    "many": 'Step {step}, "{line}", may mean: {names}.',
    "done": "Done, {step} steps.",
    "kept": "Under these settings the run is not possible from step {step} on: {line}.",
}


def rows_of(now: Now, pml: bool) -> list[tuple[str, str, str, bool]]:
    """What the panel shows of a state: name, look (a key of `LOOK`, or ""), words, and whether it is stale.
    ``pml``: the CPU has a PML buffer to show."""
    page = now.pages[0]
    tlb = ("stale: " if page.stale[0] else "") + page.tlb[0]
    owes = (", a flush is owed" if now.owed else ", no flush is owed") * now.following.startswith("flush_if")
    rows = [
        ("SPTE, page 0", page.spte, page.spte, False),
        ("its word", "", f"{page.word:016x}", False),
        ("TLB of vCPU0", page.tlb[0], tlb, page.stale[0]),
        ("dirty bitmap", "", page.bit + (", the harvest holds a 1" if page.taken else ""), False),
        ("PML buffer", "", "page 0" if page.pml[0] else "empty", False),
        ("KVM for vCPU0", "", now.faults[0] or "nothing to do", False),
        ("ioctl", "", now.ioctl or "none", False),
        ("its next step", "", now.following + owes or "none", False),
        ("logging", "", now.logging, False),
    ]
    return [row for row in rows if pml or row[0] != "PML buffer"]


def carried(graph: Graph, pml: bool) -> dict[str, Any]:
    """A graph as plain lists of numbers. ``rows``: the different rows; ``states``: for each state its rows, whether a write
    is lost (0, 1), and the distance to the nearest loss (-1: none); ``edges``: label, state, label, state, ..."""
    rows: dict[tuple[str, str, str, bool], int] = {}
    labels: dict[tuple[str, str, str], int] = {}
    states = [
        [*(rows.setdefault(row, len(rows)) for row in rows_of(now, pml)), int(now.lost), -1 if far is None else far]
        for now, far in zip(graph.states, graph.distance, strict=True)
    ]
    edges = [
        [n for a, to in steps for n in (labels.setdefault((label(a), a.who, what_of(a)), len(labels)), to)]
        for steps in graph.edges
    ]
    return {"rows": list(rows), "labels": list(labels), "states": states, "edges": edges}


# Of a line that is written: a comment, a number before it, brackets behind it, space around it. \\Z: where JavaScript's $ is.
LEFT_OUT = (r"#[^\n]*", r"\A[ \t\r]*[0-9]+\.?[ \t]", r"\([^\n]*\)[ \t\r]*\Z", r"\A[ \t\r]+", r"[ \t\r]+\Z")


def meant(line: str, possible: Sequence[str]) -> list[str]:
    """The steps that a written line may mean: each of its words begins a word of the step, in order, parts of names being
    words; of these, the ones with the fewest words left over. "v r" means "vCPU0 reads page 0", "swap" the step
    kvm_swap_active_memslots."""
    words, left = re.split(r"[ _\t]+", line.lower()), {}
    for label_ in possible:
        parts = re.split("[ _]", label_.lower())
        named = iter(parts)
        if all(any(name.startswith(word) for name in named) for word in words):
            left[label_] = len(parts) - len(words)
    return [label_ for label_, over in left.items() if over == min(left.values())]


class SchedulerPanel(Panel):
    """A panel whose result is a whole graph: `do`, `undo`, `play` and `write` walk it, as the buttons do.

    ``path``: the labels of the steps so far; ``moment``: how many of them are shown (-1: all), and a step goes on from
    there; ``asked``: "", "hint", or "play" if the reader has asked for that; ``paper``: a run for the printer.
    """

    _esm = script("scheduler")
    _css = style("scheduler")
    path: Any = traitlets.List().tag(sync=True)
    asked = traitlets.Unicode().tag(sync=True)
    words = traitlets.Dict().tag(sync=True)
    paper = traitlets.Unicode().tag(sync=True)

    def __init__(self) -> None:
        self._graphs: dict[str, dict[str, Any]] = {}
        super().__init__("You are the scheduler", SETTINGS, View)
        self.words = {
            "actors": ACTORS,
            "sentences": SENTENCES,
            "written": WRITTEN,
            "look": {state: fill for state, (fill, _) in LOOK.items()},
            "ink": INK,
        }
        self.paper = self._shortest.svg
        self.observe(lambda change: self._go(self._kept()), names="chosen")

    def _state(self, combination: Sequence[str]) -> dict[str, str]:
        ad_bits, flush = combination
        kernel = Kernel.v5_19.with_(flush=FlushPolicy(flush))
        graph = carried(graph_of(HARDWARE[ad_bits], kernel), HARDWARE[ad_bits].pml_entries > 0)
        return {"graph": json.dumps(graph, separators=(",", ":"))}

    # ---- walking ----------------------------------------------------------------------------------------------------

    @property
    def graph(self) -> dict[str, Any]:
        """The graph of the settings that are chosen, as `carried` makes it."""
        key = self._key(self.chosen)
        if key not in self._graphs:
            self._graphs[key] = json.loads(self.states[key]["graph"])
        return self._graphs[key]

    def _steps(self, state: int) -> dict[str, int]:
        edges = self.graph["edges"][state]
        return {self.graph["labels"][n][0]: to for n, to in zip(edges[::2], edges[1::2], strict=True)}

    @property
    def shown(self) -> list[str]:
        """The steps that have led to what is shown."""
        steps: list[str] = self.path if self.moment < 0 else self.path[: self.moment]
        return list(steps)

    def _states(self) -> list[int]:
        """The states that are passed on the way to what is shown, the start first."""
        states = [0]
        for said in self.shown:
            states.append(self._steps(states[-1])[said])
        return states

    @property
    def moments(self) -> list[str]:
        """What there is to step through: the start, and each step but the last."""
        return ["the start", *self.path[:-1]] if self.path else []

    def _kept(self) -> list[str]:
        """The path so far as far as it is possible under the settings that are chosen. A step that is not possible is
        replaced by the only one that its actor can do: flush_if_owed by flush_always."""
        here, kept = 0, list[str]()
        for wanted in self.path:
            steps = self._steps(here)
            same = [label_ for label_ in steps if self._actor[label_] == self._actor[wanted]]
            step = wanted if wanted in steps else same[0] if len(same) == 1 else ""
            if not step:
                break
            kept, here = [*kept, step], steps[step]
        return kept

    @functools.cached_property
    def _actor(self) -> dict[str, str]:
        """Who does each step of any graph."""
        graphs = [json.loads(state["graph"]) for state in self.states.values()]
        return {label_: who for graph in graphs for label_, who, _ in graph["labels"]}

    def possible(self) -> list[str]:
        """The steps that are possible now."""
        return list(self._steps(self._states()[-1]))

    def do(self, step: str) -> str:
        """Do one step and return the sentence. ValueError if it is not possible now."""
        if step not in self.possible():
            raise ValueError(f"{step!r} is not possible now; possible: {', '.join(self.possible())}")
        self._go([*self.shown, step])
        return self.readout

    def undo(self) -> str:
        """Take the last step back, if there is one."""
        self._go(self.shown[:-1])
        return self.readout

    def start_again(self) -> str:
        """Back to the start."""
        self._go([])
        return self.readout

    def hint(self) -> str:
        """How far it is to the nearest loss, from what is shown."""
        self.asked = "hint"
        return self.readout

    def play(self) -> str:
        """Walk a shortest run that loses a write, from the start; if there is none, say so."""
        here, path = 0, []
        while (far := self.graph["states"][here][-1]) > 0:
            step, here = next((s, to) for s, to in self._steps(here).items() if self.graph["states"][to][-1] == far - 1)
            path.append(step)
        self._go(path, "play")
        return self.readout

    def write(self, run: str) -> str:
        """Do a run that is written down, from the start: steps parted by lines or ";", see `meant`; numbers before them,
        brackets and what follows a "#" are left out. ValueError for a line that is no possible step, or that may mean
        several, saying which; what stands before it is done."""
        here, path, mistake = 0, list[str](), ""
        for written in re.split(r"[;\n]", run):
            line = functools.reduce(lambda left, none: re.sub(none, "", left), LEFT_OUT, written)
            steps = self._steps(here)
            fits = meant(line, list(steps)) if line else []
            if line and len(fits) != 1:
                said, names = WRITTEN["many" if fits else "none"], "; ".join(fits or steps)
                mistake = said.format(step=len(path) + 1, line=line, names=names)
                break
            for step in fits:
                path, here = [*path, step], steps[step]
        self._go(path)
        if mistake:
            raise ValueError(mistake)
        return self.readout

    def _go(self, path: list[str], asked: str = "") -> None:
        with self.hold_sync():
            self.path, self.asked, self.moment = path, asked, WHOLE

    # ---- what is said -----------------------------------------------------------------------------------------------

    @property
    def rows(self) -> list[tuple[str, str]]:
        """What is shown of the state that the path has led to: name and words."""
        return [(name, said) for name, _, said, _ in self._rows()]

    def _rows(self) -> list[list[Any]]:
        return [self.graph["rows"][number] for number in self.graph["states"][self._states()[-1]][:-2]]

    @property
    def lost(self) -> bool:
        """Whether a write is lost now."""
        return bool(self.graph["states"][self._states()[-1]][-2])

    @property
    def readout(self) -> str:
        """The sentence."""
        states, passed = self.graph["states"], self._states()
        far, lost = states[passed[-1]][-1], [states[number][-2] for number in passed]
        safe = states[0][-1] < 0
        said = "lost" if lost[-1] else "covered" if any(lost) else "going" if self.shown else "start"
        said = "safe" if self.asked == "play" and safe else said
        told = [said] + ["no hint" if far < 0 else "hint"] * (self.asked == "hint" and not lost[-1])
        numbers = {
            "steps": len(self.shown),
            "lost": lost.index(1) if any(lost) else 0,
            "shortest": states[0][-1],
            "states": len(states),
            "distance": far,
        }
        return " ".join(SENTENCES[name].format(**numbers) for name in told)

    @functools.cached_property
    def _shortest(self) -> Picture:
        """A shortest run that loses a write with the first settings."""
        kernel = Kernel.v5_19.with_(flush=FlushPolicy(SETTINGS["flush rule"][0]))
        return trace_picture(explore(HARDWARE[SETTINGS["A/D bits"][0]], kernel, grain=Grain.FAULT))

    def still(self) -> Picture:
        run = self._shortest
        said = "A shortest run that loses a write. In JupyterLab and in the pages you choose each step yourself."
        return framed(f"{self.title}. {said} {run.alt}", self.title, [], said, run)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}: {option}" for name, option in self.chosen.items())
        steps = [f"{number:3}  {step}" for number, step in enumerate(self.path, 1)]
        return "\n".join([f"{self.title} [{settings}]", *steps, *(f"{n}: {s}" for n, s in self.rows), self.readout])


def you_are_the_scheduler() -> SchedulerPanel:
    """Chapter 10: one page, one vCPU; the reader says who moves next."""
    return SchedulerPanel()
