"""Exercises and questions of chapter 07."""

import functools
import random
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from kvmbook.exercises.mechanism import Answer, Run, checker, question
from kvmbook.exercises.vms import PAGES, enable, lost_while_logging
from kvmbook.model import Hardware, Kernel, Outcome, PageFault, Vm
from kvmbook.scenes import BASE_GFN, FAULTS_ON, PAGES_NOW, follow, page_now

NO_AD = Hardware.ept(ad_bits=False)


def _until(vm: Vm, cpu: int, step: str) -> PageFault:
    """The fault of a vCPU, done up to a step."""
    fault = vm.vcpu[cpu].fault
    assert isinstance(fault, PageFault)
    while fault.todo and fault.todo[0] != step:
        vm.step(fault)
    return fault


@question("both", "one", "neither: they disturb each other")
def quiz_07_1() -> Answer:
    """Two vCPUs write the same write-protected page. KVM has looked at the SPTE for each of them, and has changed nothing.
    Whose compare-exchange succeeds?"""
    vm = page_now(NO_AD, "write-protected")
    for vcpu in vm.vcpu:
        vcpu.attempt("write", BASE_GFN)
    faults = [_until(vm, cpu, "fast_pf_fix_direct_spte") for cpu in (0, 1)]
    for fault in faults:
        vm.run(fault)
    done = sum(event.note == "writable" for event in vm.log)
    because = (
        "The second finds another word than the one that it has read, looks again, and sees that its write is allowed now: "
        "spurious. The first one's mark is for both writes."
    )
    return Answer("both" if done == 2 else "one" if done else "neither: they disturb each other", because)


@question("not at all", "for read", "for write")
def quiz_07_2() -> Answer:
    """No A/D bits, and the slot logs. A 2M page is write-protected, and then the host ages it. The guest reads it. How is
    mmu_lock held while rights come back?"""
    vm = page_now(NO_AD, "2M, write-protected")
    vm.clear_flush_young(BASE_GFN, BASE_GFN + 1)
    vm.vcpu[0].attempt("read", BASE_GFN)
    fault, lock = vm.vcpu[0].fault, ""
    while fault.todo:
        lock = lock or fault.wants_lock(fault.todo[0]) or ""
        vm.step(fault)
    because = (
        "It is W that a huge page must not get back in a slot that logs, and a read does not ask for W. R and X are saved "
        "in the SPTE, whatever its size: one compare-exchange, no lock, and no mark."
    )
    return Answer(f"for {lock}" if lock else "not at all", because)


@question("it faults once more, and is marked", "the next GET reports it", "it is lost")
def quiz_07_3() -> Answer:
    """Take a KVM whose slow path drops mmu_lock after it has marked the page, and takes it again to store the SPTE. In
    between, a GET comes. Then the SPTE is stored, and the guest writes. What becomes of that write?"""
    vm = page_now(NO_AD, "not mapped")
    vm.vcpu[0].attempt("write", BASE_GFN)
    fault = _until(vm, 0, "set_spte")
    fault.lock = None  # what no kernel does here
    vm.get_dirty_log(0)
    vm.run(fault)
    how = vm.vcpu[0].write(BASE_GFN)
    because = (
        "GET takes the mark and finds no SPTE to protect. Then the SPTE comes, with W: the write is a walk, and nobody is on "
        "the way to mark it. Only because the lock is held from mark to store may the slow path mark first."
    )
    if vm.missed_dirty(0).size:
        return Answer("it is lost", because)
    faulted = how not in (Outcome.HIT, Outcome.WALK)
    return Answer("it faults once more, and is marked" if faulted else "the next GET reports it", because)


# ---- 1: eight rows ---------------------------------------------------------------------------------------------------


class AccessRow(NamedTuple):
    """One access: keys of `FAULTS_ON` and `PAGES_NOW`, and "read" or "write"."""

    hardware: str
    page: str
    kind: str


WAYS_07 = ("no fault", "fast", "slow", "emulated")


@functools.cache
def _way(row: AccessRow) -> str:
    """One of `WAYS_07`. A fast path that gave up is slow."""
    path = follow(*row)
    if path.ways[-1] == "emulated":
        return "emulated"
    return "slow" if "slow" in path.ways else "fast" if "fast" in path.ways else "no fault"


def accesses_07_1(seed: int = 1) -> list[AccessRow]:
    """Eight accesses, each way among them; another ``seed``, other ones."""
    rng = random.Random(seed)
    rows = [AccessRow(*row) for row in product(FAULTS_ON, PAGES_NOW, ("read", "write"))]
    by_way = {way: [row for row in rows if _way(row) == way] for way in WAYS_07}
    drawn = [row for way in WAYS_07 for row in rng.sample(by_way[way], 1 + (way in ("fast", "slow")))]
    drawn += rng.sample([row for row in rows if row not in drawn], 8 - len(drawn))
    rng.shuffle(drawn)
    return drawn


