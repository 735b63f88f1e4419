"""Exercises and questions of chapter 14."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from kvmbook.exercises.mechanism import Answer, checker, question
from kvmbook.exercises.vms import WatchedVm, lost_while_logging
from kvmbook.model import ClearYoung, Hardware, Kernel, Vm
from kvmbook.scenes import BASE_GFN, RELAXATIONS, RELAXED_ON, TAKEN, judge, relaxed
from kvmbook.search import explore

# ---- questions -------------------------------------------------------------------------------------------------------


@question("0", "1", "3", "5")
def quiz_14_1() -> Answer:
    """Your machine has NPT, and the TDP MMU, as by default. Each of the five relaxations by itself, and the flush of enabling
    taken away: with how many of them can a write be lost?"""
    lost = [name for name in RELAXATIONS if judge(relaxed(name, TAKEN), RELAXED_ON["NPT"]).lost]
    because = (
        "Three are about what the legacy MMU owes, and it maps nothing here. Two are about ageing, which takes A and leaves "
        "W alone: enabling finds W, and flushes. A nested guest, or tdp_mmu=N, and the answer is another."
    )
    return Answer(str(len(lost)), because)


@question("on neither", "on shadow paging", "on EPT without A/D bits", "on both")
def quiz_14_2() -> Answer:
    """v6.13 with the flush of enabling taken away, and a host with so much memory that it never ages a page. Where can a
    write be lost: on shadow paging, on EPT without A/D bits (TDP MMU)?"""
    kernel = Kernel.v6_13.with_(flush=TAKEN)
    names = ("shadow paging", "EPT without A/D")
    shadow, no_ad = (not explore(RELAXED_ON[n], kernel, without=("ages", "ages and flushes")).safe for n in names)
    said = {
        (False, False): "on neither",
        (True, False): "on shadow paging",
        (False, True): "on EPT without A/D bits",
        (True, True): "on both",
    }
    because = (
        "On EPT without A/D bits it takes an ageing to hide W from the pass. On shadow paging the pass finds W and takes it, "
        "and the helper answers that no flush is owed, since MMU-writable stays."
    )
    return Answer(said[shadow, no_ad], because)


@question("none", "the first", "the second", "both")
def quiz_14_3() -> Answer:
    """v6.18, EPT without A/D bits, INITIALLY_SET, so enabling does not flush. A page is read and aged, logging is enabled,
    and the page written. User space takes the log and clears the bit; the page is written again. Which write is lost?"""
    vm, lost = Vm(RELAXED_ON["EPT without A/D"], Kernel.v6_18), []
    vm.enable_manual_dirty_log_protect(initially_set=True)
    slot: dict[str, Any] = {"slot": 0, "base_gfn": BASE_GFN, "npages": 64}
    vm.set_user_memory_region(**slot)
    vm.vcpu[0].read(BASE_GFN)
    vm.clear_flush_young(BASE_GFN, BASE_GFN + 1)
    before = vm.counters.flushes
    vm.set_user_memory_region(**slot, log_dirty_pages=True)
    assert vm.counters.flushes == before, "enabling was not to flush"
    for which in ("the first", "the second"):
        vm.vcpu[0].write(BASE_GFN)
        told = vm.get_dirty_log(0)
        if len(vm.missed_dirty(0)):
            lost.append(which)
        vm.clear_dirty_log(0, 0, 64, told)
    because = (
        "All bits are set at first, so the first report names the page. CLEAR then flushes because a bit was set: a flush by "
        "bitmap asks no SPTE, so no ageing can hide anything from it."
    )
    return Answer({0: "none", 1: lost[0] if lost else "", 2: "both"}[len(lost)], because)


# ---- 1: six kernels --------------------------------------------------------------------------------------------------

W, A, D, YOUNG, LOCK = RELAXATIONS  # their names, in the order of the chapter
LEGACY = {
    "EPT without A/D, legacy MMU": Hardware.ept(ad_bits=False, tdp_mmu=False),
    "EPT with A/D, legacy MMU": Hardware.ept(tdp_mmu=False),
}


class Case(NamedTuple):
    """v6.12 with these relaxations, on that hardware, the flush of enabling taken away."""

    names: frozenset[str]
    hardware: str

    @property
    def lost(self) -> bool:
        return judge(relaxed(self.names, TAKEN), {**RELAXED_ON, **LEGACY}[self.hardware]).lost

    def __str__(self) -> str:
        return f"{self.hardware}: {', '.join(name for name in RELAXATIONS if name in self.names)}"


CASES_14_1 = (
    Case(frozenset([W]), "EPT with A/D, legacy MMU"),
    Case(frozenset([D]), "EPT with A/D, legacy MMU"),
    Case(frozenset([W]), "EPT without A/D, legacy MMU"),
    Case(frozenset([W, D]), "EPT without A/D, legacy MMU"),
    Case(frozenset([W, A]), "PML, legacy MMU"),
    Case(frozenset([D, YOUNG]), "PML, legacy MMU"),
)


@checker
def check_14_1(answer: Sequence[str]) -> str:
    """For each case "lost" or "safe"."""
    if isinstance(answer, str) or len(answer) != len(CASES_14_1):
        return f'give a list of {len(CASES_14_1)}, each "lost" or "safe"'
    for number, (case, said) in enumerate(zip(CASES_14_1, answer, strict=True), 1):
        if said not in ("lost", "safe"):
            return f'case {number}: say "lost" or "safe"; got {said!r}'
        if (said == "lost") != case.lost:
            return f"case {number}: {_why_14_1(case)}"
    return ""


def _why_14_1(case: Case) -> str:
    if case.hardware.startswith("PML"):
        return "with PML the pass over 4K pages takes D and leaves W; which of the answers is it that must ask for the flush?"
    if "without" in case.hardware:
        return (
            'without A/D bits "dirty" means W: how many reasons to flush has a helper that takes W, and which are left?'
        )
    return "here the pass takes W and leaves D; which of the answers is it that must ask for the flush?"


# ---- 2: no ageing ----------------------------------------------------------------------------------------------------

NPAGES, PAGES = 16, (BASE_GFN, BASE_GFN + 1, BASE_GFN + 2)


def _shadow(kernel: Kernel) -> WatchedVm:
    vm = WatchedVm(RELAXED_ON["shadow paging"], kernel, vcpus=2)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=NPAGES)
    return vm


@checker
def check_14_2(run: Callable[[Vm], Any]) -> str:
    """Without any ageing, lose the write to one page of three, of v6.13 with the flush of enabling taken away."""
    if not callable(run):
        return "give a function of one VM"
    kernel = Kernel.v6_13.with_(flush=TAKEN)
    vm = _shadow(kernel)
    run(vm)
    if any(isinstance(operation, ClearYoung) for operation in vm.flushes_of):
        return "your run ages; here a write can be lost without that"
    hint = "what must the guest have done with the page before logging is enabled, so that a TLB remembers W?"
    if said := lost_while_logging(vm, kernel, hint):
        return said
    if unwritten := [gfn for gfn in PAGES if gfn not in vm.written]:
        return f"gfn {unwritten[0]:#x} is not written after enabling, or you have taken the log: the check does that"
    missed = [int(gfn) for gfn in vm.missed_dirty(0)]
    if missed != [PAGES[1]]:
        said = ", ".join(f"{gfn:#x}" for gfn in missed)
        return f"lost: {said}; only {PAGES[1]:#x} was to be: which pages may the guest have used before enabling?"
    kept = _shadow(Kernel.v6_13)
    run(kept)
    return (
        "your run loses a write with the flush kept, too, so the flush is not to blame"
        if len(kept.missed_dirty(0))
        else ""
    )


# ---- 3: put back the fewest ------------------------------------------------------------------------------------------

HARDWARE_14_3 = {name: {**RELAXED_ON, **LEGACY}[name] for name in (*RELAXED_ON, "EPT without A/D, legacy MMU")}


def _loses(undone: frozenset[str], hardware: Hardware) -> int:
    """The steps of a shortest run that loses a write, if of all relaxations these are undone; 0 if there is none."""
    return len(judge(relaxed(frozenset(RELAXATIONS) - undone, TAKEN), hardware).trace or ())


@checker
def check_14_3(undo: Mapping[str, Collection[str]]) -> str:
    """For each hardware the fewest relaxations that must be undone if the flush of enabling is taken away."""
    if not isinstance(undo, Mapping) or set(undo) != set(HARDWARE_14_3):
        return f"give a dict with these keys: {', '.join(HARDWARE_14_3)}"
    for name, hardware in HARDWARE_14_3.items():
        if isinstance(undo[name], str) or (unknown := sorted(set(undo[name]) - set(RELAXATIONS))):
            wrong = repr(undo[name]) if isinstance(undo[name], str) else repr(unknown[0])
            return f"{name}: give a set of {', '.join(RELAXATIONS)}; got {wrong}"
        undone = frozenset(undo[name])
        if steps := _loses(undone, hardware):
            return f"{name}: a write is still lost, in {steps} steps; {_who_14_3(undone, name)}"
        if spare := [other for other in sorted(undone) if not _loses(undone - {other}, hardware)]:
            return (
                f"{name}: no write is lost, but {spare[0]!r} need not be undone; what does it touch on this hardware?"
            )
    return ""


def _who_14_3(undone: frozenset[str], name: str) -> str:
    """Where to look."""
    if name.startswith("EPT without A/D") and not {YOUNG, LOCK} <= undone:
        return "a flush that may come after enabling has returned comes too late, and one that never comes, too"
    return "who takes what from the SPTE while logging is enabled, and who is to ask for the flush?"
