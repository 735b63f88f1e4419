"""Verdicts for any number of pages and vCPUs.

Two things are forgotten. Of the other pages only what they may do to this one is kept: make a flush or an exit, have user
space learn something, hold it up for a while. Of the vCPUs only which *kinds* of view exist on this page: one or many makes
no difference, and there is always another vCPU that has none.

Why "safe" holds for every number: each step of a VM of any size is a step here. It touches one view, whose kind stays, if
another vCPU has the like, or goes; or it touches all views alike; and what it does to this page depends on nothing else.
So what is never met here is never met there. The other way round: every verdict "loses" comes with a run of two vCPUs, and
cut by access, without PML, the pages of VMs with two or more vCPUs and pages are exactly those found here (tests).

All sets of kinds that may be there together with one word are kept as one int: bit k stands for the set whose members are
the set bits of k. So one step is done for all these sets at once, by shifts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvmbook.model import Hardware, Kernel
from kvmbook.search.cells import BLANK_VIEW, BLANK_WORD, Cells, Control, View, Word
from kvmbook.search.schedule import Action, Grain
from kvmbook.search.tables import differences

Node = tuple[Control, Word]


@dataclass(frozen=True)
class Verdict:
    """``safe``: no write is lost, for any number of pages and vCPUs, runs cut as they were (`Grain`); ``states``: how many
    abstract states that rests on."""

    safe: bool
    states: int


def any_number(hardware: Hardware, kernel: Kernel, grain: Grain = Grain.FAULT) -> Verdict:
    """Can a write be lost in a VM of any size, runs cut by ``grain``?
    ValueError for `Grain.STEP`: there are too many kinds of half-done faults."""
    return AnyNumber(Cells(hardware, kernel, 1, grain)).search().verdict()


class AnyNumber:
    """``found``: for each control and word the sets of kinds that may be there, as an int of sets."""

    def __init__(self, cells: Cells) -> None:
        if cells.grain is Grain.STEP:
            raise ValueError("cut by step there are too many kinds of half-done faults; cut by fault or by access")
        if cells.without:
            raise ValueError(f"for any number no step is left out; got {', '.join(sorted(cells.without))}")
        self.cells = cells
        self.kinds: list[View] = []
        self.found: dict[Node, int] = {}
        self._having: list[int] = []
        self._new: dict[Node, int] = {}
        self._user: dict[tuple[Control, Action], tuple[Control | None, dict[Word, int]]] = {}

    def search(self, stop_at_loss: bool = False) -> AnyNumber:
        """Find all, or, if a loss is all that is asked for, only as much as it takes."""
        self._add((self.cells.start, BLANK_WORD), 1)
        while self._new and not (stop_at_loss and self.lost(*next(iter(self._new)))):
            node = next(iter(self._new))
            sets = self._new.pop(node)
            self._by_vcpus(node, sets)
            self._by_host(node, sets)
            self._by_user(node, sets)
        return self

    def verdict(self) -> Verdict:
        states = sum(sets.bit_count() for sets in self.found.values())
        return Verdict(not any(self.lost(*node) for node in self.found), states)

    def sets(self, node: Node) -> set[frozenset[View]]:
        """The sets of kinds that may be there, spelled out."""
        numbers = (k for k in range(self.found[node].bit_length()) if self.found[node] >> k & 1)
        return {frozenset(view for n, view in enumerate(self.kinds) if k >> n & 1) for k in numbers}

    def kinds_at(self, node: Node) -> list[View]:
        """Each kind that may be there, whatever else is."""
        return [kind for kind, having in zip(self.kinds, self._having, strict=True) if self.found[node] & having]

    def lost(self, control: Control, word: Word) -> bool:
        """Whether in one of the states a write is lost: the page was written, and no view that is there knows."""
        sets = self.found[control, word] if word.written else 0
        for number, kind in enumerate(self.kinds):
            if sets and not self.cells.lost(control, word, kind):
                sets &= ~self._having[number]
        return bool(sets) and self.cells.lost(control, word, BLANK_VIEW)

    def _add(self, node: Node, sets: int) -> None:
        new = sets & ~self.found.get(node, 0)
        if new:
            self.found[node] = self.found.get(node, 0) | new
            self._new[node] = self._new.get(node, 0) | new

    # ---- sets of sets -----------------------------------------------------------------------------------------------

    def _number(self, kind: View) -> int:
        if kind not in self.kinds:
            self.kinds.append(kind)
            half = 1 << len(self._having)  # as many sets without the new kind as with it
            self._having = [having | having << half for having in self._having] + [((1 << half) - 1) << half]
        return self.kinds.index(kind)

    def _with(self, sets: int, kind: View) -> int:
        """Each set with that kind in it."""
        if kind == BLANK_VIEW:
            return sets
        number = self._number(kind)
        return sets & self._having[number] | (sets & ~self._having[number]) << (1 << number)

    def _without(self, sets: int, number: int) -> int:
        return (sets & self._having[number]) >> (1 << number) | sets & ~self._having[number]

    # ---- steps ------------------------------------------------------------------------------------------------------

    def _by_vcpus(self, node: Node, sets: int) -> None:
        control, word = node
        calm = self.cells.calm(control)
        for number, kind in enumerate([*self.kinds, BLANK_VIEW]):
            blank = kind == BLANK_VIEW
            having = sets if blank else sets & self._having[number]
            if not having:
                continue
            rest = having if blank else having | self._without(having, number)  # others have the like, or not
            steps = list(self.cells.vcpu_step(calm, word, kind).values())
            if kind.pml:
                steps.append(self.cells.exited(calm, word, kind))
            for step in steps:
                for after, left in self._flush(calm, step.word, rest) if step.flushed else [(step.word, rest)]:
                    self._add((control, after), self._with(left, step.view))

    def _by_host(self, node: Node, sets: int) -> None:
        control, word = node
        calm = self.cells.calm(control)
        for after, left in self._flush(calm, word, sets):  # another page's
            self._add((control, after), left)
        for step in self.cells.host_step(calm, word).values():
            for after, left in self._flush(calm, step.word, sets) if step.flushed else [(step.word, sets)]:
                self._add((control, after), left)

    def _flush(self, calm: Control, word: Word, sets: int) -> list[tuple[Word, int]]:
        """Every view of the page is flushed: the words and sets that come of it."""
        flushed = {n: self.cells.flushed(calm, word, self.kinds[n]) for n in self._there(sets)}
        return self._all_change(
            word, sets, {n: (differences(word, step.word), step.view) for n, step in flushed.items()}
        )

    def _by_user(self, node: Node, sets: int) -> None:
        control, word = node
        for number in self._there(sets):
            fault = self.kinds[number].fault
            if fault is not None and self.cells.blocks_user(control, fault):
                sets &= ~self._having[number]
        for action in self.cells.user_starts(control) if sets else ():
            silent, blank, _ = self.cells.user_step(control, action)
            heard, after, _ = self.cells.user_step(control, action, word)
            becomes = {}
            for number in self._there(sets):
                alone, changed, kind = self.cells.user_step(control, action, BLANK_WORD, self.kinds[number])
                assert alone == silent, "user space learns something from a view"
                becomes[number] = differences(blank, changed), kind
            for page, left in self._all_change(after, sets, becomes):
                self._add((heard, page), left)
                self._hear(control, action, silent, heard, page, left)

    def _hear(self, control: Control, action: Action, silent: Control, heard: Control, page: Word, sets: int) -> None:
        """Where this page is silent, another may speak: then this one comes to the same, in the control ``spoken``."""
        spoken, pages = self._user.setdefault((control, action), (None, {}))
        assert heard in (silent, spoken) or spoken is None, "pages disagree on what user space learns"
        if heard != silent and spoken is None:
            self._user[control, action] = spoken, pages = heard, pages
            for other, others in pages.items():
                self._add((heard, other), others)
        if heard == silent:
            pages[page] = pages.get(page, 0) | sets
            if spoken is not None:
                self._add((spoken, page), sets)

    def _there(self, sets: int) -> list[int]:
        """The kinds that occur."""
        return [number for number, having in enumerate(self._having) if sets & having]

    def _all_change(
        self, word: Word, sets: int, becomes: dict[int, tuple[dict[str, Any], View]]
    ) -> list[tuple[Word, int]]:
        """Each kind that is there becomes another, and may change the word."""
        results = [(word, sets)]
        for number, (change, kind) in becomes.items():
            if change or kind != self.kinds[number]:
                split = []
                for after, some in results:
                    having, rest = some & self._having[number], some & ~self._having[number]
                    split += [
                        (after._replace(**change), self._with(self._without(having, number), kind)),
                        (after, rest),
                    ]
                results = [(after, some) for after, some in split if some]
        return results
