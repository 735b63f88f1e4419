"""Exercises and questions of chapter 04."""

from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from kvmbook.exercises.mechanism import Answer, Run, checker, question
from kvmbook.exercises.vms import enable
from kvmbook.model import Hardware, Kernel, SpteFormat, TlbEntry, Vm
from kvmbook.scenes import BASE_GFN, enable_up_to_the_flush, escapes, pairs_met, spte_state

PAGES = 64
NO_AD, WITH_AD, NPT, PML = Hardware.ept(ad_bits=False), Hardware.ept(), Hardware.npt(), Hardware.ept(pml=True)


def _vm(hardware: Hardware = NO_AD, vcpus: int = 2) -> Vm:
    vm = Vm(hardware, Kernel.v6_0, vcpus=vcpus)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES)
    return vm


def _clean_by_two_faults(vm: Vm) -> None:
    """Leave the page's SPTE writable with D = 0: two vCPUs fault at once, and KVM makes it twice."""
    for vcpu in vm.vcpu[:2]:
        vcpu.attempt("read", BASE_GFN)
    for vcpu in vm.vcpu[:2]:
        vm.run(vcpu.fault)


# ---- questions -------------------------------------------------------------------------------------------------------


@question("TLB hit", "walk", "fast fault", "slow fault")
def quiz_04_1() -> Answer:
    """A CPU without A/D bits, logging is on. Both vCPUs remember R-X of a page, and vCPU 0 writes it. Then chance evicts
    vCPU 1's entry, and vCPU 1 writes the page, too. How does vCPU 1's write go?"""
    vm = _vm()
    vm.vcpu[0].read(BASE_GFN)
    enable(vm)
    for vcpu in vm.vcpu:
        vcpu.read(BASE_GFN)
    vm.vcpu[0].write(BASE_GFN)
    vm.vcpu[1].evict(BASE_GFN)
    because = (
        "Forgetting helps. vCPU 0's fault has set W in the SPTE. vCPU 1 remembers nothing, so it walks, and meets the SPTE "
        "of now. With its old R-X it would have faulted, for nothing."
    )
    return Answer(str(vm.vcpu[1].write(BASE_GFN)), because)


@question("nothing", "all but the page that faulted", "all")
def quiz_04_2() -> Answer:
    """One entry of vCPU 0 covers 2M: R-X. It writes one page there, and faults. How much of the 2M does its TLB still know
    when KVM begins to handle the fault?"""
    vm = Vm(NO_AD, Kernel.v6_0, page_size="2M", eager_page_split=False)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=512)
    vm.vcpu[0].read(BASE_GFN)
    enable(vm)  # protects the huge page as a whole, and flushes
    vm.vcpu[0].read(BASE_GFN)
    vm.vcpu[0].attempt("write", BASE_GFN + 5)
    left = sum(vm.vcpu[0].tlb.lookup("L1", gfn) is not None for gfn in range(BASE_GFN, BASE_GFN + 512))
    because = (
        "A violation drops every entry that covers the address, and one entry covers all 512 pages. It goes as a whole."
    )
    return Answer({0: "nothing", 512: "all"}.get(left, "all but the page that faulted"), because)


@question("a TLB hit: nobody sees it", "a walk that sets D", "a fault: KVM sees it")
def quiz_04_3() -> Answer:
    """A CPU with A/D bits, without PML. vCPU 0 remembers "RWX, clean". Enabling logging takes W from the SPTE, and has not
    flushed yet. vCPU 0 writes. What is that?"""
    vm = _vm(WITH_AD)
    _clean_by_two_faults(vm)
    vm.vcpu[0].read(BASE_GFN)
    enable_up_to_the_flush(vm)
    said = {"TLB hit": "a TLB hit: nobody sees it", "walk": "a walk that sets D", "fault": "a fault: KVM sees it"}
    because = (
        "A write through a clean entry has to set D in the SPTE, so the CPU walks. There it meets the SPTE of now, which has "
        "no W. The entry is stale, and does no harm."
    )
    return Answer(said[str(vm.vcpu[0].attempt("write", BASE_GFN))], because)


