"""The runs of chapter 02: a memslot call that is made or refused, and a harvest with a write in the middle of it.

Pure functions from a few settings to a result; `kvmbook.views.slot_panels` draws them.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from kvmbook.model import (
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    PAGE_SIZE,
    USER_BASE,
    Change,
    ClearDirtyLog,
    GetDirtyLog,
    Hardware,
    Kernel,
    Machine,
    MemoryRegion,
    MemorySlot,
    Operation,
    Outcome,
    SetUserMemoryRegion,
    Vm,
    step,
)
from kvmbook.scenes.enabling import BASE_GFN

# ---- which errno? ----------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """One check of KVM_SET_USER_MEMORY_REGION: what it asks, words that only its refusal has, and a call to `two_slots`
    that breaks it and no check before it."""

    asks: str
    told_by: str
    breaks_it: MemoryRegion


def region(slot: int, flags: int, gfn: float, pages: float, user: int | None = None) -> MemoryRegion:
    """A call with guest address and size in pages; ``user`` (bytes) lies at a constant offset unless told otherwise."""
    address, size = round(gfn * PAGE_SIZE), round(pages * PAGE_SIZE)
    return MemoryRegion(slot, flags, address, size, USER_BASE + address if user is None else user)


# In the kernel's order. tests/scenes/test_slots.py asks the model whether the order is right.
RULES = (
    Rule("the slot id is below 32764", "ids go from", region(32764, 0, 0x300, 64)),
    Rule("only known flags: 1, LOG_DIRTY_PAGES; 2, READONLY", "are known", region(2, 4, 0x300, 64)),
    Rule("size, guest and user address: multiples of 4096", "is not a multiple of", region(2, 0, 0x300, 0.5)),
    Rule("the user range lies in user space", "leaves user space", region(2, 0, 0x300, 64, 1 << 47)),
    Rule("the address space (slot >> 16) is 0 or 1", "address space", region(2 << 16 | 2, 0, 0x300, 64)),
    Rule("guest address + size does not wrap", "wraps around", region(2, 0, 2**52 - 1, 2, 0)),
    Rule("at most 2147483647 pages", "a slot holds at most", region(2, 0, 0x300, 2**31, 0)),
    Rule("if the size is 0 (delete): the slot exists", "memory_size 0 deletes", region(2, 0, 0x300, 0)),
    Rule("if the slot exists: same user address", "its user address cannot", region(0, 0, 0x100, 128, USER_BASE)),
    Rule("if the slot exists: same size", "its size cannot change", region(0, 0, 0x100, 64)),
    Rule("if the slot exists: READONLY as it was", "cannot be switched", region(0, 2, 0x100, 128)),
    Rule("no overlap with another slot", "overlap slot", region(2, 0, 0x1F0, 64)),
    Rule("the last gfn is within the host's physical width", "lies above the host's", region(2, 0, 2**34, 64, 0)),
)
# After a call that is accepted: how many checks it took. A deletion needs no more after the eighth; without a new place
# there is nothing to overlap.
CHECKS_TAKEN = {Change.DELETE: 8, Change.FLAGS_ONLY: 11, Change.NONE: 11, Change.CREATE: 13, Change.MOVE: 13}

SLOTS = {"2 (free)": 2, "0 (exists)": 0}
FLAGS = {"0": 0, "LOG_DIRTY_PAGES": KVM_MEM_LOG_DIRTY_PAGES, "READONLY": KVM_MEM_READONLY}
PLACES = {"0x1c0": 0x1C0, "0x100, as slot 0": 0x100, "0x300": 0x300, "0x300 and 16 bytes": 0x300 + 16 / PAGE_SIZE}
SIZES = {"128 pages": 128, "64 pages": 64, "0": 0}


class Ask(NamedTuple):
    """A call and its answer. ``error``: "" or the errno's name; ``says``: the refusal's sentence, or what was done;
    ``change``: None if it was refused; ``checks``: how many were taken, the refusing one included; ``before`` and
    ``after``: the slots."""

    call: MemoryRegion
    error: str
    says: str
    change: Change | None
    checks: int
    before: tuple[MemorySlot, ...]
    after: tuple[MemorySlot, ...]


def two_slots() -> Vm:
    """The VM that calls are put to: slot 0 has 128 pages from gfn 0x100, slot 1 has 64 from gfn 0x200; none logs."""
    vm = Vm(Hardware.ept(), Kernel.v5_19)
    vm.set_user_memory_region(slot=0, base_gfn=0x100, npages=128)
    vm.set_user_memory_region(slot=1, base_gfn=0x200, npages=64)
    return vm


def errno_of(call: Callable[[], Any]) -> str:
    """Make a call and name the errno that it is refused with; "0" if it succeeds."""
    try:
        call()
    except OSError as refused:
        return errno.errorcode[refused.errno or 0]
    return "0"


def ask(call: MemoryRegion) -> Ask:
    """Put ``call`` to a fresh `two_slots`. ValueError for what does not fit into the ioctl's struct."""
    vm = two_slots()
    before = tuple(vm.memslots.slots.values())
    operation = SetUserMemoryRegion(call)
    try:
        vm.run(operation)
    except OSError as refused:
        said = refused.strerror or ""
        number = next(number for number, rule in enumerate(RULES, 1) if rule.told_by in said)
        return Ask(call, errno.errorcode[refused.errno or 0], said, None, number, before, before)
    after = tuple(vm.memslots.slots.values())
    change = operation.change
    return Ask(call, "", change.value, change, CHECKS_TAKEN[change], before, after)


