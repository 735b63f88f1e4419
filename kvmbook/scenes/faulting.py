"""Chapter 07's runs: one access followed through hit, walk, fast path and slow path, and all endings of one write fault."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import NamedTuple

from kvmbook.model import PG_LEVEL_4K, Hardware, Kernel, Outcome, Vm
from kvmbook.scenes.enabling import BASE_GFN, spte_state

FAULTS_ON = {
    "EPT without A/D": Hardware.ept(ad_bits=False),
    "EPT with A/D": Hardware.ept(),
    "shadow paging": Hardware.shadow(),
}
HUGE = 512  # pages of the slot: one huge page


def _log(vm: Vm, on: bool = True) -> None:
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=HUGE, log_dirty_pages=on)


def _mapped(vm: Vm) -> None:
    vm.vcpu[0].read(BASE_GFN)
    _log(vm)


def _not_mapped(vm: Vm) -> None:
    _log(vm)


def _aged(vm: Vm) -> None:
    _mapped(vm)
    vm.clear_flush_young(BASE_GFN, BASE_GFN + 1)


def _written(vm: Vm) -> None:
    _log(vm)
    vm.vcpu[0].write(BASE_GFN)


def _guarded(vm: Vm) -> None:
    _mapped(vm)
    vm.track_guest_page_table(BASE_GFN)


# The page's SPTE when the access comes; the slot logs.
PAGES_NOW: dict[str, Callable[[Vm], None]] = {
    "write-protected": _mapped,
    "aged": _aged,
    "not mapped": _not_mapped,
    "2M, write-protected": _mapped,
    "guest page table": _guarded,
    "just written": _written,
}
# What vCPU 0 does: the access, and the state of its page.
ACCESSES = {
    "writes a protected page": ("write", "write-protected"),
    "writes an aged page": ("write", "aged"),
    "reads an aged page": ("read", "aged"),
    "writes a page not mapped": ("write", "not mapped"),
    "writes a protected 2M page": ("write", "2M, write-protected"),
    "writes a guest page table": ("write", "guest page table"),
    "writes a page just written": ("write", "just written"),
}
ENDS = (Outcome.HIT, Outcome.WALK, Outcome.EMULATED)  # of an access
FAST = ("fast_page_fault", "fast_pf_fix_direct_spte", "mark_page_dirty_in_slot")


def _gets(vm: Vm) -> str:
    return "reports the page" if vm.get_dirty_log(0)[0] else "reports nothing"


def _takes(vm: Vm) -> str:
    vm.invalidate_range(BASE_GFN, BASE_GFN + 1)
    return ""


# Who may come in between; what they do returns what is said of it.
NOBODY, VCPU_1, HOST, USER_SPACE = (
    "nobody",
    "vCPU 1 writes the page",
    "the host takes the page",
    "user space gets the log",
)
COMES: dict[str, Callable[[Vm], str]] = {
    VCPU_1: lambda vm: str(vm.vcpu[1].write(BASE_GFN)),
    HOST: _takes,
    USER_SPACE: _gets,
}
MEANWHILE = (NOBODY, VCPU_1, HOST)


def page_now(hardware: Hardware, page: str, kernel: Kernel = Kernel.v6_0) -> Vm:
    """A VM of two vCPUs whose page `BASE_GFN` is in a state of `PAGES_NOW`, in a slot that logs. KeyError for others."""
    size = "2M" if page.startswith("2M") else "4K"
    vm = Vm(hardware, kernel, vcpus=2, page_size=size, eager_page_split=False)
    _log(vm, on=False)
    PAGES_NOW[page](vm)
    return vm


class FaultStep(NamedTuple):
    """One row of a path. ``lane``: "guest", "fast", "slow", or "other" for who comes in between; ``said``: what came of the
    step; ``lock``: how it holds mmu_lock, "" if not. Then how the page looks: its SPTE in words, whether that is a huge
    page, its bit in the dirty bitmap, and whether the step flushed."""

    lane: str
    step: str
    said: str
    lock: str
    spte: str
    huge: bool
    bit: bool
    flushed: bool


@dataclass(frozen=True)
class AccessPath:
    """One access from the first try to its end. ``results``: how each try ended, the last one being the access's end."""

    steps: tuple[FaultStep, ...]
    results: tuple[Outcome, ...]
    lost: bool

    @property
    def ways(self) -> tuple[str, ...]:
        """The ways that the access went, in order: "fast", "slow", and at the end "hit", "walk" or "emulated"."""
        end = {Outcome.HIT: "hit", Outcome.WALK: "walk"}.get(self.results[-1], "emulated")
        tried = [step.lane for step in self.steps if step.lane in ("fast", "slow") and not step.step.startswith("x86")]
        return tuple(dict.fromkeys([*tried, end]))

    @property
    def lock(self) -> str:
        """How mmu_lock was taken for it: "read", "write", or ""."""
        return next((step.lock for step in self.steps if step.lock), "")

    def __str__(self) -> str:
        """The ways, and how mmu_lock is held on the slow one."""
        return " → ".join(f"{way} ({self.lock})" if way == "slow" and self.lock else way for way in self.ways)


