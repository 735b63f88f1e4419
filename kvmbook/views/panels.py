"""Panels: a pure function of a few settings, and a view that shows its result at a click.

A `Panel` carries the result of each combination of its settings, so it works with a kernel (JupyterLab) and without one
(the built pages, the slides). A panel of the book is one function that returns a `View`, and the lists of its options.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import anywidget
import ipywidgets as widgets
import traitlets
from IPython.display import display

from kvmbook.anynumber import any_number
from kvmbook.explore import explore
from kvmbook.figures import Picture, plans_picture, scene_picture
from kvmbook.flush_rules import BITS, BitRule, cost, leaves_met
from kvmbook.hardware import Hardware
from kvmbook.kernel import FlushPolicy, Kernel
from kvmbook.run_figures import trace_picture
from kvmbook.runs import retell, run_of
from kvmbook.scenes import CHANGES, HARDWARE, TOUCHES, enabling_plan, write_after_enabling
from kvmbook.schedule import Action, Grain, smallest_vm
from kvmbook.views import script, style

POLICIES = {policy.value: policy for policy in FlushPolicy}


class View(NamedTuple):
    """What a panel shows for one combination: a picture and a sentence."""

    picture: Picture
    readout: str


class Panel(anywidget.AnyWidget):
    """Radio groups over a picture and a sentence.

    ``settings`` maps each setting's name to its options, the first chosen; ``show`` takes one option of each, in that
    order, and returns a `View`. ``carry=False`` leaves combinations to be computed when they are chosen, which needs a
    kernel. Raises ValueError for a setting without options, with one twice, or with " | " in one.
    """

    _esm = script("panel")
    _css = style()
    title = traitlets.Unicode().tag(sync=True)
    settings: Any = traitlets.List().tag(sync=True)
    chosen = traitlets.Dict().tag(sync=True)
    states = traitlets.Dict().tag(sync=True)

    def __init__(
        self, title: str, settings: Mapping[str, Sequence[str]], show: Callable[..., View], carry: bool = True
    ) -> None:
        for options in settings.values():
            if not options or len(set(options)) < len(options) or any(" | " in option for option in options):
                raise ValueError(f"a setting needs options, each another, none with ' | ' in it; got {dict(settings)}")
        self._show = show
        self._options = {name: list(options) for name, options in settings.items()}
        super().__init__(
            title=title,
            settings=[{"name": name, "options": options} for name, options in self._options.items()],
            chosen={name: options[0] for name, options in self._options.items()},
            states={" | ".join(c): self._state(c) for c in self.combinations()} if carry else {},
        )
        self._compute_missing(self.chosen)
        self.observe(lambda change: self._compute_missing(change.new), names="chosen")

    def combinations(self) -> list[tuple[str, ...]]:
        """Every combination of options."""
        return list(itertools.product(*self._options.values()))

    def choose(self, **chosen: str) -> str:
        """Set options by name (``_`` for what is no letter) and return the sentence. KeyError or ValueError if unknown."""
        named = {re.sub(r"\W+", "_", name): name for name in self._options}
        wanted = {named[key]: option for key, option in chosen.items()}
        for name, option in wanted.items():
            if option not in self._options[name]:
                raise ValueError(f"{name} is one of {', '.join(self._options[name])}; got {option!r}")
        chosen = {**self.chosen, **wanted}
        self._compute_missing(chosen)  # before it is chosen: if it fails, nothing has changed
        self.chosen = chosen
        return self.readout

    @property
    def readout(self) -> str:
        """The sentence for what is chosen."""
        sentence: str = self.states[self._key(self.chosen)]["readout"]
        return sentence

    def _key(self, chosen: Mapping[str, str]) -> str:
        return " | ".join(chosen[name] for name in self._options)

    def _state(self, combination: Sequence[str]) -> dict[str, str]:
        view = self._show(*combination)
        return {"svg": view.picture.svg, "readout": view.readout}

    def _compute_missing(self, chosen: Mapping[str, str]) -> None:
        if (key := self._key(chosen)) not in self.states:
            self.states = {**self.states, key: self._state([chosen[name] for name in self._options])}

    def __repr__(self) -> str:
        return (
            f"{self.title} [{', '.join(f'{name}: {option}' for name, option in self.chosen.items())}]\n{self.readout}"
        )


def counted(flushes: int) -> str:
    """A number of flushes in words."""
    return f"{('no', 'one', 'two')[flushes]} flush{'es' * (flushes != 1)}"


@contextmanager
def search_progress() -> Iterator[Callable[[int, int, int], None]]:
    """A progress bar for `kvmbook.explore.explore`, as its ``progress``; it goes when the search ends or is interrupted."""
    bar = widgets.IntProgress(description="searching")
    said = widgets.Label()
    line = widgets.HBox([bar, said])
    display(line)  # type: ignore[no-untyped-call]

    def show(level: int, states: int, bound: int) -> None:
        bar.max, bar.value, said.value = bound, states, f"level {level}, {states:,} states of at most {bound:,}"

    try:
        yield show
    finally:
        line.close()


# ---- the panels of the book ------------------------------------------------------------------------------------------


def lose_a_write() -> Panel:
    """Chapter 01: the seed's scene, with the reader's hand on the hardware, the flush policy and a second vCPU."""

    def show(ad_bits: str, flush: str, touched: str) -> View:
        scenes = {name: write_after_enabling(ad_bits, policy, touched) for name, policy in POLICIES.items()}
        scene = scenes[flush]
        picture = scene_picture(scene, {name: other.missed for name, other in scenes.items()}, flush)
        if scene.missed:
            return View(
                picture, f"{scene.missed} of {len(scene.pages)} writes are missed: the report does not name them."
            )
        said = f"All {len(scene.pages)} writes are reported, after {counted(scene.flushes)} while enabling."
        return View(picture, said)

    settings = {
        "A/D bits": list(HARDWARE),
        "flush when enabling": ["if changed", "never", "if MMU-writable", "always"],
        "touched again before enabling": list(TOUCHES),
    }
    return Panel("Lose a write", settings, show)


def who_flushes_where() -> Panel:
    """Chapter 08: the path through kvm_mmu_slot_apply_flags(), before the patch and after it."""

    def show(ad_bits: str, change: str, initially_set: str, nested: str) -> View:
        before, after = (
            enabling_plan(ad_bits, kernel, change, initially_set == "on", nested == "has run")
            for kernel in (Kernel.v5_19, Kernel.v6_0)
        )
        old, new = (sum(step.startswith("flush") for step in plan) for plan in (before, after))
        if any(step.startswith("zap") for step in before):
            readout = "Nothing is write-protected. Small tables where a huge page fits again are dropped, and flushed."
        elif not new:
            readout = "No SPTE is visited and no TLB is flushed, before the patch or after it."
        else:
            readout = f"Before: at most {counted(old)}, if a pass asked. After: always {counted(new)}."
        return View(plans_picture(before, after), readout)

    settings = {
        "A/D bits": list(HARDWARE),
        "logging": list(CHANGES),
        "INITIALLY_SET": ["off", "on"],
        "nested guest": ["none", "has run"],
    }
    return Panel("Who flushes where", settings, show)


def write_the_rule() -> Panel:
    """Chapter 11: which kinds of leaf shall make enabling flush? For a CPU without A/D bits, all eight rules."""
    hardware = Hardware.ept(ad_bits=False)
    names = {"W": "writable", "tracked": "access-tracked", "MW": "neither, but MMU-writable"}  # the first that fits
    kinds = {
        next(said for bit, said in names.items() if kind.before >> BITS.index(bit) & 1): kind
        for kind in leaves_met(hardware)
    }
    seed = run_of(explore(hardware, Kernel.v5_19, grain=Grain.FAULT))

    def show(*answers: str) -> View:
        chosen = dict(zip(names.values(), answers, strict=True))
        rule = BitRule(frozenset(kind for name, kind in kinds.items() if chosen[name] == "yes"))
        result = explore(hardware, Kernel.v5_19.with_(flush=rule), vcpus=2, grain=Grain.FAULT)
        flushes, missed = cost(hardware, rule)
        paid = f"60 migrations of the workload: {flushes} flushes, {missed} writes missed."
        if not result.safe:
            steps = len(result.trace or ())
            return View(trace_picture(result), f"Unsound: a write can be lost, in {steps} steps. {paid}")
        vm = smallest_vm(hardware, result.kernel, 1, 2, Grain.FAULT)
        states = any_number(hardware, result.kernel).states
        said = f"Sound, for any number of pages and vCPUs, cut by fault ({states} abstract states). {paid}"
        cured = [*(moment.action for moment in seed.moments), Action("KVM for vCPU0", "handles the fault")]
        return View(trace_picture(retell(vm, cured, Grain.FAULT)), said)

    settings = {f"flush for a leaf that is {name}": ["no", "yes"] for name in names.values()}
    return Panel("Write the rule", settings, show)
