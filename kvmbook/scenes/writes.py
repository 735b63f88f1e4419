"""The runs of chapter 05: the same writes, caught in four ways; who writes guest memory, and whom the log knows; huge pages.

Pure functions from a few settings to a result; `kvmbook.views.writes_panel` draws the first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

from kvmbook.model import GetDirtyLog, Hardware, Kernel, Outcome, Vm
from kvmbook.scenes.enabling import BASE_GFN, Moment, moment_of

WAYS = ("W", "D and PML", "emulation", "nobody")
WRITE_TIMES = 10  # how often each page is written
PML_PLACES = Hardware.ept(pml=True).pml_entries


def mapped_and_logged(hardware: Hardware, pages: int, kernel: Kernel = Kernel.v6_0, guarded: bool = False) -> Vm:
    """A slot of ``pages`` that vCPU 0 has written all; then dirty logging is enabled. ``guarded``: KVM guards each page, as
    it does where a nested guest's hypervisor keeps its page tables."""
    vm = Vm(hardware, kernel)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=pages)
    for page in range(pages):
        vm.vcpu[0].write(BASE_GFN + page)
        if guarded:
            vm.track_guest_page_table(BASE_GFN + page)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=pages, log_dirty_pages=True)
    return vm


def set_logging(vm: Vm, on: bool) -> None:
    """Switch dirty logging of slot 0 on or off."""
    slot = vm.memslots.slots[0, 0]
    vm.set_user_memory_region(slot=0, base_gfn=slot.base_gfn, npages=slot.npages, log_dirty_pages=on)


class Counts(NamedTuple):
    """What is counted since logging was enabled: pages in the PML buffer (None: this CPU has none), bits of the bitmap, and
    how often the vCPU has left the guest."""

    buffer: int | None
    bitmap: int
    exits: int


class Caught(NamedTuple):
    """Writes caught in one way: page 0 after each moment, and the ``counts`` of all pages then. ``noted``: the counts when
    all is written and GET has not begun; ``reported`` and ``missed``: pages."""

    way: str
    pages: int
    moments: tuple[Moment, ...]
    counts: tuple[Counts, ...]
    noted: Counts
    reported: int
    missed: int


class _Told:
    """A run while it happens."""

    def __init__(self, way: str, pages: int) -> None:
        self.way = way
        hardware = Hardware.ept(pml=way in ("D and PML", "nobody"))
        self.vm = vm = mapped_and_logged(hardware, pages, guarded=way == "emulation")
        self.moments, self.counts = list[Moment](), list[Counts]()
        self.exits, self.flushes = vm.counters.exits, 0
        self.then("user space", "enables logging", f"⟳ flush, {'D' if hardware.pml_entries else 'W'} is 0")

    def then(self, actor: str, action: str, kvm: str, outcome: Outcome | None = None) -> None:
        """Note a moment."""
        vm, flushed = self.vm, self.vm.counters.flushes > self.flushes
        self.moments.append(moment_of(vm, BASE_GFN, actor, action, kvm, flushed=flushed, outcome=outcome))
        buffer = len(vm.vcpu[0].pml) if vm.hardware.pml_entries else None
        self.counts.append(Counts(buffer, int(vm.dirty_bitmap().sum()), vm.counters.exits - self.exits))
        self.flushes = vm.counters.flushes

    def write(self, pages: range) -> Outcome | None:
        """Write these pages in this way; how that went for the first of them, if a vCPU does it."""
        if self.way == "nobody":
            for page in pages:
                self.vm.write_past_kvm(BASE_GFN + page)
            return None
        first, *_ = [self.vm.vcpu[0].write(BASE_GFN + page) for page in pages]
        return first

    def writes(self, action: str, outcome: Outcome | None, seen: str = "") -> None:
        """Note what the last writes were, and what KVM saw."""
        if self.way == "nobody":
            self.then("a device", action, "✕ sees nothing")
        else:
            noted = "PML notes it" if outcome is Outcome.WALK else str(outcome)
            self.then("vCPU 0", action, f"✓ {seen or noted}", outcome)

    def harvests(self) -> int:
        """User space GETs the log: the kick, and then the rest. Returns how many pages are reported."""
        waiting = len(self.vm.vcpu[0].pml)
        get = self.vm.start(GetDirtyLog(0))
        self.vm.step(get)
        self.vm.vcpu[0].exit()
        self.then("user space", "GET kicks", "drains the buffer" if waiting else "nothing to drain")
        reported = int(self.vm.run(get).sum())
        self.then("user space", "GET reports", "⟳ re-arm, flush" if reported else "no bit, no flush")
        return reported


@cache
def caught(way: str = WAYS[0], pages: int = 600) -> Caught:
    """All ``pages`` are written `WRITE_TIMES` times while the log is on, and then reported; page 0 is written once more.
    ``way`` is one of `WAYS`; ValueError for another."""
    if way not in WAYS:
        raise ValueError(f"a write is caught by one of {', '.join(WAYS)}; got {way!r}")
    told, everything = _Told(way, pages), range(pages)
    told.writes("writes page 0", told.write(everything[:1]))
    if pages > 1:
        told.write(everything[1:])
    again = [told.write(everything) for _ in range(WRITE_TIMES - 1)]
    often = f"writes {'all' if pages > 1 else 'it'}, {WRITE_TIMES}×"
    told.writes(often, again[-1], "each write" if way == "emulation" else "each page once")
    noted = told.counts[-1]
    reported = told.harvests()
    missed = len(told.vm.missed_dirty(0))
    told.writes("writes page 0", told.write(everything[:1]))
    return Caught(way, pages, tuple(told.moments), tuple(told.counts), noted, reported, missed)


