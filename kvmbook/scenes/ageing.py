"""Ageing, the story of chapter 06: a host ages a guest's pages, the guest uses them or not, the host asks which it used."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvmbook.model import Hardware, Kernel, Outcome, SpteFormat, Vm
from kvmbook.scenes.enabling import BASE_GFN, Moment, moment_of

AGED_ON = {
    "EPT without A/D bits": Hardware.ept(ad_bits=False),
    "EPT with A/D bits": Hardware.ept(ad_bits=True),
}
NO_FLUSH = Kernel.v6_0.with_(name="Linux v6.0 with v6.13's rule", clear_flush_young_flushes=False)
CALLS = {
    "clear_young": ("clear_young", Kernel.v6_0),
    "clear_flush_young": ("clear_flush_young", Kernel.v6_0),
    "clear_flush_young, since v6.13": ("clear_flush_young", NO_FLUSH),
    "test_young": ("test_young", Kernel.v6_0),
}
USES = {"vCPU 0 reads": (0, "read"), "vCPU 0 writes": (0, "write"), "vCPU 1 reads": (1, "read"), "nobody": None}
FAULTS = (Outcome.FAST_FAULT, Outcome.SLOW_FAULT)
SEEN_BY = {Outcome.HIT: "sees nothing", Outcome.WALK: "the CPU sets A"}  # of what retires without KVM


@dataclass(frozen=True)
class Ageing:
    """One page that is mapped, aged, perhaps used, and asked about. ``moments`` of the page and of vCPU 0's TLB; ``words``:
    its SPTE after each; ``used`` since it was aged, and whether the host is told that it is ``young``; ``faults`` and
    ``flushes`` since the host's first call."""

    fmt: SpteFormat
    moments: tuple[Moment, ...]
    words: tuple[int, ...]
    used: bool
    young: bool
    faults: int
    flushes: int


def age_touch_ask(hardware: str, call: str, use: str) -> Ageing:
    """vCPU 0 reads a page, the host ages it by ``call``, the guest uses it or not, the host asks by test_young().

    The arguments are keys of `AGED_ON`, `CALLS` and `USES`. Raises KeyError for others.
    """
    name, kernel = CALLS[call]
    vm = Vm(AGED_ON[hardware], kernel, vcpus=2)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=1)
    moments, words, faults = list[Moment](), list[int](), 0

    def then(actor: str, action: str, kvm: str, flushed: bool = False, outcome: Outcome | None = None) -> None:
        moments.append(moment_of(vm, BASE_GFN, actor, action, kvm, flushed=flushed, outcome=outcome))
        words.append(vm.spte(BASE_GFN))

    outcome = vm.vcpu[0].read(BASE_GFN)
    then("vCPU 0", "reads", str(outcome), outcome=outcome)
    was_young = _host_calls(vm, name)
    flushes = vm.counters.flushes
    then(name, "host ages", f"{_said(was_young)}, {'⟳ flush' if flushes else 'no flush'}", bool(flushes))
    if (done := USES[use]) is not None:
        number, kind = done
        outcome = vm.vcpu[number].complete(kind, BASE_GFN)
        faults += outcome in FAULTS
        then(f"vCPU {number}", f"{kind}s", SEEN_BY.get(outcome, str(outcome)), outcome=outcome)
    young, used = vm.test_young(BASE_GFN, BASE_GFN + 1), done is not None
    then("test_young", "host asks", f"{'✓' if young == used else '✕'} {_said(young)}")
    return Ageing(vm.fmt, tuple(moments), tuple(words), used, young, faults, flushes)


def _host_calls(vm: Vm, name: str) -> bool:
    notifier: Callable[[int, int], bool] = getattr(vm, name)
    return notifier(BASE_GFN, BASE_GFN + 1)


def _said(young: bool) -> str:
    return "young" if young else "old"


# ---- which pages are in use? -----------------------------------------------------------------------------------------

PAGES = 64
ALL = range(BASE_GFN, BASE_GFN + PAGES)


@dataclass(frozen=True)
class Measured:
    """What a way to ask has ``found`` in use, of how many pages that were, and the faults and flushes that it took."""

    found: int
    used: int
    faults: int
    flushes: int


def _log(vm: Vm) -> None:
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES, log_dirty_pages=True)


def _one_by_one(vm: Vm) -> None:
    for gfn in ALL:
        vm.clear_flush_young(gfn, gfn + 1)


# How to begin; at the end the log is fetched, or each page is asked for by test_young().
WAYS_TO_ASK: dict[str, Callable[[Vm], object]] = {
    "dirty log": _log,
    "clear_young": lambda vm: vm.clear_young(ALL.start, ALL.stop),
    "clear_flush_young": lambda vm: vm.clear_flush_young(ALL.start, ALL.stop),
    "clear_flush_young, page by page": _one_by_one,
}


def measure(way: str, hardware: Hardware, read: Iterable[int], written: Iterable[int]) -> Measured:
    """A guest has 64 pages, all mapped and in its TLB. Then it reads some pages and writes some (numbers from 0); what does
    one of the `WAYS_TO_ASK` to ask say about that? Linux v6.0. KeyError for another way."""
    vm = Vm(hardware, Kernel.v6_0)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES)
    for gfn in ALL:
        vm.vcpu[0].read(gfn)
    WAYS_TO_ASK[way](vm)
    uses = [("read", page) for page in read] + [("write", page) for page in written]
    outcomes = [vm.vcpu[0].complete(kind, BASE_GFN + page) for kind, page in uses]
    flushes = vm.counters.flushes
    report = vm.get_dirty_log(0) if way == "dirty log" else [vm.test_young(gfn, gfn + 1) for gfn in ALL]
    used, faults = {page for _, page in uses}, [outcome for outcome in outcomes if outcome in FAULTS]
    return Measured(int(sum(report)), len(used), len(faults), flushes)
