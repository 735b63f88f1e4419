"""Exercises and questions of chapter 05."""

import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from kvmbook.exercises.mechanism import Answer, checker, question
from kvmbook.exercises.vms import enable, slot_was_touched
from kvmbook.model import Hardware, Kernel, Vm
from kvmbook.scenes import BASE_GFN, PML_PLACES, mapped_and_logged

PML = Hardware.ept(pml=True)

# ---- questions -------------------------------------------------------------------------------------------------------


@question("300", "600", "512, and one exit")
def quiz_05_1() -> Answer:
    """Two vCPUs write the same 300 pages under PML, first vCPU 0 all of them, then vCPU 1. How many entries do their two
    buffers have together?"""
    vm = Vm(PML, Kernel.v6_0, vcpus=2)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=300)
    for page in range(300):
        vm.vcpu[0].write(BASE_GFN + page)
    enable(vm)
    exits = vm.counters.exits
    for vcpu in vm.vcpu:
        for page in range(300):
            vcpu.write(BASE_GFN + page)
    entries, left = sum(len(vcpu.pml) for vcpu in vm.vcpu), vm.counters.exits - exits
    because = (
        "A CPU logs a page when it sets D. D stands in the SPTE, which both vCPUs share: when vCPU 1 walks, D is set "
        "already, and there is nothing to log."
    )
    return Answer(f"{entries}, and one exit" if left else str(entries), because)


@question("yes", "no: the guest has only read it", "only if the guest had written it since the last report")
def quiz_05_2() -> Answer:
    """Logging is on, and a page is write-protected. The host swaps it out and in again, and the guest reads it.
    Does the next report name the page?"""

    def named(written: bool) -> bool:
        vm = mapped_and_logged(Hardware.ept(ad_bits=False), 64)
        if written:
            vm.vcpu[0].write(BASE_GFN)
        vm.get_dirty_log(0)
        vm.invalidate_range(BASE_GFN, BASE_GFN + 1)
        vm.vcpu[0].read(BASE_GFN)
        return bool(vm.get_dirty_log(0)[0])

    because = (
        "The host took the mapping away, so the read is a fault on a page that is not mapped. KVM maps it with W, as the "
        "host allows, and marks it at once: it will not see the writes that may follow."
    )
    if named(written=False):
        return Answer("yes", because)
    only = "only if the guest had written it since the last report"
    return Answer(only if named(written=True) else "no: the guest has only read it", because)


@question("none", "one", "two")
def quiz_05_3() -> Answer:
    """Linux v6.0, a CPU with PML. A 2M page was not split when logging was enabled. The guest writes page 7 of it, and then
    page 8. How many exits do these two writes take?"""
    vm = Vm(PML, Kernel.v6_0, page_size="2M", eager_page_split=False)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=512)
    vm.vcpu[0].write(BASE_GFN)
    enable(vm)
    exits = vm.counters.exits
    outcomes = [vm.vcpu[0].write(BASE_GFN + page) for page in (7, 8)]
    because = (
        f"A huge SPTE loses W also with PML, so the first write is a {outcomes[0]}. It drops the 2M SPTE, and maps one page "
        f"of 4K. So page 8 is not mapped any more, and its write is a {outcomes[1]}, too."
    )
    return Answer({0: "none", 1: "one", 2: "two"}[vm.counters.exits - exits], because)


# ---- 1: what it costs ------------------------------------------------------------------------------------------------

HARDWARE = {"W": Hardware.ept(ad_bits=False), "D and PML": PML, "emulation": Hardware.ept(ad_bits=False)}
ALL = 1100  # pages of the slot
Formula = Callable[[str, int, int, int], Any]


