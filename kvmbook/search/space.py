"""The states of a small VM as numbers, so that a search needs no hash table.

A state of the VM is one pair for each page. Which block each page's pair lies in is the *situation*; within a situation every
combination of pairs gets a number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator

import numpy as np

from kvmbook.model import Hardware, Kernel
from kvmbook.search.cells import Cells
from kvmbook.search.schedule import Grain
from kvmbook.search.tables import EXIT, PageSteps, Pairs, UserSteps

MOST_STATES = 1 << 31  # one byte each, and in the worst level seen about as much again

Situation = tuple[int, ...]  # for each page the block of its pair


def space_of(
    hardware: Hardware, kernel: Kernel, pages: int, vcpus: int, grain: Grain, without: Collection[str] = ()
) -> Space:
    """The states of that VM, numbered, none of them visited yet."""
    return Space(Pairs(PageSteps(Cells(hardware, kernel, pages, grain, without), vcpus)))


class Space:
    """All states as numbers.

    ``situations[s]``: for each page a block, all of one control, no vCPU busy on two pages. State ``base[s] + sum(rank[p] *
    strides[p][s])`` is the one in which the pair of page p is the rank[p]-th of its block. In the arrays pairs are numbered
    block by block: ``order[i]`` is the number that `Pairs` gave to pair i, ``place[i]`` goes the other way. ``lookup`` finds
    the situation by the sum of the pairs' ``codes``. Only if there are no more than `MOST_STATES`: ``bound`` says how many
    numbers it takes.
    """

    def __init__(self, pairs: Pairs, pages: int | None = None) -> None:
        """``pages``: fewer than the pairs were found for, where nothing tells pages apart (not cut by step)."""
        self.pairs, self.pages = pairs, pages or pairs.cells.pages
        if self.pages != pairs.cells.pages and len(pairs.numbers) > 1:
            raise ValueError(f"cut by step, pairs of {pairs.cells.pages} pages do not serve {self.pages}")
        self.order = np.argsort(np.array(pairs.block), kind="stable")
        self.place = np.argsort(self.order)
        self.block = np.array(pairs.block)[self.order]
        self.size = np.bincount(self.block)
        self.first = np.cumsum(self.size) - self.size
        controls = {control: number for number, control in enumerate(pairs.users)}
        gates = {gates: number for number, gates in enumerate(dict.fromkeys(gates for _, gates in pairs.blocks))}
        self.control = np.array([controls[control] for control, _ in pairs.blocks])
        self.gates = np.array([gates[g] for _, g in pairs.blocks])
        self.busy = [pairs.steps.seen_elsewhere(g) for _, g in pairs.blocks]
        self.situations = self._reachable_situations()
        self.blocks = np.array(self.situations)
        sizes = self.size[self.blocks]
        self.bound = sum(math.prod(row) for row in sizes.tolist())  # python's ints: it may be a large number
        if self.bound <= MOST_STATES:
            self._number_states(sizes, len(controls), len(gates))

    def _number_states(self, sizes: np.ndarray, controls: int, gates: int) -> None:
        self.base = np.concatenate([[0], np.cumsum(sizes.prod(axis=1))])
        stride = np.cumprod(np.roll(sizes, -1, axis=1)[:, ::-1], axis=1)[:, ::-1] // sizes[:, :1]
        self.strides = list(np.ascontiguousarray(stride.T))
        self.firsts = list(np.ascontiguousarray(self.first[self.blocks].T))
        self.rank = np.arange(len(self.block)) - self.first[self.block]
        of_control = gates**self.pages
        self.codes = [self.gates[self.block] * gates**page for page in range(self.pages)]
        self.codes[0] = self.codes[0] + self.control[self.block] * of_control
        self.lookup = np.full(controls * of_control, -1)
        self.lookup[sum(codes[firsts] for codes, firsts in zip(self.codes, self.firsts, strict=True))] = np.arange(
            len(sizes)
        )

    def elsewhere(self, situation: Situation, page: int) -> int:
        """What goes on on the pages other than ``page``, as `Edge.unless` counts it."""
        masks = (self.busy[block] for other, block in enumerate(situation) if other != page)
        together = 0
        for mask in masks:
            together |= mask
        return together

    def may_exit(self, situation: Situation, vcpu: int) -> bool:
        """Whether a vCPU is in the guest and could leave it, with an effect on some page."""
        busy = any(self.busy[block] >> vcpu & 1 for block in situation)
        return not busy and EXIT + vcpu not in self.pairs.quiet and "exits" not in self.pairs.cells.without

    def users(self, situation: Situation) -> list[UserSteps]:
        """What user space could do next; nothing while it must wait for a fault."""
        waits = any(self.pairs.holds_up_user[block] for block in situation)
        return [] if waits else self.pairs.users[self.pairs.blocks[situation[0]][0]]

    def _reachable_situations(self) -> list[Situation]:
        pairs = self.pairs
        # steps from block to block, with their conditions
        ways: list[set[tuple[int, int]]] = [set() for _ in pairs.blocks]
        for number, edges in enumerate(pairs.edges):
            ways[pairs.block[number]] |= {(pairs.block[to], unless) for to, _, unless in edges}
        start = (pairs.block[0],) * self.pages
        found, todo = {start}, [start]
        while todo:
            here = todo.pop()
            new = {there for there in itertools.chain(self._by_page(here, ways), self._by_user(here))} - found
            found |= new
            todo += new
        return sorted(found)

    def _by_page(self, here: Situation, ways: list[set[tuple[int, int]]]) -> Iterator[Situation]:
        for page, block in enumerate(here):
            elsewhere = self.elsewhere(here, page)
            for to, unless in ways[block]:
                if not unless & elsewhere:
                    yield (*here[:page], to, *here[page + 1 :])

    def _by_user(self, here: Situation) -> Iterator[Situation]:
        for user in self.users(here):
            for after in {user.silent, user.spoken or user.silent}:
                yield from itertools.product(*(self.pairs.blocks_after(user, block, after) for block in here))
