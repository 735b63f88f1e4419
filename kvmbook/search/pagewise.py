"""What can happen in one state of a small VM, put together page by page when somebody asks.

A state is a tuple of numbers, one for each page: of its pair of control and page, as in `tables`. Nothing is found before
it is needed, so a search that ends early runs only those steps of the model that it meets.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from kvmbook.search.cells import Control
from kvmbook.search.schedule import Action, Reach
from kvmbook.search.tables import EXIT, Page, PageSteps, Pair

State = tuple[int, ...]
ORDER = ("vCPU", "KVM ", "host")  # the order of `Pagewise.actions`, then user space


class Way(NamedTuple):
    """An `Edge` of a pair, with the number of the pair that it leads to."""

    to: int
    everywhere: int
    unless: int
    action: Action


class Pagewise:
    """The VM of ``steps.cells.pages`` pages, or of fewer where nothing tells pages apart."""

    def __init__(self, steps: PageSteps, pages: int | None = None) -> None:
        self.tables, self.cells = steps, steps.cells
        self.pairs: list[Pair] = []
        self._number: dict[Pair, int] = {}
        self._busy: list[int] = []
        self._ways: dict[int, list[list[Way]]] = {}
        self._everywhere: dict[tuple[int, int], int] = {}
        self._users: dict[int, list[Action]] = {}
        self._after_user: dict[tuple[int, int, Action], tuple[bool, Control, Page]] = {}
        self._lost: dict[int, bool] = {}
        self._of_one_page: dict[State, list[State]] = {}
        exits = [Action(f"vCPU{v}", "exits") for v in range(steps.vcpus)] if "exits" not in self.cells.without else []
        self.exits = [(action, 1 << v, EXIT + v) for v, action in enumerate(exits)]
        self.start = (self.number(self.cells.start, (0,) * (steps.vcpus + 1)),) * (pages or self.cells.pages)

    def number(self, control: Control, page: Page) -> int:
        """The number of a pair, the next one if it was not met before."""
        pair = control, page
        number = self._number.setdefault(pair, len(self.pairs))
        if number == len(self.pairs):
            self.pairs.append(pair)
            self._busy.append(self.tables.seen_elsewhere(self.tables.gates(page)))
        return number

    def lost(self, state: State) -> bool:
        """Whether a write is lost."""
        for pair in state:
            if pair not in self._lost:
                self._lost[pair] = self.tables.lost(*self.pairs[pair])
        return any(self._lost[pair] for pair in state)

    def successors(self, state: State) -> list[State]:
        """Where the steps possible in one state lead, in the order of `actions`."""
        if state in self._of_one_page:
            return self._of_one_page[state]
        found = [to for _, _, to in self.moves(state)] + [to for _, to in self.user_space(state)]
        if len(state) == 1:  # nothing goes on elsewhere, so this is as much a table as any
            self._of_one_page[state] = found
        return found

    def actions(self, state: State) -> list[tuple[Action, State]]:
        """The steps possible in one state, and where they lead: vCPUs first, then KVM for them, the host, user space."""
        moves = [(a if a.page is None else a._replace(page=page), to) for a, page, to in self.moves(state)]
        return [*moves, *self.user_space(state)]

    def moves(self, state: State) -> Iterator[tuple[Action, int, State]]:
        """The steps of all but user space: the action as if there were one page, the page, where it leads."""
        busy = [self._busy[pair] for pair in state]
        elsewhere = [_union(busy[:page] + busy[page + 1 :]) for page in range(len(state))] if any(busy) else busy
        ways = [self._ways.get(pair) or self._find_ways(pair) for pair in state]
        for kind in range(len(ORDER)):
            for page, way_of in enumerate(ways):
                for to, everywhere, unless, action in way_of[kind]:
                    if not unless & elsewhere[page]:
                        others = self._all(state, everywhere) if everywhere else state
                        yield action, page, (*others[:page], to, *others[page + 1 :])
            if kind == 0:
                for action, vcpu, what in self.exits:
                    if not vcpu & _union(busy) and (after := self._all(state, what)) != state:
                        yield action, 0, after

    def _find_ways(self, pair: int) -> list[list[Way]]:
        control, _ = self.pairs[pair]
        ways: list[list[Way]] = [[] for _ in ORDER]
        for edge in self.tables.edges(*self.pairs[pair]):
            to = self.number(control, edge.page)
            ways[ORDER.index(edge.action.who[:4])].append(Way(to, edge.everywhere, edge.unless, edge.action))
        self._ways[pair] = ways
        return ways

    def _all(self, state: State, what: int) -> State:
        """What a flush or an exit makes of all pages."""
        for pair in state:
            if (pair, what) not in self._everywhere:
                control, page = self.pairs[pair]
                self._everywhere[pair, what] = self.number(control, self.tables.everywhere(control, page, what))
        return tuple([self._everywhere[pair, what] for pair in state])

    def user_space(self, state: State) -> Iterator[tuple[Action, State]]:
        """Its steps: all pages change at once, and where to depends on whether one of them speaks."""
        ways = [self._users[pair] if pair in self._users else self._find_users(pair) for pair in state]
        for action in ways[0] if all(ways) else ():
            after = [self._by_user(page, pair, action) for page, pair in enumerate(state)]
            controls = {control for speaks, control, _ in after if speaks} or {after[0][1]}
            assert len(controls) == 1, "pages disagree on what user space learns"
            (control,) = controls
            yield action, tuple([self.number(control, page) for _, _, page in after])

    def _find_users(self, pair: int) -> list[Action]:
        control, page = self.pairs[pair]
        self._users[pair] = [] if self.tables.holds_up_user(control, page) else self.cells.user_starts(control)
        return self._users[pair]

    def _by_user(self, page: int, pair: int, action: Action) -> tuple[bool, Control, Page]:
        key = page, pair, action
        if key not in self._after_user:
            control, here = self.pairs[pair]
            silent, *_ = self.cells.user_step(control, action)
            to, after = self.tables.user_step(control, action, here, page)
            self._after_user[key] = to != silent, to, after
        return self._after_user[key]


def _union(masks: list[int]) -> int:
    together = 0
    for mask in masks:
        together |= mask
    return together


def search_pagewise(vm: Pagewise, max_states: int) -> Reach | None:
    """Visit the states breadth first, up to and with the level in which a write is first lost. None beyond ``max_states``.
    The trace is the first, in the order of `Pagewise.actions`, of the shortest runs that lose a write."""
    came_from: dict[State, State] = {}
    met, level, transitions, depth = {vm.start}, [vm.start], 0, 0
    while level:
        if (loss := next((state for state in level if vm.lost(state)), None)) is not None:
            return Reach(len(met), transitions, depth, _trace(vm, came_from, loss))
        following: list[State] = []
        for state in level:
            after = vm.successors(state)
            transitions += len(after)
            for to in after:
                if to not in met:
                    met.add(to)
                    came_from[to] = state
                    following.append(to)
            if len(met) > max_states:
                return None
        level, depth = following, depth + bool(following)
    return Reach(len(met), transitions, depth, None)


def _trace(vm: Pagewise, came_from: dict[State, State], state: State) -> tuple[Action, ...]:
    trace: list[Action] = []
    while (before := came_from.get(state)) is not None:
        trace.append(next(action for action, to in vm.actions(before) if to == state))
        state = before
    return tuple(reversed(trace))