def ring_order(kernel: Kernel) -> list[int]:
    """The guest writes pages 3, 1 and 2, and leaves: in which order they reach its dirty ring."""
    vm = Vm(Hardware.ept(pml=True), kernel)
    vm.enable_dirty_ring(16384)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=4)
    for page in range(4):
        vm.vcpu[0].write(BASE_GFN + page)
    set_logging(vm, True)
    for page in (3, 1, 2):
        vm.vcpu[0].write(BASE_GFN + page)
    vm.vcpu[0].exit()
    ring = vm.vcpu[0].dirty_ring
    return [page for _, page in ring.harvest()] if ring is not None else []


# ---- who writes guest memory -----------------------------------------------------------------------------------------

WRITERS: dict[str, Callable[[Vm], object]] = {
    "the guest": lambda vm: vm.vcpu[0].write(BASE_GFN),
    "KVM, for a vCPU": lambda vm: vm.kvm_write_guest(BASE_GFN, vcpu=0),
    "KVM, for no vCPU": lambda vm: vm.kvm_write_guest(BASE_GFN, vcpu=None),
    "user space, vhost, a device": lambda vm: vm.write_past_kvm(BASE_GFN),
}


def is_reported(writer: str, kernel: Kernel = Kernel.v6_0) -> bool:
    """Whether the next report names a page that one of `WRITERS` has written."""
    vm = mapped_and_logged(Hardware.ept(ad_bits=False), 64, kernel)
    WRITERS[writer](vm)
    return bool(vm.get_dirty_log(0)[0])


# ---- huge pages ------------------------------------------------------------------------------------------------------


class Touched(NamedTuple):
    """512 accesses to the pages of one 2M page: how they went, the TLB's entries after them, the level of the mapping, and
    how many pages the log names (None: it is off)."""

    outcomes: dict[str, int]
    entries: int
    level: int
    reported: int | None

    @property
    def faults(self) -> str:
        """The faults among them, in words."""
        found = [f"{count} {how}{'s' * (count > 1)}" for how, count in self.outcomes.items() if how.endswith("fault")]
        return ", ".join(found) or "none"


def huge_vm(split: bool = True, kernel: Kernel = Kernel.v6_0) -> Vm:
    """A slot of 512 pages, one 2M page of the host, which vCPU 0 has written; KVM splits huge pages when logging is enabled,
    or does not."""
    vm = Vm(Hardware.ept(ad_bits=False), kernel, page_size="2M", eager_page_split=split)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=512)
    vm.vcpu[0].write(BASE_GFN)
    return vm


def touch_all(vm: Vm, kind: str = "write") -> Touched:
    """vCPU 0 reads or writes the 512 pages of `huge_vm`; the log, if it is on, is harvested."""
    outcomes = Counter(str(vm.vcpu[0].complete(kind, BASE_GFN + page)) for page in range(512))
    entries, level = len(vm.vcpu[0].tlb.entries), vm.level(BASE_GFN)
    reported = int(vm.get_dirty_log(0).sum()) if vm.memslots.slots[0, 0].logs_dirty else None
    return Touched(dict(outcomes), entries, level, reported)


SPLITS = {
    "when enabled": (True, Kernel.v6_0),
    "never": (False, Kernel.v6_0),
    "by the fault (v6.2)": (False, Kernel.v6_0.with_(splits_on_fault=True)),
}


def one_write_then_reads(split: str) -> tuple[Outcome, Touched]:
    """Logging of a 2M page is enabled; vCPU 0 writes its first page, and reads them all. ``split`` is a key of `SPLITS`."""
    vm = huge_vm(*SPLITS[split])
    set_logging(vm, True)
    return vm.vcpu[0].write(BASE_GFN), touch_all(vm, "read")


def with_and_without_split() -> Iterator[tuple[str, str, Touched]]:
    """(was it split, the log, what came of it): the 512 pages written while the log is off, on, and off again."""
    for split in ("yes", "no"):
        vm = huge_vm(split == "yes")
        for log in ("off", "on", "off again"):
            set_logging(vm, log == "on")
            yield split, log, touch_all(vm)


# ---- two sides, two locks --------------------------------------------------------------------------------------------


def locks_of(tdp_mmu: bool) -> dict[str, str | None]:
    """How mmu_lock is held where SPTEs change, on the TDP side or on the rmap side."""
    vm = mapped_and_logged(Hardware.ept(ad_bits=False, tdp_mmu=tdp_mmu), 64)
    set_logging(vm, False)
    slot = vm.memslots.slots[0, 0]
    enable = vm.user_memory_region(0, slot.base_gfn, slot.npages, log_dirty_pages=True)
    vm.invalidate_range(BASE_GFN, BASE_GFN + 1)
    vm.vcpu[0].attempt("write", BASE_GFN)
    return {
        "the pass of enabling": enable.wants_lock(f"write_protect_{'tdp' if tdp_mmu else 'rmap'}"),
        "a slow fault": vm.vcpu[0].fault.wants_lock("make_spte"),
        "re-arming after a harvest": GetDirtyLog(0).wants_lock("rearm"),
    }
