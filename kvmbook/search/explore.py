"""Every interleaving of a small VM: can a write be lost, by which shortest run, and over how many states is that known?

The meaning of each step comes from the model (`cells`, `tables`), and `space` has a number for each state; this module only
counts. What the search knows of a state is one byte: the level at which it was met. That makes a breadth-first search
without a hash table, whose every level is a handful of gathers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np

from kvmbook.model import Hardware, Kernel, Vm
from kvmbook.search.cells import Cells
from kvmbook.search.pagewise import Pagewise, search_pagewise
from kvmbook.search.playing import script_of
from kvmbook.search.schedule import Action, Grain, replay, smallest_vm
from kvmbook.search.selftest import c_program
from kvmbook.search.space import MOST_STATES, Space, space_of
from kvmbook.search.tables import EXIT, PageSteps, Pairs

UNSEEN = 255
CHUNK = 1 << 16  # states handled at once: what they gather stays in the cache
SCAN = 1 << 24  # bytes looked through at once
FEW_STATES = 2000  # so many are sooner visited one by one than numbered

Progress = Callable[[int, int, int], None]  # the level, the states met so far, how many there are at most


@dataclass(frozen=True)
class Result:
    """What a search found. ``states`` and ``transitions`` of the whole graph; ``depth``: the greatest distance of a state
    from the start; ``trace``: a shortest run that loses a write, or None. If not ``whole``, the search stopped at the loss:
    ``states`` are those up to that level, ``transitions`` those of the levels before. The rest are its bounds."""

    hardware: Hardware
    kernel: Kernel
    pages: int
    vcpus: int
    grain: Grain
    without: frozenset[str]
    states: int
    transitions: int
    depth: int
    trace: tuple[Action, ...] | None
    whole: bool = True

    @property
    def safe(self) -> bool:
        """Whether no run loses a write."""
        return self.trace is None

    def replay(self) -> Vm:
        """A new VM after the steps of the trace."""
        vm = smallest_vm(self.hardware, self.kernel, self.pages, self.vcpus, self.grain)
        return replay(vm, self.trace or (), self.grain)

    def to_selftest(self, form: str = "standalone") -> str:
        """The trace as a C program for a real KVM, which plays what user space can play of it: see `c_program`. ValueError
        if no run loses a write."""
        if self.trace is None:
            raise ValueError("no run loses a write: there is none to play")
        script = script_of(self.hardware, self.kernel, self.pages, self.vcpus, self.grain, self.trace)
        return c_program(script, form)

    def __str__(self) -> str:
        size = f"{self.states:,} states, {self.transitions:,} transitions, depth {self.depth}"
        size += "" if self.whole else ", where it stopped: no full count"
        found = "no run loses a write"
        if self.trace is not None:
            steps = (f"{number:3}  {action}" for number, action in enumerate(self.trace, 1))
            found = "\n".join([f"a shortest run that loses a write, {len(self.trace)} steps:", *steps])
        bounds = f"{self.pages} page(s), {self.vcpus} vCPU(s), cut by {self.grain.value}"
        bounds += f", without {', '.join(sorted(self.without))}" if self.without else ""
        return f"{bounds}: {size}\n{found}"


def explore(
    hardware: Hardware,
    kernel: Kernel,
    pages: int = 1,
    vcpus: int = 1,
    grain: Grain = Grain.STEP,
    without: Collection[str] = (),
    progress: Progress | None = None,
    whole: bool = True,
) -> Result:
    """Search all runs of ``vcpus`` vCPUs on one slot of ``pages`` 4K pages; if not ``whole``, up to the level in which a
    write is first lost, which is all that a shortest run needs.

    Bounds: accesses are reads and writes; the host only ages; harvests are KVM_GET_DIRTY_LOG; PML buffers do not fill; the
    fast path tries twice; steps that ``without`` names (`Action.what`, say "ages") are not done. ``progress`` is called now
    and then with the level, the number of states met so far, and a bound of it; `kvmbook.views.search_progress` is one.
    Raises ValueError for sizes below 1, and, before it visits more than a few states, for sizes that would need more than
    4 GiB.
    """
    steps = PageSteps(Cells(hardware, kernel, pages, grain, without), vcpus)
    bounds = hardware, kernel, pages, vcpus, grain, frozenset(without)
    if not whole and (near := search_pagewise(Pagewise(steps), FEW_STATES)) is not None:
        return Result(*bounds, near.states, near.transitions, near.depth, near.trace, whole=near.trace is None)
    space = Space(Pairs(steps))
    if space.bound > MOST_STATES:
        raise ValueError(_too_large(space, hardware, kernel, without))
    search = Search(space)
    search.run(progress, whole)
    trace = search.shortest_loss()
    return Result(*bounds, search.states, search.transitions, search.depth, trace, whole or trace is None)


def _too_large(space: Space, hardware: Hardware, kernel: Kernel, without: Collection[str]) -> str:
    pages, vcpus, grain = space.pages, space.pairs.vcpus, space.pairs.cells.grain
    smaller = (space_of(hardware, kernel, p, vcpus, grain, without).bound for p in range(1, pages))
    fit = sum(1 for _ in itertools.takewhile(lambda bound: bound <= MOST_STATES, smaller))
    return (
        f"{pages} pages and {vcpus} vCPUs make up to {space.bound:,} states, {space.bound / 2**30:,.1f} GiB at one byte "
        f"each, and as much again at work; {fit} page(s) fit. kvmbook.search.count_states does not visit them"
    )


class Search:
    """Breadth-first over a `Space`. After `run`: ``states``, ``transitions``, ``depth``, and ``level``, one byte a state."""

    def __init__(self, space: Space) -> None:
        self.space, self.pagewise = space, Pagewise(space.pairs.steps, space.pages)
        pairs, place = space.pairs, space.place
        self.everywhere = {what: place[np.array(to)[space.order]] for what, to in pairs.everywhere.items()}
        self.lost = np.array([pairs.steps.lost(*pair) for pair in pairs.pairs])[space.order]
        blocks_lost = np.bincount(space.block, self.lost, len(space.size)) > 0
        self.may_lose = blocks_lost[space.blocks].any(axis=1)
        self._rows_of_edges()
        self._columns_of_user_steps()
        self.may_exit = np.array([[space.may_exit(s, v) for v in range(pairs.vcpus)] for s in space.situations])

    # ---- tables to gather from --------------------------------------------------------------------------------------

    def _rows_of_edges(self) -> None:
        """One row for each pair and for what may go on elsewhere, with the steps that are possible then: those that stay in
        the block as differences, the others as (everywhere, pair)."""
        space = self.space
        edges = self._edges()
        rows: dict[tuple[int, int], int] = {}
        near: list[list[int]] = []
        far: list[list[tuple[int, int]]] = []
        degree: list[int] = []
        self.row = [np.empty(len(space.situations), np.int64) for _ in range(space.pages)]
        for s, situation in enumerate(space.situations):
            for page, block in enumerate(situation):
                elsewhere = space.elsewhere(situation, page)
                if rows.setdefault((block, elsewhere), len(degree)) == len(degree):
                    low, high = int(space.first[block]), int(space.first[block] + space.size[block])
                    for here in range(low, high):
                        steps = [(what, to) for what, to, unless in edges[here] if not unless & elsewhere]
                        away = {step for step in steps if step[0] or not low <= step[1] < high}
                        near.append(sorted({to - here for step in steps if step not in away for to in step[1:]} - {0}))
                        far.append(sorted(away))
                        degree.append(len(steps))
                self.row[page][s] = rows[block, elsewhere]
        self.degree = np.array(degree)
        self.near = _columns(near, 0)
        self.far = {
            what: _columns([[to for w, to in row if w == what] for row in far], -1) for what in (0, *self.everywhere)
        }

    def _edges(self) -> list[list[tuple[int, int, int]]]:
        """The steps of each pair: what they do everywhere, if that is anything; the pair that they lead to; `Edge.unless`."""
        pairs, place = self.space.pairs, self.space.place.tolist()
        edges: list[list[tuple[int, int, int]]] = [[]] * len(place)
        for number, (control, _) in enumerate(pairs.pairs):
            edges[place[number]] = [
                (e.everywhere, place[pairs.number[control, e.page]], e.unless) for e in pairs.edges[number]
            ]
        return edges

    def _columns_of_user_steps(self) -> None:
        """For the first, second, ... step of user space: what each pair becomes, in the silent and the spoken control, and
        whether it speaks; by page, if that makes a difference."""
        space, pairs, place = self.space, self.space.pairs, self.space.place.tolist()
        self.user: list[tuple[np.ndarray, np.ndarray]] = []
        for nth in range(max(map(len, pairs.users.values()))):
            to = np.full((2, len(pairs.numbers), len(space.place)), -1)
            speaks = np.zeros((len(pairs.numbers), len(space.place)), bool)
            for steps in pairs.users.values():
                for which, becomes in enumerate(steps[nth].becomes if nth < len(steps) else ()):
                    for pair, (page, says) in becomes.items():
                        here = place[pair]
                        speaks[which, here] = says
                        for column, control in enumerate((steps[nth].silent, steps[nth].spoken)):
                            if control is not None and not (says and column == 0):
                                to[column, which, here] = place[pairs.number[control, page]]
            self.user.append((to, speaks))
        self.user_steps = np.array([len(space.users(situation)) for situation in space.situations])

    # ---- one level --------------------------------------------------------------------------------------------------

    def _take_apart(self, states: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Of each state, in ascending order, the situation, and for each page the rank of its pair."""
        space = self.space
        counts = np.diff(np.searchsorted(states, space.base))
        situation = np.repeat(np.arange(len(counts)), counts)
        rest, ranks = states - space.base.take(situation), []
        for strides in space.strides[:-1]:
            stride = strides.take(situation)
            rank = rest // stride
            rest = rest - rank * stride
            ranks.append(rank)
        return situation, [*ranks, rest]

    def _put_together(self, pairs: list[np.ndarray]) -> np.ndarray:
        """The states that are made of these pairs, one array for each page."""
        space = self.space
        code: np.ndarray = sum(codes.take(pair) for codes, pair in zip(space.codes, pairs, strict=True))
        situation = space.lookup.take(code)
        states: np.ndarray = space.base.take(situation) + space.rank.take(pairs[-1])
        for strides, pair in zip(space.strides, pairs[:-1], strict=False):
            states += space.rank.take(pair) * strides.take(situation)
        return states

    def successors(self, states: np.ndarray) -> Iterator[tuple[np.ndarray | slice, np.ndarray]]:
        """Yield (which of ``states``; what one step makes of these), until all steps are done. States that a step does not
        change may be left out. Adds to ``transitions``."""
        space = self.space
        situation, ranks = self._take_apart(states)
        pairs = [rank + firsts.take(situation) for rank, firsts in zip(ranks, space.firsts, strict=True)]
        for page, rank in enumerate(ranks):
            row, stride = rank + self.row[page].take(situation), space.strides[page].take(situation)
            self.transitions += int(self.degree.take(row).sum())
            for column in self.near:  # the situation stays, so the number changes by a multiple of the stride
                yield slice(None), states + column.take(row) * stride
            for what, columns in self.far.items():
                for column in columns:
                    to = column.take(row)
                    which = np.flatnonzero(to >= 0)
                    if which.size:
                        after = [pair.take(which) for pair in pairs]
                        if what:
                            after = [self.everywhere[what].take(pair) for pair in after]
                        after[page] = to.take(which)
                        yield which, self._put_together(after)
        yield from self._exits(situation, pairs)
        yield from self._user_space(situation, pairs)

    def _exits(self, situation: np.ndarray, pairs: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """A vCPU in the guest whose PML buffer holds some page leaves it."""
        for vcpu in range(self.space.pairs.vcpus):
            if self.may_exit[:, vcpu].any():
                drained = self.everywhere[EXIT + vcpu]
                changes = np.any([drained.take(pair) != pair for pair in pairs], axis=0)
                which = np.flatnonzero(changes & self.may_exit[:, vcpu].take(situation))
                self.transitions += which.size
                yield which, self._put_together([drained.take(pair.take(which)) for pair in pairs])

    def _user_space(self, situation: np.ndarray, pairs: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All pages change at once; where to depends on whether one of them speaks."""
        possible = self.user_steps.take(situation)
        self.transitions += int(possible.sum())
        for nth, (to, speaks) in enumerate(self.user):
            which = np.flatnonzero(possible > nth)
            here = [pair.take(which) for pair in pairs]
            spoken = np.zeros(which.size, int)
            for page, pair in enumerate(here):
                spoken |= speaks[page % len(speaks)].take(pair)
            yield which, self._put_together([to[spoken, page % len(speaks), pair] for page, pair in enumerate(here)])

    # ---- the whole search -------------------------------------------------------------------------------------------

    def run(self, progress: Progress | None = None, whole: bool = True) -> None:
        """Visit all states; if not ``whole``, up to the first level in which a write is lost. What it finds is in this
        object alone: it can be interrupted at any time."""
        self.level = np.full(self.space.bound, UNSEEN, np.uint8)
        self.transitions, self.states, self.depth = 0, 0, 0
        frontier = self._put_together([self.space.place[:1]] * self.space.pages)
        self.level[frontier] = 0
        while frontier.size:
            self.states += frontier.size
            if not whole and self._lost_in(frontier).any():
                break
            frontier = self._next(frontier, progress)
            self.depth += bool(frontier.size)

    def _next(self, frontier: np.ndarray, progress: Progress | None) -> np.ndarray:
        """The states that are first met from these, in ascending order, so that gathers go through memory in order too."""
        level, number, count = self.level, self.depth + 1, 0
        met: list[np.ndarray] = []
        if number == UNSEEN:
            raise ValueError(f"a run of {UNSEEN} steps: one byte is too small for the level of a state")
        for begin in range(0, frontier.size, CHUNK):
            for _, after in self.successors(frontier[begin : begin + CHUNK]):
                new = after.compress(level.take(after) == UNSEEN)
                level[new] = number
                count += new.size
                if count * 1000 < len(level):
                    met.append(new)
            if progress is not None:
                progress(number, self.states + count, len(level))
        if count * 1000 < len(level):  # so few that it is not worth while to look through all bytes
            return np.unique(np.concatenate([*met, frontier[:0]]))
        parts = range(0, len(level), SCAN)
        return np.concatenate([begin + np.flatnonzero(level[begin : begin + SCAN] == number) for begin in parts])

    # ---- a shortest run ---------------------------------------------------------------------------------------------

    def shortest_loss(self) -> tuple[Action, ...] | None:
        """The first, in the order of `actions`, of the shortest runs that lose a write; None if no run does."""
        counted, goals = self.transitions, self._first_lost()
        if not goals.size:
            return None
        length = int(self.level[goals[0]])
        good = [goals]  # from the end to the start: the states on some shortest run
        for number in range(length - 1, -1, -1):
            states = np.flatnonzero(self.level == number)
            leads = np.zeros(states.size, bool)
            for begin in range(0, states.size, CHUNK):
                part = leads[begin : begin + CHUNK]
                for which, after in self.successors(states[begin : begin + CHUNK]):
                    part[which] |= np.isin(after, good[-1])
            good.append(states.compress(leads))
        self.transitions = counted
        trace, here = [], int(good.pop()[0])
        for goal in reversed(good):
            action, here = next(step for step in self.actions(here) if step[1] in goal)
            trace.append(action)
        return tuple(trace)

    def _first_lost(self) -> np.ndarray:
        """The states in which a write is lost, of the first level that has any."""
        found = [np.empty(0, np.int64)]
        for begin, end in zip(self.space.base[:-1][self.may_lose], self.space.base[1:][self.may_lose], strict=True):
            states = begin + np.flatnonzero(self.level[begin:end] != UNSEEN)
            found.append(states.compress(self._lost_in(states)))
        states = np.concatenate(found)
        levels = self.level[states]
        return states.compress(levels == levels.min(initial=UNSEEN))

    def _lost_in(self, states: np.ndarray) -> np.ndarray:
        """Whether a write is lost in each of these, in ascending order."""
        situation, ranks = self._take_apart(states)
        lost = [
            self.lost.take(rank + firsts.take(situation)) for rank, firsts in zip(ranks, self.space.firsts, strict=True)
        ]
        together: np.ndarray = np.logical_or.reduce(lost)
        return together

    def pairs_in(self, state: int) -> list[int]:
        """For each page of one state the number of its pair, as in `Pairs`."""
        situation, ranks = self._take_apart(np.array([state]))
        firsts = (firsts[situation] for firsts in self.space.firsts)
        return [int(self.space.order[rank + first][0]) for rank, first in zip(ranks, firsts, strict=True)]

    def state_of(self, pairs: list[int]) -> int:
        """The state that is made of these pairs, one for each page."""
        return int(self._put_together([self.space.place[[pair]] for pair in pairs])[0])

    def actions(self, state: int) -> list[tuple[Action, int]]:
        """The steps possible in one state, and where they lead, as `Pagewise.actions` orders them."""
        found, pairs = self.pagewise, self.space.pairs
        here = tuple(found.number(*pairs.pairs[pair]) for pair in self.pairs_in(state))
        return [
            (action, self.state_of([pairs.number[found.pairs[pair]] for pair in after]))
            for action, after in found.actions(here)
        ]


def _columns(rows: list[list[int]], fill: int) -> list[np.ndarray]:
    """Lists of different lengths as columns, the short ones filled up."""
    table = np.full((max(map(len, rows), default=0), len(rows)), fill)
    for number, row in enumerate(rows):
        table[: len(row), number] = row
    return list(table)
