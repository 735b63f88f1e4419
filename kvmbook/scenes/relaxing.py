"""What later releases no longer flush, and what became of it: each relaxation of chapter 14 alone, with the flush of enabling
and without it; every release; the runs that lose, counted; and what all of it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import ClassVar, NamedTuple

import numpy as np

from kvmbook.model import ClearFlushYoung, FlushPolicy, Hardware, Kernel, SpteFormat, Vm
from kvmbook.scenes.enabling import BASE_GFN
from kvmbook.scenes.runs import Graph, Run, graph_of, retell
from kvmbook.search import (
    Action,
    AnyNumber,
    Cells,
    Grain,
    PageSteps,
    Pairs,
    Search,
    Space,
    act,
    ioctl_of,
    plain_search,
    possible,
    smallest_vm,
)

TAKEN, KEPT = FlushPolicy.IF_CHANGED, FlushPolicy.ALWAYS  # the flush of enabling: as up to v5.19, and since v6.0
FLUSHES: dict[str, FlushPolicy] = {"taken away": TAKEN, "kept": KEPT}


# ---- five relaxations, each of them alone ----------------------------------------------------------------------------

W, A, D = "W goes", "A is cleared", "D is cleared"
YOUNG, LOCK = "clear_flush_young", "no mmu_lock"


class Relaxation(NamedTuple):
    """``says`` what is no longer done; the ``commits`` and the ``release`` that relaxed it."""

    says: str
    commits: str
    release: str


RELAXATIONS = {
    W: Relaxation("the legacy MMU owes no flush if W goes and MMU-writable stays", "081976992f43", "v6.13"),
    A: Relaxation("it owes none if A is cleared", "b7ed46b201a4", "v6.13"),
    D: Relaxation("it owes none if D is cleared", "856cf4a60cff", "v6.13"),
    YOUNG: Relaxation("clear_flush_young ages, and does not flush", "2ebbe0308c29, b9883ee40d7e", "v6.13"),
    LOCK: Relaxation("ageing does not take mmu_lock", "b146a9b34aed, af3b6a9eba48", "v6.15"),
}
OWED = {W, A, D}  # those that are about what the legacy MMU owes
RELAXED_ON = {
    "shadow paging": Hardware.shadow(),
    "PML, legacy MMU": Hardware.ept(pml=True, tdp_mmu=False),
    "EPT without A/D": Hardware.ept(ad_bits=False),
    "NPT": Hardware.npt(),
}
BEFORE = Kernel.v6_12  # the last release without any of them


@cache
def owing_less(relaxed: frozenset[str]) -> type[SpteFormat]:
    """The helpers of `BEFORE`, but that the legacy MMU owes no flush for these of `OWED`."""

    class OwesLess(BEFORE.spte_rules):  # type: ignore[name-defined,misc]  # a class that a kernel carries as data
        goes: ClassVar[frozenset[str]] = relaxed

        def mmu_spte_update(self, old: int, new: int) -> bool:
            """As up to v6.12, reason by reason."""
            self.check_spte_writable_invariants(new)
            if not self.may_replace(old, new):
                return False
            stays = self.is_mmu_writable_spte(new) if W in self.goes else self.is_writable_pte(new)
            aged = A not in self.goes and self.is_accessed_spte(old) and not self.is_accessed_spte(new)
            cleaned = D not in self.goes and self.is_dirty_spte(old) and not self.is_dirty_spte(new)
            return (self.is_mmu_writable_spte(old) and not stays) or aged or cleaned

    return OwesLess


@cache
def relaxed(names: str | frozenset[str], flush: FlushPolicy = KEPT) -> Kernel:
    """v6.12 with these relaxations of `RELAXATIONS` and no other, and with this flush of enabling. ValueError for others."""
    wanted = frozenset([names]) if isinstance(names, str) else names
    if unknown := sorted(wanted - set(RELAXATIONS)):
        raise ValueError(f"relaxations are {', '.join(RELAXATIONS)}; got {', '.join(map(repr, unknown))}")
    owed = wanted & OWED
    return BEFORE.with_(
        flush=flush,
        spte_rules=owing_less(owed) if owed else BEFORE.spte_rules,
        clear_flush_young_flushes=YOUNG not in wanted,
        ages_without_lock=LOCK in wanted,
        name=f"Linux v6.12 with {', '.join(sorted(wanted)) or 'no relaxation'}",
    )


class Judged(NamedTuple):
    """``states`` that were searched, and a shortest ``trace`` that loses a write, or None."""

    states: int
    trace: tuple[Action, ...] | None

    @property
    def lost(self) -> bool:
        return self.trace is not None


def being_aged(hardware: Hardware, kernel: Kernel, grain: Grain = Grain.STEP) -> Vm:
    """The smallest VM, its page mapped and read by vCPU 0, and a clear_flush_young() of it under way, all its steps to do."""
    vm = smallest_vm(hardware, kernel, grain=grain)
    gfn = vm.memslots.slots[0, 0].base_gfn
    vm.vcpu[0].read(gfn)
    vm.start(ClearFlushYoung(gfn, gfn + 1))
    return vm


@cache
def judge(kernel: Kernel, hardware: Hardware) -> Judged:
    """One page, one vCPU, cut by fault; the host ages by clear_flush_young() alone. Where ageing takes no lock, its steps are
    apart: every interleaving with one ageing is searched, from `being_aged`, and logging stays on."""
    if kernel.ages_without_lock:
        vm = being_aged(hardware, kernel, Grain.FAULT)
        reach = plain_search(vm, Grain.FAULT, without=("ages", "ages and flushes", "disables"))
        return Judged(reach.states, reach.trace)
    search = Search(
        Space(Pairs(PageSteps(_cells(kernel.with_(flush=KEPT, name=""), hardware).with_flush(kernel.flush), 1)))
    )
    search.run()
    return Judged(search.states, search.shortest_loss())


@cache
def _cells(kernel: Kernel, hardware: Hardware) -> Cells:
    """The steps of that search, found once for both flush rules."""
    return Cells(hardware, kernel, grain=Grain.FAULT, without=("ages",))


def run_under(relaxation: str, flush: FlushPolicy, hardware: Hardware) -> Run:
    """The shortest run that loses a write under one relaxation; if there is none, what becomes of the calls of such a run."""
    kernel = relaxed(relaxation, flush)
    starts = being_aged if relaxation == LOCK else smallest_vm
    vm = starts(hardware, kernel, grain=Grain.FAULT)
    run = retell(vm, judge(kernel, hardware).trace or _calls(vm.copy(), relaxation), Grain.FAULT)
    moments = [replace(m, action=m.action._replace(who=m.action.who.removesuffix(" mm"))) for m in run.moments]
    return replace(run, moments=tuple(moments))


def _calls(vm: Vm, relaxation: str) -> list[Action]:
    """The page is read, then aged unless the relaxation is about protecting it, logging is enabled, the page is written: each
    call with all its steps, but for an ageing that is under way and still owes its flush."""
    reads, writes = Action("vCPU0", "reads", 0), Action("vCPU0", "writes", 0)
    ages = [Action("host", "ages and flushes", 0)] * (relaxation not in (W, D))
    begins = [reads, reads, *ages]
    if relaxation == LOCK:
        begins = [Action("host mm", step) for step in ("kvm_age_gfn", "kvm_tdp_mmu_age_spte")]
    done: list[Action] = []
    for call in [*begins, Action("user space", "enables"), writes]:
        following: list[Action] = [call]
        while following:
            act(vm, following[0], Grain.FAULT)
            done.append(following[0])
            own = [
                a
                for a in possible(vm, Grain.FAULT)
                if a.who.removeprefix("KVM for ") == call.who and call.who != "host mm"
            ]
            following = [a for a in own if a.who != call.who or (a.who == "user space" and ioctl_of(vm))]
    return done


# ---- every release ---------------------------------------------------------------------------------------------------

JUDGED_ON = {
    "EPT without A/D": RELAXED_ON["EPT without A/D"],
    "EPT with PML": Hardware.ept(pml=True),
    "NPT": RELAXED_ON["NPT"],
    "shadow paging": RELAXED_ON["shadow paging"],
    "PML, legacy MMU": RELAXED_ON["PML, legacy MMU"],
}
# The switches that a search of 4K pages, one slot and a bitmap can meet. All others are about huge pages, rings, user
# space's options, order in a PML buffer: tests judge each release by itself.
MET = ("spte_rules", "clear_flush_young_flushes", "ages_without_lock", "allowed_is_spurious")


class Verdicts(NamedTuple):
    """Whether a release is safe with the flush of enabling ``taken`` away, and with it ``kept``."""

    taken: bool
    kept: bool


@cache
def _verdicts(met: tuple[object, ...], hardware: Hardware) -> Verdicts:
    kernel = Kernel.v6_0.with_(**dict(zip(MET, met, strict=True)))
    cells = Cells(hardware, kernel, 1, Grain.FAULT)
    found = (AnyNumber(cells.with_flush(flush)).search(stop_at_loss=True) for flush in (TAKEN, KEPT))
    return Verdicts(*(search.verdict().safe for search in found))


def verdicts_of(release: Kernel, hardware: Hardware) -> Verdicts:
    """For any number of pages and vCPUs, cut by fault, whoever ages by whatever call. Releases that differ in none of `MET`
    are one search."""
    return _verdicts(tuple(getattr(release, name) for name in MET), hardware)


# ---- how many runs lose ----------------------------------------------------------------------------------------------


def runs_that_lose(release: Kernel, hardware: Hardware, steps: int) -> list[int]:
    """Of the runs of 0, 1, ... ``steps`` steps of one page and one vCPU, cut by step, how many have lost a write by then, if
    the flush of enabling is taken away."""
    return losing_runs(graph_of(hardware, release.with_(flush=TAKEN), grain=Grain.STEP), steps)


def losing_runs(graph: Graph, steps: int) -> list[int]:
    """The same of any graph: all runs, less those that avoid every state in which a write is lost."""
    spared = [not now.lost for now in graph.states]
    every = [1] + [0] * (len(graph.states) - 1)
    clean, found = list(every), [0]
    for _ in range(steps):
        every, clean = _longer(graph, every), _longer(graph, clean)
        clean = [runs * ok for runs, ok in zip(clean, spared, strict=True)]
        found.append(sum(every) - sum(clean))
    return found


def _longer(graph: Graph, runs: Iterable[int]) -> list[int]:
    """The runs that are one step longer, by the state in which they end."""
    after = [0] * len(graph.states)
    for count, edges in zip(runs, graph.edges, strict=True):
        for _, to in edges:
            after[to] += count
    return after


# ---- what it costs ---------------------------------------------------------------------------------------------------


class Cycles(NamedTuple):
    """What a workload cost: flushes of ``ageing``, of ``faults``, of ``harvests``, and of ``enabling``, once; of the pages
    ``used`` before a question of the host, how many were ``seen`` as young."""

    ageing: int
    faults: int
    harvests: int
    enabling: int
    used: int
    seen: int


CYCLES, PAGES, HOT = 10, 32, 8


@cache
def cycles(kernel: Kernel, hardware: Hardware, seed: int = 14) -> Cycles:
    """`CYCLES` harvest cycles of a guest with two vCPUs and `PAGES` pages, of which the first `HOT` are used most.

    Each cycle has two rounds: either vCPU uses eight pages, every fourth of them by a write, then the host, in search of
    memory, asks clear_flush_young() of each page; after both rounds user space gets the log. Equal seeds give equal
    workloads, whatever the kernel.
    """
    rng, vm, gfns = np.random.default_rng(seed), Vm(hardware, kernel, vcpus=2), range(BASE_GFN, BASE_GFN + PAGES)
    flushes, used, seen = Counter[str](), 0, 0

    def count(what: str) -> None:
        flushes[what] += vm.counters.flushes - flushes.total()

    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES)
    for gfn in gfns:
        vm.vcpu[0].write(gfn)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES, log_dirty_pages=True)
    count("enabling")
    for turn in range(2 * CYCLES):
        touched = _use(vm, rng)
        count("faults")
        young = {gfn for gfn in gfns if vm.clear_flush_young(gfn, gfn + 1)}
        count("ageing")
        used, seen = used + len(touched), seen + len(touched & young)
        if turn % 2:
            vm.get_dirty_log(0)
        count("harvests")
    return Cycles(**flushes, used=used, seen=seen)


def _use(vm: Vm, rng: np.random.Generator) -> set[int]:
    """Either vCPU uses eight pages; returns the gfns."""
    touched = set[int]()
    for vcpu in vm.vcpu:
        for number in range(8):
            gfn = BASE_GFN + int(rng.integers(HOT if rng.random() < 0.75 else PAGES))
            (vcpu.read if number % 4 else vcpu.write)(gfn)
            touched.add(gfn)
    return touched
