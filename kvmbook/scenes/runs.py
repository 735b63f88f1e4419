"""Runs retold: how page, TLB and log look after each step of a run, in words; and all runs of one page as one graph.

`run_of` follows a trace on a real `Vm`. `graph_of` words the states that `kvmbook.search` numbers. Both say the same of
the same state, so a picture, a table and a panel need no rules of their own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from kvmbook.model import ClearDirtyLog, GetDirtyLog, Hardware, Kernel, Operation, PageFault, SpteFormat, TlbEntry, Vm
from kvmbook.scenes.enabling import is_stale, spte_state, tlb_state
from kvmbook.search import Action, Grain, Result, Search, Space, act, ioctl_of, smallest_vm, space_of

IOCTLS = {"SetUserMemoryRegion": "KVM_SET_USER_MEMORY_REGION", "GetDirtyLog": "KVM_GET_DIRTY_LOG"}
SAYS = {"enables": "enables logging", "disables": "disables logging", "gets": "gets the dirty log"}


def what_of(action: Action) -> str:
    """What is done, in words that a reader who has not seen the code understands; steps of the kernel keep their names."""
    return SAYS.get(action.what, action.what) + ("" if action.page is None else f" page {action.page}")


def label(action: Action) -> str:
    """Who does what, as one line: "vCPU0 reads page 0"."""
    return f"{action.who} {what_of(action)}"


class PageNow(NamedTuple):
    """One page at one moment. ``spte`` and, for each vCPU, ``tlb`` are states in words (see `kvmbook.scenes`), ``word`` the
    SPTE itself; ``bit`` of the bitmap is "-" while nothing is logged; ``taken``: a harvest holds the bit; ``stale``: the
    TLB entry lets a write pass that the SPTE would stop or note; ``pml``: the page is in that vCPU's PML buffer; ``lost``: it
    was written, and no report will name it."""

    spte: str
    word: int
    bit: str
    taken: bool
    tlb: tuple[str, ...]
    stale: tuple[bool, ...]
    pml: tuple[bool, ...]
    lost: bool


class Now(NamedTuple):
    """A whole VM at one moment. ``faults``: for each vCPU what KVM is handling for it, or ""; ``logging``: "off", "enabling",
    or "on" while user space relies on the log; ``ioctl`` under way and its ``following`` step, or ""; ``owed``: a pass has
    asked for a flush that is still to come."""

    pages: tuple[PageNow, ...]
    faults: tuple[str, ...]
    logging: str
    ioctl: str
    following: str
    owed: bool

    @property
    def lost(self) -> bool:
        return any(page.lost for page in self.pages)


def _page(
    fmt: SpteFormat, word: int, bit: str, taken: bool, tlb: Sequence[TlbEntry | None], pml: Iterable[bool], lost: bool
) -> PageNow:
    spte, entries = spte_state(fmt, word), tuple(tlb_state(entry) for entry in tlb)
    return PageNow(spte, word, bit, taken, entries, tuple(is_stale(spte, entry) for entry in entries), tuple(pml), lost)


def _now(
    pages: Iterable[PageNow],
    faults: Iterable[str],
    operation: str,
    todo: Sequence[str],
    flush: bool,
    logs: bool,
    relies: bool,
) -> Now:
    enabling = operation == "SetUserMemoryRegion" and logs != ("kvm_swap_active_memslots" in todo)
    logging = "on" if relies else "enabling" if enabling else "off"
    return Now(
        tuple(pages), tuple(faults), logging, IOCTLS.get(operation, operation), todo[0] if todo else "", bool(flush)
    )


def now_of(vm: Vm, numbers: Iterable[int] = (), l2: bool = False, harmed: Collection[int] | None = None) -> Now:
    """How slot 0 of a VM looks now, or these pages of it; all its vCPUs, and the ioctl under way. Where writes go to rings, a
    page's bit says whether one of them has it. ``l2``: SPTEs and TLB entries are the nested guest's; ``harmed``: the gfns
    that count as lost, by default those whose write is."""
    slot, missed = vm.memslots.slots[0, 0], set(vm.missed_dirty(0).tolist()) if harmed is None else harmed
    noted = {page for vcpu in vm.vcpus if vcpu.dirty_ring is not None for page in vcpu.dirty_ring.news}
    operation = ioctl_of(vm)
    held = operation if isinstance(operation, GetDirtyLog | ClearDirtyLog) else Operation()
    pages = [
        _page(
            vm.fmt,
            vm.spte(gfn, l2),
            str(int(slot.test_bit(gfn) or (0, number) in noted)) if slot.logs_dirty else "-",
            held.covers(slot, gfn),
            [vcpu.tlb.lookup(vm.root(l2).name, gfn) for vcpu in vm.vcpus],
            [gfn in vcpu.pml for vcpu in vm.vcpus],
            gfn in missed,
        )
        for number in numbers or range(slot.npages)
        for gfn in [slot.base_gfn + number]
    ]
    faults = [
        f"{op.kind} fault on page {op.gfn - slot.base_gfn} at {op.todo[0]}"
        if isinstance(op := vcpu.fault, PageFault)
        else ""
        for vcpu in vm.vcpus
    ]
    name, todo = (type(operation).__name__, operation.todo) if operation is not None else ("", [])
    return _now(pages, faults, name, todo, getattr(operation, "flush", False), slot.logs_dirty, bool(vm.watched))


ANSWERS = {"TLB": "its TLB lets it pass", "SPTE": "a walk", "KVM": "a fault"}  # who answers an access, in words

# ---- one run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunMoment:
    """One step of a run and how all looks after it. ``note``: what the model's log says came of it; ``flushed``: all TLBs;
    ``answered``: of a guest's access, where it was: "TLB", "SPTE" (a walk), or "KVM" (a fault)."""

    action: Action
    now: Now
    note: str
    flushed: bool
    answered: str


