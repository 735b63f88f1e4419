"""Check cells: each takes a reader's answer, runs it on the model, and says yes, or no with a hint. Never the answer.

An unanswered exercise (None) is "Not yet". An answer that raises is told so, and the error is shown.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from kvmbook.faults import Outcome
from kvmbook.hardware import Hardware
from kvmbook.kernel import FlushPolicy, FlushRule, Kernel
from kvmbook.scenes import BASE_GFN, enabling_plan
from kvmbook.vm import Vm

PAGES = 16
Run = Callable[[Vm], Any]


def checker(judge: Callable[[Any], str]) -> Callable[[Any], None]:
    """Turn a function that returns a hint, or "" if all is well, into a check cell's call, which prints."""

    @functools.wraps(judge)
    def check(answer: Any = None) -> None:
        if answer is None:
            print("Not yet: there is no answer to check.")
            return
        try:
            hint = judge(answer)
        except Exception as error:
            hint = f"your answer raised {type(error).__name__}: {error}"
        print(f"No: {hint}" if hint else "Yes.")

    return check


def _enable(vm: Vm, slot: int = 0) -> None:
    old = vm.memslots.slots[0, slot]
    vm.set_user_memory_region(slot=slot, base_gfn=old.base_gfn, npages=old.npages, log_dirty_pages=True)


def _aged(hardware: Hardware, kernel: Kernel, pages: int = PAGES) -> Vm:
    vm = Vm(hardware, kernel, vcpus=2)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=pages)
    for gfn in range(BASE_GFN, BASE_GFN + pages):
        vm.vcpu[0].read(gfn)
    vm.clear_young(BASE_GFN, BASE_GFN + pages)
    return vm


# ---- chapter 01 ------------------------------------------------------------------------------------------------------


@checker
def check_01_1(touch: Run) -> str:
    """One access between ageing and enabling, and no write is missed."""
    vm = _aged(Hardware.ept(ad_bits=False), Kernel.v5_19)
    logged = len(vm.log)
    touch(vm)
    touched = {e.gfn for e in vm.log[logged:] if e.actor.startswith("vCPU")}
    if len(touched) != 1:
        return f"exactly one page may be touched, by exactly one vCPU; yours touched {len(touched)}"
    if vm.memslots.slots[0, 0].logs_dirty:
        return "enabling comes after your access; leave it to the check"
    _enable(vm)
    for gfn in range(BASE_GFN, BASE_GFN + PAGES):
        vm.vcpu[0].write(gfn)
    missed = len(vm.missed_dirty(0))
    return f"{missed} writes are still missed; which access makes an SPTE writable again?" if missed else ""


@checker
def check_01_2(run: Run) -> str:
    """Exactly five of sixteen pages missed, on v5.19 without A/D bits."""
    vm = Vm(Hardware.ept(ad_bits=False), Kernel.v5_19, vcpus=2)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES)
    run(vm)
    if not vm.memslots.slots[0, 0].logs_dirty:
        return "your run must leave dirty logging enabled"
    unwritten = PAGES - len({e.gfn for e in vm.log if e.step == "write"})
    if unwritten:
        return f"{unwritten} pages were never written; all sixteen must be"
    missed = len(vm.missed_dirty(0))
    return "" if missed == 5 else f"{missed} writes are missed, not 5; who still remembers a page at the end?"


@checker
def check_01_3(rescue: Run) -> str:
    """Save the write without coming near slot 0."""
    vm = _aged(Hardware.ept(ad_bits=False), Kernel.v5_19)
    vm.set_user_memory_region(slot=1, base_gfn=0x1000, npages=8)
    vm.vcpu[1].write(0x1000)
    logged = len(vm.log)
    rescue(vm)
    near = [e for e in vm.log[logged:] if e.gfn is not None and BASE_GFN <= e.gfn < BASE_GFN + PAGES]
    if near or vm.memslots.slots[0, 0].logs_dirty:
        return "your rescue touches slot 0 or its pages; stay away from it"
    _enable(vm)
    vm.vcpu[0].write(BASE_GFN)
    return "the write is missed; what else flushes the whole VM's TLBs?" if len(vm.missed_dirty(0)) else ""


# ---- chapter 08 ------------------------------------------------------------------------------------------------------


@checker
def check_08_1(plan: Sequence[str]) -> str:
    """The steps of enabling under v6.0 with PML."""
    right = enabling_plan("on, with PML", FlushPolicy.ALWAYS)
    for number, (given, wanted) in enumerate(zip(plan, right, strict=False), 1):
        if given != wanted:
            return f"step {number} is not {given!r}"
    return "" if len(plan) == len(right) else f"there are {len(right)} steps, you name {len(plan)}"


@checker
def check_08_2(rule: FlushRule) -> str:
    """A flush rule that loses nothing without A/D bits, and does not flush for pages that nobody can write."""
    for what, prepare in (
        ("untouched since ageing", None),
        ("read again by vCPU 1", "read"),
        ("written again", "write"),
    ):
        vm = _aged(Hardware.ept(ad_bits=False), Kernel.v5_19.with_(flush=rule), pages=1)
        if prepare:
            vm.vcpu[1].complete(prepare, BASE_GFN)
        _enable(vm)
        vm.vcpu[0].write(BASE_GFN)
        if len(vm.missed_dirty(0)):
            return f"a write is missed if the page is {what}"
    vm = Vm(Hardware.ept(ad_bits=False), Kernel.v5_19.with_(flush=rule))
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES)
    vm.write_protect_host_page(BASE_GFN)
    vm.vcpu[0].read(BASE_GFN)
    _enable(vm)
    return "it flushes although the only mapped page is read-only in the host" if vm.counters.flushes else ""


@checker
def check_08_3(run: Run) -> str:
    """Lose a write with PML although the MMU-writable test decides about the flush."""
    vm = Vm(Hardware.ept(pml=True), Kernel.v5_19.with_(flush=FlushPolicy.IF_MMU_WRITABLE), vcpus=2)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES)
    run(vm)
    if vm.in_flight:
        return f"{vm.in_flight[0].who} is still under way: bring every fault to its end"
    if not vm.memslots.slots[0, 0].logs_dirty:
        return "your run must leave dirty logging enabled"
    if len(vm.missed_dirty(0)):
        return ""
    if not any(e.note == Outcome.FAULT.value for e in vm.log):
        return "no vCPU has faulted; let two of them fault on one page before either fault is handled"
    return "no write is missed; look at D in the SPTE and in vCPU 0's TLB before you enable logging"
