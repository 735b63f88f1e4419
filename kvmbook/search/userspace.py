"""A run of whole calls, as a careful user space makes it, and what it means that a write is lost.

User space copies a guest's memory, as a migration does: all of it when enabling has returned; then each page of which it
was told, once KVM has armed it again. It clears bits only of pages of which a GET has told it (with INITIALLY_SET it knows
of all at first), and gives ring entries back only when it has harvested them. *A write is lost* if the page differs from
its copy, and a report that is asked for now, with all vCPUs out of the guest, does not name it.

A `Play` makes the calls on whatever has `Vm`'s front door, and keeps its own books: it does not ask the model which
writes are accounted for.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from itertools import chain, combinations
from typing import Any

import numpy as np

from kvmbook.model import PG_LEVEL_4K, DirtyRing, PageTable, ResetDirtyRings, Vm
from kvmbook.search.configurations import Configuration
from kvmbook.search.playing import Call, Cleared

INTERRUPTED = "resets, and a signal comes"
ELSEWHERE = 1 << 18  # how many gfns a slot is moved up, and back: aligned as it was


@dataclass
class Play:
    """A run under way on ``vm``. ``differs``: the pages written since their last copy; ``told``: those of which user
    space has been told and whose bits it has not cleared; ``harvested``: those whose ring entries it holds; ``used``:
    how many vCPUs have run."""

    configuration: Configuration
    vm: Any
    logs: bool = False
    moved: bool = False
    used: int = 0
    differs: set[int] = field(default_factory=set)
    told: set[int] = field(default_factory=set)
    harvested: set[int] = field(default_factory=set)

    @classmethod
    def start(cls, configuration: Configuration) -> Play:
        """On a new VM of the model."""
        return cls.on(configuration.bare(), configuration)

    @classmethod
    def on(cls, vm: Any, configuration: Configuration) -> Play:
        """On ``vm``, new."""
        configuration.prepare(vm)
        return cls(configuration, vm)

    def copy(self) -> Play:
        """An independent copy, model and all."""
        books = set(self.differs), set(self.told), set(self.harvested)
        return Play(self.configuration, self.vm.copy(), self.logs, self.moved, self.used, *books)

    def gfn(self, page: int) -> int:
        return self.configuration.slot.base_gfn + ELSEWHERE * self.moved + page

    # ---- what can be done -------------------------------------------------------------------------------------------

    def possible(self) -> list[Call]:
        """The calls that somebody could make now. A vCPU runs only when those before it have: their numbers mean
        nothing. (KVM's own write for nobody is left out where there are rings: KVM warns that it cannot note it, in
        each release.)"""
        c, pages = self.configuration, self.configuration.slot.pages
        guests = [f"vCPU{number}" for number in range(min(self.used + 1, c.vcpus))]
        guests += [f"L2 on {who}" for who in guests] if c.nested else []
        calls = [Call(who, what, page) for who in guests for what in ("writes", "reads") for page in pages]
        calls += [Call("host", what, page) for what in ("ages", "takes away") for page in pages]
        calls += [Call("user space", "disables" if self.logs else "enables"), Call("user space", "moves")]
        if self.logs:
            calls += [
                Call("KVM", what, page) for what in ("writes", "writes for nobody")[: 2 - c.ring] for page in pages
            ]
        if self.logs and c.ring:
            calls += [Call("user space", "harvests", ring=number) for number in range(self.used)]
            calls += [Call("user space", "resets")]
            calls += [Call("user space", INTERRUPTED)] * self.configuration.kernel.reset_stops_at_signal
        elif self.logs:
            calls += [Call("user space", "gets")]
            calls += [Call("user space", "clears", cleared=cleared) for cleared in self._clearable()]
        return calls

    def rarer(self) -> list[Call]:
        """What else could be done. Runs that are made at random do it too."""
        pages, vcpus = self.configuration.slot.pages, range(self.used)
        calls = [
            Call(f"vCPU{number}", what, page) for number in vcpus for what in ("fetches", "forgets") for page in pages
        ]
        calls += [Call(f"vCPU{number}", "exits") for number in vcpus]
        return calls + [Call("KVM", what, page) for what in ("shadows", "no longer shadows") for page in pages]

    def _clearable(self) -> Iterable[Cleared]:
        """CLEARs of some of the pages that runs are about, in one call; and with INITIALLY_SET, of the rest too."""
        slot, told = self.configuration.slot, sorted(self.told)
        if self.configuration.manual:
            some = chain.from_iterable(combinations(told, size) for size in range(1, len(told) + 1))
            yield from (Cleared.of(pages, slot.npages) for pages in some)
        if self.configuration.manual & 2 and slot.npages > len(slot.pages):
            yield Cleared.of(set(range(slot.npages)).difference(slot.pages) | self.told, slot.npages)

    # ---- doing it ---------------------------------------------------------------------------------------------------

    def do(self, call: Call) -> None:
        """Make the call, and keep the books."""
        if call.what == INTERRUPTED:
            self.resets_until_a_signal()
        elif call.who == "user space":
            getattr(self, call.what)(call)
        elif call.who == "host":
            gfn = self._gfn_of(call)
            (self.vm.clear_young if call.what == "ages" else self.vm.invalidate_range)(gfn, gfn + 1)
        elif call.who == "KVM":
            self._kvm(call)
        else:
            self._guest(call)
        if call.what.startswith("writes") and self.logs and call.page is not None:
            self.differs.add(call.page)

    def _gfn_of(self, call: Call) -> int:
        assert call.page is not None
        return self.gfn(call.page)

    def _guest(self, call: Call) -> None:
        number, l2 = int(call.who[-1]), {"l2": True} if call.who.startswith("L2") else {}
        vcpu = self.vm.vcpu[number]
        self.used = max(self.used, number + 1)
        match call.what:
            case "exits":
                vcpu.exit()
            case "forgets":
                vcpu.evict(self._gfn_of(call))
            case _:
                kind = {"reads": "read", "writes": "write", "fetches": "fetch"}[call.what]
                getattr(vcpu, kind)(self._gfn_of(call), **l2)

    def _kvm(self, call: Call) -> None:
        gfn = self._gfn_of(call)
        match call.what:
            case "shadows":
                self.vm.track_guest_page_table(gfn)
            case "no longer shadows":
                self.vm.untrack_guest_page_table(gfn)
            case _:
                self.vm.kvm_write_guest(gfn, vcpu=None if call.what == "writes for nobody" else 0)

    def _region(self) -> None:
        npages = self.configuration.slot.npages
        self.vm.set_user_memory_region(slot=0, base_gfn=self.gfn(0), npages=npages, log_dirty_pages=self.logs)

    def enables(self, _: Call) -> None:
        self.logs = True
        self._region()
        all_set = self.configuration.manual & 2 and not self.configuration.ring
        self.differs, self.told = set(), set(self.configuration.slot.pages if all_set else ())

    def disables(self, _: Call) -> None:
        self.logs = False
        self._region()
        self.differs, self.told = set(), set()

    def moves(self, _: Call) -> None:
        self.moved = not self.moved
        self._region()

    def gets(self, _: Call) -> None:
        report = set(np.flatnonzero(self.vm.get_dirty_log(0)).tolist()).intersection(self.configuration.slot.pages)
        if self.configuration.manual:
            self.told |= report
        else:
            self.differs -= report

    def clears(self, call: Call) -> None:
        assert call.cleared is not None
        self.vm.clear_dirty_log(0, call.cleared.first, call.cleared.number, call.cleared.bitmap)
        copied = self.told.intersection(call.cleared.pages)
        self.differs -= copied
        self.told -= copied

    def harvests(self, call: Call) -> None:
        self.harvested.update(page for _, page in self.vm.vcpu[call.ring].dirty_ring.harvest())

    def resets(self, _: Call) -> None:
        self.vm.reset_dirty_rings()
        self.differs -= self.harvested
        self.harvested = set()

    def resets_until_a_signal(self) -> None:
        """The signal comes when the first entries have been freed. User space sees by the count how many they were."""
        reset = self.vm.start(ResetDirtyRings())
        self.vm.step(reset)
        reset.signal_pending = True
        self.vm.run(reset)
        freed = {page for _, page in reset.taken}
        self.differs -= freed
        self.harvested -= freed

    # ---- what came of it --------------------------------------------------------------------------------------------

    def unreported(self) -> tuple[int, ...]:
        """Ask for a last report: the pages that differ from their copies, and that it does not name."""
        if not self.logs:
            return ()
        if self.configuration.ring:
            for number in range(self.configuration.vcpus):
                self.harvests(Call("user space", "harvests", ring=number))
            return tuple(sorted(self.differs - self.harvested))
        return tuple(sorted(self.differs.difference(np.flatnonzero(self.vm.get_dirty_log(0)).tolist())))

    def lost(self) -> tuple[int, ...]:
        """The pages whose writes are lost, on the model: what is `unreported` once each vCPU has left the guest. The run
        itself goes on as if nobody had asked."""
        if not self.differs:
            return ()
        asked = self.copy()
        for vcpu in asked.vm.vcpu:
            vcpu.exit()
        return asked.unreported()

    def key(self) -> Hashable:
        """A value that two runs share if nothing that can follow tells them apart."""
        books = self.logs, self.moved, self.used, *map(frozenset, (self.differs, self.told, self.harvested))
        return books, future_of(self.vm)


# ---- equal futures ---------------------------------------------------------------------------------------------------


def future_of(vm: Vm) -> Hashable:
    """All that later calls can tell of a VM in which nothing is in flight: not which frames its tables lie in, nor what
    only counts up."""
    names = {pfn: (table.root.name, table.level, table.base_gfn) for pfn, table in vm.page_tables.tables.items()}
    tables = frozenset((names[pfn], _sptes(vm, table, names)) for pfn, table in vm.page_tables.tables.items())
    vcpus = tuple(
        (
            frozenset(vcpu.tlb.entries.items()),
            frozenset((key, names[pfn]) for key, pfn in vcpu.tlb.tables.items()),
            frozenset(vcpu.pml),
            vcpu.guest_mode,
            None if vcpu.dirty_ring is None else _used(vcpu.dirty_ring),
        )
        for vcpu in vm.vcpus
    )
    slots = tuple((slot, _live(slot.dirty_bitmap)) for slot in vm.memslots.slots.values())
    return tables, vcpus, slots, vm.page_tables.shadow_root_allocated, frozenset(vm.write_tracked)


def _sptes(vm: Vm, table: PageTable, names: dict[int, tuple[str, int, int]]) -> Hashable:
    full = np.flatnonzero(table.sptes != vm.fmt.shadow_nonpresent_value)
    sptes = table.sptes[full]
    if table.level == PG_LEVEL_4K:
        return full.tobytes(), sptes.tobytes()
    return full.tobytes(), tuple(names.get(vm.fmt.spte_to_pfn(spte), spte) for spte in sptes.tolist())


def _live(bitmap: np.ndarray | None) -> bytes | None:
    return None if bitmap is None else bitmap[0].tobytes()


def _used(ring: DirtyRing) -> Hashable:
    entries = (ring.entries[index % ring.size] for index in range(ring.reset_index, ring.dirty_index))
    return ring.harvest_index - ring.reset_index, tuple((entry.flags, entry.slot, entry.offset) for entry in entries)
