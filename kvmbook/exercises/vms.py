"""The VMs that exercises start from, and what several of them ask of one at the end."""

from collections.abc import Callable
from typing import Any

from kvmbook.model import FlushPolicy, Hardware, Kernel, MemorySlot, Operation, SetUserMemoryRegion, Vm
from kvmbook.scenes import BASE_GFN

PAGES = 16


def enable(vm: Vm, slot: int = 0) -> None:
    """Switch dirty logging on for a slot."""
    old = vm.memslots.slots[0, slot]
    vm.set_user_memory_region(slot=slot, base_gfn=old.base_gfn, npages=old.npages, log_dirty_pages=True)


class WatchedVm(Vm):
    """A VM that counts the flushes of each operation, so that one that was made by hand, inside the model, shows."""

    def __init__(self, hardware: Hardware, kernel: Kernel, **more: Any) -> None:
        super().__init__(hardware, kernel, **more)
        self.flushes_of: dict[Operation, int] = {}

    def step(self, operation: Operation) -> None:
        before = self.counters.flushes
        try:
            super().step(operation)
        finally:
            self.flushes_of[operation] = self.flushes_of.get(operation, 0) + self.counters.flushes - before

    @property
    def was_flushed(self) -> bool:
        """Whether any operation has flushed."""
        return any(self.flushes_of.values())

    @property
    def was_flushed_by_hand(self) -> bool:
        """Whether there was a flush that no operation has made."""
        return self.counters.flushes != sum(self.flushes_of.values())

    @property
    def enabling_flushed(self) -> bool:
        """Whether the last change of slot 0 has flushed."""
        changes = [op for op in self.flushes_of if isinstance(op, SetUserMemoryRegion) and op.region.slot == 0]
        return bool(self.flushes_of[changes[-1]])


def aged(hardware: Hardware, kernel: Kernel, pages: int = PAGES) -> WatchedVm:
    """Two vCPUs and one slot of ``pages``, all read by vCPU 0, then aged; logging is off."""
    vm = WatchedVm(hardware, kernel, vcpus=2)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=pages)
    for gfn in range(BASE_GFN, BASE_GFN + pages):
        vm.vcpu[0].read(gfn)
    vm.clear_young(BASE_GFN, BASE_GFN + pages)
    return vm


def slot_was_touched(vm: Vm, before: MemorySlot) -> bool:
    """Whether slot 0 is not the one that it was."""
    return vm.memslots.slots.get((0, 0)) is not before


def lost_under_always(machine: Callable[[Kernel], Vm], run: Callable[[Vm], Any]) -> str:
    """A hint if ``run`` loses a write even where enabling always flushes: then no flush rule is to blame. ``machine`` makes
    the VM that the run starts from."""
    vm = machine(Kernel.v5_19.with_(flush=FlushPolicy.ALWAYS))
    try:
        run(vm)
    except Exception:  # it counts on the rule
        return ""
    lost = any(len(vm.missed_dirty(slot)) for _, slot in vm.memslots.slots)
    return 'your run loses a write under "always" as well, so the rule is not to blame' if lost else ""


def lost_while_logging(vm: Vm, kernel: Kernel, hint: str) -> str:
    """A hint unless the VM, still under ``kernel``, logs slot 0 and has missed a write there."""
    if vm.kernel is not kernel:
        return "your run has replaced the VM's kernel; keep the one that you are given"
    if (0, 0) not in vm.memslots.slots or not vm.memslots.slots[0, 0].logs_dirty:
        return "your run must leave dirty logging enabled"
    return "" if len(vm.missed_dirty(0)) else f"no write is missed; {hint}"