# ---- 1: who forgets? -------------------------------------------------------------------------------------------------


class Happens(NamedTuple):
    """Something that happens, in words, what it does to the VM of exercise 1, and what helps a reader who is wrong."""

    said: str
    does: Callable[[Vm], object]
    hint: str


OTHER, UNMAPPED, SECOND = BASE_GFN + 1, BASE_GFN + 9, 0x1000
KEPT = "an exit, or a fault on another address, takes nothing away"
BY_HARVEST = "a harvest flushes if it has taken a bit; whose pages it was does not matter"
BY_HOST = "which of the host's calls flush, and when?"

EVENTS = (
    Happens("vCPU 0 exits", lambda vm: vm.vcpu[0].exit(), KEPT),
    Happens("vCPU 0 tries to write page 0, and faults", lambda vm: vm.vcpu[0].attempt("write", BASE_GFN),
            "a CPU that faults drops its own entries for that address"),
    Happens("vCPU 1 reads page 9, and faults", lambda vm: vm.vcpu[1].attempt("read", UNMAPPED), KEPT),
    Happens("vCPU 1 evicts page 0", lambda vm: vm.vcpu[1].evict(BASE_GFN), "each TLB forgets for itself"),
    Happens("clear_young of page 0", lambda vm: vm.clear_young(BASE_GFN, OTHER), BY_HOST),
    Happens("clear_flush_young of page 0", lambda vm: vm.clear_flush_young(BASE_GFN, OTHER), BY_HOST),
    Happens("clear_flush_young of page 9", lambda vm: vm.clear_flush_young(UNMAPPED, UNMAPPED + 1),
            f"{BY_HOST} Is page 9 young?"),
    Happens("the host takes page 1 away", lambda vm: vm.invalidate_range(OTHER, OTHER + 1),
            "what was mapped must be flushed when it goes; for which pages is a flush?"),
    Happens("the host takes page 9 away", lambda vm: vm.invalidate_range(UNMAPPED, UNMAPPED + 1),
            f"{BY_HOST} Was page 9 mapped?"),
    Happens("GET of slot 0", lambda vm: vm.get_dirty_log(0), f"{BY_HARVEST}. Has slot 0 a bit?"),
    Happens("GET of slot 1", lambda vm: vm.get_dirty_log(1), f"{BY_HARVEST}. Has slot 1 a bit?"),
    Happens("logging of slot 1 is switched off",
            lambda vm: vm.set_user_memory_region(slot=1, base_gfn=SECOND, npages=8),
            "switching off protects nothing, so what would there be to flush?"),
)  # fmt: skip
WHO = ("nobody", "vCPU 0", "vCPU 1", "both")


def _both_remember() -> Vm:
    """Slots 0 and 1 log. Both vCPUs have R-X of page 0; page 1 is mapped, page 9 is not; slot 1 has one bit."""
    vm = _vm()
    vm.set_user_memory_region(slot=1, base_gfn=SECOND, npages=8)
    vm.vcpu[0].read(BASE_GFN)
    vm.vcpu[0].read(OTHER)
    enable(vm)
    enable(vm, slot=1)
    vm.vcpu[1].write(SECOND)
    for vcpu in vm.vcpu:
        vcpu.read(BASE_GFN)
    return vm


def _forgets(event: Happens) -> str:
    """Who no longer knows page 0 after it."""
    vm = _both_remember()
    event.does(vm)
    gone = [vcpu.state.id for vcpu in vm.vcpu if vcpu.tlb.lookup("L1", BASE_GFN) is None]
    return {(): "nobody", (0,): "vCPU 0", (1,): "vCPU 1", (0, 1): "both"}[tuple(gone)]


def _drawn(seed: int) -> list[Happens]:
    return Random(seed).sample(EVENTS, 8)


def events_04_1(seed: int = 1) -> list[str]:
    """The eight events of a seed, in words."""
    return [event.said for event in _drawn(seed)]


