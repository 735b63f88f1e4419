"""Chapter 09: the reasons why a leaf is not writable, and runs in which somebody gives W back or takes MMU-writable away.

The chain is HW -> MMU-writable -> W. The questions: who may change which of them under which lock, and when must the TLBs
have forgotten?
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from kvmbook.model import FlushPolicy, Kernel, Operation, Outcome, SpteFormat, TrackGuestPageTable, Vm
from kvmbook.scenes.enabling import BASE_GFN, HARDWARE

LOGGING, TABLE, READ_ONLY, TRACKING = 1, 2, 3, 4
REASONS = {
    LOGGING: "dirty logging",
    TABLE: "a guest's page table",
    READ_ONLY: "read-only in the host",
    TRACKING: "access tracking",
}


def reasons_of(fmt: SpteFormat, spte: int) -> set[int]:
    """The reasons (keys of `REASONS`) that a present leaf shows for its W=0; none if W is set.

    What a word may hide is left out: an access-tracked page may be one of a slot that logs, and "dirty logging" is also what
    is left of access tracking after a read. The kernel lists them above is_writable_pte(), mmu/spte.h, v6.0.
    """
    if fmt.is_writable_pte(spte):
        return set()
    tracked = {TRACKING} if fmt.is_access_track_spte(spte) else set[int]()
    if fmt.is_mmu_writable_spte(spte):
        return tracked or {LOGGING}
    host_writable = spte & fmt.shadow_host_writable_mask
    return tracked | {TABLE if host_writable else READ_ONLY}


# ---- somebody wants W, or takes MMU-writable away --------------------------------------------------------------------

NOT_WRITABLE = {
    "1 dirty logging": {LOGGING},
    "4 access tracking": {TRACKING},
    "2 a guest's page table": {TABLE},
    "2 and 4: a page table, then aged": {TABLE, TRACKING},
    "3 read-only in the host": {READ_ONLY},
}
WRITES, GUARDS, ENABLES = "vCPU 1 writes the page", "KVM guards it as a page table", "logging is enabled"
# What happens, and a kernel that does it carelessly.
ACTS = {
    WRITES: Kernel.v6_0.with_(fast_path_asks_mmu_writable=False),
    GUARDS: Kernel.v6_0.with_(guard_flushes_before_unlock=False),
    ENABLES: Kernel.v6_0.with_(flush=FlushPolicy.IF_CHANGED),
}
BY_RULES, CARELESS = "by its rules", "carelessly"
SHARED = "the guest has written a frame that the host shares with others"
UNSEEN = "a guest's page table is written, and KVM does not see it"
MISSED = "a write is missed: no report will name the page"


class Stage(NamedTuple):
    """How page and lock are after one step. ``note``: what came of it; ``chain``: HW, MMU-writable and W; ``rights``: R, X,
    "" if nothing is mapped; ``tlb`` of vCPU 0; ``lock``: how somebody holds mmu_lock during the step, and ``held`` whether
    after it, too."""

    who: str
    what: str
    note: str
    lock: str
    held: bool
    chain: tuple[bool, bool, bool]
    rights: str
    tlb: str
    stale: bool
    flushed: bool


class Act(NamedTuple):
    """A run: its ``rows``, the ``harm`` that it does, a sentence or "", and the number of the row that does it, or None."""

    rows: tuple[Stage, ...]
    harm: str
    harmed: int | None

    @property
    def gives_back(self) -> Stage | None:
        """The step that sets W, if one does."""
        return next((now for was, now in pairwise(self.rows) if now.chain[2] > was.chain[2]), None)

    @property
    def flush(self) -> Stage | None:
        """The first flush, if there is one."""
        return next((row for row in self.rows if row.flushed), None)


def page_with(reasons: set[int], kernel: Kernel = Kernel.v6_0) -> Vm:
    """Two vCPUs and one page on a CPU without A/D bits, read by vCPU 0; then what makes W=0 for these reasons."""
    vm = Vm(HARDWARE["off"], kernel, vcpus=2)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=1)
    if READ_ONLY in reasons:
        vm.write_protect_host_page(BASE_GFN)
    vm.vcpu[0].read(BASE_GFN)
    if LOGGING in reasons:
        vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=1, log_dirty_pages=True)
    if TABLE in reasons:
        vm.track_guest_page_table(BASE_GFN)
    if TRACKING in reasons:
        vm.clear_young(BASE_GFN, BASE_GFN + 1)
    return vm


def harm_of(vm: Vm, how: Outcome) -> str:
    """What is wrong with a guest's write to the page that ended like that; "" if nothing is."""
    if how in (Outcome.EMULATED, Outcome.FAULT):
        return ""
    slot, locked = vm.memslots.slots[0, 0], any(op.lock == "write" for op in vm.in_flight)
    if BASE_GFN in vm.write_tracked and not locked:  # under the lock nobody has read the table yet
        return UNSEEN
    if not vm.host.lookup(slot.hva(BASE_GFN)).writable:
        return SHARED
    return MISSED if len(vm.missed_dirty(0)) else ""


