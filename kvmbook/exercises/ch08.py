"""Exercises and questions of chapter 08."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

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
from kvmbook.scenes import BASE_GFN, CHANGES, HARDWARE, enabling_plan, missed_against_aged
from kvmbook.search import any_number
from kvmbook.views import ShapeGuess


def guess_08_1() -> ShapeGuess:
    """The shape of the cliff."""
    pages = 64
    because = (
        "The pass changes an SPTE that is still writable, and the flush that follows is for the whole VM, aged pages too. "
        "Only if all pages were aged does the pass change nothing, and then no TLB is flushed."
    )
    return ShapeGuess(
        f"On a CPU without A/D bits the guest writes {pages} pages, the host ages some of them, dirty logging is enabled, "
        f'and the guest writes all {pages} again. Under the flush rule "if changed", how many of these writes are missed?',
        {
            aged: missed_against_aged(FlushPolicy.IF_CHANGED, aged)
            for aged in (*range(0, pages - 1, 8), pages - 1, pages)
        },
        top=pages,
        because=because,
        along="pages aged (the last step is 1 page)",
        counted="missed writes",
        named="with {} pages aged",
    )


@question("yes", "no")
def quiz_08_1() -> Answer:
    """Logging is on. It is switched off and on again, and no page is used meanwhile. Does the flush rule "if changed" flush
    at the second enabling?"""
    vm = Vm(Hardware.ept(ad_bits=False), Kernel.v5_19)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES)
    vm.vcpu[0].write(BASE_GFN)
    enable(vm)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES)
    flushes = vm.counters.flushes
    enable(vm)
    because = (
        "No SPTE is writable any more, so there is none to change. Whether a flush is needed depends on the first enabling: "
        "if that one flushed, no TLB can hold a writable copy; if it did not, because all pages were aged, the stale "
        "copies are still there."
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
    because = "Enabling has not returned, so user space has not begun to copy. What it copies later has the write."
    return Answer("it is logged" if logged else "it is lost" if lost else "it is not logged, and not lost", because)


@question("yes, by being there", "only if logging is enabled on it", "no: a flush is for one slot")
def quiz_08_3() -> Answer:
    """All pages of slot 0 are aged. Does a second slot, whose pages are all writable, help slot 0 under the flush rule "if
    changed"?"""

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
        "The pass over the second slot then changes SPTEs, and its flush is for the whole VM. That flush may come before "
        "logging is enabled on slot 0 or after it, but it must come after the ageing and before the guest writes."
    )
    if saved(enabled=False):
        return Answer("yes, by being there", because)
    return Answer("only if logging is enabled on it" if saved(enabled=True) else "no: a flush is for one slot", because)


# ---- 1: the plan -----------------------------------------------------------------------------------------------------

# What a reader whose plan lacks a step should look for.
MISSING = {
    "kvm_mmu_update_cpu_dirty_logging": "the CPU must be told to log; which step does that?",
    "clear_dirty_rmap": "the CPU reports a write when it sets D; which pass sees to it that D has to be set?",
    "write_protect_rmap": "D reports writes to 4K pages; which pass makes sure of larger ones?",
    "flush_always": "which step has v6.0 put at the end, whatever the passes met?",
}


def _all_steps() -> set[str]:
    """Every name that a plan of the panel has."""
    cases = product(HARDWARE, (Kernel.v5_19, Kernel.v6_0), CHANGES, (False, True), (False, True))
    return {name for case in cases for name in enabling_plan(*case)}


def _foreign(name: str) -> str:
    """Why a step that the function does take elsewhere has no place in this plan."""
    if name.startswith("zap"):
        return "belongs to switching logging off"
    if name.startswith("split"):
        return "belongs to the eager split, which is not made where the TDP MMU is off"
    if name.endswith("_tdp"):
        return "visits the TDP MMU's tables, and this host has none"
    return "flushes only if a pass asked for it, as v5.19 does"


@checker
def check_08_1(plan: Sequence[str]) -> str:
    """The steps of enabling under v6.0 with PML and the legacy MMU."""
    if isinstance(plan, str) or not all(isinstance(name, str) for name in plan):
        return "give the names of the steps as a list of strings"
    vm = Vm(Hardware.ept(pml=True, tdp_mmu=False), Kernel.v6_0)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES)
    off = vm.memslots.slots[0, 0]
    right = kvm_mmu_slot_apply_flags(vm, Change.FLAGS_ONLY, off, replace(off, flags=KVM_MEM_LOG_DIRTY_PAGES))
    for name in plan:
        if name not in _all_steps():
            return f"{name!r} is no step of kvm_mmu_slot_apply_flags(); mind the spelling"
        if name not in right:
            return f"{name!r} {_foreign(name)}"
        if plan.count(name) > 1:
            return f"{name!r} is done once here"
    if missing := [name for name in right if name not in plan]:
        return f"a step is missing: {MISSING[missing[0]]}"
    wrong = next((n for n, (given, wanted) in enumerate(zip(plan, right, strict=True), 1) if given != wanted), 0)
    return f"these are the steps, but not in this order: {plan[wrong - 1]!r} is not number {wrong}" if wrong else ""


# ---- 2: a rule of one's own ------------------------------------------------------------------------------------------