def ask_panel(slot: str, flags: str, place: str, size: str) -> Ask:
    """The same for the panel's words: keys of `SLOTS`, `FLAGS`, `PLACES`, `SIZES`. Memory lies in user space where a VMM
    would have put it: slot 0 where it lies already, another slot at a constant offset."""
    number = SLOTS[slot]
    kept = USER_BASE + 0x100 * PAGE_SIZE if number == 0 else None
    call = region(number, FLAGS[flags], PLACES[place], SIZES[size], kept)
    return ask(call._replace(userspace_addr=call.userspace_addr & -PAGE_SIZE))


def what_changes(vm: Vm, **region: Any) -> str:
    """Make the call that `Vm.user_memory_region` makes of ``region``; say in a line which kind of change it came to, and
    which slots there are then. OSError if it is refused."""
    operation = vm.user_memory_region(**region)
    vm.run(operation)
    slots = ", ".join(f"slot {slot.id} at {slot.base_gfn:#x}" for slot in vm.memslots.slots.values())
    return f"{operation.change.value:13} {slots}"


def refusals() -> Iterator[tuple[Rule, Ask]]:
    """Each rule with the answer to the call that breaks it first."""
    for rule in RULES:
        yield rule, ask(rule.breaks_it)


# ---- a harvest -------------------------------------------------------------------------------------------------------

NPAGES = 130  # three words, the last one short
SEEN_PAGES = (1, 5, 70)
PROTOCOLS = {
    "GET clears": 0b00,
    "manual protect": 0b01,
    "manual, initially set": 0b11,
}
WRITTEN = {"page 1": (1,), "pages 5 and 70": (5, 70), "no page": ()}
WHEN = ("never", "before GET", "bits read", "W taken", "flushed", "after the harvest")


class Row(NamedTuple):
    """One line of a harvest: who did which step, and how things look after it. ``live`` and ``buffer``: the three words
    of the bitmap's halves; ``spte``: W of the pages of `SEEN_PAGES`; ``tlb``: the same in vCPU 0's TLB, None without an
    entry; ``flushed``: the step flushed the TLBs."""

    who: str
    what: str
    live: tuple[int, ...]
    buffer: tuple[int, ...]
    spte: tuple[bool, ...]
    tlb: tuple[bool | None, ...]
    flushed: bool


