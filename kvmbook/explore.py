"""Every interleaving of a small VM: can a write be lost, by which shortest run, and over how many states is that known?

The meaning of each step comes from the model (`kvmbook.cells`, `kvmbook.tables`); this module only counts. A state of a
VM is one block of pairs per page, and within each block one pair; so all states together are a few boxes, and a state
is a number. What the search has seen is one byte for each number: the level it was met at. That gives a breadth-first
search without a hash table, whose every level is a handful of gathers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvmbook.cells import Cells
from kvmbook.hardware import Hardware
from kvmbook.kernel import Kernel
from kvmbook.schedule import Action, Grain, replay, smallest_vm
from kvmbook.tables import EXIT, FLUSH, Pairs
from kvmbook.vm import Vm

UNSEEN = 255
CHUNK = 1 << 16  # states handled at once: what they gather from stays in the cache


@dataclass(frozen=True)
class Result:
    """What a search found. ``states`` and ``transitions`` of the whole graph; ``depth``: the greatest distance of a state
    from the start; ``trace``: a shortest run that loses a write, or None. The rest are its bounds."""

    hardware: Hardware
    kernel: Kernel
    pages: int
    vcpus: int
    grain: Grain
    states: int
    transitions: int
    depth: int
    trace: tuple[Action, ...] | None

    @property
    def safe(self) -> bool:
        """Whether no run loses a write."""
        return self.trace is None

    def replay(self) -> Vm:
        """A new VM after the steps of the trace."""
        vm = smallest_vm(self.hardware, self.kernel, self.pages, self.vcpus, self.grain)
        return replay(vm, self.trace or (), self.grain)

    def __str__(self) -> str:
        size = f"{self.states} states, {self.transitions} transitions, depth {self.depth}"
        bounds = f"{self.pages} page(s), {self.vcpus} vCPU(s), cut by {self.grain.value}: {size}"
        if self.trace is None:
            return f"{bounds}\nno run loses a write"
        steps = "\n".join(f"{number:3}  {action}" for number, action in enumerate(self.trace, 1))
        return f"{bounds}\na shortest run that loses a write, {len(self.trace)} steps:\n{steps}"


def explore(
    hardware: Hardware, kernel: Kernel, pages: int = 1, vcpus: int = 1, grain: Grain = Grain.STEP
) -> Result:
    """Search all runs of ``vcpus`` vCPUs on one slot of ``pages`` 4K pages.

    Bounds: accesses are reads and writes; the host only ages; harvests are KVM_GET_DIRTY_LOG; PML buffers do not fill;
    the fast path tries twice.
    """
    space = Space(Pairs(Cells(hardware, kernel, pages, grain), vcpus), pages)
    return Search(space).result(hardware, kernel, grain)


class Space:
    """All states as numbers. A *situation* is one block per page, all of one control, no vCPU busy on two pages. State i of
    situation s is ``base[s]`` plus, for each page, the rank of its pair in its block times ``stride[s, page]``."""

    def __init__(self, pairs: Pairs, pages: int) -> None:
        self.pairs, self.pages = pairs, pages
        order = np.argsort(np.array(pairs.block), kind="stable")  # pairs by block
        self.number = np.empty(len(order), np.int64)
        self.number[order] = np.arange(len(order))  # the pairs' numbers as found -> by block
        self.block = np.array(pairs.block)[order]
        self.first = np.searchsorted(self.block, np.arange(len(pairs.blocks)))
        self.size = np.bincount(self.block)
        controls = {control: n for n, control in enumerate(pairs.users)}
        gates = {gates: n for n, gates in enumerate(dict.fromkeys(gates for _, gates in pairs.blocks))}
        self.control = np.array([controls[control] for control, _ in pairs.blocks])
        self.gate = np.array([gates[g] for _, g in pairs.blocks])
        self.busy = [self._busy(g) for _, g in pairs.blocks]
        self._block_edges()
        self.situations = self._closure()
        self.blocks = np.array(self.situations)
        sizes = self.size[self.blocks]
        self.stride = np.cumprod(np.hstack([np.ones((len(sizes), 1), np.int64), sizes[:, :0:-1]]), axis=1)[:, ::-1].copy()
        self.base = np.concatenate([[0], np.cumsum(sizes.prod(axis=1))])
        self.weight = len(gates) ** np.arange(pages)
        self.lookup = np.full((len(controls), len(gates) ** pages), -1)
        self.lookup[self.control[self.blocks[:, 0]], self.gate[self.blocks] @ self.weight] = np.arange(len(sizes))

    def __len__(self) -> int:
        return int(self.base[-1])

    def _busy(self, gates) -> int:
        busy = sum(1 << v for v, gate in enumerate(gates) if gate is not None)
        locks = [gate[0] for gate in gates if gate is not None and gate[0] is not None]
        return busy | sum({self.pairs.steps.locks[lock] for lock in locks})

    def _block_edges(self) -> None:
        pairs = self.pairs
        self.ways: list[set[tuple[int, int]]] = [set() for _ in pairs.blocks]
        for number, edges in enumerate(pairs.edges):
            control = pairs.pairs[number][0]
            self.ways[pairs.block[number]] |= {(pairs.block[pairs.number[control, e.page]], e.unless) for e in edges}

    def foreign(self, situation: tuple[int, ...], page: int) -> int:
        """What goes on on the other pages, as `Edge.unless` counts it."""
        mask = 0
        for other, block in enumerate(situation):
            mask |= self.busy[block] * (other != page)
        return mask

    def _closure(self) -> list[tuple[int, ...]]:
        start = (self.pairs.block[0],) * self.pages
        found, todo = {start: None}, [start]
        while todo:
            here = todo.pop()
            for there in itertools.chain(self._by_page(here), self._by_user(here)):
                if there not in found:
                    found[there] = None
                    todo.append(there)
        return sorted(found)

    def _by_page(self, here: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        for page, block in enumerate(here):
            foreign = self.foreign(here, page)
            for to, unless in self.ways[block]:
                if not unless & foreign:
                    yield (*here[:page], to, *here[page + 1 :])

    def user_waits(self, situation) -> bool:
        return any(self.pairs.holds_up_user[block] for block in situation)

    def _by_user(self, here: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if self.user_waits(here):
            return
        control = self.pairs.blocks[here[0]][0]
        for user in self.pairs.users[control]:
            for after in {user.silent, user.spoken or user.silent}:
                yield from itertools.product(*(self._blocks_after(user, block, after) for block in here))

    def _blocks_after(self, user, block, after):
        if not hasattr(self, "_after"):
            self._after = {}
        key = (id(user), block, after)
        if key not in self._after:
            pairs = self.pairs
            pages = {page for table in user.becomes for number, (page, speaks) in table.items() if pairs.block[number] == block and (not speaks or after == user.spoken)}
            self._after[key] = {pairs.block[pairs.number[after, page]] for page in pages}
        return self._after[key]


class Search:
    """Breadth-first over a `Space`."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.seen = np.full(len(space), UNSEEN, np.uint8)
        self._tables()

    # ---- tables -----------------------------------------------------------------------------------------------------

    def _tables(self) -> None:
        space, pairs = self.space, self.space.pairs
        number = space.number
        self.rows: dict[tuple[int, int], int] = {}  # (block, what goes on elsewhere) -> first row
        stay, leave, degree = [], [], []
        quiet = {what for what in pairs.effects if pairs.everywhere[what] == list(range(len(number)))}
        members: list[list[int]] = [[] for _ in pairs.blocks]
        for pair, block in enumerate(pairs.block):
            members[block].append(pair)
        self.row = np.empty_like(space.blocks)
        for s, situation in enumerate(space.situations):
            for page, block in enumerate(situation):
                foreign = space.foreign(situation, page)
                if (block, foreign) not in self.rows:
                    self.rows[block, foreign] = len(degree)
                    for pair in members[block]:
                        control = pairs.pairs[pair][0]
                        edges = [(pairs.number[control, e.page], e) for e in pairs.edges[pair] if not e.unless & foreign]
                        edges = [(to, e._replace(everywhere=0) if e.everywhere in quiet else e) for to, e in edges]
                        near = {int(number[to] - number[pair]) for to, e in edges if not e.everywhere and pairs.block[to] == block}
                        stay.append(sorted(near - {0}))
                        leave.append(sorted({(e.everywhere, int(number[to])) for to, e in edges if e.everywhere or pairs.block[to] != block}))
                        degree.append(len(edges))
                self.row[s, page] = self.rows[block, foreign]
        self.degree = np.array(degree)
        self.stay = _columns(stay, 0)
        self.leave = {}
        for what in [0, *pairs.effects]:
            self.leave[what] = _columns([[to for w, to in row if w == what] for row in leave], -1)
        self.everywhere = {}
        for what in pairs.effects:
            to = np.empty_like(number)
            to[number] = number[pairs.everywhere[what]]
            self.everywhere[what] = to
        self.exit_pages = [self.everywhere[EXIT + v] != np.arange(len(number)) for v in range(pairs.vcpus)]
        lost = np.zeros(len(number), bool)
        lost[number] = [pairs.steps.lost(*pair) for pair in pairs.pairs]
        self.lost = lost
        self._user_tables()

    def _user_tables(self) -> None:
        space, pairs, number = self.space, self.space.pairs, self.space.number
        self.user = []  # by column: (has, silent control, spoken control, targets [page][pair] silent, spoken, speaks)
        controls = {control: n for n, control in enumerate(pairs.users)}
        most = max(len(users) for users in pairs.users.values())
        for column in range(most):
            to = np.full((2, len(pairs.numbers), len(number)), -1)
            speaks = np.zeros((len(pairs.numbers), len(number)), bool)
            for control, users in pairs.users.items():
                if column < len(users):
                    user = users[column]
                    for which, table in enumerate(user.becomes):
                        for pair, (page, says) in table.items():
                            speaks[which, number[pair]] = says
                            if not says:
                                to[0, which, number[pair]] = number[pairs.number[user.silent, page]]
                            if user.spoken is not None:
                                to[1, which, number[pair]] = number[pairs.number[user.spoken, page]]
            self.user.append((to, speaks))
        waits = np.array([space.user_waits(s) for s in space.situations])
        count = np.array([len(pairs.users[pairs.blocks[s[0]][0]]) for s in space.situations])
        self.user_steps = np.where(waits, 0, count)
        self.idle = np.array([[not any(space.busy[b] >> v & 1 for b in s) for v in range(pairs.vcpus)] for s in space.situations])

    # ---- one level --------------------------------------------------------------------------------------------------

    def successors(self, states: np.ndarray) -> Iterator[tuple[np.ndarray | None, np.ndarray]]:
        """Yield (which of ``states``, None for all; what one step makes of them), repetitions included."""
        space = self.space
        at = np.searchsorted(space.base, states, side="right") - 1
        rest = states - space.base[at]
        ranks, rows, pair = [], [], []
        for page in range(space.pages):
            if page < space.pages - 1:
                rank, rest = np.divmod(rest, space.stride[at, page])
            else:
                rank = rest
            ranks.append(rank)
            rows.append(rank + self.row[at, page])
            pair.append(rank + space.first[space.blocks[at, page]])
        self.transitions += int(self.user_steps[at].sum())
        for page in range(space.pages):
            row, stride = rows[page], space.stride[at, page]
            self.transitions += int(self.degree[row].sum())
            for column in self.stay:
                yield None, states + column.take(row) * stride
            for what, columns in self.leave.items():
                for column in columns:
                    to = column[row]
                    which = np.flatnonzero(to >= 0)
                    if which.size:
                        yield which, self._index([
                            to[which] if other == page else pair[other][which] if not what else self.everywhere[what][pair[other][which]]
                            for other in range(space.pages)
                        ])
        for v, exits in enumerate(self.exit_pages):
            drained = exits[pair[0]]
            for p in pair[1:]:
                drained = drained | exits[p]
            which = np.flatnonzero(drained & self.idle[at, v])
            if which.size:
                self.transitions += which.size
                yield which, self._index([self.everywhere[EXIT + v][p[which]] for p in pair])
        for column, (to, speaks) in enumerate(self.user):
            which = np.flatnonzero(self.user_steps[at] > column)
            if which.size:
                here = [p[which] for p in pair]
                spoken = np.zeros(which.size, bool)
                for page, p in enumerate(here):
                    spoken |= speaks[page % len(speaks)][p]
                yield which, self._index([to[spoken.astype(int), page % len(speaks), p] for page, p in enumerate(here)])

    def _index(self, pair: list[np.ndarray]) -> np.ndarray:
        """The numbers of the states that are made of these pairs."""
        space = self.space
        blocks = [space.block[p] for p in pair]
        code = sum(space.gate[b] * w for b, w in zip(blocks, space.weight))
        at = space.lookup[space.control[blocks[0]], code]
        return space.base[at] + sum((p - space.first[b]) * space.stride[at, page] for page, (p, b) in enumerate(zip(pair, blocks)))

    # ---- the whole search -------------------------------------------------------------------------------------------

    def run(self):
        seen, self.transitions = self.seen, 0
        start = self._index([self.space.number[:1]] * self.space.pages)
        seen[start] = 0
        frontier, level, states, self.loss = start, 0, 0, None
        while frontier.size:
            states += frontier.size
            if self.loss is None:
                lost = self._lost(frontier)
                if lost.size:
                    self.loss = level, int(lost[0])
            fresh = []
            level += 1
            for begin in range(0, frontier.size, CHUNK):
                for _, after in self.successors(frontier[begin : begin + CHUNK]):
                    new = after.compress(seen.take(after) == UNSEEN)
                    if new.size:
                        seen[new] = level
                        fresh.append(new)
            total = sum(map(len, fresh))
            if total * 50 < len(seen):
                frontier = np.unique(np.concatenate(fresh)) if fresh else np.empty(0, np.int64)
            else:
                frontier = np.flatnonzero(seen == level)
        self.states, self.depth = states, level - 1
        return self

    def _lost(self, states):
        space = self.space
        at = np.searchsorted(space.base, states, side="right") - 1
        rest = states - space.base[at]
        lost = np.zeros(states.size, bool)
        for page in range(space.pages):
            rank, rest = np.divmod(rest, space.stride[at, page])
            lost |= self.lost[rank + space.first[space.blocks[at, page]]]
        return states[lost]


def _columns(rows: list[list[int]], fill: int) -> list[np.ndarray]:
    """Lists of different lengths as columns, the short ones filled up."""
    width = max(map(len, rows), default=0)
    table = np.full((width, len(rows)), fill)
    for n, row in enumerate(rows):
        table[: len(row), n] = row
    return list(table)