@cache
def exits_of(way: str, pages: int, times: int, harvests: int) -> int:
    """The exits that the guest's writes take: before each of the harvests it writes each of ``pages`` so often."""
    vm, exits = mapped_and_logged(HARDWARE[way], ALL, guarded=way == "emulation"), 0
    for _ in range(harvests):
        before = vm.counters.exits
        for page in [page for _ in range(times) for page in range(pages)]:
            vm.vcpu[0].write(BASE_GFN + page)
        exits += vm.counters.exits - before
        vm.get_dirty_log(0)
    return exits


def _why_exits(way: str, pages: int, times: int, harvests: int, given: Any) -> str:
    """What a formula that is wrong there has not thought of."""
    if way == "emulation":
        return "does KVM ever give W back to such a page?"
    if way == "W":
        if given == pages * times * harvests:
            return "which writes to a page find W in the TLB?"
        return "how often does a page lose W, and how often does it get it back?"
    if not pages:
        return "nothing is written there"
    if given == max(pages * times - 1, 0) // PML_PLACES * harvests:
        return "a write through an entry with D = 1 sets nothing, and logs nothing"
    if given == pages // PML_PLACES * harvests:
        return "a full buffer is no exit yet; which write finds that it is full?"
    if given == exits_of(way, pages, 1, 1):
        return "the guest goes on after the first harvest"
    return "when does a page come into the buffer, and who empties it before it is full?"


@checker
def check_05_1(exits: Formula, seed: int = 1) -> str:
    """A formula for the exits, held against the model in three ways."""
    if not callable(exits):
        return "give a function of way, pages, times and harvests"
    draw = random.Random(seed)
    sizes = {
        "W": (0, 1, draw.randrange(2, 300)),
        "D and PML": (0, 1, draw.randrange(300, 500), 512, 513, draw.randrange(520, 1000), 1024, 1025),
        "emulation": (0, draw.randrange(2, 100)),
    }
    for way, counts in sizes.items():
        for pages in counts:
            case = way, pages, draw.randrange(2, 4), draw.randrange(2, 4)
            given = exits(*case)
            if given != exits_of(*case):
                said = f"way {way!r}, {pages} pages, {case[2]} times each, {case[3]} harvests"
                return f"{said}: the model does not count {given} exits; {_why_exits(*case, given)}"
    return ""


# ---- 2: a report that is not up to date ------------------------------------------------------------------------------


def _steps(vm: Vm, name: str, since: int) -> list[int]:
    """Where in the VM's log a step of this name is, from ``since``."""
    return [number for number, event in enumerate(vm.log) if number >= since and event.step == name]


@checker
def check_05_2(run: Callable[[Vm], Any]) -> str:
    """One GET whose report lacks a page that was written before it began, though the next one has it."""
    vm = mapped_and_logged(PML, 64)
    kernel, slot, since = vm.kernel, vm.memslots.slots[0, 0], len(vm.log)
    report = run(vm)
    if vm.kernel is not kernel or slot_was_touched(vm, slot):
        return "your run has replaced the VM's kernel or its slot; keep those that you are given"
    if vm.in_flight:
        return f"{vm.in_flight[0].who} has not finished: its next step is {vm.in_flight[0].todo[0]}; finish every operation"
    kicks, copies = _steps(vm, "kick", since), _steps(vm, "copy_to_user", since)
    if len(kicks) != 1 or len(copies) != 1:
        return f"your run GETs the log {len(copies)} times; once is right"
    if not isinstance(report, np.ndarray) or vm.log[copies[0]].note != f"{int(report.sum())} dirty":
        return "return what KVM has reported: the result of the GET, as it is"
    early = {e.gfn - BASE_GFN for e in vm.log[since : kicks[0]] if e.step == "write" and e.gfn is not None}
    if not early:
        return "the guest writes nothing before the GET begins"
    absent = [page for page in early if not report[page]]
    if not absent:
        left = [event for event in vm.log[since : kicks[0]] if event.step == "exit"]
        if left:
            return "the vCPU has left the guest before the GET began, and so it has drained its buffer"
        return "the report names every page; the kick asks, and who lets the vCPU leave before the bits are taken?"
    if len(vm.missed_dirty(0)) or not all(vm.get_dirty_log(0)[absent]):
        return "a write is lost for good; it has to be in the next report"
    return ""