class _Followed:
    """A path while it happens: everything that somebody does is noted, and how the page looks after it."""

    def __init__(self, vm: Vm) -> None:
        self.vm, self.steps, self.results = vm, list[FaultStep](), list[Outcome]()

    def note(self, lane: str, step: str, lock: str, do: Callable[[], object]) -> object:
        """Let somebody do something. Said is what that returns, or else what the log says of it."""
        vm, flushes, logged = self.vm, self.vm.counters.flushes, len(self.vm.log)
        said = do()
        logs = next((event.note for event in vm.log[logged:] if event.step == step and event.note), "")
        spte, bit = vm.spte(BASE_GFN), bool(vm.dirty_bitmap()[0])
        seen = "frozen" if vm.fmt.is_removed_spte(spte) else spte_state(vm.fmt, spte)
        huge, flushed = vm.level(BASE_GFN) > PG_LEVEL_4K, vm.counters.flushes > flushes
        self.steps.append(FaultStep(lane, step, str(said or logs), lock, seen, huge, bit, flushed))
        return said

    def comes(self, who: str) -> None:
        """Somebody of `COMES`."""
        self.note("other", who, "", partial(COMES[who], self.vm))

    def accesses(self, kind: str, comes: Sequence[str], before: Collection[str]) -> None:
        """vCPU 0 does, until its access is over; ``comes`` come once, before the first step of a name in ``before``."""
        vm, waiting = self.vm, list(comes)
        while not self.results or self.results[-1] not in ENDS:
            tried = self.note("guest", f"{kind}s", "", partial(vm.vcpu[0].attempt, kind, BASE_GFN))
            fault = vm.vcpu[0].fault
            while fault is not None and fault.todo:
                while waiting and fault.todo[0] in before:
                    self.comes(waiting.pop(0))
                lane, lock = "fast" if fault.todo[0] in FAST else "slow", fault.wants_lock(fault.todo[0]) or ""
                self.note(lane, fault.todo[0], lock, partial(vm.step, fault))
            end = tried if fault is None else fault.result
            assert isinstance(end, Outcome)
            self.results.append(end)

    def path(self) -> AccessPath:
        return AccessPath(tuple(self.steps), tuple(self.results), bool(self.vm.missed_dirty(0).size))


def follow(
    hardware: str = "EPT without A/D", page: str = "write-protected", kind: str = "write", meanwhile: str = NOBODY
) -> AccessPath:
    """Follow one access of vCPU 0 until it retires or is emulated. ``meanwhile``, one of `MEANWHILE`, comes once, between
    KVM's look at the page and what KVM does about it. ``hardware`` and ``page``: keys of `FAULTS_ON` and `PAGES_NOW`."""
    told = _Followed(page_now(FAULTS_ON[hardware], page))
    told.accesses(kind, [meanwhile] * (meanwhile != NOBODY), ("fast_pf_fix_direct_spte", "make_spte"))
    return told.path()


def harvest_before(step: str, marks_first: bool = False, comes: Sequence[str] = (USER_SPACE,)) -> AccessPath:
    """A write to a write-protected page goes by the fast path; before ``step`` of it come those in ``comes``, and at the end
    user space gets the log. ``marks_first``: KVM marks the page before its exchange, and not after."""
    kernel = Kernel.v6_0.with_(fast_path_marks_first=marks_first)
    told = _Followed(page_now(FAULTS_ON["EPT without A/D"], "write-protected", kernel))
    told.accesses("write", comes, (step,))
    told.comes(USER_SPACE)
    return told.path()


