"""Write protection and clear-dirty after a harvest, and for a guest's page tables. Each has an rmap side and a TDP side.

*Re-arming* follows a harvest, page by page, and its caller flushes. *Guarding a guest's page table* needs a promise that no
CPU can write, and so clears MMU-writable too. (*Enabling* dirty logging passes over a whole slot: see `memory_regions`.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np

from kvmbook.model.guest_memory import GuestAccess
from kvmbook.model.huge_pages import split_huge_pages
from kvmbook.model.machine import Machine, step
from kvmbook.model.memslots import MemorySlot
from kvmbook.model.page_tables import RMAPS, TDP
from kvmbook.model.spte import KVM_MAX_HUGEPAGE_LEVEL, PG_LEVEL_2M, PG_LEVEL_4K, pages_per_level

HUGE = PG_LEVEL_2M, KVM_MAX_HUGEPAGE_LEVEL


def kvm_arch_mmu_enable_log_dirty_pt_masked(m: Machine, slot: MemorySlot, gfn_offset: int, mask: np.ndarray) -> None:
    """Make the next write to some pages visible again: those whose bits are set in ``mask``, words of a bitmap of which bit 0
    is the page ``gfn_offset`` of the slot. The caller flushes, whatever changed. Source: mmu/mmu.c, v5.19."""
    if slot.as_id or not mask.any():
        return
    start = slot.base_gfn + gfn_offset
    end = min(start + mask.size * 64, slot.end_gfn)
    if m.initially_set and any(True for side in (RMAPS, TDP) for _ in m.page_tables.leaves(side, start, end, HUGE)):
        for number in np.flatnonzero(mask).tolist():
            word, at = int(mask[number]), start + number * 64
            _protect_huge_pages(m, at + (word & -word).bit_length() - 1, at + word.bit_length() - 1)
    pml, small = bool(m.hardware.pml_entries), (PG_LEVEL_4K, PG_LEVEL_4K)
    rmap_rule = m.fmt.rmap_clear_dirty if pml else m.fmt.spte_write_protect
    m.update_leaves(RMAPS, start, end, rmap_rule, small, mask)
    m.update_leaves(TDP, start, end, partial(m.fmt.tdp_clear_dirty, wrprot=not pml), small, mask)


def _protect_huge_pages(m: Machine, first: int, last: int) -> None:
    """Enabling has protected nothing (INITIALLY_SET), so huge pages are split, or protected for good, when they are met.
    The comparison that decides about the last page rounds up, in every release: a huge page that begins at ``last`` is
    overlooked if ``first`` lies in the one before.
    Source: mmu/mmu.c: kvm_arch_mmu_enable_log_dirty_pt_masked(), v5.19."""
    if m.eager_page_split and m.hardware.tdp_mmu:
        end = last if m.kernel.clear_split_forgets_last else last + 1
        if m.kernel.eager_split_rmaps:
            split_huge_pages(m, RMAPS, first, max(end, first + 1))  # this side always visits the first
        split_huge_pages(m, TDP, first, end)
    kvm_mmu_slot_gfn_write_protect(m, first, PG_LEVEL_2M)
    pages = pages_per_level(PG_LEVEL_2M)
    up = pages - 1 if m.kernel.clear_compares_rounded_up else 0
    if (first + up) // pages != (last + up) // pages:
        kvm_mmu_slot_gfn_write_protect(m, last, PG_LEVEL_2M)


# ---- guarding a guest's page table -----------------------------------------------------------------------------------


def kvm_mmu_slot_gfn_write_protect(m: Machine, gfn: int, min_level: int = PG_LEVEL_4K) -> bool:
    """Clear W and MMU-writable of each leaf that covers ``gfn``, from ``min_level`` up. Returns whether the caller must flush
    before it unlocks. Source: mmu/mmu.c, mmu/tdp_mmu.c: write_protect_gfn(), v5.19."""
    levels = min_level, KVM_MAX_HUGEPAGE_LEVEL
    owed = m.update_leaves(RMAPS, gfn, gfn + 1, partial(m.fmt.spte_write_protect, pt_protect=True), levels)
    return m.update_leaves(TDP, gfn, gfn + 1, m.fmt.tdp_write_protect, levels) or owed


@dataclass(eq=False)
class TrackGuestPageTable(GuestAccess):
    """KVM starts to shadow the guest page table at ``gfn``: nobody may write it unseen once the lock is dropped.
    Source: mmu/page_track.c: kvm_slot_page_track_add_page(), mmu/mmu.c: account_shadowed(), v5.19."""

    actor: ClassVar[str] = "KVM"
    flushes_late: bool = field(default=False, init=False)

    def begin(self, m: Machine) -> None:
        super().begin(m)
        if self.slot is None:
            raise ValueError(f"gfn {self.gfn:#x} is in no slot")
        self.flushes_late = not m.kernel.guard_flushes_before_unlock
        self.todo = ["kvm_mmu_slot_gfn_write_protect"]

    def wants_lock(self, name: str) -> str | None:
        late = self.flushes_late and name == "kvm_flush_remote_tlbs"
        return None if late else super().wants_lock(name)

    @step(lock="write", keeps=True)
    def kvm_mmu_slot_gfn_write_protect(self, m: Machine) -> str:
        if (slot := m.memslots.gfn_to_memslot(self.gfn)) is None or slot.invalid:
            self.todo = []
            return "the slot is gone, or about to go"
        m.write_tracked.add(self.gfn)
        owed = kvm_mmu_slot_gfn_write_protect(m, self.gfn)
        self.todo = ["kvm_flush_remote_tlbs"] * owed
        return "flush before unlock" if owed else "no CPU can write"

    @step(lock="write")
    def kvm_flush_remote_tlbs(self, m: Machine) -> None:
        m.kvm_flush_remote_tlbs()