# ---- 3: pages of a nested guest --------------------------------------------------------------------------------------

CPUS = {
    "EPT": Hardware.ept(ad_bits=False),
    "EPT, A/D bits": Hardware.ept(),
    "EPT, A/D bits, PML": PML,
    "NPT": Hardware.npt(),
}
L1S = {"ept": "EPT, A/D bits", "ept without A/D": "EPT", "npt": "NPT"}


class Write(NamedTuple):
    """A write of the nested guest (L2) or of L1: on which CPU, through which tables, and to which page."""

    cpu: str
    nested: str
    l2: bool
    l2_gfn: int
    gfn: int

    def __str__(self) -> str:
        who = (
            f"L2 writes its gfn {self.l2_gfn:#x}, L1's {self.gfn:#x}" if self.l2 else f"L1 writes its gfn {self.gfn:#x}"
        )
        return f"CPU: {self.cpu}; L1 uses: {L1S[self.nested]}; {who}"


def writes_05_3(seed: int = 1) -> list[Write]:
    """Four writes for exercise 3, others for each ``seed``."""
    draw = random.Random(seed)

    def write(cpu: str, nested: str, l2: bool) -> Write:
        l2_gfn, gfn = draw.sample(range(0x200, 0x1000), 2)
        return Write(cpu, nested, l2, l2_gfn, gfn)

    pml, kinds = "EPT, A/D bits, PML", ("ept", "ept without A/D")
    cpu = draw.choice([name for name in CPUS if name != pml])
    other = {"NPT": "npt", "EPT": "ept without A/D"}
    writes = [write(pml, nested, True) for nested in kinds]
    writes += [write(pml, draw.choice(kinds), False)]
    writes += [write(cpu, other.get(cpu) or draw.choice(kinds), True)]
    draw.shuffle(writes)
    return writes


def truth_of(write: Write) -> tuple[int, str, int | None]:
    """The A/D type of the page's SPTE, the bit that enabling takes from it, and the gfn that the CPU would log if PML were on
    for this write: that of the address whose SPTE it walked to, if it sets D there."""
    hardware = CPUS[write.cpu]
    vm = Vm(hardware, Kernel.v6_0, nested=write.nested)
    vm.set_user_memory_region(slot=0, base_gfn=0, npages=0x1000)
    vm.vcpu[0].write(write.gfn, write.l2)
    before = vm.spte(write.gfn, write.l2)
    enable(vm)
    taken = before & ~vm.spte(write.gfn, write.l2)
    ad_type = before >> 52 & 3 if hardware.format.shadow_acc_track_mask else 0
    walked = write.l2_gfn if write.l2 else write.gfn
    return ad_type, "W" if taken & 0b10 else "D", walked if hardware.pml_entries and ad_type != 1 else None


HINTS = (
    "its type is not {}; does KVM use A and D there, and may the log go by them?",
    "enabling does not take {} from its SPTE; look at the type first",
    "the CPU would not log {}; it logs when it sets D, and it knows only the address that it walks for",
)


@checker
def check_05_3(answer: Sequence[tuple[int, str, int | None]], seed: int = 1) -> str:
    """(type, bit, gfn that would be logged) of each write."""
    writes = writes_05_3(seed)
    if isinstance(answer, str) or len(answer) != len(writes) or any(len(one) != 3 for one in answer):
        return f'give a list of {len(writes)} triples, such as (0, "W", None)'
    for number, (given, write) in enumerate(zip(answer, writes, strict=True), 1):
        for said, true, hint in zip(given, truth_of(write), HINTS, strict=True):
            if said != true or isinstance(said, bool):
                name = f"{said:#x}" if type(said) is int and said > 3 else said
                return f"write {number}: {hint.format(name)}"
    return ""
