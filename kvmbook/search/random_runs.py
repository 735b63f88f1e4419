"""Runs at random: longer than anybody can try all of, on odder slots, with what is done more rarely. Hypothesis makes
them, and shrinks one that loses a write. Only `runs_at_random` comes here, for Hypothesis is no need of the package
itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
from hypothesis import strategies as st

from kvmbook.model import Hardware, Kernel
from kvmbook.search.configurations import BORDER, HUGE, OPTIONS, Configuration, Slot
from kvmbook.search.litmus import Litmus, Made
from kvmbook.search.userspace import Play

Draw = Callable[[Any], Any]
BATCH = 500
QUIET = hypothesis.settings(
    max_examples=BATCH, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)


def losing_run(kernel: Kernel, longest: int, seed: int, hardware: Hardware | None = None) -> Made:
    """Make `BATCH` runs of up to ``longest`` calls, on any hardware or on this, and more to shrink one that loses a write."""
    runs = steps = 0

    def loses(made: Callable[[], tuple[Litmus, int]]) -> bool:
        nonlocal runs, steps
        litmus, took = made()
        runs += 1
        steps += took
        return bool(litmus.lost)

    fixed = {} if hardware is None else {"hardware": st.just(hardware)}
    try:
        any_run = st.composite(lambda draw: _run(draw, kernel, longest, fixed))()
        found = hypothesis.find(any_run, loses, settings=QUIET, random=random.Random(seed))
    except hypothesis.errors.NoSuchExample:
        return Made(None, runs, steps)
    return Made(found()[0], runs, steps)


def _run(draw: Draw, kernel: Kernel, longest: int, fixed: dict[str, Any]) -> Callable[[], tuple[Litmus, int]]:
    """A run, up to where it first loses a write, and the steps of the model that it took; as a function, of which Hypothesis
    prints nothing (it would print every field of every field)."""
    fields = {name: st.sampled_from(options) for name, options in OPTIONS.items()}
    fields |= {"vcpus": st.integers(1, 3), "slot": _slots(), **fixed}
    configuration = Configuration(kernel, **{name: draw(field) for name, field in fields.items()})
    hypothesis.assume(configuration.makes_sense)
    play, run = Play.start(configuration), []
    for _ in range(draw(st.integers(0, longest))):
        run.append(draw(st.sampled_from(play.possible() + play.rarer())))
        play.do(run[-1])
        if play.lost():
            break
    litmus, steps = Litmus(configuration, tuple(run), play.lost()), len(play.vm.log)
    return lambda: (litmus, steps)


@st.composite
def _slots(draw: Draw) -> Slot:
    """A slot that begins and ends near borders of words and of 2M pages, and one to four pages of it that lie at some."""
    base_gfn = BORDER + draw(st.sampled_from((0, -1, 1, -63, -64, -65, -32)))
    page_size = draw(st.sampled_from(("4K", "2M")))
    ends = (2, 64, 128) if page_size == "4K" else (BORDER + HUGE - base_gfn, BORDER + 2 * HUGE - base_gfn)
    npages = draw(st.sampled_from(ends)) + draw(st.sampled_from((0, 1, 2, -1, 64)))
    edges = sorted(set(_near_borders(base_gfn, npages)))
    pages = draw(st.lists(st.sampled_from(edges), min_size=1, max_size=4, unique=True))
    return Slot(base_gfn, npages, tuple(sorted(pages)), page_size)


def _near_borders(base_gfn: int, npages: int) -> Iterator[int]:
    """The pages at a slot's ends, and on both sides of its first borders of a word and of a 2M page."""
    for border in (0, 64, -base_gfn % HUGE, -base_gfn % HUGE + HUGE, npages):
        yield from (page for page in (border - 1, border) if 0 <= page < npages)
