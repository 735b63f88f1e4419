"""Check cells: each takes a reader's answer, runs it on the model, and says yes, or no with a hint. Never the answer.

An unanswered exercise (None) is "Not yet". An answer that raises is told so, and the error is shown.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from kvmbook.arrays import Spte, Truth
from kvmbook.explore import Result, explore
from kvmbook.faults import ACCESSES, Outcome
from kvmbook.flush_rules import BITS, BitRule, leaves_met, sound_rules
from kvmbook.hardware import Hardware
from kvmbook.kernel import FlushPolicy, FlushRule, Kernel
from kvmbook.memory_regions import kvm_mmu_slot_apply_flags
from kvmbook.memslots import KVM_MEM_LOG_DIRTY_PAGES, Change, MemorySlot
from kvmbook.scenes import BASE_GFN
from kvmbook.schedule import Grain, act, possible, smallest_vm
from kvmbook.spte import SpteFormat
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


def _slot_was_touched(vm: Vm, before: MemorySlot) -> bool:
    return vm.memslots.slots.get((0, 0)) is not before


# ---- chapter 01 ------------------------------------------------------------------------------------------------------


@checker
def check_01_1(touch: Run) -> str:
    """One access between ageing and enabling, and no write is missed."""
    vm = _aged(Hardware.ept(ad_bits=False), Kernel.v5_19)
    slot, logged = vm.memslots.slots[0, 0], len(vm.log)
    touch(vm)
    events = [e for e in vm.log[logged:] if e.step in ACCESSES]
    if len({(e.actor, e.gfn) for e in events}) != 1 or vm.counters.flushes:
        return "exactly one vCPU touches exactly one page, and nothing else happens"
    if _slot_was_touched(vm, slot):
        return "enabling comes after your access; leave it to the check"
    if events[-1].gfn not in range(slot.base_gfn, slot.end_gfn):
        return "that page is in no slot"
    if events[-1].note == Outcome.HIT.value:
        return "your access never reached KVM; whose TLB is stale?"
    _enable(vm)
    for gfn in range(BASE_GFN, BASE_GFN + PAGES):
        vm.vcpu[0].write(gfn)
    missed = len(vm.missed_dirty(0))
    return f"{missed} writes are still missed; which access makes an SPTE writable again?" if missed else ""


@checker
def check_01_2(run: Run) -> str:
    """Exactly five of sixteen pages missed, on v5.19 without A/D bits."""
    kernel = Kernel.v5_19
    vm = Vm(Hardware.ept(ad_bits=False), kernel, vcpus=2)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES)
    run(vm)
    if vm.kernel is not kernel:
        return "that is another kernel; stay with v5.19"
    if (0, 0) not in vm.memslots.slots or not vm.memslots.slots[0, 0].logs_dirty:
        return "your run must leave dirty logging enabled"
    enabled = max(i for i, e in enumerate(vm.log) if (e.step, e.note) == ("return_to_user_space", "slot 0"))
    retired, slot = (Outcome.HIT.value, Outcome.WALK.value), vm.memslots.slots[0, 0]
    written = {e.gfn for e in vm.log[enabled:] if e.step == "write" and e.note in retired and e.gfn in slot}
    if len(written) != PAGES:
        return f"{len(written)} pages of the slot are written after logging is enabled; all {PAGES} must be"
    missed = len(vm.missed_dirty(0))
    return "" if missed == 5 else f"{missed} writes are missed, not 5; who still remembers a page at the end?"


@checker
def check_01_3(rescue: Run) -> str:
    """Save the write without coming near slot 0."""
    vm = _aged(Hardware.ept(ad_bits=False), Kernel.v5_19)
    vm.set_user_memory_region(slot=1, base_gfn=0x1000, npages=8)
    vm.vcpu[1].write(0x1000)
    slot, logged, spte = vm.memslots.slots[0, 0], len(vm.log), vm.spte(BASE_GFN)
    rescue(vm)
    events = vm.log[logged:]
    zapped_all = any(e.step == "kvm_mmu_zap_all_fast" for e in events)  # deleting slot 1 does, and is a fair answer
    changed = vm.spte(BASE_GFN) != spte and not zapped_all
    if changed or _slot_was_touched(vm, slot) or any(e.gfn in slot for e in events):
        return "your rescue touches slot 0 or its pages; stay away from it"
    _enable(vm)
    vm.vcpu[0].write(BASE_GFN)
    return "the write is missed; what else flushes the whole VM's TLBs?" if len(vm.missed_dirty(0)) else ""


# ---- chapter 08 ------------------------------------------------------------------------------------------------------


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
                ("", _aged(hardware, kernel, pages=1)),
                (", beside one that is read-only in the host", _beside_read_only_page(hardware, kernel)),
            ):
                if kind:
                    vm.vcpu[1].complete(kind, BASE_GFN)
                _enable(vm)
                vm.vcpu[0].write(BASE_GFN)
                if len(vm.missed_dirty(0)):
                    return f"a write is missed if the page is {what}{beside} ({hardware.name})"
        vm = Vm(hardware, kernel)
        vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES)
        vm.write_protect_host_page(BASE_GFN)
        vm.vcpu[0].read(BASE_GFN)
        _enable(vm)
        if vm.counters.flushes:
            return "it flushes although the only mapped page is read-only in the host"
    _enable(_aged(Hardware.ept(pml=True), kernel))  # it must at least have an answer for the other pass
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


# ---- chapter 10 ------------------------------------------------------------------------------------------------------


@checker
def check_10_1(without: Collection[str]) -> str:
    """The one step without which v5.19 loses no write on a CPU without A/D bits."""
    if isinstance(without, str) or len(without) != 1:
        return 'give one step in a list or tuple, like ("forgets",)'
    (name,) = without
    if name in ("writes", "enables"):
        return "that one must stay: without it nobody writes, or nobody logs"
    if name not in ("reads", "forgets", "ages", "ages and flushes", "gets", "disables"):
        return f"{name!r} is none of the steps that somebody chooses; give the name alone, without who and which page"
    if explore(Hardware.ept(ad_bits=False), Kernel.v5_19, vcpus=2, grain=Grain.FAULT, without=without).safe:
        return ""
    return "a write is still lost; which step of the run leaves the TLB stale?"


@checker
def check_10_2(steps: Sequence[str]) -> str:
    """Lose the writes to both pages of a slot, in as few steps as can be."""
    if isinstance(steps, str):
        return "give a list of steps"
    vm = smallest_vm(Hardware.ept(ad_bits=False), Kernel.v5_19, pages=2, grain=Grain.ACCESS)
    for number, said in enumerate(steps, 1):
        can = {" ".join(str(action).split()): action for action in possible(vm, Grain.ACCESS)}
        if " ".join(said.split()) not in can:
            return f"step {number}, {said!r}, is not possible there; possible: {', '.join(can)}"
        act(vm, can[" ".join(said.split())], Grain.ACCESS)
    if len(vm.missed_dirty(0)) < 2:
        return f"{len(vm.missed_dirty(0))} of 2 writes are lost; can one pass of enabling miss both pages?"
    return "" if len(steps) <= 13 else f"both are lost, in {len(steps)} steps; 13 are enough"


@checker
def check_10_3(results: tuple[Result, Result]) -> str:
    """Reclaim alone loses a write where clear_flush_young does not flush, unless enabling flushes always."""
    if not isinstance(results, tuple) or len(results) != 2:
        return "give two results, the losing one and the safe one"
    losing, safe = results
    for result in (losing, safe):
        if result.hardware.format.kvm_ad_enabled:
            return f"the bug is about CPUs without A/D bits, this is {result.hardware.name}"
        if result.kernel.clear_flush_young_flushes:
            return "both kernels need clear_flush_young_flushes=False"
        if "ages" not in result.without or "ages and flushes" in result.without:
            return 'leave out "ages", and nothing of "ages and flushes"'
        if {"reads", "writes", "enables"} & result.without:
            return "the guest must be able to read and write, and user space to enable logging"
    releases = [kernel.with_(clear_flush_young_flushes=False) for kernel in (Kernel.v5_19, Kernel.v6_0)]
    if [result.kernel for result in (losing, safe)] == releases[::-1]:
        return "the first result should lose a write, the second be safe; which flush rule does each release have?"
    if [result.kernel for result in (losing, safe)] != releases:
        return "change that one switch of Kernel.v5_19 and Kernel.v6_0, and nothing else"
    return ""


# ---- chapter 11 ------------------------------------------------------------------------------------------------------


@checker
def check_11_1(rule: BitRule) -> str:
    """The cheapest sound rule on AMD."""
    hardware = Hardware.npt()
    if type(rule) is not BitRule or not isinstance(rule.kinds, frozenset):
        return "give a BitRule(frozenset(...)) of kinds from leaves_met(...)"
    if sound_rules(hardware, [rule]) != [rule]:
        return "a write can be lost under this rule; which kinds of leaf may a TLB still let write?"
    spare = [kind for kind in rule.kinds if sound_rules(hardware, [BitRule(rule.kinds - {kind})])]
    return f"it is sound, but {len(spare)} of its {len(rule.kinds)} kinds could be left out" if spare else ""


class WInTheClearDirtyPass:
    """Asks for MMU-writable where W is taken, and for W where D is cleared."""

    unconditional = False

    def after_write_protect(self, fmt: SpteFormat, old: Spte, new: Spte, answer: Truth) -> Truth:
        return fmt.is_mmu_writable_spte(old)

    def after_clear_dirty(self, fmt: SpteFormat, old: Spte, new: Spte, answer: Truth) -> Truth:
        return fmt.is_writable_pte(old)


@checker
def check_11_2(run: Run) -> str:
    """A nested guest that breaks a rule that was sound without one."""
    kernel = Kernel.v5_19.with_(flush=WInTheClearDirtyPass())
    vm = Vm(Hardware.ept(pml=True), kernel, vcpus=2, nested="ept without A/D")
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES)
    run(vm)
    return _lost_while_logging(vm, kernel, "the nested guest's leaves have no A/D bits: what does ageing do to them?")


@checker
def check_11_3(run: Run) -> str:
    """A run that loses a write under the rule that was only lucky: flush if W, or if access-tracked."""
    hardware = Hardware.ept(ad_bits=False)
    bits = 1 << BITS.index("W") | 1 << BITS.index("tracked")
    rule = BitRule(frozenset(kind for kind in leaves_met(hardware) if kind.before & bits))
    vm = Vm(hardware, kernel := Kernel.v5_19.with_(flush=rule), vcpus=2)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES)
    run(vm)
    hint = "which kind of leaf is not in the rule, and how does a page come to look like that?"
    return _lost_while_logging(vm, kernel, hint)


def _lost_while_logging(vm: Vm, kernel: Kernel, hint: str) -> str:
    if vm.kernel is not kernel:
        return "that is another kernel; keep the one you are given"
    if (0, 0) not in vm.memslots.slots or not vm.memslots.slots[0, 0].logs_dirty:
        return "your run must leave dirty logging enabled"
    return "" if len(vm.missed_dirty(0)) else f"no write is missed; {hint}"
