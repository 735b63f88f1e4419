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
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvmbook.model import FlushRule
from kvmbook.search.cells import BLANK_VIEW, BLANK_WORD, Cells, Control, View, Word
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


class _Move(NamedTuple):
    """A step of a vCPU: its ``names`` for each vCPU, the numbers of the word and the view that it leads to, and whether all
    TLBs are ``flushed``, the vCPU ``exited``, or it ``starts`` what it could not if it were busy on another page."""

    names: list[Action]
    word: int
    view: int
    flushed: bool
    exited: bool
    starts: bool


@dataclass
class _Calm:
    """What is known of one control without an ioctl, by numbers: the ``moves`` of a vCPU with one word and view, what a
    flush or an exit makes of these, and what follows for pages."""

    control: Control
    moves: dict[tuple[int, int], list[_Move]] = field(default_factory=dict)
    flushed: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    exited: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    edges: dict[Page, list[Edge]] = field(default_factory=dict)
    everywhere: dict[tuple[Page, int], Page] = field(default_factory=dict)


@dataclass
class _User:
    """What is known of one step of user space on the ``number``-th page: the ``silent`` control that it leads to, the word
    that it makes of a ``blank`` page; what it makes of each word, and of a blank one with each view; and the control, where
    user space learns something."""

    control: Control
    action: Action
    number: int
    silent: Control
    blank: int
    words: dict[int, tuple[Control | None, int]] = field(default_factory=dict)
    views: dict[int, tuple[Control | None, int, int]] = field(default_factory=dict)


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
        self._calm: dict[Control, _Calm] = {}  # of every control, in the cells of this one
        self._known: dict[Control, _Calm] = {}  # of the calm ones, also by those of another flush rule
        self._user: dict[tuple[Control, Action, int], _User] = {}
        self._joined: dict[tuple[int, ...], int] = {}
        self._waits: dict[int, int] = {}
        self.locks = {"read": 1 << vcpus, "write": 2 << vcpus}

    def with_flush(self, rule: FlushRule) -> PageSteps:
        """The same under another flush rule: what vCPUs and the host do is already known."""
        other = copy.copy(self)
        other.cells, other._calm, other._user = self.cells.with_flush(rule), {}, {}
        return other

    def page(self, word: Word, views: list[View]) -> Page:
        """The numbers of these parts; new parts get the next ones."""
        return (self._word(word), *map(self._view, views))

    def _word(self, word: Word) -> int:
        if (number := self._word_number.setdefault(word, len(self.words))) == len(self.words):
            self.words.append(word)
        return number

    def _view(self, view: View) -> int:
        if (number := self._view_number.setdefault(view, len(self.views))) == len(self.views):
            self.views.append(view)
        return number

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
        here = self._calm_of(control)
        if page not in here.edges:
            here.edges[page] = [*self._vcpu_edges(here, page), *self._host_edges(here, page)]
        edges = here.edges[page]
        held = self.locks[control.lock] if control.lock is not None else 0
        return [edge for edge in edges if not edge.unless & held] if held else edges

    def _calm_of(self, control: Control) -> _Calm:
        if control not in self._calm:
            calm = self.cells.calm(control)
            self._calm[control] = self._known.setdefault(calm, _Calm(calm))
        return self._calm[control]

    def _vcpu_edges(self, here: _Calm, page: Page) -> Iterator[Edge]:
        word, *views = page
        holds = [self._holds(view) for view in views]
        for v, view in enumerate(views):
            waits = self._waits_of(view)
            if any(waits & held for other, held in enumerate(holds) if other != v):
                continue
            if (word, view) not in here.moves:
                here.moves[word, view] = self._find_moves(here.control, word, view)
            for names, to_word, to_view, flushed, exited, starts in here.moves[word, view]:
                after = (to_word, *page[1 : v + 1], to_view, *page[v + 2 :])
                if flushed:  # which concerns the other views too
                    all_flushed = self._everywhere(here, after, FLUSH)
                    after = (*all_flushed[: v + 1], to_view, *all_flushed[v + 2 :])
                yield Edge(names[v], after, FLUSH if flushed else EXIT + v if exited else 0, waits | starts << v)

    def _find_moves(self, calm: Control, word: int, view: int) -> list[_Move]:
        """The steps of a vCPU that has this view."""
        moves = []
        for action, step in self.cells.vcpu_step(calm, self.words[word], self.views[view]).items():
            starts = self.views[view].fault is None and action.what != "forgets"
            names = [action._replace(who=action.who.replace("vCPU0", f"vCPU{v}")) for v in range(self.vcpus)]
            moves.append(_Move(names, self._word(step.word), self._view(step.view), step.flushed, step.exited, starts))
        return moves

    def _host_edges(self, here: _Calm, page: Page) -> Iterator[Edge]:
        if not any(self._holds(view) for view in page[1:]):
            waits = sum(self.locks[lock] for lock in self.locks if self.cells.waits(None, lock))
            for action, step in self.cells.host_step(here.control, self.words[page[0]]).items():
                after = (self._word(step.word), *page[1:])
                after = self._everywhere(here, after, FLUSH) if step.flushed else after
                yield Edge(action, after, FLUSH * step.flushed, waits)

    def _holds(self, view: int) -> int:
        """The mmu_lock that the fault of a view holds, as `Edge.unless` counts it."""
        fault = self.views[view].fault
        return self.locks[fault.lock] if fault is not None and fault.lock else 0

    def _waits_of(self, view: int) -> int:
        """The ways of holding mmu_lock that the fault of a view must wait for."""
        if view not in self._waits:
            fault = self.views[view].fault
            self._waits[view] = sum(self.locks[lock] for lock in self.locks if fault and self.cells.waits(fault, lock))
        return self._waits[view]

    def everywhere(self, control: Control, page: Page, what: int) -> Page:
        """What a flush, or the exit of one vCPU, makes of any page."""
        return self._everywhere(self._calm_of(control), page, what)

    def _everywhere(self, here: _Calm, page: Page, what: int) -> Page:
        key = page, what
        if key not in here.everywhere:
            word, *views = page
            steps = here.flushed if what == FLUSH else here.exited
            run = self.cells.flushed if what == FLUSH else self.cells.exited
            words = []
            for v in range(self.vcpus) if what == FLUSH else [what - EXIT]:
                if (word, views[v]) not in steps:
                    step = run(here.control, self.words[word], self.views[views[v]])
                    steps[word, views[v]] = self._word(step.word), self._view(step.view)
                to_word, views[v] = steps[word, views[v]]
                words.append(to_word)
            here.everywhere[key] = (self._join(word, word, words), *views)
        return here.everywhere[key]

    def _join(self, word: int, before: int, results: list[int]) -> int:
        """The word after all changes that were made of ``before``, each alone."""
        if results.count(before) == len(results):
            return word
        key = word, before, *results
        if key not in self._joined:
            changes = [differences(self.words[before], self.words[result]) for result in results]
            together = {name: new for change in changes for name, new in change.items()}
            self._joined[key] = self._word(self.words[word]._replace(**together))
        return self._joined[key]

    # ---- what user space does to it ---------------------------------------------------------------------------------

    def user_step(self, control: Control, action: Action, page: Page, number: int) -> tuple[Control, Page]:
        """The control and the page after a step of user space; the page is the ``number``-th of the slot."""
        key = control, action, number
        if key not in self._user:
            silent, blank, _ = self.cells.user_step(control, action, BLANK_WORD, BLANK_VIEW, number)
            self._user[key] = _User(control, action, number, silent, self._word(blank))
        step, (word, *views) = self._user[key], page
        after = step.words[word] if word in step.words else self._after_user(step, word)
        alone = [step.views[view] if view in step.views else self._view_after_user(step, view) for view in views]
        spoken = {to for to in (after[0], *(to for to, _, _ in alone)) if to is not None}
        assert len(spoken) <= 1, "parts of a page disagree on what user space learns"
        word = self._join(after[1], step.blank, [changed for _, changed, _ in alone])
        return spoken.pop() if spoken else step.silent, (word, *(view for _, _, view in alone))

    def _after_user(self, step: _User, word: int) -> tuple[Control | None, int]:
        to, after, _ = self.cells.user_step(step.control, step.action, self.words[word], BLANK_VIEW, step.number)
        step.words[word] = to if to != step.silent else None, self._word(after)
        return step.words[word]

    def _view_after_user(self, step: _User, view: int) -> tuple[Control | None, int, int]:
        to, word, after = self.cells.user_step(step.control, step.action, BLANK_WORD, self.views[view], step.number)
        step.views[view] = to if to != step.silent else None, self._word(word), self._view(after)
        return step.views[view]

    def holds_up_user(self, control: Control, page: Page) -> bool:
        """Whether user space must wait for a fault on the page."""
        faults = [fault for view in self.parts(page)[1] if (fault := view.fault) is not None]
        return any(self.cells.blocks_user(control, fault) for fault in faults)

    def lost(self, control: Control, page: Page) -> bool:
        """Whether a write to the page is lost: written, and no view knows."""
        word, views = self.parts(page)
        return word.written and all(self.cells.lost(control, word, view) for view in views)


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
    ``unless``; ``everywhere[what][i]``: the pair that a flush or an exit makes of pair i, ``quiet`` those that change none,
    which the edges leave out; ``block[i]``: its block; ``blocks[b]``: control and gates; ``members[b]``: its pairs;
    ``holds_up_user[b]``: whether user space must wait while a page is there; ``users[control]``: the steps of user space.
    """

    def __init__(self, steps: PageSteps) -> None:
        self.steps, self.cells, self.vcpus = steps, steps.cells, steps.vcpus
        cells, vcpus = self.cells, self.vcpus
        self.numbers = range(cells.pages if cells.grain is Grain.STEP else 1)  # only there a pass tells pages apart
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
