"""Every interleaving of a small VM, by plain breadth-first search over `Vm` itself.

Guest accesses, KVM's fault handling, ageing, eviction, enabling, harvesting and disabling are taken apart into their named
steps, and every order of them is visited. So a verdict "safe" is a proof for that number of pages and vCPUs, and a lost
write comes with a shortest run that loses it.

This is the reference: slow, and as plain as can be. It knows no rules, it only asks the model which steps are possible now.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

from kvmbook.access_tracking import ClearYoung
from kvmbook.dirty_log import GetDirtyLog
from kvmbook.faults import PageFault
from kvmbook.hardware import Hardware
from kvmbook.kernel import Kernel
from kvmbook.machine import Operation
from kvmbook.vm import Vm

BASE_GFN = 0x200


class Action(NamedTuple):
    """One possible step: ``who`` does ``what``, to page ``page`` if it is about one."""

    who: str
    what: str
    page: int | None = None

    def __str__(self) -> str:
        return f"{self.who:13} {self.what}" + ("" if self.page is None else f" page {self.page}")


@dataclass(frozen=True)
class Result:
    """What the search found. ``states`` and ``transitions`` of the whole graph; ``depth``: the greatest distance of a state
    from the start; ``trace``: a shortest run that loses a write, or None; ``pages`` and ``vcpus`` are its bounds."""

    pages: int
    vcpus: int
    states: int
    transitions: int
    depth: int
    trace: tuple[Action, ...] | None

    @property
    def safe(self) -> bool:
        """Whether no run loses a write."""
        return self.trace is None

    def __str__(self) -> str:
        size = f"{self.states} states, {self.transitions} transitions, depth {self.depth}"
        bounds = f"{self.pages} page(s), {self.vcpus} vCPU(s): {size}"
        if self.trace is None:
            return f"{bounds}\nno run loses a write"
        steps = "\n".join(f"{number:3}  {action}" for number, action in enumerate(self.trace, 1))
        return f"{bounds}\na shortest run that loses a write, {len(self.trace)} steps:\n{steps}"


def explore(hardware: Hardware, kernel: Kernel, pages: int = 1, vcpus: int = 1, max_states: int = 200_000) -> Result:
    """Search all runs of ``vcpus`` vCPUs on one slot of ``pages`` 4K pages: some 3,000 transitions a second.

    Bounds: accesses are reads and writes; the host only ages; harvests are KVM_GET_DIRTY_LOG; a PML buffer has one entry.
    Raises ValueError for sizes below 1, and MemoryError if there are more than ``max_states`` states.
    """
    start = _smallest_vm(hardware, kernel, pages, vcpus)
    came_from: dict[Hashable, tuple[Hashable, Action] | None] = {start.state(): None}
    queue, transitions, depth = deque([(start, start.state(), 0)]), 0, 0
    loss: Hashable = None
    while queue:
        vm, here, depth = queue.popleft()
        for action in possible(vm):
            after = vm.copy()
            act(after, action)
            _forget_history(after)
            key = after.state()
            transitions += 1
            if key in came_from:
                continue
            if len(came_from) >= max_states:
                raise MemoryError(f"more than {max_states} states for {pages} page(s) and {vcpus} vCPU(s)")
            came_from[key] = (here, action)
            queue.append((after, key, depth + 1))
            if loss is None and after.missed_dirty(0).size:
                loss = key
    return Result(pages, vcpus, len(came_from), transitions, depth, _trace(came_from, loss))


def possible(vm: Vm) -> list[Action]:
    """Every step that some actor could do now."""
    actions = []
    slot = vm.memslots.slots[0, 0]
    for vcpu in vm.vcpu:
        for page in range(slot.npages):
            if vcpu.fault is None:
                actions += [Action(vcpu.state.name, "reads", page), Action(vcpu.state.name, "writes", page)]
            if vcpu.tlb.lookup("L1", slot.base_gfn + page):
                actions.append(Action(vcpu.state.name, "forgets", page))
        if vcpu.fault is None and (vcpu.state.kicked or vcpu.pml):
            actions.append(Action(vcpu.state.name, "exits"))
    actions += [Action("host", "ages", page) for page in range(slot.npages) if _lock_is_free(vm)]
    for operation in vm.in_flight:
        if not operation.waits_for(vm, operation.todo[0]):
            actions.append(Action(operation.who, operation.todo[0]))
    if not any(op.needs_slots_lock for op in vm.in_flight):
        actions += [Action("user space", what) for what in (("gets", "disables") if slot.logs_dirty else ("enables",))]
    return actions


def act(vm: Vm, action: Action) -> None:
    """Do one action that `possible` has named."""
    slot = vm.memslots.slots[0, 0]
    gfn = slot.base_gfn + (action.page or 0)
    if action.who.startswith("vCPU"):
        vcpu = next(v for v in vm.vcpu if v.state.name == action.who)
        if action.what == "forgets":
            vcpu.evict(gfn)
        elif action.what == "exits":
            vcpu.exit()
        else:
            vcpu.attempt(action.what.removesuffix("s"), gfn)
    elif action.what == "ages":
        vm.step(vm.start(ClearYoung(gfn, gfn + 1)))
    elif action.what in ("enables", "disables"):
        vm.start(vm.user_memory_region(0, slot.base_gfn, slot.npages, log_dirty_pages=action.what == "enables"))
    elif action.what == "gets":
        vm.start(GetDirtyLog(0))
    else:
        vm.step(next(op for op in vm.in_flight if op.who == action.who and op.todo[0] == action.what))


def replay(hardware: Hardware, kernel: Kernel, result: Result) -> Vm:
    """Do the steps of ``result.trace`` on a new VM, and return it."""
    vm = _smallest_vm(hardware, kernel, result.pages, result.vcpus)
    for action in result.trace or ():
        act(vm, action)
    return vm


def _smallest_vm(hardware: Hardware, kernel: Kernel, pages: int, vcpus: int) -> Vm:
    if pages < 1:
        raise ValueError(f"a slot needs at least one page; got {pages}")
    vm = Vm(hardware.with_(pml_entries=1) if hardware.pml_entries else hardware, kernel, vcpus, eager_page_split=False)
    vm.pages_per_step = 1
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=pages)
    assert len(vm.vcpu) == vcpus
    _forget_history(vm)
    return vm


def _lock_is_free(vm: Vm) -> bool:
    """Whether the host could take mmu_lock for write now."""
    return not any(op.lock for op in vm.in_flight)


def _forget_history(vm: Vm) -> None:
    """Bring what only counts up, or only looks back, to one value, so that equal futures are equal states."""
    generation, vm.memslots.generation = vm.memslots.generation, 0
    vm.in_flight.sort(key=_by_name)
    for operation in vm.in_flight:
        if isinstance(operation, PageFault):
            operation.generation -= generation
    vm.host.dirty.clear()
    vm.log.clear()


def _by_name(operation: Operation) -> str:
    return operation.who


def _trace(came_from: dict[Hashable, tuple[Hashable, Action] | None], key: Hashable) -> tuple[Action, ...] | None:
    """The actions that lead from the start to ``key``; None if there is no such state."""
    if key is None:
        return None
    actions = []
    while (step := came_from[key]) is not None:
        key, action = step
        actions.append(action)
    return tuple(reversed(actions))
