"""Runs at random: longer than anybody can try all of, on odder slots, with what is done more rarely. Hypothesis makes
them, and shrinks one that loses a write. Only `hunt_at_random` comes here, for Hypothesis is no need of the package
itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
from hypothesis import strategies as st

from kvmbook.model import Kernel
from kvmbook.search.configurations import BORDER, HUGE, OPTIONS, Configuration, Slot
from kvmbook.search.litmus import Litmus
from kvmbook.search.userspace import Play

Draw = Callable[[Any], Any]
BATCH = 500
QUIET = hypothesis.settings(
    max_examples=BATCH, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)


def losing_run(kernel: Kernel, longest: int, seed: int) -> tuple[Litmus | None, int]:
    """Make `BATCH` runs of up to ``longest`` calls, more to shrink one that loses a write. Returns it, or None; and how
    many were made."""
    made = 0

    def loses(run: Callable[[], Litmus]) -> bool:
        nonlocal made
        made += 1
        return bool(run().lost)

    try:
        runs = st.composite(lambda draw: _run(draw, kernel, longest))()
        found = hypothesis.find(runs, loses, settings=QUIET, random=random.Random(seed))
    except hypothesis.errors.NoSuchExample:
        return None, made
    return found(), made


def _run(draw: Draw, kernel: Kernel, longest: int) -> Callable[[], Litmus]:
    """A run, up to where it first loses a write; as a function, of which Hypothesis prints nothing (it would print every
    field of every field)."""
    values = {name: draw(st.sampled_from(options)) for name, options in OPTIONS.items() if name != "slot"}
    configuration = Configuration(kernel, **values | {"vcpus": draw(st.integers(1, 3)), "slot": draw(_slots())})
    hypothesis.assume(configuration.makes_sense)
    play, run = Play.start(configuration), []
    for _ in range(draw(st.integers(0, longest))):
        run.append(draw(st.sampled_from(play.possible() + play.rarer())))
        play.do(run[-1])
        if play.lost():
            break
    litmus = Litmus(configuration, tuple(run), play.lost())
    return lambda: litmus


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