@dataclass(frozen=True)
class Harvest:
    """A whole run: ``now`` and ``next``, the pages of this report and of the one after it; ``flushes`` of this harvest;
    ``missed``: the pages that neither named although they were written since user space read them last."""

    rows: tuple[Row, ...]
    now: tuple[int, ...]
    next: tuple[int, ...]
    flushes: int
    missed: tuple[int, ...]


def logged_vm(protocol: str = "GET clears", npages: int = NPAGES) -> Vm:
    """A VM without A/D bits whose slot 0, ``npages`` pages from gfn 0x200, was mapped and then logs by ``protocol``, a key
    of `PROTOCOLS`."""
    vm = Vm(Hardware.ept(ad_bits=False), Kernel.v6_0)
    vm.enable_cap_manual_dirty_log_protect2(PROTOCOLS[protocol])
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=npages)
    for page in SEEN_PAGES:
        vm.vcpu[0].read(BASE_GFN + page)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=npages, log_dirty_pages=True)
    return vm


def page_numbers(report: np.ndarray) -> tuple[int, ...]:
    """A report as the numbers of its pages."""
    return tuple(np.flatnonzero(report).tolist())


STEP_SAYS = {
    "copy_live_bitmap": "copies the live bits out",
    "find_words": "zeroes the buffer",
    "copy_from_user": "copies the request in",
    "take_bits": "takes the bits of a word",
    "rearm": "takes W from their pages",
    "kvm_arch_flush_remote_tlbs_memslot": "flushes the TLBs",
    "copy_to_user": "returns",
    "return_to_user_space": "returns",
}


class Recorder:
    """Does steps, and takes down a row after each that a reader should see."""

    def __init__(self, vm: Vm) -> None:
        self.vm, self.flushes = vm, vm.counters.flushes
        self.rows: list[Row] = []

    def note(self, who: str, what: str) -> None:
        vm, gfns = self.vm, [BASE_GFN + page for page in SEEN_PAGES]
        bitmap = vm.memslots.slots[0, 0].dirty_bitmap
        assert bitmap is not None
        live, buffer = (tuple(half.tolist()) for half in bitmap)
        spte = tuple(bool(vm.fmt.is_writable_pte(vm.spte(gfn))) for gfn in gfns)
        entries = [vm.vcpu[0].tlb.lookup("L1", gfn) for gfn in gfns]
        tlb = tuple(None if entry is None else entry.write for entry in entries)
        self.rows.append(Row(who, what, live, buffer, spte, tlb, vm.counters.flushes > self.flushes))
        self.flushes = vm.counters.flushes

    def write(self, page: int) -> None:
        outcome = self.vm.vcpu[0].write(BASE_GFN + page)
        self.note("vCPU 0", f"writes page {page}: {outcome}")

    def steps(self, operation: Operation, until: str = "") -> None:
        """Do the steps of ``operation``, or only those before the step ``until`` and before it returns."""
        vm, name = self.vm, "GET" if isinstance(operation, GetDirtyLog) else "CLEAR"
        if not operation.started:
            vm.start(operation)
        while operation.todo and not (until and operation.todo[0] in (until, "copy_to_user", "return_to_user_space")):
            did = operation.todo[0]
            vm.step(operation)
            if did in STEP_SAYS:
                self.note(name, STEP_SAYS[did])


def harvest(protocol: str = "GET clears", written: str = "page 1", when: str = "bits read") -> Harvest:
    """vCPU 0 writes pages, user space harvests, and at some moment of it vCPU 0 writes page 1. Then comes a second GET, to
    see what it finds.

    The settings are a key of `PROTOCOLS`, a key of `WRITTEN` and one of `WHEN`. A moment that this harvest does not have
    (nothing to protect, nothing to flush) is the moment before it returns. With manual protect, "bits read" means that GET
    has returned and CLEAR has not begun. KeyError or ValueError for other settings.
    """
    if when not in WHEN:
        raise ValueError(f"when is one of {', '.join(WHEN)}; got {when!r}")
    recorder = Recorder(vm := logged_vm(protocol))
    recorder.note("", "logging is on")
    for page in WRITTEN[written]:
        recorder.write(page)
    if when == "before GET":
        recorder.write(1)
    flushes = vm.counters.flushes
    now = _harvest(recorder, when)
    flushes = vm.counters.flushes - flushes
    if when == "after the harvest":
        recorder.write(1)
    missed = tuple(gfn - BASE_GFN for gfn in vm.missed_dirty(0).tolist())
    return Harvest(tuple(recorder.rows), now, page_numbers(vm.get_dirty_log(0)), flushes, missed)


