"""One page with the views of all vCPUs: the tables that the fast searches stand on.

A *pair* is a control and one page's state, (word, views). From the start all pairs are found that a page can get into,
whatever other pages do meanwhile: they may make a flush, have a harvest find something, keep a vCPU or a lock busy, and
nothing else. So the search of a larger VM needs no more than these pairs, one for each page.

Pairs that agree in the control and in which faults are under way (their *gates*) form a *block*.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from kvmbook.model import FlushRule
from kvmbook.search.cells import BLANK_VIEW, BLANK_WORD, Cells, Control, Step, View, Word
from kvmbook.search.schedule import Action, Grain

Page = tuple[int, ...]  # the number of a word, then of one view for each vCPU
Gates = tuple[tuple[str | None, int] | None, ...]  # for each vCPU the gate of its fault on a page, if there is one
FLUSH, EXIT = 1, 2  # what a step on one page does to all others: nothing (0), a flush, an exit of vCPU v (EXIT + v)

# How many pairs one vCPU makes, and how many times as many each further one, as measured; and what a pair takes in memory.
GROWTH = {Grain.ACCESS: (300, 3.2), Grain.FAULT: (500, 6), Grain.STEP: (1400, 33)}
MOST_PAIRS, PAIR_BYTES = 100_000, 2000


def expected_pairs(grain: Grain, vcpus: int) -> int:
    """About how many pairs the tables of so many vCPUs have."""
    one, factor = GROWTH[grain]
    return round(one * factor ** min(vcpus - 1, 50))


class Edge(NamedTuple):
    """One step on one page. ``everywhere``: FLUSH, EXIT + v, or 0 (a step that does both counts as a flush: a vCPU that
    handles a fault has left the guest, so its PML buffer is empty). ``unless``: a bit set; bit v: vCPU v handles a fault on
    another page; then one bit each for mmu_lock held there for read, and for write."""

    action: Action
    page: Page
    everywhere: int
    unless: int


class PageSteps:
    """The steps of one page with ``vcpus`` views, put together from cells."""

    def __init__(self, cells: Cells, vcpus: int) -> None:
        if vcpus < 1:
            raise ValueError(f"a VM needs at least one vCPU; got {vcpus}")
        if (pairs := expected_pairs(cells.grain, vcpus)) > MOST_PAIRS:
            fit = next(v for v in itertools.count(1) if expected_pairs(cells.grain, v + 1) > MOST_PAIRS)
            raise ValueError(
                f"{vcpus} vCPUs cut by {cells.grain.value} make tables of some {pairs:,} page states, "
                f"{pairs * PAIR_BYTES / 2**30:,.1f} GiB; {fit} vCPU(s) fit"
            )
        self.cells = cells
        self.vcpus = vcpus
        self.words, self.views = [BLANK_WORD], [BLANK_VIEW]
        self._word_number, self._view_number = {BLANK_WORD: 0}, {BLANK_VIEW: 0}
        self._edges: dict[tuple[Control, Page], list[Edge]] = {}
        self._everywhere: dict[tuple[Control, Page, int], Page] = {}
        self.locks = {"read": 1 << vcpus, "write": 2 << vcpus}

    def with_flush(self, rule: FlushRule) -> PageSteps:
        """The same under another flush rule: what vCPUs and the host do is already known."""
        other = copy.copy(self)
        other.cells = self.cells.with_flush(rule)
        return other

    def page(self, word: Word, views: list[View]) -> Page:
        """The numbers of these parts; new parts get the next ones."""
        if word not in self._word_number:
            self._word_number[word] = len(self.words)
            self.words.append(word)
        for view in views:
            if view not in self._view_number:
                self._view_number[view] = len(self.views)
                self.views.append(view)
        return (self._word_number[word], *(self._view_number[view] for view in views))

    def parts(self, page: Page) -> tuple[Word, list[View]]:
        """What these numbers stand for."""
        return self.words[page[0]], [self.views[number] for number in page[1:]]

    def gates(self, page: Page) -> Gates:
        """What others may have to wait for."""
        faults = (self.views[number].fault for number in page[1:])
        return tuple(fault.gate if fault is not None else None for fault in faults)

    def seen_elsewhere(self, gates: Gates) -> int:
        """What the other pages see of a page with these gates, as `Edge.unless` counts it."""
        mask = 0
        for vcpu, gate in enumerate(gates):
            if gate is not None:
                mask |= 1 << vcpu | self.locks.get(gate[0] or "", 0)
        return mask

    # ---- what happens on the page -----------------------------------------------------------------------------------

    def edges(self, control: Control, page: Page) -> list[Edge]:
        """All steps of the vCPUs and the host on this page, less those that wait for user space's mmu_lock."""
        key = self.cells.calm(control), page
        if key not in self._edges:
            self._edges[key] = list(self._find_edges(*key))
        edges = self._edges[key]
        held = self.locks[control.lock] if control.lock is not None else 0
        return [edge for edge in edges if not edge.unless & held] if held else edges

    def _find_edges(self, calm: Control, page: Page) -> Iterator[Edge]:
        word, views = self.parts(page)
        held = [(v, fault.lock) for v, view in enumerate(views) if (fault := view.fault) is not None and fault.lock]
        for v, view in enumerate(views):
            waits = sum(self.locks[lock] for lock in self.locks if view.fault and self.cells.waits(view.fault, lock))
            if any(self.locks[lock] & waits for holder, lock in held if holder != v):
                continue
            for action, step in self.cells.vcpu_step(calm, word, view).items():
                starts = view.fault is None and action.what != "forgets"
                after = self._others(calm, step, [*views[:v], step.view, *views[v + 1 :]], v)
                everywhere = FLUSH if step.flushed else EXIT + v if step.exited else 0
                named = action._replace(who=action.who.replace("vCPU0", f"vCPU{v}"))
                yield Edge(named, after, everywhere, waits | starts << v)
        waits = sum(self.locks[lock] for lock in self.locks if self.cells.waits(None, lock))
        if not held:
            for action, step in self.cells.host_step(calm, word).items():
                yield Edge(action, self._others(calm, step, views, -1), FLUSH * step.flushed, waits)

    def _others(self, calm: Control, step: Step, views: list[View], mover: int) -> Page:
        """The page after a step of vCPU ``mover`` (-1: the host): a flush concerns the other views too."""
        page = self.page(step.word, views)
        if not step.flushed:
            return page
        flushed = self.everywhere(calm, page, FLUSH)
        return flushed if mover < 0 else (*flushed[: mover + 1], page[mover + 1], *flushed[mover + 2 :])

    def everywhere(self, control: Control, page: Page, what: int) -> Page:
        """What a flush, or the exit of one vCPU, makes of any page."""
        key = self.cells.calm(control), page, what
        if key not in self._everywhere:
            word, views = self.parts(page)
            concerned = range(self.vcpus) if what == FLUSH else [what - EXIT]
            runs = self.cells.flushed if what == FLUSH else self.cells.exited
            steps = {v: runs(key[0], word, views[v]) for v in concerned}
            for v, step in steps.items():
                views[v] = step.view
            self._everywhere[key] = self.page(joined(word, [step.word for step in steps.values()]), views)
        return self._everywhere[key]

    # ---- what user space does to it ---------------------------------------------------------------------------------

    def user_step(self, control: Control, action: Action, page: Page, number: int) -> tuple[Control, Page]:
        """The control and the page after a step of user space; the page is the ``number``-th of the slot."""
        word, views = self.parts(page)
        run = self.cells.user_step
        silent, blank, _ = run(control, action, BLANK_WORD, BLANK_VIEW, number)
        controls, after, _ = run(control, action, word, BLANK_VIEW, number)
        alone = [run(control, action, BLANK_WORD, view, number) for view in views]
        spoken = {c for c in (controls, *(c for c, _, _ in alone)) if c != silent}
        assert len(spoken) <= 1, "parts of a page disagree on what user space learns"
        changed = [after._replace(**differences(blank, w)) for _, w, _ in alone]
        return spoken.pop() if spoken else silent, self.page(joined(after, changed), [view for _, _, view in alone])

    def holds_up_user(self, control: Control, page: Page) -> bool:
        """Whether user space must wait for a fault on the page."""
        faults = [fault for view in self.parts(page)[1] if (fault := view.fault) is not None]
        return any(self.cells.blocks_user(control, fault) for fault in faults)

    def lost(self, control: Control, page: Page) -> bool:
        """Whether a write to the page is lost: written, and no view knows."""
        word, views = self.parts(page)
        return word.written and all(self.cells.lost(control, word, view) for view in views)