@checker
def check_04_1(answers: Sequence[str], seed: int = 1) -> str:
    """Who forgets page 0, for each of eight events."""
    events = _drawn(seed)
    if isinstance(answers, str) or len(answers) != len(events):
        return f"give {len(events)} answers in a list"
    if unknown := [said for said in answers if said not in WHO]:
        return f"{unknown[0]!r} is none of {', '.join(WHO)}"
    wrong = [n for n, event in enumerate(events) if answers[n] != _forgets(event)]
    if not wrong:
        return ""
    first = wrong[0]
    more = f" ({len(wrong)} of {len(events)} are wrong)" if len(wrong) > 1 else ""
    return f"number {first + 1}, {events[first].said!r}, is not right{more}: {events[first].hint}"


# ---- 2: three rights of one page -------------------------------------------------------------------------------------

WANTED = ("RWX", "RWX, clean", "R-X")


def protected_and_clean() -> Vm:
    """The VM of exercise 2: NPT, three vCPUs; page 0 has W = 0 and D = 0, and no TLB knows it; logging is off again."""
    vm = _vm(NPT, vcpus=3)
    _clean_by_two_faults(vm)
    enable(vm)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES)
    return vm


def _remembered(vm: Vm, vcpu: int) -> str:
    entry = vm.vcpu[vcpu].tlb.lookup("L1", BASE_GFN)
    return "nothing" if entry is None else str(entry)


@checker
def check_04_2(run: Run) -> str:
    """A run after which three vCPUs remember three different rights of one page."""
    vm = protected_and_clean()
    run(vm)
    if vm.in_flight:
        return f"{vm.in_flight[0].who} has not finished: its next step is {vm.in_flight[0].todo[0]}; finish every operation"
    now = tuple(_remembered(vm, vcpu) for vcpu in range(3))
    if now == WANTED:
        walked = {event.actor for event in vm.log if event.note == "walk"}
        by_hand = not walked.issuperset(vcpu.state.name for vcpu in vm.vcpu)
        return "a TLB is filled by a walk: let each vCPU access the page" if by_hand else ""
    wrong = next(vcpu for vcpu in range(3) if now[vcpu] != WANTED[vcpu])
    hints = {
        "R-X": "an entry says R-X if the SPTE had no W when it was filled: who must come first?",
        "RWX, clean": "an entry is clean if the SPTE had W and not yet D when it was filled: who gives W back, who sets D?",
        "RWX": "a write that has retired leaves RWX",
    }
    return f"vCPU {wrong} remembers {now[wrong]}, and should remember {WANTED[wrong]}; {hints[WANTED[wrong]]}"


# ---- 3: which stale entries matter? ----------------------------------------------------------------------------------

Predicate = Callable[[SpteFormat, TlbEntry, int], object]


@checker
def check_04_3(may_escape: Predicate) -> str:
    """A predicate that says of an entry and an SPTE whether a write may pass unseen, on every pair that runs bring about."""
    for hardware in (NO_AD, PML, WITH_AD, NPT):
        fmt = Kernel.v6_0.spte_format(hardware.format)
        for entry, spte in pairs_met(hardware):
            said = may_escape(fmt, entry, spte)
            if not isinstance(said, bool):
                return f"return True or False; your function returned {said!r}"
            if said != escapes(hardware, entry, spte):
                return _hint_04_3(hardware, fmt, entry, spte, said)
    return ""


def _hint_04_3(hardware: Hardware, fmt: SpteFormat, entry: TlbEntry, spte: int, said: bool) -> str:
    case = f"{hardware.name}, entry {entry}, SPTE {spte:#x} ({spte_state(fmt, spte)}): your function says {said}"
    if said and not entry.write:
        return f"{case}; a write through an entry without W faults"
    if said and not entry.dirty:
        return f"{case}; a write through a clean entry has to walk"
    if said:
        return f"{case}; without the entry the SPTE lets the write pass, too, and has nothing to note"
    if fmt.is_writable_pte(spte):
        return f"{case}; the SPTE allows the write, but would the CPU not set D there?"
    return f"{case}; the entry lets a write pass that the SPTE would stop"