@dataclass(frozen=True)
class Run:
    """A run from its ``start``. ``numbers``: of the pages that it tells of, all by default; ``log``: what notes writes;
    ``loss``: what it means in this run that something is lost."""

    start: Now
    moments: tuple[RunMoment, ...]
    numbers: tuple[int, ...] = ()
    log: str = "bit"
    loss: str = "the write is lost"

    @property
    def actors(self) -> list[str]:
        """Who may move, KVM's part of a vCPU's work aside, and KVM only if it does something of its own."""
        kvm = ["KVM"] * any(moment.action.who == "KVM" for moment in self.moments)
        return [*(f"vCPU{v}" for v in range(len(self.start.faults))), *kvm, "host", "user space"]

    def lane(self, who: str) -> int:
        """The place among the actors of one who acts, for a vCPU or in its nested guest or not."""
        return self.actors.index(who.removeprefix("KVM for ").removeprefix("L2 on "))

    def told(self) -> str:
        """The run in one line: each step, and what it changed."""
        return "; ".join(self.steps())

    def steps(self) -> list[str]:
        """The same, step by step."""
        said, before = [], self.start
        for number, moment in enumerate(self.moments, 1):
            changes = [ANSWERS[moment.answered]] if moment.answered else []
            changes += ["all TLBs flushed"] * moment.flushed
            for old, new in zip(before.pages, moment.now.pages, strict=True):
                changes += [f"SPTE {new.spte}"] * (old.spte != new.spte)
                for v, tlb in enumerate(zip(new.tlb, new.stale, strict=True)):
                    changes += [f"TLB of vCPU{v} {'stale, ' * tlb[1]}{tlb[0]}"] * (tlb != (old.tlb[v], old.stale[v]))
                changes += [f"bit {new.bit}"] * (old.bit != new.bit)
                changes += [self.loss] * (new.lost and not old.lost)
            said.append(f"{number}. {label(moment.action)}" + f" ({', '.join(changes)})" * bool(changes))
            before = moment.now
        return said


def retell(vm: Vm, trace: Iterable[Action], grain: Grain = Grain.STEP) -> Run:
    """Do the steps of ``trace`` on ``vm`` and say how it looks after each."""
    start, moments = now_of(vm), []
    for action in trace:
        flushes, hits, exits = vm.counters.flushes, vm.counters.hits, vm.counters.exits
        events = act(vm, action, grain)
        note = "; ".join(event.note for event in events if event.note)
        answered = ""
        if action.what in ("reads", "writes"):
            answered = "KVM" if vm.counters.exits > exits else "TLB" if vm.counters.hits > hits else "SPTE"
        moments.append(RunMoment(action, now_of(vm), note, vm.counters.flushes > flushes, answered))
    return Run(start, tuple(moments))


def run_of(result: Result) -> Run:
    """The shortest run that a search has found. Raises ValueError if it has found that there is none."""
    if result.trace is None:
        raise ValueError("no run loses a write here: there is nothing to retell")
    vm = smallest_vm(result.hardware, result.kernel, result.pages, result.vcpus, result.grain)
    return retell(vm, result.trace, result.grain)


