"""A vCPU's access to memory: TLB hit, hardware walk, fast fault, slow fault.

`access` is the hardware's part, one atomic act: it retires, or it leaves a `PageFault` in flight. A `PageFault` is KVM's
part; when it is over the guest tries again.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from itertools import groupby, takewhile
from typing import Any

from kvmbook.model.guest_memory import GuestAccess
from kvmbook.model.host import HostPage
from kvmbook.model.huge_pages import kvm_mmu_max_mapping_level
from kvmbook.model.machine import Machine, VcpuState, step
from kvmbook.model.memslots import MemorySlot
from kvmbook.model.page_tables import Found, Root, Sptep
from kvmbook.model.spte import ACCESSES, PG_LEVEL_4K, PT_WRITABLE_MASK, Made, pages_per_level
from kvmbook.model.tlb import TlbEntry

PTE_PREFETCH_NUM = 8


class Outcome(Enum):
    """How an access went. The first two retire without KVM. The next three name the fault that let it retire, or that
    did its work. The others do not retire: a fault is to be handled, lost a race, or the vCPU left for another reason."""

    HIT = "TLB hit"
    WALK = "walk"
    FAST_FAULT = "fast fault"
    SLOW_FAULT = "slow fault"
    EMULATED = "emulated"
    FAULT = "fault"
    RETRY = "retry"
    PML_FULL = "PML full"
    RING_FULL = "dirty ring full"
    MMIO = "MMIO"

    def __str__(self) -> str:
        return self.value


def access(m: Machine, vcpu: VcpuState, kind: str, gfn: int, root: Root) -> Outcome:
    """Let the vCPU try one ``kind`` of access ("read", "write", "fetch") to ``gfn`` through ``root``'s tables.

    Returns HIT or WALK if it retired, FAULT if ``vcpu.fault`` is now in flight, PML_FULL or RING_FULL if the vCPU left
    the guest instead. Raises ValueError while an earlier fault is in flight.
    The rules are the CPU manuals'. Source: arch/x86/kvm/x86.c: vcpu_enter_guest() (the ring check), v5.19.
    """
    if kind not in ACCESSES:
        raise ValueError(f"an access is one of {', '.join(ACCESSES)}; got {kind!r}")
    if vcpu.fault is not None:
        raise ValueError(f"{vcpu.name} is outside the guest: KVM is handling its last fault")
    if vcpu.dirty_ring is not None and vcpu.dirty_ring.soft_full:
        return _done(m, vcpu, kind, gfn, Outcome.RING_FULL)
    if vcpu.guest_mode != root.guest_mode:
        m.vcpu_exit(vcpu)  # between L1 and the nested guest lies an exit
        vcpu.guest_mode = root.guest_mode
    cached = vcpu.tlb.lookup(root.name, gfn)
    if cached is not None and not cached.allows(kind):
        return _violation(m, vcpu, kind, gfn, root, present=True)
    if cached is not None and (kind != "write" or cached.dirty):
        m.counters.hits += 1
        return _done(m, vcpu, kind, gfn, Outcome.HIT)
    found = _walk(m, vcpu, gfn, root)  # also for a write through a clean entry
    rights = m.fmt.hardware_rights(found.spte if found is not None else 0)
    if found is None or not rights.allow(kind):
        return _violation(m, vcpu, kind, gfn, root, present=any(rights))
    return _fill(m, vcpu, kind, gfn, root, found)


def _walk(m: Machine, vcpu: VcpuState, gfn: int, root: Root) -> Found | None:
    """The hardware's walk. It may start at a level-1 table that it remembers, even one that was unlinked since."""
    table = vcpu.tlb.tables.get((root.name, gfn & -pages_per_level(2)))
    found = m.page_tables.walk(root, gfn, table)
    if found is not None and found.level == PG_LEVEL_4K:
        vcpu.tlb.tables[root.name, gfn & -pages_per_level(2)] = found.sptep.table
    return found


