"""A small VM whose next step is always somebody's choice: which steps are possible, and what one of them does.

One slot of a few 4K pages, a few vCPUs, the host, user space. `possible` asks the model which steps could be done now, `act`
does one. The scheduler panel, the plain search below and the fast one in `kvmbook.search` all stand on these two.
"""

from __future__ import annotations

import itertools
import operator
from collections import deque
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple, Protocol, Self

from kvmbook.model import (
    PG_LEVEL_4K,
    ClearFlushYoung,
    ClearYoung,
    Event,
    GetDirtyLog,
    Hardware,
    Kernel,
    MemorySlot,
    Operation,
    PageFault,
    Vm,
    no_words,
)

BASE_GFN = 0x200


class Grain(Enum):
    """How finely runs are cut.

    ACCESS: an access with all its faults is one step. FAULT: the exit, and KVM's handling of the fault, are apart. STEP: each
    named step of a fault is apart, and a slot-wide pass takes page by page. In the two coarse grains what KVM does without
    letting mmu_lock go is one step; all other steps of an ioctl are apart in each grain.
    """

    ACCESS = "access"
    FAULT = "fault"
    STEP = "step"


class Action(NamedTuple):
    """One possible step: ``who`` does ``what``, to page ``page`` if it is about one."""

    who: str
    what: str
    page: int | None = None

    def __str__(self) -> str:
        return f"{self.who:13} {self.what}" + ("" if self.page is None else f" page {self.page}")


def smallest_vm(hardware: Hardware, kernel: Kernel, pages: int = 1, vcpus: int = 1, grain: Grain = Grain.STEP) -> Vm:
    """A VM with slot 0 of ``pages`` pages, not logging, nothing mapped yet but the tables above.
    ValueError for sizes below 1, more than 64 pages (one word of the bitmap), or a PML buffer that they could fill."""
    if 0 < hardware.pml_entries < 64:
        raise ValueError(f"a PML buffer of {hardware.pml_entries} entries could fill; here it needs 64 or more")
    pages, vcpus, grain = operator.index(pages), operator.index(vcpus), Grain(grain)
    if not 1 <= pages <= 64:
        raise ValueError(f"a slot to search has 1 to 64 pages; got {pages}")
    vm = Vm(hardware, kernel, vcpus, eager_page_split=False)
    vm.pages_per_step = 1 if grain is Grain.STEP else None
    vm.fast_retries = 1
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=pages)
    assert len(vm.vcpu) == vcpus
    vm.page_tables.descend(vm.l1_root, BASE_GFN, PG_LEVEL_4K)
    forget_history(vm)
    return vm


CHOICES = ("reads", "writes", "forgets", "exits", "ages", "ages and flushes", "enables", "disables", "gets")


def steps_left_out(without: Collection[str]) -> frozenset[str]:
    """The steps that a search is told to leave out. TypeError for one string, ValueError for names that are no choice of
    somebody's: steps of an operation under way cannot be left out."""
    if isinstance(without, str):
        raise TypeError(f"steps to leave out come as a list or tuple; got the string {without!r}")
    if unknown := sorted(set(without) - set(CHOICES)):
        raise ValueError(f"steps that can be left out are {', '.join(CHOICES)}; got {', '.join(map(repr, unknown))}")
    return frozenset(without)