def _look_at(row: AccessRow, right: str) -> str:
    """What decides about a row."""
    if right == "no fault":
        return "what do TLB and SPTE allow at this moment? A fault needs an access that they do not allow"
    if right == "emulated":
        return "KVM shadows that page; may the guest ever write it by itself?"
    if row.hardware == "shadow paging":
        return "the fast path is for tables in which nothing depends on the guest's own tables"
    if row.page == "not mapped":
        return "is there an SPTE that could be repaired?"
    if row.page.startswith("2M"):
        return "the log knows 4K pages only: may this SPTE become writable as it is?"
    if row.page == "aged" and row.hardware == "EPT with A/D":
        return "it is not its age that makes the access fault: the slot logs, so what has this SPTE lost beside A?"
    return "all that is missing is in the SPTE itself, or KVM may put it back at any time"


@checker
def check_07_1(ways: Sequence[str], seed: int = 1) -> str:
    """The way of each of eight accesses."""
    rows = accesses_07_1(seed)
    if isinstance(ways, str) or len(ways) != len(rows):
        return f"give a list of {len(rows)} words, one a row"
    if unknown := [way for way in ways if way not in WAYS_07]:
        return f"the ways are {', '.join(WAYS_07)}; got {unknown[0]!r}"
    for number, (row, way) in enumerate(zip(rows, ways, strict=True), 1):
        if way != (right := _way(row)):
            return f"row {number} ({', '.join(row)}) is not {way!r}: {_look_at(row, right)}"
    return ""


# ---- 2: the other order ----------------------------------------------------------------------------------------------

MARKS_FIRST = Kernel.v6_0.with_(fast_path_marks_first=True)


def _logging_vm(kernel: Kernel, manual: bool = False) -> Vm:
    """Two vCPUs, and sixteen pages that were read before logging was enabled: protected, and no bit is set. ``manual``: user
    space protects by itself, so GET only reports."""
    vm = Vm(NO_AD, kernel, vcpus=2)
    if manual:
        vm.enable_manual_dirty_log_protect()
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES)
    for gfn in range(BASE_GFN, BASE_GFN + PAGES):
        vm.vcpu[0].read(gfn)
    enable(vm)
    return vm


def _also_lost_by_v6_0(run: Run) -> bool:
    """Whether a run loses a write in the right order, too."""
    vm = _logging_vm(Kernel.v6_0, manual=True)
    try:
        run(vm)
    except Exception:  # it counts on the other order
        return False
    return bool(vm.missed_dirty(0).size)


@checker
def check_07_2(run: Run) -> str:
    """Lose a write because the mark comes before the exchange."""
    vm = _logging_vm(MARKS_FIRST, manual=True)
    logged = len(vm.log)
    run(vm)
    events = vm.log[logged:]
    steps = [event.step for event in events]
    if vm.in_flight and vm.kernel is MARKS_FIRST:
        return f"{vm.in_flight[0].who} has not finished: its next step is {vm.in_flight[0].todo[0]}"
    if "mark_page_dirty_in_slot" not in steps:
        hint = "no fault has come as far as its mark. Which vCPU has to write which page?"
    elif "take_bits" not in steps:
        hint = "nobody takes the mark, it stays where it is. With manual protection GET reports; which call takes?"
    elif steps.index("take_bits") < steps.index("mark_page_dirty_in_slot"):
        hint = "bits are taken before the mark is there"
    elif steps.index("take_bits") > steps.index("fast_pf_fix_direct_spte"):
        hint = "the mark is taken after the exchange, and W with it. Stop the fault one step earlier"
    else:
        hint = "the mark is taken too early, as it should be. Who writes then, and has the fault been finished before?"
    if said := lost_while_logging(vm, MARKS_FIRST, hint):
        return said
    return "your run loses a write under v6.0 as well, so the order is not to blame" if _also_lost_by_v6_0(run) else ""


# ---- 3: two exchanges that fail --------------------------------------------------------------------------------------


@checker
def check_07_3(run: Run) -> str:
    """vCPU 0's compare-exchange fails twice and then succeeds."""
    kernel = Kernel.v6_0
    vm = _logging_vm(kernel)
    logged = len(vm.log)
    run(vm)
    if vm.kernel is not kernel:
        return "your run has replaced the VM's kernel; keep the one that you are given"
    events = [event for event in vm.log[logged:] if event.actor == "KVM for vCPU0"]
    if not events:
        return "vCPU 0 has not faulted. A write does: every page is protected"
    if vm.vcpu[0].fault is not None:
        return f"vCPU 0's fault is not finished: its next step is {vm.vcpu[0].fault.todo[0]}"
    tried = [event.note for event in events if event.step == "fast_pf_fix_direct_spte"]
    failed, won = sum(note.startswith("the SPTE changed") for note in tried), "writable" in tried
    if failed > 2:
        return f"the exchange has failed {failed} times"
    if failed < 2:
        return (
            f"the exchange has failed {('not once', 'once')[failed]}. What changes this SPTE between look and exchange?"
        )
    if any(event.step == "kvm_faultin_pfn" for event in events):
        return "twice, but then it went slow: the SPTE was gone. Change it in a way that leaves it there"
    if not won:
        return "twice, but then it was spurious: somebody else has given W back. Whose write did that?"
    return ""