def _fill(m: Machine, vcpu: VcpuState, kind: str, gfn: int, root: Root, found: Found) -> Outcome:
    """Set A, and D for a write, log the page if PML is on, and copy all the SPTE's rights into the TLB."""
    fmt, spte = m.fmt, found.spte
    has_ad = fmt.kvm_ad_enabled and not root.ad_disabled
    if has_ad:
        spte |= fmt.shadow_accessed_mask
        if kind == "write" and not spte & fmt.shadow_dirty_mask:
            if m.pml_on and (not root.guest_mode or m.kernel.pml_logs_nested):
                if len(vcpu.pml) >= m.hardware.pml_entries:
                    m.vcpu_exit(vcpu)
                    return _done(m, vcpu, kind, gfn, Outcome.PML_FULL)
                vcpu.pml.append(gfn - root.base_gfn)
            spte |= fmt.shadow_dirty_mask
        m.page_tables.write(found.sptep, spte)
    rights = fmt.hardware_rights(spte)
    dirty = not has_ad or spte & fmt.shadow_dirty_mask != 0
    vcpu.tlb.fill(root.name, gfn, TlbEntry(fmt.spte_to_pfn(spte), found.level, *rights, dirty=rights.write and dirty))
    m.counters.walks += 1
    return _done(m, vcpu, kind, gfn, Outcome.WALK)


def _violation(m: Machine, vcpu: VcpuState, kind: str, gfn: int, root: Root, present: bool) -> Outcome:
    """Leave the guest with a fault. The CPU drops its own entries for the address, and no other CPU's."""
    vcpu.tlb.drop(root.name, gfn)
    m.vcpu_exit(vcpu)
    outcome = _done(m, vcpu, kind, gfn, Outcome.FAULT)
    vcpu.fault = m.start(PageFault(gfn, vcpu.id, kind, root, present))
    return outcome


def _done(m: Machine, vcpu: VcpuState, kind: str, gfn: int, outcome: Outcome) -> Outcome:
    m.record(vcpu.name, kind, gfn, outcome.value)
    if kind == "write" and outcome in (Outcome.HIT, Outcome.WALK, Outcome.EMULATED):
        m.note_write(gfn)
    return outcome


