"""Exercises and questions of chapter 08."""

from collections.abc import Sequence
from dataclasses import replace

from kvmbook.exercises.mechanism import Answer, Run, checker, question
from kvmbook.exercises.vms import PAGES, aged, enable
from kvmbook.model import (
    KVM_MEM_LOG_DIRTY_PAGES,
    Change,
    FlushPolicy,
    FlushRule,
    Hardware,
    Kernel,
    Vm,
    kvm_mmu_slot_apply_flags,
)
from kvmbook.scenes import BASE_GFN


@question("yes", "no")
def quiz_08_1() -> Answer:
    """Logging is switched off and on again, and no page was used meanwhile. Does "if changed" flush the second time?"""
    vm = Vm(Hardware.ept(ad_bits=False), Kernel.v5_19)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES)
    vm.vcpu[0].write(BASE_GFN)
    enable(vm)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES)
    flushes = vm.counters.flushes
    enable(vm)
    because = (
        "No SPTE is writable any more. Whether it should flush depends on the first enabling: if that one flushed, no "
        "TLB can hold a writable copy; if it did not, because all pages were aged, the stale copies are still there."
    )
    return Answer("yes" if vm.counters.flushes > flushes else "no", because)


@question("it is lost", "it is logged", "it is not logged, and not lost")
def quiz_08_2() -> Answer:
    """The flush comes after mmu_lock is dropped. A vCPU writes a page through a stale entry between the pass and the
    flush. What becomes of that write?"""
    vm = Vm(Hardware.ept(ad_bits=False), Kernel.v6_0)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES)
    vm.vcpu[0].write(BASE_GFN)
    enabling = vm.start(vm.user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES, log_dirty_pages=True))
    while enabling.todo[0] != "flush_always":
        vm.step(enabling)
    vm.vcpu[0].write(BASE_GFN)
    logged = vm.dirty_bitmap()[0]
    vm.run(enabling)
    lost = len(vm.missed_dirty(0)) > 0
    because = "Enabling has not returned, so user space has not begun to copy. Whatever it copies later has the write."
    return Answer("it is logged" if logged else "it is lost" if lost else "it is not logged, and not lost", because)


@question("yes, by being there", "only if logging is enabled on it", "no: a flush is for one slot")
def quiz_08_3() -> Answer:
    """All pages of slot 0 are aged. Does a second slot, whose pages are all writable, help slot 0 under "if changed"?"""

    def saved(enabled: bool) -> bool:
        vm = aged(Hardware.ept(ad_bits=False), Kernel.v5_19)
        vm.set_user_memory_region(slot=1, base_gfn=0x1000, npages=8)
        vm.vcpu[1].write(0x1000)
        enable(vm)
        if enabled:
            enable(vm, slot=1)
        vm.vcpu[0].write(BASE_GFN)
        return len(vm.missed_dirty(0)) == 0

    because = (
        "Its pass then changes SPTEs, and the flush is for the whole VM. It may come before slot 0 is enabled or after, "
        "if only it comes after the ageing and before the guest writes."
    )
    if saved(enabled=False):
        return Answer("yes, by being there", because)
    return Answer("only if logging is enabled on it" if saved(enabled=True) else "no: a flush is for one slot", because)


@checker
def check_08_1(plan: Sequence[str]) -> str:
    """The steps of enabling under v6.0 with PML and the legacy MMU."""
    vm = Vm(Hardware.ept(pml=True, tdp_mmu=False), Kernel.v6_0)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES)
    off = vm.memslots.slots[0, 0]
    right = kvm_mmu_slot_apply_flags(vm, Change.FLAGS_ONLY, off, replace(off, flags=KVM_MEM_LOG_DIRTY_PAGES))
    for number, (given, wanted) in enumerate(zip(plan, right, strict=False), 1):
        if given != wanted:
            return f"step {number} is not {given!r}"
    return "" if len(plan) == len(right) else f"this function takes {len(right)} steps here, you name {len(plan)}"


@checker
def check_08_2(rule: FlushRule) -> str:
    """A flush rule that loses nothing without A/D bits, and does not flush for pages that nobody can write."""
    if isinstance(rule, type):
        return "pass an object, MyRule(), not the class"
    kernel = Kernel.v5_19.with_(flush=rule)
    for hardware in (Hardware.ept(ad_bits=False), Hardware.ept(ad_bits=False, tdp_mmu=False)):
        for what, kind in (
            ("untouched since ageing", None),
            ("read again by vCPU 1", "read"),
            ("written again", "write"),
        ):
            for beside, vm in (
                ("", aged(hardware, kernel, pages=1)),
                (", beside one that is read-only in the host", _beside_read_only_page(hardware, kernel)),
            ):
                if kind:
                    vm.vcpu[1].complete(kind, BASE_GFN)
                enable(vm)
                vm.vcpu[0].write(BASE_GFN)
                if len(vm.missed_dirty(0)):
                    return f"a write is missed if the page is {what}{beside} ({hardware.name})"
        vm = Vm(hardware, kernel)
        vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES)
        vm.write_protect_host_page(BASE_GFN)
        vm.vcpu[0].read(BASE_GFN)
        enable(vm)
        if vm.counters.flushes:
            return "it flushes although the only mapped page is read-only in the host"
    enable(aged(Hardware.ept(pml=True), kernel))  # it must at least have an answer for the other pass
    return ""


def _beside_read_only_page(hardware: Hardware, kernel: Kernel) -> Vm:
    """Page 0 aged and remembered, page 1 mapped and read-only in the host."""
    vm = Vm(hardware, kernel, vcpus=2)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=2)
    vm.write_protect_host_page(BASE_GFN + 1)
    for gfn in (BASE_GFN, BASE_GFN + 1):
        vm.vcpu[0].read(gfn)
    vm.clear_young(BASE_GFN, BASE_GFN + 2)
    return vm


@checker
def check_08_3(run: Run) -> str:
    """Lose a write with PML although the MMU-writable test decides about the flush."""
    kernel = Kernel.v5_19.with_(flush=FlushPolicy.IF_MMU_WRITABLE)
    vm = Vm(Hardware.ept(pml=True), kernel, vcpus=2)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES)
    run(vm)
    if vm.kernel is not kernel:
        return "that is another kernel; keep the one you are given"
    if vm.in_flight:
        return f"{vm.in_flight[0].who}: {vm.in_flight[0].todo[0]} is still to be done; finish every operation"
    if (0, 0) not in vm.memslots.slots or not vm.memslots.slots[0, 0].logs_dirty:
        return "your run must leave dirty logging enabled"
    if len(vm.missed_dirty(0)):
        return ""
    if not vm.written and not any(e.step == "write" for e in vm.log):
        return "nobody writes after logging is enabled"
    return "no write is missed; look at D in the SPTE and in vCPU 0's TLB before you enable logging"
