"""How many states there are, and whether a write is lost in one, without visiting them.

Pages meet only in what user space learns from all of them, in the flushes and exits that concern them all, and in the
vCPUs and locks that a fault on one page keeps from the others. Between such meetings each page wanders alone. So the
reachable states of one situation are a union of a few *boxes*: every combination of a set of pairs for page 0, a set for
page 1, and so on. This module searches boxes. It is exact: a box is only made of what one step makes of all the states of
a box, or of two boxes that differ on one page.

A set of pairs of one control is an int: bit i for the i-th of them.
"""

from __future__ import annotations

import itertools
import operator
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from kvmbook.model import KVM_MEM_MAX_NR_PAGES, Hardware, Kernel
from kvmbook.search.cells import Cells, Control
from kvmbook.search.schedule import Grain
from kvmbook.search.space import Situation, Space
from kvmbook.search.tables import EXIT, PageSteps, Pair, Pairs, UserSteps

Box = tuple[int, ...]  # for each page a set of pairs


@dataclass(frozen=True, repr=False)
class Count:
    """``states``: their exact number; ``safe``: no write is lost in any; ``boxes``: of how many boxes they are made."""

    states: int
    safe: bool
    boxes: int

    def __repr__(self) -> str:
        size = f"{self.states:,}" if self.states < 10**30 else f"more than 2^{self.states.bit_length() - 1}"
        return f"{size} states in {self.boxes} boxes, " + ("no write is lost" if self.safe else "a write is lost")


def count_states(space: Space) -> Count:
    """The number of reachable states, and the verdict."""
    boxes = _Boxes(space).search()
    lost = any(boxes.sets.lost(control) & page for control, box in boxes.all() for page in box)
    found = list(boxes.found.values())
    return Count(sum(map(_size_of_union, found)), not lost, sum(map(len, found)))


def pages_seen(space: Space) -> set[Pair]:
    """The pairs that some page can be in: what remains of all reachable states if one looks at one page at a time."""
    boxes = _Boxes(space).search()
    return {
        space.pairs.pairs[boxes.sets.members[control][member]]
        for control, box in boxes.all()
        for page in box
        for member in bits(page)
    }


def count_any_size(hardware: Hardware, kernel: Kernel, pages: int, vcpus: int = 1) -> Count:
    """The same for a slot of any number of ``pages``, 2^18 of them say, cut by access (`Grain.ACCESS`).
    ValueError with PML, where the buffer of a vCPU ties pages together in more ways than this form can say."""
    pages = operator.index(pages)
    if not 1 <= pages <= KVM_MEM_MAX_NR_PAGES:
        raise ValueError(f"a slot has at least one page, and at most {KVM_MEM_MAX_NR_PAGES}; got {pages}")
    crowds = _Crowds(Pairs(PageSteps(Cells(hardware, kernel, min(pages, 2), Grain.ACCESS), vcpus)), pages)
    return crowds.search().count()


# ---- sets of pairs ---------------------------------------------------------------------------------------------------


def bits(number: int) -> Iterator[int]:
    """The positions of the set bits."""
    while number:
        lowest = number & -number
        yield lowest.bit_length() - 1
        number ^= lowest


