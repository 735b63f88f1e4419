"""Every interleaving of a small VM: can a write be lost, by which shortest run, and over how many states is that known?

The meaning of each step comes from the model (`cells`, `tables`), and `space` has a number for each state; this module only
counts. What the search knows of a state is one byte: the level at which it was met. That makes a breadth-first search
without a hash table, whose every level is a handful of gathers.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np

from kvmbook.model import Hardware, Kernel, Vm
from kvmbook.search.cells import Cells
from kvmbook.search.levels import Levels, PageTables, VmTables, pays
from kvmbook.search.pagewise import Pagewise, search_pagewise
from kvmbook.search.playing import script_of
from kvmbook.search.schedule import Action, Grain, replay, smallest_vm, steps_left_out
from kvmbook.search.selftest import c_program
from kvmbook.search.space import MOST_STATES, Space, space_of
from kvmbook.search.tables import EXIT, PageSteps, Pairs

UNSEEN, GOAL = 255, 254  # no levels
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
    bounds = hardware, kernel, pages, vcpus, grain, steps_left_out(without)
    asked = _asked(*bounds)
    if not whole and (reach := search_pagewise(asked, FEW_STATES)) is not None:
        return Result(*bounds, reach.states, reach.transitions, reach.depth, reach.trace, reach.trace is None)
    space = Space(Pairs(asked.tables))
    if space.bound > MOST_STATES:
        raise ValueError(_too_large(space, hardware, kernel, without))
    search = Search(space)
    search.run(progress, whole)
    trace = search.shortest_loss()
    return Result(*bounds, search.states, search.transitions, search.depth, trace, whole or trace is None)


@functools.lru_cache(maxsize=4)
def _asked(
    hardware: Hardware, kernel: Kernel, pages: int, vcpus: int, grain: Grain, without: frozenset[str]
) -> Pagewise:
    """What the model has said of a small VM, for whoever asks again."""
    return Pagewise(PageSteps(Cells(hardware, kernel, pages, grain, without), vcpus))


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
        self.lost = np.array([space.pairs.steps.lost(*pair) for pair in space.pairs.pairs])[space.order]
        blocks_lost = np.bincount(space.block, self.lost, len(space.size)) > 0
        self.may_lose = blocks_lost[space.blocks].any(axis=1)
        self.pages = self._steps_of_pages()
        self.vm = self._steps_of_all()
        self.near, self.far = self._columns()
        self.levels: Levels | None = None
        if pays(space):
            self.load()

    def load(self) -> None:
        """Have the search run by compiled loops, which are compiled, or read from disk, now."""
        self.levels = Levels(self.space, self.pages, self.vm)

    # ---- tables to gather from --------------------------------------------------------------------------------------

    def _steps_of_pages(self) -> PageTables:
        """One row for each pair and for what may go on elsewhere, with the steps that are possible then."""
        space = self.space
        here, to, what, unless = self._edges()
        begin, end = (np.searchsorted(here, pairs) for pairs in (space.first, space.first + space.size))
        rows: dict[tuple[int, int], int] = {}
        pair, row, chosen, total = [np.empty(0, int)], [np.empty(0, int)], [np.empty(0, int)], 0
        first = [np.empty(len(space.situations), np.int64) for _ in range(space.pages)]
        for s, situation in enumerate(space.situations):
            for page, block in enumerate(situation):
                elsewhere = space.elsewhere(situation, page)
                if rows.setdefault((block, elsewhere), total) == total:
                    edges = np.arange(begin[block], end[block])
                    chosen.append(edges[unless[edges] & elsewhere == 0])
                    row.append(here[chosen[-1]] + (total - space.first[block]))
                    pair.append(space.first[block] + np.arange(space.size[block]))
                    total += int(space.size[block])
                first[page][s] = rows[block, elsewhere]
        edge, of_row, of_pair = (np.concatenate(parts) for parts in (chosen, row, pair))
        degree = np.bincount(of_row, minlength=total)
        changes = (what[edge] != 0) | (to[edge] != here[edge])
        kinds = len(space.pairs.effects) + 1
        steps = np.unique(((of_row * kinds + what[edge]) * len(space.place) + to[edge])[changes])
        steps, to = np.divmod(steps, len(space.place))
        return PageTables(first, of_pair, degree, *np.divmod(steps, kinds), to)

    def _edges(self) -> np.ndarray:
        """The steps of all pairs, by pair: the pair, the one that it becomes, what that does everywhere, `Edge.unless`."""
        pairs, place = self.space.pairs, self.space.place
        count = np.array([len(edges) for edges in pairs.edges])
        numbers = itertools.chain.from_iterable(itertools.chain.from_iterable(pairs.edges))
        to, what, unless = np.fromiter(numbers, np.int64, 3 * count.sum()).reshape(-1, 3).T
        here = np.repeat(place, count)
        return np.array([here, place[to], what, unless])[:, np.argsort(here, kind="stable")]

    def _columns(self) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
        """For the first, second, ... step of each row: how many pairs further on it leads, where it stays in the block; to
        which pair, where it does not, by what it does everywhere."""
        steps, block = self.pages, self.space.block
        here, rows = steps.pair[steps.row], len(steps.degree)
        stays = (steps.what == 0) & (block[steps.to] == block[here])
        near, far = _columns(steps.row[stays], (steps.to - here)[stays], rows, 0), []
        for what in range(len(self.vm.everywhere)):
            leaves = ~stays & (steps.what == what)
            far.append(_columns(steps.row[leaves], steps.to[leaves], rows, -1))
        return near, far

    def _steps_of_all(self) -> VmTables:
        space, pairs, place = self.space, self.space.pairs, self.space.place.tolist()
        images = [place if what == 0 else space.place[pairs.everywhere[what]] for what in (0, *pairs.effects)]
        everywhere = np.array(images)[:, space.order]
        may_exit = np.array([[space.may_exit(s, v) for v in range(pairs.vcpus)] for s in space.situations])
        steps_of_user = max(map(len, pairs.users.values()))
        becomes = np.full((steps_of_user, 2, len(pairs.numbers), len(place)), -1)
        speaks = np.zeros((steps_of_user, len(pairs.numbers), len(place)), bool)
        for users in pairs.users.values():
            for nth, user in enumerate(users):
                for which, table in enumerate(user.becomes):
                    for pair, (page, says) in table.items():
                        here = place[pair]
                        speaks[nth, which, here] = says
                        for column, control in enumerate((user.silent, user.spoken)):
                            if control is not None and not (says and column == 0):
                                becomes[nth, column, which, here] = place[pairs.number[control, page]]
        return VmTables(
            everywhere, may_exit, becomes, speaks, np.array([len(space.users(s)) for s in space.situations])
        )

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
            row, stride = rank + self.pages.first[page].take(situation), space.strides[page].take(situation)
            self.transitions += int(self.pages.degree.take(row).sum())
            for column in self.near:  # the situation stays, so the number changes by a multiple of the stride
                yield slice(None), states + column.take(row) * stride
            for what, columns in enumerate(self.far):
                for column in columns:
                    to = column.take(row)
                    which = np.flatnonzero(to >= 0)
                    if which.size:
                        after = [pair.take(which) for pair in pairs]
                        if what:
                            after = [self.vm.everywhere[what].take(pair) for pair in after]
                        after[page] = to.take(which)
                        yield which, self._put_together(after)
        yield from self._exits(situation, pairs)
        yield from self._user_space(situation, pairs)

    def _exits(self, situation: np.ndarray, pairs: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """A vCPU in the guest whose PML buffer holds some page leaves it."""
        for vcpu in range(self.space.pairs.vcpus):
            if self.vm.may_exit[:, vcpu].any():
                drained = self.vm.everywhere[EXIT + vcpu]
                changes = np.any([drained.take(pair) != pair for pair in pairs], axis=0)
                which = np.flatnonzero(changes & self.vm.may_exit[:, vcpu].take(situation))
                self.transitions += which.size
                yield which, self._put_together([drained.take(pair.take(which)) for pair in pairs])

    def _user_space(self, situation: np.ndarray, pairs: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All pages change at once; where to depends on whether one of them speaks."""
        possible = self.vm.user_steps.take(situation)
        self.transitions += int(possible.sum())
        for nth, (to, speaks) in enumerate(zip(self.vm.becomes, self.vm.speaks, strict=True)):
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
        if number == GOAL:
            raise ValueError(f"a run of {GOAL} steps: one byte is too small for the level of a state")
        for begin in range(0, frontier.size, CHUNK):
            for new in self._mark(frontier[begin : begin + CHUNK], number):
                count += new.size
                if count * 1000 < len(level):
                    met.append(new)
            if progress is not None:
                progress(number, self.states + count, len(level))
        if count * 1000 < len(level):  # so few that it is not worth while to look through all bytes
            return np.unique(np.concatenate([*met, frontier[:0]]))
        parts = range(0, len(level), SCAN)
        return np.concatenate([begin + np.flatnonzero(level[begin : begin + SCAN] == number) for begin in parts])

    def _mark(self, states: np.ndarray, number: int) -> Iterator[np.ndarray]:
        """Give all that follow on ``states`` and have no level yet this one; yield them."""
        if self.levels is not None:
            for _, after, _, transitions in self.levels.successors(states):
                self.transitions += transitions
                yield self.levels.mark(after, self.level, number)
        else:
            for _, after in self.successors(states):
                new = after.compress(self.level.take(after) == UNSEEN)
                self.level[new] = number
                yield new

    # ---- a shortest run ---------------------------------------------------------------------------------------------

    def shortest_loss(self) -> tuple[Action, ...] | None:
        """The first, in the order of `actions`, of the shortest runs that lose a write; None if no run does."""
        counted, goals = self.transitions, self._first_lost()
        if not goals.size:
            return None
        good = [goals]  # from the end to the start: the states on some shortest run
        for number in range(int(self.level[goals[0]]) - 1, -1, -1):
            states = np.flatnonzero(self.level == number)
            self.level[good[-1]] = GOAL
            parts = [states[begin : begin + CHUNK] for begin in range(0, states.size, CHUNK)]
            leads = np.concatenate([self._lead_to_goals(part) for part in parts])
            self.level[good[-1]] = number + 1
            good.append(states.compress(leads))
        self.transitions = counted
        trace, here = [], int(good.pop()[0])
        for goal in reversed(good):
            action, here = next(step for step in self.actions(here) if step[1] in goal)
            trace.append(action)
        return tuple(trace)

    def _lead_to_goals(self, states: np.ndarray) -> np.ndarray:
        """Whether one step can make of each of these, in ascending order, a state whose level is GOAL."""
        leads = np.zeros(states.size, bool)
        if self.levels is not None:
            for where, after, ends, _ in self.levels.successors(states):
                goals = np.concatenate([[0], np.cumsum(self.level.take(after) == GOAL)])
                leads[where] = np.diff(goals.take(ends), prepend=0) > 0
        else:
            for which, after in self.successors(states):
                leads[which] |= self.level.take(after) == GOAL
        return leads

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


def _columns(row: np.ndarray, values: np.ndarray, rows: int, fill: int) -> list[np.ndarray]:
    """What each row has, the rows ascending, as columns of all rows, the short ones filled up."""
    nth = np.arange(row.size) - np.searchsorted(row, row)
    table = np.full((nth.max(initial=-1) + 1, rows), fill)
    table[nth, row] = values
    return list(table)
