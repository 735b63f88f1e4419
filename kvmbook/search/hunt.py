"""The hunter: it looks for writes that are lost, over every configuration of a VM and all short runs of whole calls.

`hunt` goes over the configurations in an order without pattern, with all runs of four calls, then of five, and so on, until
its time is over: from a VM's start it visits, breadth first, every state that so many calls reach. A run that loses a write
is held against the faults that are known: does it lose it still, with one of them repaired? So each is told from the
others, and what no repair cures is new. `hunt_at_random` makes longer runs, on odder slots, with what is done more rarely;
Hypothesis finds and shrinks them.

Between two whole calls nothing is in flight: what goes wrong between the steps of calls is `explore`'s to find.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from itertools import count, groupby, repeat
from typing import Any, NamedTuple

from kvmbook.model import Hardware, Kernel
from kvmbook.search.configurations import Configuration, every
from kvmbook.search.known_faults import fault_of
from kvmbook.search.litmus import Litmus, Made
from kvmbook.search.playing import Call
from kvmbook.search.userspace import Play

# ---- all runs of one configuration -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Covered:
    """What the search of one configuration came to: all runs of up to ``calls`` calls, in so many ``states`` and
    ``transitions``; ``found`` has a shortest run for each fault. No run goes on after it has lost a write."""

    configuration: Configuration
    calls: int
    states: int
    transitions: int
    found: tuple[Litmus, ...]


def hunt_one(configuration: Configuration, calls: int) -> Covered:
    """Visit every state that up to ``calls`` whole calls reach."""
    start = Play.start(configuration)
    seen, transitions = {start.key()}, 0
    level: list[tuple[Play, tuple[Call, ...]]] = [(start, ())]
    found: dict[str | None, Litmus] = {}
    for _ in range(calls):
        following = []
        for here, run in level:
            same, before = None, here.key()
            for call in here.possible():
                after, longer = same or here.copy(), (*run, call)
                after.do(call)
                after.vm.log.clear()
                transitions += 1
                key = after.key()
                same = after if key == before else None  # nothing came of it: no new copy is needed
                if key in seen:
                    continue
                seen.add(key)
                if lost := after.lost():
                    fault = fault_of(configuration, longer, found)
                    found.setdefault(fault, Litmus(configuration, longer, lost, fault))
                else:
                    following.append((after, longer))
        level = following
    return Covered(configuration, calls, len(seen), transitions, tuple(found.values()))


# ---- the hunt --------------------------------------------------------------------------------------------------------


class Met(NamedTuple):
    """A fault that was met: by the run ``litmus``, in the simplest configuration that shows it, after so many
    ``configurations``, ``transitions`` and ``seconds`` of the hunt."""

    litmus: Litmus
    configurations: int
    transitions: int
    seconds: float


@dataclass
class Hunt:
    """What a hunt has come to so far. ``met``: by the name of the fault, None for what is new."""

    kernel: Kernel
    covered: dict[Configuration, Covered] = field(default_factory=dict)
    met: dict[str | None, Met] = field(default_factory=dict)
    transitions: int = 0
    seconds: float = 0

    def add(self, covered: Covered) -> None:
        """Take the result for one more configuration in, or for longer runs of one."""
        self.covered[covered.configuration] = covered
        self.transitions += covered.transitions
        for litmus in covered.found:
            if litmus.fault not in self.met:
                self.met[litmus.fault] = Met(litmus.simplest(), len(self.covered), self.transitions, self.seconds)

    def rows(self, *names: str) -> list[tuple[Any, ...]]:
        """What was covered, by these fields of a `Configuration`: their values in words, how many configurations, of how
        many calls all runs were tried in each (least and most), states, transitions."""

        def values(covered: Covered) -> tuple[str, ...]:
            return tuple(covered.configuration.words[name] for name in names)

        rows: list[tuple[Any, ...]] = []
        for said, group in groupby(sorted(self.covered.values(), key=values), values):
            each = list(group)
            calls, states, transitions = zip(*((c.calls, c.states, c.transitions) for c in each), strict=True)
            rows.append((*said, len(each), min(calls), max(calls), sum(states), sum(transitions)))
        return rows


def hunt(
    kernel: Kernel,
    seconds: float = 600,
    *,
    calls: tuple[int, int] = (4, 8),
    seed: int = 1,
    configurations: Iterable[Configuration] | None = None,
    executor: Executor | None = None,
    progress: Callable[[Hunt], None] | None = None,
) -> Hunt:
    """Hunt until ``seconds`` are over: with all runs of ``calls[0]`` calls in each of the ``configurations`` (by default
    `every` one), in the order that ``seed`` gives them, then with runs of one call more, up to ``calls[1]``.
    ``progress`` is called after each. With an ``executor`` they are shared out among its workers."""
    order = list(every(kernel) if configurations is None else configurations)
    random.Random(seed).shuffle(order)
    begin, so_far = time.monotonic(), Hunt(kernel)
    for covered in _searched(order, calls, executor):
        so_far.seconds = time.monotonic() - begin
        so_far.add(covered)
        if progress is not None:
            progress(so_far)
        if so_far.seconds > seconds:
            break
    return so_far


def _searched(order: Sequence[Configuration], calls: tuple[int, int], executor: Executor | None) -> Iterator[Covered]:
    for length in range(calls[0], calls[1] + 1):
        yield from (map if executor is None else executor.map)(hunt_one, order, repeat(length))


def hunt_at_random(
    kernel: Kernel, seconds: float = 60, *, seed: int = 1, longest: int = 20
) -> tuple[Litmus | None, int]:
    """Make longer runs at random, of up to ``longest`` calls, on odder slots, until one loses a write or ``seconds`` are
    over. Returns that run, shrunk, or None; and how many runs were made. ImportError without Hypothesis."""
    begin, made = time.monotonic(), 0
    for batch in count(seed):
        if time.monotonic() - begin >= seconds:
            break
        litmus, runs, _ = runs_at_random(kernel, seed=batch, longest=longest)
        made += runs
        if litmus is not None:
            return replace(litmus, fault=fault_of(litmus.configuration, litmus.run)), made
    return None, made


def runs_at_random(kernel: Kernel, hardware: Hardware | None = None, *, seed: int = 1, longest: int = 20) -> Made:
    """Some hundred of them, on any hardware or on this one. ImportError without Hypothesis."""
    try:
        from kvmbook.search.random_runs import losing_run
    except ImportError:
        raise ImportError("runs at random are made and shrunk by Hypothesis: pip install hypothesis") from None
    return losing_run(kernel, longest, seed, hardware)