def possible(vm: Vm, grain: Grain = Grain.STEP, without: Collection[str] = ()) -> list[Action]:
    """Every step that some actor could do now, but for those that ``without`` names (`Action.what`)."""
    actions = []
    slot = vm.memslots.slots[0, 0]
    for vcpu in vm.vcpu:
        for page in range(slot.npages):
            if vcpu.fault is None:
                actions += [Action(vcpu.state.name, "reads", page), Action(vcpu.state.name, "writes", page)]
            if vcpu.tlb.lookup("L1", slot.base_gfn + page):
                actions.append(Action(vcpu.state.name, "forgets", page))
        if vcpu.fault is None and vcpu.pml:
            actions.append(Action(vcpu.state.name, "exits"))
    if not any(op.lock for op in vm.in_flight):
        for page, what in itertools.product(range(slot.npages), ("ages", "ages and flushes")):
            actions.append(Action("host", what, page))
    for operation in vm.in_flight:
        if not operation.waits_for(vm, operation.todo[0]):
            whole = grain is Grain.FAULT and isinstance(operation, PageFault)
            actions.append(Action(operation.who, "handles the fault" if whole else operation.todo[0]))
    if not any(op.needs_slots_lock for op in vm.in_flight):
        actions += [Action("user space", what) for what in (("gets", "disables") if slot.logs_dirty else ("enables",))]
    return [action for action in actions if action.what not in without]


def act(vm: Vm, action: Action, grain: Grain = Grain.STEP) -> list[Event]:
    """Do one action that `possible` has named, forget what no later step can tell, and return what the log says of it."""
    slot = vm.memslots.slots[0, 0]
    gfn = slot.base_gfn + (action.page or 0)
    if action.who.startswith("vCPU"):
        vcpu = next(v for v in vm.vcpu if v.state.name == action.who)
        if action.what == "forgets":
            vcpu.evict(gfn)
        elif action.what == "exits":
            vcpu.exit()
        elif grain is Grain.ACCESS:
            vcpu.complete(action.what.removesuffix("s"), gfn)
        else:
            vcpu.attempt(action.what.removesuffix("s"), gfn)
    elif action.who == "host":
        vm.run((ClearYoung if action.what == "ages" else ClearFlushYoung)(gfn, gfn + 1))
    elif action.what in ("enables", "disables"):
        vm.start(vm.user_memory_region(0, slot.base_gfn, slot.npages, log_dirty_pages=action.what == "enables"))
    elif action.what == "gets":
        vm.start(GetDirtyLog(0))
    else:
        operation = next(op for op in vm.in_flight if op.who == action.who)
        vm.step(operation)
        while operation.todo and grain is not Grain.STEP and (operation.lock or isinstance(operation, PageFault)):
            vm.step(operation)
    events = list(vm.log)
    forget_history(vm)
    return events


def replay(vm: Vm, trace: Iterable[Action], grain: Grain = Grain.STEP) -> Vm:
    """Do the steps of ``trace`` on ``vm``, and return it."""
    for action in trace:
        act(vm, action, grain)
    return vm


# ---- equal futures, equal states -------------------------------------------------------------------------------------


def forget_history(vm: Vm) -> None:
    """Bring to one value what only counts up, only looks back, or will not be read again, so that equal futures are equal
    states. No table is ever freed here, so where a walk starts makes no difference; a PML buffer never fills, so its order
    makes none; and a kick makes a vCPU do nothing that it may not do anyway, which is to exit."""
    generation, vm.memslots.generation = vm.memslots.generation, 0
    vm.in_flight.sort(key=_by_name)
    vm.host.dirty.clear()
    vm.log.clear()
    for vcpu in vm.vcpus:
        vcpu.kicked = False
        vcpu.pml = sorted(set(vcpu.pml))
        vcpu.tlb.tables.clear()
    slot = vm.memslots.slots[0, 0]
    taken = False
    for operation in vm.in_flight:
        if isinstance(operation, PageFault):
            operation.generation -= generation
            _forget_what_the_fault_saw(operation)
            _forget_bitmap(operation.slot, slot)
        elif isinstance(operation, GetDirtyLog):
            taken = bool(operation.taken.any())
            operation.mask = operation.mask if operation.todo[0] == "rearm" else no_words()
        else:
            _forget_bitmap(getattr(operation, "old", None), slot)
    if slot.dirty_bitmap is not None and not taken:
        slot.dirty_bitmap[1] = 0


def _by_name(operation: Operation) -> str:
    return operation.who