class _Told:
    """A run while it happens: its rows, and the first harm."""

    def __init__(self, vm: Vm) -> None:
        self.vm, self.rows, self.flushes = vm, list[Stage](), vm.counters.flushes
        self.harm = ""
        self.harmed: int | None = None

    def note(self, who: str, what: str, note: str = "", lock: str = "") -> None:
        """Add a row about what has just happened."""
        vm, fmt, spte, entry = self.vm, self.vm.fmt, self.vm.spte(BASE_GFN), self.vm.vcpu[0].tlb.lookup("L1", BASE_GFN)
        masks = fmt.shadow_host_writable_mask, fmt.shadow_mmu_writable_mask
        read, write, execute = fmt.hardware_rights(spte)
        rights = " ".join(letter if on else "–" for letter, on in (("R", read), ("X", execute)))
        held = next((op.lock for op in vm.in_flight if op.lock), "") or ""
        self.rows.append(
            Stage(
                who,
                what,
                note,
                lock or held,
                bool(held),
                (spte & masks[0] != 0, spte & masks[1] != 0, write),
                rights if fmt.is_shadow_present_pte(spte) else "",
                str(entry) if entry else "empty",
                entry is not None and entry.write and not write,
                vm.counters.flushes > self.flushes,
            )
        )
        self.flushes = vm.counters.flushes

    def step(self, operation: Operation) -> None:
        """KVM, or the ioctl, does its next step."""
        name, logged = operation.todo[0], len(self.vm.log)
        lock = operation.lock or operation.wants_lock(name) or ""
        self.vm.step(operation)
        self.note("KVM", name, self.vm.log[logged].note, lock)

    def judge(self, who: str, what: str, how: Outcome) -> None:
        """Note a guest's write, and whether it does harm."""
        self.note(who, what, str(how))
        if not self.harm and (harm := harm_of(self.vm, how)):
            self.harm, self.harmed = harm, len(self.rows) - 1

    def writes(self, vcpu: int, said: str = "writes") -> None:
        """A vCPU writes, and KVM handles its fault step by step."""
        how = self.vm.vcpu[vcpu].attempt("write", BASE_GFN)
        self.judge(f"vCPU {vcpu}", said, how)
        if fault := self.vm.vcpu[vcpu].fault:
            while fault.todo:
                self.step(fault)
            if fault.result is not Outcome.EMULATED:
                self.writes(vcpu, "writes again")

    def writes_if_the_tlb_lets_it(self) -> None:
        """vCPU 0 writes, if that takes no fault."""
        entry = self.vm.vcpu[0].tlb.lookup("L1", BASE_GFN)
        if entry is not None and entry.write:
            self.writes(0)

    def writes_to_the_end(self) -> None:
        """vCPU 0 writes, faults and all, in one row."""
        how = self.vm.vcpu[0].write(BASE_GFN)
        self.judge("vCPU 0", "writes", how)
        if how is Outcome.EMULATED and self.rows[-1].rights != self.rows[-2].rights:
            self.rows[-1] = self.rows[-1]._replace(note=f"fault, {how}")  # the fault gave R and X back


def give_back(page: str, act: str = WRITES, how: str = BY_RULES) -> Act:
    """One page with W=0, and what somebody does to it. ``page`` is a key of `NOT_WRITABLE`, ``act`` of `ACTS`, ``how`` is
    `BY_RULES` or `CARELESS`. KeyError for others."""
    vm = page_with(NOT_WRITABLE[page], {BY_RULES: Kernel.v6_0, CARELESS: ACTS[act]}[how])
    if act == ENABLES:
        vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=1)  # off, if it was on; W stays as it is
    told = _Told(vm)
    told.note("", "at the start")
    if act == WRITES:
        told.writes(1)
    elif act == GUARDS:
        _protects_then_flushes(told, vm.start(TrackGuestPageTable(BASE_GFN)))
    else:
        enabling = vm.start(vm.user_memory_region(slot=0, base_gfn=BASE_GFN, npages=1, log_dirty_pages=True))
        while not enabling.todo[0].startswith("write_protect"):
            vm.step(enabling)
        _protects_then_flushes(told, enabling)
    told.writes_to_the_end()
    return Act(tuple(told.rows), told.harm, told.harmed)


def _protects_then_flushes(told: _Told, operation: Operation) -> None:
    """A pass, a write of vCPU 0 before the TLBs are flushed, and the rest."""
    told.step(operation)
    if operation.todo:
        told.writes_if_the_tlb_lets_it()
    while operation.todo:
        told.step(operation)
