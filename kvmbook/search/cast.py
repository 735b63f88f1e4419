"""A small VM with a cast of its own: runs with actors that `schedule` does not have, one move or one step at a time.

KVM guards a guest's page table or zaps a range; the host replaces a page; a nested guest runs beside L1. `Cast` says which
moves are possible and does one; `search_plainly` visits them all. For the museum of chapter 13.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace

from kvmbook.model import (
    ChangePte,
    ClearYoung,
    GetDirtyLog,
    Operation,
    Outcome,
    PageFault,
    TrackGuestPageTable,
    Vm,
    ZapGfnRange,
)
from kvmbook.search.schedule import Action, forget_history

# What somebody other than a guest may begin, about the gfn of a page.
BEGINS: dict[str, Callable[[Vm, int], Operation]] = {
    "ages": lambda vm, gfn: ClearYoung(gfn, gfn + 1),
    "replaces": lambda vm, gfn: ChangePte(gfn, gfn + 1, vm.memslots.slots[0, 0], True),
    "guards": lambda vm, gfn: TrackGuestPageTable(gfn),
    "zaps all pages": lambda vm, gfn: ZapGfnRange(gfn, vm.memslots.slots[0, 0].end_gfn),
    "gets": lambda vm, gfn: GetDirtyLog(0),
    "enables": lambda vm, gfn: _logging(vm, True),
    "disables": lambda vm, gfn: _logging(vm, False),
}
ONCE: dict[str, Callable[[Vm, int], bool]] = {  # whether what can be done once is still to do
    "replaces": lambda vm, gfn: not vm.host.pages,
    "guards": lambda vm, gfn: gfn not in vm.write_tracked,
    "gets": lambda vm, gfn: vm.memslots.slots[0, 0].logs_dirty,
    "disables": lambda vm, gfn: vm.memslots.slots[0, 0].logs_dirty,
    "enables": lambda vm, gfn: not vm.memslots.slots[0, 0].logs_dirty,
}


def _logging(vm: Vm, on: bool) -> Operation:
    slot = vm.memslots.slots[0, 0]
    return vm.user_memory_region(0, slot.base_gfn, slot.npages, log_dirty_pages=on)


@dataclass
class Cast:
    """A VM and who may move in it. ``whole``: a move is done to its end; else what it begins goes step by step. ``harm``
    tells the gfns that harm was done to; ``begins``: what is begun by each move that is not a guest's; ``unseen`` has the
    guarded gfns that a guest wrote with KVM none the wiser."""

    vm: Vm
    moves: tuple[Action, ...]
    harm: Callable[[Cast], set[int]]
    whole: bool = False
    begins: Mapping[str, Callable[[Vm, int], Operation]] = field(default_factory=lambda: BEGINS)
    unseen: set[int] = field(default_factory=set)

    def possible(self) -> list[Action]:
        """The moves and steps that could be done now."""
        busy = {lane_of(operation) for operation in self.vm.in_flight}
        actions = [move for move in self.moves if move.who not in busy and self._may(move)]
        for operation in self.vm.in_flight:
            if not operation.waits_for(self.vm, operation.todo[0]):
                actions.append(Action(lane_of(operation), operation.todo[0]))
        return actions

    def _may(self, move: Action) -> bool:
        gfn = self.gfn(move)
        if "vCPU" not in move.who:
            return move.what not in ONCE or ONCE[move.what](self.vm, gfn)
        vcpu = self.vm.vcpus[int(move.who[-1])]
        remembers = any(vcpu.tlb.lookup(root, gfn) for root in ("L1", "L2"))
        return vcpu.fault is None and (move.what != "forgets" or remembers)

    def gfn(self, move: Action) -> int:
        return self.vm.memslots.slots[0, 0].base_gfn + (move.page or 0)

    def do(self, action: Action) -> None:
        """Do one of them; its events are in ``vm.log`` until the next."""
        vm, gfn = self.vm, self.gfn(action)
        vm.log.clear()
        under_way = next((op for op in vm.in_flight if lane_of(op) == action.who), None)
        if under_way is not None:
            vm.step(under_way)
        elif "vCPU" in action.who:
            self._guest(action, gfn)
        else:
            (vm.run if self.whole else vm.start)(self.begins[action.what](vm, gfn))
        guarding = any(isinstance(op, TrackGuestPageTable) for op in vm.in_flight)
        passed = Outcome.HIT.value, Outcome.WALK.value
        writes = [event.gfn for event in vm.log if event.step == "write" and event.note in passed]
        self.unseen |= {gfn for gfn in vm.write_tracked if gfn in writes and not guarding}

    def _guest(self, action: Action, gfn: int) -> None:
        vcpu, l2 = self.vm.vcpu[int(action.who[-1])], action.who.startswith("L2")
        if action.what == "forgets":
            vcpu.evict(gfn)
        else:
            (vcpu.complete if self.whole else vcpu.attempt)(action.what.removesuffix("s"), gfn, l2)

    def copy(self) -> Cast:
        return replace(self, vm=self.vm.copy(), unseen=set(self.unseen))

    def key(self) -> Hashable:
        """Brings what no later step can tell to one value."""
        vm = self.vm
        for operation in vm.in_flight:
            if isinstance(operation, PageFault):
                operation.mmu_seq = -(operation.mmu_seq != vm.mmu_notifier_seq)
            elif isinstance(operation, TrackGuestPageTable):
                operation.generation -= vm.memslots.generation
        vm.mmu_notifier_seq = 0
        forget_history(vm)
        return vm.state(), frozenset(self.unseen)

    def done(self) -> bool:
        return bool(self.harm(self))


def lane_of(operation: Operation) -> str:
    """Whose an operation under way is, as actions have it."""
    return operation.who.removesuffix(" mm")


# ---- harm: the gfns that it is done to -------------------------------------------------------------------------------


def missed_writes(cast: Cast) -> set[int]:
    """The pages that were written, and that no report will name."""
    return set(cast.vm.missed_dirty(0).tolist())


def unseen_writes(cast: Cast) -> set[int]:
    """The page tables that a guest wrote, and KVM, which shadows them, does not know."""
    return cast.unseen


def freed_pages(cast: Cast) -> set[int]:
    """The pages for which some TLB still leads to a frame that the host has given to somebody else."""
    slot = cast.vm.memslots.slots[0, 0]
    return {
        gfn
        for vcpu in cast.vm.vcpus
        for (_, gfn, _), entry in vcpu.tlb.entries.items()
        if entry.pfn != cast.vm.host.lookup(slot.hva(gfn)).pfn
    }