class PairSets:
    """What steps make of sets of pairs. Everything is remembered: the same few sets come back all the time."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs
        self.members: dict[Control, list[int]] = defaultdict(list)
        self.bit: list[int] = []
        for number, (control, _) in enumerate(pairs.pairs):
            self.bit.append(1 << len(self.members[control]))
            self.members[control].append(number)
        self.blocks: dict[Control, list[int]] = defaultdict(list)
        self.within = [0] * len(pairs.blocks)  # the set of all pairs of a block
        for number, block in enumerate(pairs.block):
            self.within[block] |= self.bit[number]
        for block, (control, _) in enumerate(pairs.blocks):
            self.blocks[control].append(block)
        self._tables: dict[object, list[int]] = {}
        self._known: dict[object, int] = {}

    def _image(self, name: object, table: list[int], these: int) -> int:
        key = name, these
        if key not in self._known:
            image = 0
            for member in bits(these):
                image |= table[member]
            self._known[key] = image
        return self._known[key]

    def steps(self, control: Control, elsewhere: int, what: int) -> list[int]:
        """For each pair the pairs that one step leads to, a step that does ``what`` everywhere (0: nothing)."""
        key = control, elsewhere, what
        if key not in self._tables:
            self._tables[key] = [
                sum(
                    {
                        self.bit[to]
                        for to, does, unless in self.pairs.edges[number]
                        if does == what and not unless & elsewhere
                    }
                )
                for number in self.members[control]
            ]
        return self._tables[key]

    def reached(self, control: Control, elsewhere: int, these: int) -> int:
        """These, and all that a page can come to alone while nothing else moves."""
        key = "reached", control, elsewhere, these
        if key not in self._known:
            table, found, new = self.steps(control, elsewhere, 0), these, these
            while new:
                after = 0
                for member in bits(new):
                    after |= table[member]
                new = after & ~found
                found |= new
            self._known[key] = found
        return self._known[key]

    def loud(self, control: Control, elsewhere: int, what: int, these: int) -> int:
        """What the steps that do ``what`` everywhere make of the page where they are done."""
        return self._image(("loud", control, elsewhere, what), self.steps(control, elsewhere, what), these)

    def everywhere(self, control: Control, what: int, these: int) -> int:
        """What a flush or an exit makes of a page."""
        key = "everywhere", control, what
        if key not in self._tables:
            to = self.pairs.everywhere[what]
            self._tables[key] = [self.bit[to[number]] for number in self.members[control]]
        return self._image(key, self._tables[key], these)

    def speaking(self, control: Control, user: UserSteps, which: int) -> int:
        """The pairs with something to say."""
        key = "speaking", id(user), which
        if key not in self._known:
            becomes = user.becomes[which]
            self._known[key] = sum(self.bit[n] for n in self.members[control] if n in becomes and becomes[n][1])
        return self._known[key]

    def after_user(self, control: Control, user: UserSteps, which: int, to: Control, these: int) -> int:
        """What a step of user space that leads to ``to`` makes of the ``which``-th page."""
        key = "user", id(user), which, to
        if key not in self._tables:
            becomes, number = user.becomes[which], self.pairs.number
            self._tables[key] = [
                self.bit[number[to, becomes[n][0]]] if n in becomes and (to, becomes[n][0]) in number else 0
                for n in self.members[control]
            ]
        return self._image(key, self._tables[key], these)

    def lost(self, control: Control) -> int:
        """The pairs in which a write is lost."""
        key = "lost", control
        if key not in self._known:
            lost = (n for n in self.members[control] if self.pairs.steps.lost(*self.pairs.pairs[n]))
            self._known[key] = sum(self.bit[n] for n in lost)
        return self._known[key]


# ---- boxes -----------------------------------------------------------------------------------------------------------


class _Boxes:
    """The search of boxes; ``found``: for each situation boxes of which none contains another."""

    def __init__(self, space: Space) -> None:
        self.space, self.pages = space, space.pages
        self.sets = PairSets(space.pairs)
        self.found: dict[Situation, list[Box]] = defaultdict(list)
        self._todo: list[tuple[Situation, Box]] = []

    def search(self) -> _Boxes:
        start = self.space.pairs.block[0]
        self._add((start,) * self.pages, (self.sets.bit[0],) * self.pages)
        for situation, box in self._todo:  # grows while we go
            if box in self.found[situation]:
                for after in itertools.chain(
                    self._by_page(situation, box), self._exits(situation, box), self._by_user(situation, box)
                ):
                    self._add(*after)
        return self

    def all(self) -> Iterator[tuple[Control, Box]]:
        for situation, boxes in self.found.items():
            for box in boxes:
                yield self._control(situation), box

    def _control(self, situation: Situation) -> Control:
        return self.space.pairs.blocks[situation[0]][0]

    def _reached(self, situation: Situation, page: int, these: int) -> int:
        return self.sets.reached(self._control(situation), self.space.elsewhere(situation, page), these)

    def _close(self, situation: Situation, box: Box) -> Box:
        """All that comes of it by steps of single pages that end in the same situation."""
        return tuple(self._reached(situation, p, these) & self.sets.within[situation[p]] for p, these in enumerate(box))

    def _add(self, situation: Situation, box: Box) -> None:
        """Add a box, unless it is inside another; unite it with those that differ from it on one page."""
        box, found = self._close(situation, box), self.found[situation]
        if any(_inside(box, other) for other in found):
            return
        while (other := next((o for o in found if _inside(o, box) or _differ_once(o, box)), None)) is not None:
            found.remove(other)
            box = self._close(situation, tuple(a | b for a, b in zip(box, other, strict=True)))
        found.append(box)
        self._todo.append((situation, box))

    def _by_page(self, situation: Situation, box: Box) -> Iterator[tuple[Situation, Box]]:
        """One page goes to another block, alone, or with a flush or an exit that all pages feel."""
        control, sets = self._control(situation), self.sets
        for page, these in enumerate(box):
            elsewhere = self.space.elsewhere(situation, page)
            for what in (0, *self.space.pairs.effects):
                alone = (
                    sets.reached(control, elsewhere, these) if not what else sets.loud(control, elsewhere, what, these)
                )
                for block in sets.blocks[control] if alone else ():
                    if (part := alone & sets.within[block]) and (what or block != situation[page]):
                        others = [sets.everywhere(control, what, other) if what else other for other in box]
                        yield _put(situation, page, block), (*others[:page], part, *others[page + 1 :])

    def _exits(self, situation: Situation, box: Box) -> Iterator[tuple[Situation, Box]]:
        control = self._control(situation)
        for vcpu in range(self.space.pairs.vcpus):
            if self.space.may_exit(situation, vcpu):
                yield situation, tuple(self.sets.everywhere(control, EXIT + vcpu, these) for these in box)

    def _by_user(self, situation: Situation, box: Box) -> Iterator[tuple[Situation, Box]]:
        """All pages are silent; or one speaks, and the others may."""
        control = self._control(situation)
        for user in self.space.users(situation):
            which = [page % len(user.becomes) for page in range(self.pages)]
            speaking = [self.sets.speaking(control, user, w) for w in which]
            silent = tuple(these & ~says for these, says in zip(box, speaking, strict=True))
            if all(silent):
                yield from self._after_user(control, user, user.silent, silent)
            for page, says in enumerate(speaking):
                if box[page] & says:
                    assert user.spoken is not None
                    yield from self._after_user(control, user, user.spoken, _put(box, page, box[page] & says))

    def _after_user(self, control: Control, user: UserSteps, to: Control, box: Box) -> Iterator[tuple[Situation, Box]]:
        parts: list[list[tuple[int, int]]] = []
        for page, these in enumerate(box):
            after = self.sets.after_user(control, user, page % len(user.becomes), to, these)
            parts.append([(b, part) for b in self.sets.blocks[to] if (part := after & self.sets.within[b])])
        for combination in itertools.product(*parts):
            yield tuple(block for block, _ in combination), tuple(part for _, part in combination)


def _put(values: tuple[int, ...], page: int, value: int) -> tuple[int, ...]:
    return (*values[:page], value, *values[page + 1 :])


def _inside(inner: Box, outer: Box) -> bool:
    return all(a & ~b == 0 for a, b in zip(inner, outer, strict=True))


def _differ_once(one: Box, other: Box) -> bool:
    return sum(a != b for a, b in zip(one, other, strict=True)) <= 1


def _size_of_union(boxes: list[Box]) -> int:
    """The number of states in any of the boxes: split page 0's pairs by the boxes that they are in, and go on with page 1."""
    if len(boxes) == 1:
        size = 1
        for these in boxes[0]:
            size *= these.bit_count()
        return size
    if not boxes[0]:
        return 1
    parts: dict[tuple[int, ...], int] = {(): 0}
    for box in boxes:
        parts[()] |= box[0]
    for number, box in enumerate(boxes):
        split: dict[tuple[int, ...], int] = {}
        for inside, these in parts.items():
            for key, part in ((*inside, number), these & box[0]), (inside, these & ~box[0]):
                if part:
                    split[key] = part
        parts = split
    return sum(these.bit_count() * _size_of_union([boxes[n][1:] for n in inside]) for inside, these in parts.items())