def _forget_what_the_fault_saw(fault: PageFault) -> None:
    """Each step of a fault uses only some of what was learned before."""
    following = set(fault.todo)
    fault.present = False
    if not following & {"fast_page_fault", "fast_pf_fix_direct_spte"}:
        fault.retries = 0
    if not following & {"fast_pf_fix_direct_spte", "set_spte"}:
        fault.sptep, fault.old_spte, fault.new_spte = None, 0, 0
    if fault.todo[0] != "make_spte":
        fault.page = None


def _forget_bitmap(held: MemorySlot | None, published: MemorySlot) -> None:
    """Nobody reads the bitmap of a slot that is no longer published."""
    if held is not None and held is not published and held.dirty_bitmap is not None:
        held.dirty_bitmap[:] = 0


# ---- the plain search ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reach:
    """What the plain search found: how many ``states`` and ``transitions``, the greatest distance ``depth`` of a state from
    the start, and a shortest ``trace`` that loses a write, or None."""

    states: int
    transitions: int
    depth: int
    trace: tuple[Action, ...] | None


class Moving(Protocol):
    """Something that can move: which actions are ``possible`` now, ``do`` one of them, a ``key`` that is equal for equal
    futures, and whether harm was ``done``."""

    def possible(self) -> list[Action]: ...
    def do(self, action: Action) -> object: ...
    def copy(self) -> Self: ...
    def key(self) -> Hashable: ...
    def done(self) -> bool: ...


def search_plainly(start: Moving, max_states: int = 200_000, stop_at_loss: bool = False) -> Reach:
    """Visit all runs from ``start`` breadth first, up to the first harm if ``stop_at_loss``. It knows no rules. Raises
    MemoryError beyond ``max_states`` states."""
    came_from: dict[Hashable, tuple[Hashable, Action] | None] = {start.key(): None}
    queue, transitions, depth = deque([(start, start.key(), 0)]), 0, 0
    loss: Hashable = None
    while queue and not (stop_at_loss and loss is not None):
        moving, here, depth = queue.popleft()
        for action in moving.possible():
            after = moving.copy()
            after.do(action)
            key = after.key()
            transitions += 1
            if key in came_from:
                continue
            if len(came_from) >= max_states:
                raise MemoryError(f"more than {max_states} states")
            came_from[key] = (here, action)
            queue.append((after, key, depth + 1))
            if loss is None and after.done():
                loss = key
    return Reach(len(came_from), transitions, depth, _trace(came_from, loss))


@dataclass
class _Scheduled:
    """A small VM as `possible` and `act` move it."""

    vm: Vm
    grain: Grain
    without: frozenset[str]

    def possible(self) -> list[Action]:
        return possible(self.vm, self.grain, self.without)

    def do(self, action: Action) -> object:
        return act(self.vm, action, self.grain)

    def copy(self) -> Self:
        return replace(self, vm=self.vm.copy())

    def key(self) -> Hashable:
        state: Hashable = self.vm.state()
        return state

    def done(self) -> bool:
        return bool(self.vm.missed_dirty(0).size)


def plain_search(vm: Vm, grain: Grain = Grain.STEP, without: Collection[str] = (), max_states: int = 200_000) -> Reach:
    """Visit all runs from ``vm`` breadth first, some 3,000 transitions a second: the reference for every faster engine.
    It knows no rules, it only asks the model. Raises MemoryError beyond ``max_states`` states."""
    return search_plainly(_Scheduled(vm, grain, steps_left_out(without)), max_states)


def _trace(came_from: dict[Hashable, tuple[Hashable, Action] | None], key: Hashable) -> tuple[Action, ...] | None:
    """The actions that lead from the start to ``key``; None if there is no such state."""
    if key is None:
        return None
    actions = []
    while (step := came_from[key]) is not None:
        key, action = step
        actions.append(action)
    return tuple(reversed(actions))