NO_AD, NPT = Hardware.ept(ad_bits=False), Hardware.npt()
ALL = range(BASE_GFN, BASE_GFN + 64)


def _read(vm: Vm) -> None:
    for gfn in ALL:
        vm.vcpu[0].read(gfn)


def _age(vm: Vm) -> None:
    _read(vm)
    vm.clear_young(ALL.start, ALL.stop)


def _age_then(kind: str) -> Run:
    def prepare(vm: Vm) -> None:
        _age(vm)
        for gfn in ALL:
            vm.vcpu[1].complete(kind, gfn)

    return prepare


def _map_read_only(vm: Vm) -> None:
    vm.write_protect_host_page(BASE_GFN)
    vm.vcpu[0].read(BASE_GFN)


def _log_before(vm: Vm) -> None:
    vm.vcpu[0].write(BASE_GFN)
    enable(vm)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=len(ALL))


# What happened to all pages before logging is enabled.
BEFORE: dict[str, Callable[[Vm], None]] = {
    "were aged": _age,
    "were aged, and read again by vCPU 1": _age_then("read"),
    "were aged, and written again by vCPU 1": _age_then("write"),
}


def _prepared(hardware: Hardware, kernel: Kernel, prepare: Callable[[Vm], None]) -> Vm:
    """Two vCPUs, and a slot that does not log yet."""
    vm = Vm(hardware, kernel, vcpus=2)
    vm.set_user_memory_region(slot=0, base_gfn=ALL.start, npages=len(ALL))
    prepare(vm)
    return vm


def _flushes_and_missed(hardware: Hardware, kernel: Kernel, prepare: Callable[[Vm], None]) -> tuple[int, int]:
    """The flushes of enabling, and the writes of vCPU 0 that are missed afterwards."""
    vm = _prepared(hardware, kernel, prepare)
    before = vm.counters.flushes
    enable(vm)
    flushes = vm.counters.flushes - before
    vm.vcpu[0].write(BASE_GFN)
    return flushes, len(vm.missed_dirty(0))


@checker
def check_08_2(rule: FlushRule) -> str:
    """A flush rule that loses nothing without A/D bits and on NPT, and does not flush where W and MMU-writable tell that it
    need not."""
    if isinstance(rule, type):
        return "pass an object, MyRule(), not the class"
    kernel = Kernel.v5_19.with_(flush=rule)
    for hardware in (NO_AD, Hardware.ept(ad_bits=False, tdp_mmu=False), NPT):
        for what, prepare in BEFORE.items():
            if _flushes_and_missed(hardware, kernel, prepare)[1]:
                return f"{hardware.name}: a write is missed if the pages {what}"
    for hardware in (NO_AD, NPT):
        if _flushes_and_missed(hardware, kernel, _map_read_only)[0]:
            return f"{hardware.name}: your rule flushes, although the only mapped page is read-only in the host"
    if _flushes_and_missed(NPT, kernel, _log_before)[0]:
        return "NPT: your rule flushes when logging was switched off and on again. What does ageing take there?"
    for hardware in (NO_AD, NPT):
        if not any_number(hardware, kernel).safe:
            return f"{hardware.name}: chapter 10's search finds a run under your rule that loses a write"
    return ""


# ---- 3: a host that cannot be patched --------------------------------------------------------------------------------

IOCTLS = ("set_user_memory_region", "enable_manual_dirty_log_protect", "get_dirty_log", "clear_dirty_log")
MACHINES: dict[str, Callable[[Vm], None]] = {"were read": _read, "were never used": lambda vm: None, **BEFORE}


@checker
def check_08_3(begin: Callable[[Any], None]) -> str:
    """The first calls of a migration on v5.19: no write after them is missed, no page is named or dropped in vain."""
    if not callable(begin):
        return "give a function of kvm"
    for what, prepare in MACHINES.items():
        if hint := _judge(begin, _prepared(NO_AD, Kernel.v5_19, prepare)):
            return f"if the pages {what}, {hint}"
    return ""


def _judge(begin: Callable[[Any], None], vm: Vm) -> str:
    """One machine: a hint if a write is missed there, or too much is done."""
    mapped = sum(vm.level(gfn) > 0 for gfn in ALL)
    begin(SimpleNamespace(**{name: getattr(vm, name) for name in IOCTLS}))
    slot = vm.memslots.slots.get((0, 0))
    if slot is None or not slot.logs_dirty or (slot.base_gfn, slot.npages) != (ALL.start, len(ALL)):
        return "slot 0 does not log when your function is over"
    if dropped := mapped - sum(vm.level(gfn) > 0 for gfn in ALL):
        return f"{dropped} mapped pages are dropped; who deletes or moves a slot pays that"
    written = ALL[::2]
    for gfn in written:
        vm.vcpu[0].write(gfn)
    report = {ALL.start + int(page) for page in vm.get_dirty_log(0).nonzero()[0]}
    if missed := set(written) - report:
        return f"{len(missed)} writes are missed. Which call flushes by bits, whatever an SPTE looks like? When are they set?"
    if vain := report - set(written):
        return f"the report names {len(vain)} pages that nobody has written since; which call takes bits, and arms?"
    return ""