# ---- KVM's part ------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class PageFault(GuestAccess):
    """One EPT violation or page fault under way, from the exit to the entry.

    ``present``: the translation that faulted allowed something. ``result`` becomes the Outcome.
    Source: mmu/mmu_internal.h: struct kvm_page_fault, mmu/mmu.c: direct_page_fault(), v5.19.
    """

    vcpu: int
    kind: str
    root: Root
    present: bool
    retries: int = 0
    sptep: Sptep | None = None
    old_spte: int = 0
    new_spte: int = 0
    mmu_seq: int = 0
    page: HostPage | None = None

    def begin(self, m: Machine) -> None:
        super().begin(m)
        self.todo = ["fast_page_fault"] if self._may_be_fast(m) else ["kvm_faultin_pfn"]
        if self.kind == "write" and self.present and self.gfn in m.write_tracked:
            self.todo = ["x86_emulate_instruction"]

    def _may_be_fast(self, m: Machine) -> bool:
        """Source: mmu/mmu.c: page_fault_can_be_fast(), v5.19."""
        if not self.root.direct:
            return False
        return self.kind == "write" if self.present else not m.fmt.kvm_ad_enabled

    @property
    def who(self) -> str:
        return f"KVM for vCPU{self.vcpu}"

    def covers(self, slot: MemorySlot, gfn: int) -> bool:
        """The fast path marks the page after it made the SPTE writable; another vCPU may write in between."""
        return (
            gfn == self.gfn
            and "mark_page_dirty_in_slot" in self.todo
            and self.slot is not None
            and self.slot.logs_dirty
        )

    def _over(self, m: Machine, outcome: Outcome) -> None:
        """Back into the guest."""
        self.result = outcome
        self.todo.clear()
        m.vcpus[self.vcpu].fault = None

    # ---- the fast path: no mmu_lock ---------------------------------------------------------------------------------

    @step()
    def fast_page_fault(self, m: Machine) -> str:
        """Read the SPTE and decide. Source: mmu/mmu.c, v5.19."""
        fmt, found = m.fmt, m.page_tables.walk(self.root, self.gfn)
        self.todo = ["kvm_faultin_pfn"]
        if found is None or not fmt.is_shadow_present_pte(found.spte):
            return "not mapped: slow path"
        self.sptep, old = found.sptep, found.spte
        self.old_spte = self.new_spte = old
        if self._allowed(m, old):
            self._over(m, Outcome.FAST_FAULT)
            return "spurious"
        if not fmt.kvm_ad_enabled and fmt.is_access_track_spte(old):
            self.new_spte = fmt.restore_acc_track_spte(old) | fmt.shadow_accessed_mask  # no bit, before v6.13
        asks = m.kernel.fast_path_asks_mmu_writable
        if self.kind == "write" and (fmt.is_mmu_writable_spte(old) or not asks):
            if found.level > PG_LEVEL_4K and self.slot is not None and self.slot.logs_dirty:
                return "huge page in a slot that logs: slow path"
            self.new_spte |= PT_WRITABLE_MASK
        if self.new_spte == old or not self._allowed(m, self.new_spte):
            return "cannot be repaired without the lock: slow path"
        self.todo = ["fast_pf_fix_direct_spte"]
        if m.kernel.fast_path_marks_first and self._gives_w_back(m):
            self.todo.insert(0, "mark_page_dirty_in_slot")
        return "can be repaired"

    def _gives_w_back(self, m: Machine) -> bool:
        return m.fmt.is_writable_pte(self.new_spte) and not m.fmt.is_writable_pte(self.old_spte)

    @step()
    def fast_pf_fix_direct_spte(self, m: Machine) -> str:
        """Compare and exchange; the mark comes after. Source: mmu/mmu.c, v5.19."""
        assert self.sptep is not None
        if self.sptep.table not in m.page_tables.tables or m.page_tables.read(self.sptep) != self.old_spte:
            self.retries += 1
            self.todo = ["fast_page_fault"] if self.retries <= m.fast_retries else ["kvm_faultin_pfn"]
            return "the SPTE changed meanwhile: again"
        m.page_tables.write(self.sptep, self.new_spte)
        gives_w_back = self._gives_w_back(m)
        if gives_w_back and not m.kernel.fast_path_marks_first:
            self.todo = ["mark_page_dirty_in_slot"]
        else:
            self._over(m, Outcome.FAST_FAULT)
        return "writable" if gives_w_back else "readable"

    @step()
    def mark_page_dirty_in_slot(self, m: Machine) -> str:
        m.mark_page_dirty_in_slot(self.slot, self.gfn, m.vcpus[self.vcpu])
        if not self.todo:
            self._over(m, Outcome.FAST_FAULT)
        return "dirty" if self.slot is not None and self.slot.logs_dirty else "the slot does not log"

    def _allowed(self, m: Machine, spte: int) -> bool:
        """Source: mmu/mmu.c: is_access_allowed(), v5.19."""
        return m.fmt.hardware_rights(spte).allow(self.kind)

    # ---- the slow path: mmu_lock for read in the TDP MMU, for write in the legacy MMU -------------------------------

    def wants_lock(self, name: str) -> str | None:
        wants = super().wants_lock(name)
        return ("read" if self.root.tdp_mmu else "write") if wants == "fault" else wants

    @step()
    def kvm_faultin_pfn(self, m: Machine) -> str | None:
        """Ask the host for the frame, and note how many notifier calls came before. Source: mmu/mmu.c, v5.19."""
        self.mmu_seq = m.mmu_notifier_seq
        if self.slot is not None and self.slot.invalid:
            self._over(m, Outcome.RETRY)
            return "the slot is about to move or go"
        if self.slot is None or (self.kind == "write" and self.slot.readonly):
            self._over(m, Outcome.MMIO)
            return "no memory here" if self.slot is None else "read-only slot"
        self.page = m.host.lookup(self.slot.hva(self.gfn))
        self.todo = ["make_spte"]
        if self.kind == "write" and not self.page.writable:
            self.todo.insert(0, "do_wp_page")
            return "the host maps it read-only"
        return None

    @step(lock="fault", keeps=True)
    def make_spte(self, m: Machine) -> str | None:
        """Walk down, make room, and build the leaf; a page that becomes writable is marked *before* the SPTE is stored.
        Source: mmu/tdp_mmu.c: kvm_tdp_mmu_map(), mmu/mmu.c: __direct_map() (the legacy MMU), v5.19."""
        assert self.slot is not None and self.page is not None
        raced = m.mmu_notifier_seq != self.mmu_seq or any(a <= self.gfn < b for a, b in m.invalidating)
        goal = self._goal_level(m)
        found = None if raced else m.page_tables.descend(self.root, self.gfn, goal)
        if found is None or m.fmt.is_removed_spte(found.spte):
            self._over(m, Outcome.RETRY)
            return "raced with the host or another fault"
        self.sptep, self.old_spte = found.sptep, found.spte
        if m.nx_huge_pages:
            goal = min(goal, found.level)  # a table stays where an instruction fetch asked for it
        if found.level > goal:
            return self._zap_larger(m)
        here = self.root.tdp_mmu and found.level == goal and m.fmt.is_shadow_present_pte(found.spte)
        if here and m.kernel.allowed_is_spurious and self._allowed(m, found.spte):
            self._over(m, Outcome.SLOW_FAULT)
            return "spurious: allowed by now"
        over = found.spte
        if found.level < goal:  # a table is in the way of a huge page; for make_spte() of the TDP MMU it is a W=1 SPTE
            self.sptep, self.old_spte = m.page_tables.entry_at(self.root, self.gfn, goal), 0
            over = m.page_tables.read(self.sptep) if self.root.tdp_mmu else 0
            m.drop_table(self.sptep)
        host_writable = self.page.writable and not self.slot.readonly
        pfn = self.page.pfn & -pages_per_level(goal)
        made = self._leaf(m, self.gfn, pfn, level=goal, old_spte=over, host_writable=host_writable)
        self.new_spte = made.spte
        if m.fmt.is_writable_pte(made.spte):
            m.mark_page_dirty_in_slot(self.slot, self.gfn, m.vcpus[self.vcpu])
        self.todo = ["set_spte"] + ["x86_emulate_instruction"] * (made.wrprot and self.kind == "write")
        return None

    def _leaf(self, m: Machine, gfn: int, pfn: int, **how: Any) -> Made:
        ad_type = m.fmt.tdp_ad_type(self.root.ad_disabled, self.root.guest_mode, bool(m.hardware.pml_entries))
        tracked = gfn in m.write_tracked
        return m.fmt.make_spte(pfn, ad_type=ad_type, write_tracked=tracked, nx_huge_pages=m.nx_huge_pages, **how)

    def _goal_level(self, m: Machine) -> int:
        """4K in a slot that logs, and for a fetch if huge pages are never executable; else as large as may be.
        Source: mmu/mmu.c: kvm_mmu_hugepage_adjust(), v5.19."""
        assert self.slot is not None
        if self.slot.logs_dirty or (m.nx_huge_pages and self.kind == "fetch"):
            return PG_LEVEL_4K
        return kvm_mmu_max_mapping_level(m, self.slot, self.gfn)

    def _zap_larger(self, m: Machine) -> str:
        """A larger leaf is in the way. The legacy MMU drops it and flushes at once; the TDP MMU freezes it first, so that
        other faults keep away until the flush is done. (Since v6.2 the TDP MMU splits it; what was in it stays mapped.)"""
        assert self.sptep is not None
        m.tell_host(self.old_spte, 0)
        if self.root.tdp_mmu and m.kernel.splits_on_fault:
            m.page_tables.split(self.sptep, m.nx_huge_pages)
            self.todo = ["make_spte"]
            return "a larger page is split"
        m.page_tables.write(self.sptep, m.fmt.removed_spte if self.root.tdp_mmu else m.fmt.shadow_nonpresent_value)
        m.kvm_flush_remote_tlbs()
        self.todo = ["unfreeze", "make_spte"] if self.root.tdp_mmu else ["make_spte"]
        return "a larger page is zapped"

    @step(lock="fault", keeps=True)
    def unfreeze(self, m: Machine) -> str | None:
        """Source: mmu/tdp_mmu.c: tdp_mmu_zap_spte_atomic(), v5.19."""
        assert self.sptep is not None
        if self._table_is_gone(m):
            return "the table was removed meanwhile"
        m.page_tables.zap(self.sptep)
        return None

    @step(lock="fault")
    def set_spte(self, m: Machine) -> str | None:
        """Store the leaf: compare and exchange in the TDP MMU, mmu_spte_update() in the legacy MMU.
        Source: mmu/tdp_mmu.c: tdp_mmu_map_handle_target_level(), mmu/mmu.c: mmu_set_spte(), v5.19."""
        assert self.sptep is not None
        if self._table_is_gone(m):
            return "the table was removed meanwhile"
        now = m.page_tables.read(self.sptep)
        if self.root.tdp_mmu and now != self.old_spte:
            self._over(m, Outcome.RETRY)
            return "the SPTE changed meanwhile"
        owed = m.fmt.mmu_spte_update(now, self.new_spte)
        m.page_tables.write(self.sptep, self.new_spte)
        m.tell_host(now, self.new_spte)
        if owed and not self.root.tdp_mmu:
            m.kvm_flush_remote_tlbs()
        if m.kernel.neighbour_prefetch and not self.root.tdp_mmu and now != self.new_spte:
            self._direct_pte_prefetch(m)
        if not self.todo:
            self._over(m, Outcome.SLOW_FAULT)
        return "spurious" if now == self.new_spte else None

    def _direct_pte_prefetch(self, m: Machine) -> None:
        """Also map those of the eight aligned neighbours that are not mapped: old, as nobody has accessed them. Never in a
        slot that logs or is read-only, and only where A bits will tell. A run of neighbours of which none can be had ends it.
        Source: mmu/mmu.c: direct_pte_prefetch(), direct_pte_prefetch_many(), v5.19."""
        assert self.sptep is not None
        table, first = m.page_tables.tables[self.sptep.table], self.sptep.entry & -PTE_PREFETCH_NUM
        if self.root.ad_disabled or not table.direct or table.level > PG_LEVEL_4K or m.invalidating:
            return
        for mapped, run in groupby(
            range(first, first + PTE_PREFETCH_NUM),
            lambda entry: int(table.sptes[entry]) != m.fmt.shadow_nonpresent_value,
        ):
            gfns = [table.gfn(entry) for entry in run]
            slot = m.memslots.gfn_to_memslot(gfns[0])
            if mapped:
                continue
            if slot is None or slot.invalid or slot.readonly or slot.logs_dirty or gfns[-1] not in slot:
                return
            pages = list(takewhile(lambda page: page.writable, (m.host.lookup(slot.hva(gfn)) for gfn in gfns)))
            if not pages:
                return
            for gfn, page in zip(gfns, pages, strict=False):
                spte = self._leaf(m, gfn, page.pfn, prefetch=True).spte
                m.page_tables.write(Sptep(table.pfn, table.index(gfn)), spte)

    def _table_is_gone(self, m: Machine) -> bool:
        """Whether another fault, which also holds the lock for read, removed the table; if so, try again."""
        assert self.sptep is not None
        gone = self.sptep.table not in m.page_tables.tables
        if gone:
            self._over(m, Outcome.RETRY)
        return gone

    @step()
    def x86_emulate_instruction(self, m: Machine) -> str | None:
        """KVM does the write itself, and knows it. Source: arch/x86/kvm/x86.c, v5.19."""
        self.slot = slot = m.memslots.gfn_to_memslot(self.gfn)
        if slot is None or slot.invalid or slot.readonly:
            self._over(m, Outcome.MMIO)
        elif self.write_guest(m, m.vcpus[self.vcpu], "x86_emulate_instruction"):
            self._over(m, Outcome.EMULATED)
        else:
            return "the host maps it read-only"
        return None


def complete(m: Machine, vcpu: VcpuState, kind: str, gfn: int, root: Root) -> Outcome:
    """Repeat an access, with all its faults handled, until it retires or leaves to user space. Returns HIT or WALK, or the
    kind of fault that it took (the slow kind if both), or EMULATED, MMIO or RING_FULL."""
    took = None
    while True:
        outcome = access(m, vcpu, kind, gfn, root)
        if outcome in (Outcome.HIT, Outcome.WALK):
            return took or outcome
        if outcome is Outcome.RING_FULL:
            return outcome
        if vcpu.fault is not None:
            handled: Outcome = m.run(vcpu.fault)
            if handled in (Outcome.EMULATED, Outcome.MMIO):
                return handled
            if handled is Outcome.RETRY:  # notifiers, memslot changes and faults under the lock go on meanwhile
                for operation in [op for op in m.in_flight if op.lock or not isinstance(op, PageFault)]:
                    with suppress(OSError, ValueError):  # one that waited for its turn may be refused
                        m.run(operation)
            took = Outcome.FAST_FAULT if handled is Outcome.FAST_FAULT and took is None else Outcome.SLOW_FAULT