def _harvest(recorder: Recorder, when: str) -> tuple[int, ...]:
    """GET, and with manual protect CLEAR of what GET said; a write to page 1 if ``when`` lies within."""
    get = GetDirtyLog(0)
    last: GetDirtyLog | ClearDirtyLog = get
    until = {"bits read": "rearm", "W taken": "kvm_arch_flush_remote_tlbs_memslot", "flushed": "copy_to_user"}.get(when)
    if recorder.vm.manual_protect:
        recorder.steps(get)
        last = ClearDirtyLog(0, 0, NPAGES, get.result)
        if when == "bits read":
            recorder.write(1)
            until = None
    if until:
        recorder.steps(last, until)
        recorder.write(1)
    recorder.steps(last)
    return page_numbers(get.result)


def ask_twice(protocol: str) -> tuple[int, int]:
    """How many pages two GETs in a row report, if the guest wrote three of 64 pages before, and nothing in between."""
    vm = logged_vm(protocol, npages=64)
    for page in (3, 5, 8):
        vm.vcpu[0].write(BASE_GFN + page)
    first, second = vm.get_dirty_log(0), vm.get_dirty_log(0)
    return int(first.sum()), int(second.sum())


SLOT = {"base_gfn": BASE_GFN, "npages": 64}
LOGGING = {**SLOT, "log_dirty_pages": True}
SLOT_CHANGES: dict[str, tuple[dict[str, Any], ...]] = {
    "switches the log off": (SLOT,),
    "switches it off and on": (SLOT, LOGGING),
    "moves the slot": ({**LOGGING, "base_gfn": BASE_GFN + 0x100},),
    "deletes it, and makes it again": ({}, LOGGING),
}


def after_change(change: str) -> tuple[str, Outcome]:
    """What becomes of a slot that logs, with page 3 dirty and page 1 protected, by a change of it, a key of `SLOT_CHANGES`:
    what GET answers afterwards, the dirty pages or an errno, and how the guest's next write to page 1 goes."""
    vm = logged_vm(npages=64)
    vm.vcpu[0].write(BASE_GFN + 3)
    for call in SLOT_CHANGES[change]:
        vm.set_user_memory_region(slot=0, **call)
    slot, get = vm.memslots.slots[0, 0], GetDirtyLog(0)
    refused = errno_of(lambda: vm.run(get))
    said = str(list(page_numbers(get.result))) if refused == "0" else refused
    return said, vm.vcpu[0].write(slot.base_gfn + 1)


# ---- another order ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class ProtectFirst(GetDirtyLog):
    """GET in an order that loses writes: it protects a word's pages *before* it takes the word's bits. Kernels did so until
    2010 (edde99ce0529), for all words of a slot at a time."""

    @step(lock="write", keeps=True)
    def find_words(self, m: Machine) -> None:
        super().find_words(m)
        self.todo = ["protect_first"] if self.words.size else self.ending(False)

    @step(lock="write", keeps=True)
    def protect_first(self, m: Machine) -> None:
        """Take W from the pages of the next word; its bits stay in the bitmap for now."""
        assert self.slot is not None
        self.offset = int(self.words[0])
        self.mask = self.live[self.offset : self.offset + 1].copy()
        self.rearm(m)
        self.todo = ["take_bits"]

    @step(lock="write", keeps=True)
    def take_bits(self, m: Machine) -> str:
        said = super().take_bits(m)
        self.todo = ["protect_first"] if self.words.size else self.ending(bool(self.taken.any()))
        return said