# ---- any number of pages ---------------------------------------------------------------------------------------------

Crowd = tuple[int, tuple[int, ...]]


class _Crowds:
    """Boxes of pages that nothing tells apart, for any number of them: every page is in one set, and, for each of a few
    *witnesses*, some page of its own is in a subset. (A pass that spoke leaves one witness: the page that it changed.)"""

    def __init__(self, pairs: Pairs, pages: int) -> None:
        self.pairs, self.pages, self.sets = pairs, pages, PairSets(pairs)
        self.found: dict[Control, list[Crowd]] = defaultdict(list)
        self._todo: list[tuple[Control, Crowd]] = []
        if any(EXIT + vcpu not in pairs.quiet for vcpu in range(pairs.vcpus)):
            raise ValueError("with PML the pages of a slot are tied together by the vCPUs' buffers; use count_states")

    def search(self) -> _Crowds:
        self._add(self.pairs.pairs[0][0], self.sets.bit[0], [])
        for control, crowd in self._todo:  # grows while we go
            if crowd in self.found[control]:
                self._by_flush(control, crowd)
                for user in self.pairs.users[control]:
                    self._by_user(control, user, crowd)
        return self

    def _add(self, control: Control, every: int, witnesses: list[int]) -> None:
        every = self.sets.reached(control, 0, every)
        if len(witnesses) > self.pages:
            return
        some = tuple(sorted(w for these in witnesses if (w := self.sets.reached(control, 0, these)) != every))
        crowd, found = (every, some), self.found[control]
        if not any(_within(crowd, other) for other in found):
            found[:] = [other for other in found if not _within(other, crowd)] + [crowd]
            self._todo.append((control, crowd))

    def _by_flush(self, control: Control, crowd: Crowd) -> None:
        """A flush takes no page out of its set, since a vCPU may forget at any time: only that is assumed, and checked."""
        for what in self.pairs.effects:
            for these in (crowd[0], *crowd[1]):
                after = self.sets.everywhere(control, what, these) | self.sets.loud(control, 0, what, these)
                assert after & ~these == 0, "a flush leads out of a closed set"

    def _by_user(self, control: Control, user: UserSteps, crowd: Crowd) -> None:
        every, some = crowd
        speaking = self.sets.speaking(control, user, 0)

        def add(to: Control | None, these: int, witnesses: list[int]) -> None:
            if to is not None and these and all(witnesses):
                after = [self.sets.after_user(control, user, 0, to, part) for part in (these, *witnesses)]
                self._add(to, after[0], after[1:])

        add(user.silent, every & ~speaking, [these & ~speaking for these in some])
        for number, these in enumerate(some):  # a witness speaks
            add(user.spoken, every, [*some[:number], these & speaking, *some[number + 1 :]])
        add(user.spoken, every, [*some, every & speaking])

    def count(self) -> Count:
        """Inclusion and exclusion, over crowds, then over the witnesses that are missing."""
        states = 0
        for crowds in self.found.values():
            for number in range(1, len(crowds) + 1):
                for chosen in itertools.combinations(crowds, number):
                    states += (-1) ** (number + 1) * self._in_all(chosen)
        lost = any(self.sets.lost(control) & every for control, crowds in self.found.items() for every, _ in crowds)
        return Count(states, not lost, sum(map(len, self.found.values())))

    def _in_all(self, crowds: tuple[Crowd, ...]) -> int:
        every, witnesses = crowds[0][0], [these for _, some in crowds for these in some]
        if any(len(some) > 1 for _, some in crowds):
            raise ValueError("two witnesses in one crowd: this form does not count them")
        for other, _ in crowds:
            every &= other
        size = 0
        for number in range(len(witnesses) + 1):
            for missing in itertools.combinations(witnesses, number):
                rest = every
                for these in missing:
                    rest &= ~these
                size += (-1) ** number * rest.bit_count() ** self.pages
        return size


def _within(inner: Crowd, outer: Crowd) -> bool:
    """Whether the first crowd's states are all in the second."""
    if inner[0] & ~outer[0]:
        return False
    asked = [these for these in outer[1] if inner[0] & ~these]  # the others any page of ``inner`` answers
    return any(
        all(mine & ~these == 0 for mine, these in zip(chosen, asked, strict=True))
        for chosen in itertools.permutations(inner[1], len(asked))
    )