# ---- all runs of one page --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Graph:
    """All states of a VM with one page, in the order in which a breadth-first search meets them; 0 is the start.
    ``edges[i]``: the steps possible in state i, and where they lead."""

    states: list[Now]
    edges: list[list[tuple[Action, int]]]

    @cached_property
    def distance(self) -> list[int | None]:
        """For each state, how many more steps lose a write at the soonest; None where no run does."""
        sources: list[list[int]] = [[] for _ in self.states]
        for number, edges in enumerate(self.edges):
            for _, to in edges:
                sources[to].append(number)
        distance: list[int | None] = [0 if now.lost else None for now in self.states]
        queue = deque((number, 0) for number, now in enumerate(self.states) if now.lost)
        while queue:
            here, far = queue.popleft()
            for source in sources[here]:
                if distance[source] is None:
                    distance[source] = far + 1
                    queue.append((source, far + 1))
        return distance

    def shortest_loss(self) -> tuple[Action, ...] | None:
        """The first, in the order of the steps, of the shortest runs that lose a write; None if no run does."""
        here, trace = 0, []
        if self.distance[0] is None:
            return None
        while far := self.distance[here]:
            action, here = next(step for step in self.edges[here] if self.distance[step[1]] == far - 1)
            trace.append(action)
        return tuple(trace)

    def runs(self, steps: int) -> list[int]:
        """For each state, how many runs of that many steps end there: a run goes on along each edge."""
        runs = [1] + [0] * (len(self.states) - 1)
        for _ in range(steps):
            longer = [0] * len(runs)
            for number, edges in enumerate(self.edges):
                for _, to in edges:
                    longer[to] += runs[number]
            runs = longer
        return runs

    def chance_of_loss(self, steps: int) -> list[float]:
        """How likely a write has been lost after 0, 1, ... ``steps`` steps, each drawn at random from those that are
        possible."""
        chance, lost_by = [1.0] + [0.0] * (len(self.states) - 1), list[float]()
        for _ in range(steps + 1):
            lost_by.append(sum(share for share, now in zip(chance, self.states, strict=True) if now.lost))
            after = [0.0] * len(chance)
            for number, edges in enumerate(self.edges):
                ways = [number] if self.states[number].lost else [to for _, to in edges]  # lost is lost
                for to in ways:
                    after[to] += chance[number] / len(ways)
            chance = after
        return lost_by

    def walk(self, trace: Iterable[Action]) -> list[int]:
        """The states that a run passes, the start first. Raises ValueError for a step that is not possible."""
        path = [0]
        for action in trace:
            steps = dict(self.edges[path[-1]])
            if action not in steps:
                can = ", ".join(label(other) for other in steps)
                raise ValueError(f"{label(action)!r} is not possible now; possible: {can}")
            path.append(steps[action])
        return path


def graph_of(hardware: Hardware, kernel: Kernel, vcpus: int = 1, grain: Grain = Grain.FAULT) -> Graph:
    """The whole graph of a VM with one page, as `kvmbook.search` knows it, its states in words."""
    space = space_of(hardware, kernel, 1, vcpus, grain)
    search, fmt = Search(space), kernel.spte_format(hardware.format)
    order = {search.state_of([0]): 0}
    states: list[Now] = []
    edges: list[list[tuple[Action, int]]] = []
    for number in (queue := list(order)):  # grows while we go
        states.append(_now_of_pair(space, fmt, search.pairs_in(number)[0]))
        edges.append([])
        for action, to in search.actions(number):
            if to not in order:
                order[to] = len(order)
                queue.append(to)
            edges[-1].append((action, order[to]))
    return Graph(states, edges)


def _now_of_pair(space: Space, fmt: SpteFormat, pair: int) -> Now:
    control, numbers = space.pairs.pairs[pair]
    word, views = space.pairs.steps.parts(numbers)
    bit = str(int(word.live)) if control.logs else "-"
    lost = space.pairs.steps.lost(control, numbers)
    page = _page(fmt, word.spte, bit, word.taken, [v.tlb for v in views], [v.pml for v in views], lost)
    faults = [f"{view.fault.kind} fault on page 0 at {view.fault.todo[0]}" if view.fault else "" for view in views]
    name, todo, _, flush, *_ = control.operation or ("", (), None, False)
    return _now([page], faults, name, todo, flush, control.logs, control.watched)