def two_faults_at(step: str, hardware: Hardware) -> Vm:
    """Both vCPUs write a page that is not mapped, and each fault is done up to ``step``. ValueError if one of them must wait
    for the other before that."""
    vm = page_now(hardware, "not mapped")
    for vcpu in vm.vcpu:
        vcpu.attempt("write", BASE_GFN)
    for vcpu in vm.vcpu:
        while vcpu.fault.todo[0] != step:
            vm.step(vcpu.fault)
    return vm


def exchanges_that_fail() -> list[tuple[str, str]]:
    """A write fault whose SPTE is changed before each compare-exchange, and left in its place: what each exchange says, and
    KVM's next step, until that is no longer on the fast path."""
    vm, told = page_now(FAULTS_ON["EPT without A/D"], "write-protected"), list[tuple[str, str]]()
    vm.vcpu[0].attempt("write", BASE_GFN)
    fault = vm.vcpu[0].fault
    while fault.todo[0] in FAST:
        vm.step(fault)
        if not vm.clear_flush_young(BASE_GFN, BASE_GFN + 1):  # old already: make it young
            vm.vcpu[1].read(BASE_GFN)
        vm.step(fault)
        told.append((vm.log[-1].note, fault.todo[0]))
    return told


# ---- all endings of one fault ----------------------------------------------------------------------------------------


class Ending(NamedTuple):
    """How KVM's part of one fault can end: its last step, what that says, and what becomes of the access."""

    step: str
    said: str
    outcome: Outcome


def _logging_off(vm: Vm) -> None:
    """Switched off, but only published yet; then vCPU 1 faults on the page beside."""
    vm.step(vm.start(vm.user_memory_region(slot=0, base_gfn=BASE_GFN, npages=HUGE)))
    vm.vcpu[1].attempt("write", BASE_GFN + 1)
    if vm.vcpu[1].fault is not None:
        vm.run(vm.vcpu[1].fault)


def _slot_moves(vm: Vm) -> None:
    """Its first step: from now on who looks the slot up finds that it is about to go."""
    vm.step(vm.start(vm.user_memory_region(slot=0, base_gfn=2 * BASE_GFN, npages=HUGE)))


def _off_again(vm: Vm) -> None:
    _mapped(vm)
    _log(vm, on=False)


def _no_slot(vm: Vm) -> None:
    vm.set_user_memory_region(slot=0)


def _read_only_slot(vm: Vm) -> None:
    _no_slot(vm)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=HUGE, readonly=True)


BEFORE_A_FAULT = {**PAGES_NOW, "logged": _off_again, "read-only slot": _read_only_slot, "no slot": _no_slot}
IN_BETWEEN: tuple[Callable[[Vm], object], ...] = (
    lambda vm: None,
    lambda vm: vm.vcpu[1].write(BASE_GFN),
    lambda vm: vm.invalidate_range(BASE_GFN, BASE_GFN + 1),
    lambda vm: vm.track_guest_page_table(BASE_GFN),
    _logging_off,
    _slot_moves,
)
STEPS = (*FAST, "kvm_faultin_pfn", "make_spte", "unfreeze", "set_spte", "x86_emulate_instruction")


def _ending(vm: Vm, kind: str, comes: Callable[[Vm], object], at: int) -> Ending | None:
    """The end of one fault of vCPU 0, if ``comes`` comes before its exit (0), or before KVM's first step (1), second ..."""
    if at == 0:
        comes(vm)
    vm.vcpu[0].attempt(kind, BASE_GFN)
    done, fault = 1, vm.vcpu[0].fault
    while fault is not None and fault.todo:
        if done == at:
            comes(vm)
        if fault.todo:  # who came may have had to wait for it
            vm.step(fault)
        done += 1
    if fault is None:
        return None
    last = next(event for event in reversed(vm.log) if event.actor == fault.who)
    return Ending(last.step, last.note, fault.result)


def endings(kind: str = "write") -> list[Ending]:
    """All endings of one fault on EPT without A/D bits, in the order of KVM's steps: every state of the page, every one who
    may come in between, at every moment."""
    found = set[Ending | None]()
    for size, before, comes, at in product(("4K", "2M"), BEFORE_A_FAULT.values(), IN_BETWEEN, range(7)):
        vm = Vm(FAULTS_ON["EPT without A/D"], Kernel.v6_0, vcpus=2, page_size=size, eager_page_split=False)
        _log(vm, on=False)
        before(vm)
        with suppress(OSError, ValueError):  # refused, or it must wait for the fault
            found.add(_ending(vm, kind, comes, at))
    return sorted((end for end in found if end), key=lambda end: (STEPS.index(end.step), end.said, end.outcome.value))