def joined(word: Word, results: list[Word]) -> Word:
    """What several changes of one word come to together: each field as it was, unless one of them changed it."""
    changes = [differences(word, result) for result in results]
    return word._replace(**{name: new for change in changes for name, new in change.items()})


def differences(before: Word, after: Word) -> dict[str, Any]:
    """The fields of ``after`` that are not as before."""
    return {name: new for name, old, new in zip(Word._fields, before, after, strict=True) if new != old}


# ---- all pairs -------------------------------------------------------------------------------------------------------

Pair = tuple[Control, Page]


@dataclass
class UserSteps:
    """One step of user space from one control. It leads to ``silent``, or to ``spoken`` if some page speaks: has something
    that user space learns by this step. ``becomes[number][pair]``: the ``number``-th page afterwards, and whether it
    speaks."""

    action: Action
    silent: Control
    spoken: Control | None
    becomes: list[dict[int, tuple[Page, bool]]]


class Pairs:
    """All pairs of a slot with ``steps.cells.pages`` pages and ``steps.vcpus`` vCPUs, numbered as they are found.

    ``pairs[i]``: control and page; ``edges[i]``: its steps, each as the pair that it leads to, and `Edge.everywhere` and
    ``unless``; ``everywhere[what][i]``: the pair that a flush or an exit makes
    of pair i, ``quiet`` those that change none, which the edges leave out; ``block[i]``: its block; ``blocks[b]``: control
    and gates; ``members[b]``: its pairs; ``holds_up_user[b]``: whether user space must wait while a page is there;
    ``users[control]``: the steps of user space.
    """

    def __init__(self, steps: PageSteps) -> None:
        self.steps, self.cells, self.vcpus = steps, steps.cells, steps.vcpus
        cells, vcpus = self.cells, self.vcpus
        self.numbers = (
            range(cells.pages) if cells.grain is Grain.STEP else range(1)
        )  # only there a pass tells pages apart
        self.effects = [FLUSH, *(EXIT + v for v in range(vcpus))]
        self.pairs: list[Pair] = []
        self.number: dict[Pair, int] = {}
        self.edges: list[list[tuple[int, int, int]]] = []
        self.blocks: list[tuple[Control, Gates]] = []
        self.block: list[int] = []
        self.holds_up_user: list[bool] = []
        self.users: dict[Control, list[UserSteps]] = {}
        self.everywhere: dict[int, list[int]] = {what: [] for what in self.effects}
        self._block_number: dict[tuple[Control, Gates], int] = {}
        self.find(cells.start, (0,) * (vcpus + 1))
        for number, (control, page) in enumerate(self.pairs):  # grows while we go
            self._visit(number, control, page)
        self.members: list[list[int]] = [[] for _ in self.blocks]
        for number, block in enumerate(self.block):
            self.members[block].append(number)
        unchanged = list(range(len(self.pairs)))
        self.quiet = {what for what, to in self.everywhere.items() if to == unchanged}
        if self.quiet:
            self.edges = [[(to, 0 if what in self.quiet else what, u) for to, what, u in es] for es in self.edges]
        self._after: dict[tuple[int, int, Control], set[int]] = {}

    def find(self, control: Control, page: Page) -> int:
        """The number of a pair, a new one if it was not found before."""
        number = self.number.setdefault((control, page), len(self.pairs))
        if number == len(self.pairs):
            if number == 2 * MOST_PAIRS:  # that was more than expected
                raise ValueError(f"more than {number:,} page states for {self.vcpus} vCPUs: the tables do not fit")
            self.pairs.append((control, page))
            key = control, self.steps.gates(page)
            self.block.append(self._block_number.setdefault(key, len(self.blocks)))
            if self.block[-1] == len(self.blocks):
                self.blocks.append(key)
                self.holds_up_user.append(self.steps.holds_up_user(control, page))
        return number

    def _visit(self, number: int, control: Control, page: Page) -> None:
        edges = self.steps.edges(control, page)
        self.edges.append([(self.find(control, edge.page), edge.everywhere, edge.unless) for edge in edges])
        for what in self.effects:
            self.everywhere[what].append(self.find(control, self.steps.everywhere(control, page, what)))
        if control not in self.users:
            actions = self.cells.user_starts(control)
            silent = [self.cells.user_step(control, action)[0] for action in actions]
            self.users[control] = [
                UserSteps(action, to, None, [{} for _ in self.numbers])
                for action, to in zip(actions, silent, strict=True)
            ]
        for user in () if self.holds_up_user[self.block[number]] else self.users[control]:
            for which in self.numbers:
                self._visit_by_user(number, user, which)

    def _visit_by_user(self, number: int, user: UserSteps, which: int) -> None:
        """Another page may speak or not: what a silent page becomes, it may become in both controls."""
        control, page = self.pairs[number]
        after, becomes = self.steps.user_step(control, user.action, page, which)
        speaks = after != user.silent
        if speaks and user.spoken is None:
            user.spoken = after
            for known, _ in (pair for table in user.becomes for pair in table.values()):
                self.find(after, known)
        assert not speaks or after == user.spoken, "pages disagree on what user space learns"
        user.becomes[which][number] = becomes, speaks
        if user.spoken is not None:
            self.find(user.spoken, becomes)
        if not speaks:
            self.find(user.silent, becomes)

    def block_of(self, control: Control, page: Page) -> int:
        return self.block[self.number[control, page]]

    def blocks_after(self, user: UserSteps, block: int, control: Control) -> set[int]:
        """The blocks that a page in ``block`` may be in after a step of user space that leads to ``control``."""
        key = id(user), block, control
        if key not in self._after:
            becomes = [user.becomes[which][pair] for which in self.numbers for pair in self.members[block]]
            self._after[key] = {
                self.block_of(control, page) for page, says in becomes if not says or control == user.spoken
            }
        return self._after[key]
