"""Write protection and clear-dirty: making the next write visible. Each job has an rmap side and a TDP side.

Three callers want three things. *Enabling* dirty logging passes over a whole slot; *re-arming* follows a harvest, page
by page; *guarding a guest's page table* needs a promise that no CPU can write, and so clears MMU-writable too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from kvmbook.model.arrays import Spte, Truth
from kvmbook.model.huge_pages import shadow_mmu_split_huge_pages, tdp_mmu_split_huge_pages
from kvmbook.model.machine import Machine, Operation, step
from kvmbook.model.memslots import MemorySlot
from kvmbook.model.spte import KVM_MAX_HUGEPAGE_LEVEL, PG_LEVEL_2M, PG_LEVEL_4K, Changed, pages_per_level

Ask = Callable[[Any, Spte, Spte, Truth], Truth]


def owes_flush(m: Machine, visited: list[tuple[Spte, Any]], ask: Ask) -> bool:
    """Whether the flush rule's question ``ask`` finds a reason among the leaves that a pass has visited."""
    return any(np.any(ask(m.fmt, old, new, answer)) for old, (new, answer) in visited)


# ---- enabling: a pass over the slot. Each returns whether the release's flush rule wants a flush after it. ------------


def slot_rmap_write_protect(m: Machine, start: int, end: int, start_level: int) -> bool:
    """Take W from the rmap side.
    Source: mmu/mmu.c: slot_rmap_write_protect(), kvm_mmu_slot_remove_write_access(), v5.19."""
    visited = m.update_rmap_leaves(start, end, m.fmt.spte_write_protect, start_level)
    return owes_flush(m, visited, m.kernel.flush.after_write_protect)


def kvm_tdp_mmu_wrprot_slot(m: Machine, start: int, end: int, start_level: int) -> bool:
    """Take W from the TDP side. Source: mmu/tdp_mmu.c: kvm_tdp_mmu_wrprot_slot(), wrprot_gfn_range(), v5.19."""
    visited = m.update_tdp_leaves(start, end, m.fmt.tdp_wrprot, start_level)
    return owes_flush(m, visited, m.kernel.flush.after_write_protect)


def slot_rmap_clear_dirty(m: Machine, start: int, end: int) -> bool:
    """4K leaves only: the legacy MMU logs at no other size.
    Source: mmu/mmu.c: __rmap_clear_dirty(), kvm_mmu_slot_leaf_clear_dirty(), v5.19."""
    visited = m.update_rmap_leaves(start, end, m.fmt.rmap_clear_dirty, max_level=PG_LEVEL_4K)
    return owes_flush(m, visited, m.kernel.flush.after_clear_dirty)


def kvm_tdp_mmu_clear_dirty_slot(m: Machine, start: int, end: int) -> bool:
    """Leaves of every size. Source: mmu/tdp_mmu.c: kvm_tdp_mmu_clear_dirty_slot(), clear_dirty_gfn_range(), v5.19."""
    visited = m.update_tdp_leaves(start, end, m.fmt.tdp_clear_dirty)
    return owes_flush(m, visited, m.kernel.flush.after_clear_dirty)


# ---- re-arming after a harvest ---------------------------------------------------------------------------------------


def kvm_arch_mmu_enable_log_dirty_pt_masked(m: Machine, slot: MemorySlot, gfns: list[int]) -> None:
    """Make the next write to each of ``gfns`` (ascending, not empty) visible again. The caller flushes, whatever changed.
    Source: mmu/mmu.c, v5.19."""
    if slot.as_id:
        return  # no vCPU of this model runs there: nothing is mapped
    if m.initially_set:
        first, last = gfns[0], gfns[-1]
        if m.eager_page_split and m.hardware.tdp_mmu:
            end = last if m.kernel.clear_split_forgets_last else last + 1
            if m.kernel.eager_split_rmaps:
                shadow_mmu_split_huge_pages(m, first, end)
            tdp_mmu_split_huge_pages(m, first, end)
        for gfn in {first, last} if (first ^ last) >= pages_per_level(PG_LEVEL_2M) else {first}:
            kvm_mmu_slot_gfn_write_protect(m, gfn, PG_LEVEL_2M)
    pml = bool(m.hardware.cpu_dirty_log_size)
    rmap_rule = m.fmt.rmap_clear_dirty if pml else m.fmt.spte_write_protect
    for start, end in runs(gfns):
        m.update_rmap_leaves(start, end, rmap_rule, max_level=PG_LEVEL_4K)
        m.update_tdp_leaves(start, end, lambda s: m.fmt.tdp_clear_dirty(s, wrprot=not pml), max_level=PG_LEVEL_4K)


def runs(gfns: list[int]) -> list[tuple[int, int]]:
    """Ascending gfns as the fewest [start, end) ranges."""
    ranges: list[tuple[int, int]] = []
    for gfn in gfns:
        if ranges and ranges[-1][1] == gfn:
            ranges[-1] = (ranges[-1][0], gfn + 1)
        else:
            ranges.append((gfn, gfn + 1))
    return ranges


# ---- guarding a guest's page table -----------------------------------------------------------------------------------


def kvm_mmu_slot_gfn_write_protect(m: Machine, gfn: int, min_level: int = PG_LEVEL_4K) -> bool:
    """Clear W and MMU-writable of every leaf that covers ``gfn`` at ``min_level`` or above. Returns whether the caller
    must flush before it unlocks. Source: mmu/mmu.c, mmu/tdp_mmu.c: write_protect_gfn(), v5.19."""

    def protect(spte: Spte) -> Changed:
        return Changed(*m.fmt.spte_write_protect(spte, pt_protect=True))

    visited = m.update_rmap_leaves(gfn, gfn + 1, protect, min_level, KVM_MAX_HUGEPAGE_LEVEL)
    visited += m.update_tdp_leaves(gfn, gfn + 1, m.fmt.tdp_write_protect, min_level)
    return any(np.any(answer.changed) for _, answer in visited)


@dataclass(eq=False)
class TrackGuestPageTable(Operation):
    """KVM starts to shadow the guest page table at ``gfn``: nobody may write it unseen once the lock is dropped.
    Source: mmu/page_track.c: kvm_slot_page_track_add_page(), mmu/mmu.c: account_shadowed(), v5.19."""

    actor: ClassVar[str] = "KVM"

    gfn: int

    def begin(self, m: Machine) -> None:
        if m.memslots.gfn_to_memslot(self.gfn) is None:
            raise ValueError(f"gfn {self.gfn:#x} is in no slot")
        self.todo = ["kvm_mmu_slot_gfn_write_protect"]

    @property
    def where(self) -> int:
        return self.gfn

    @step(lock="write", keeps=True)
    def kvm_mmu_slot_gfn_write_protect(self, m: Machine) -> str:
        if m.memslots.gfn_to_memslot(self.gfn) is None:
            self.todo = []
            return "the slot is gone"
        m.write_tracked.add(self.gfn)
        owed = kvm_mmu_slot_gfn_write_protect(m, self.gfn)
        self.todo = ["kvm_flush_remote_tlbs"] * owed
        return "flush before unlock" if owed else "no CPU can write"

    @step(lock="write")
    def kvm_flush_remote_tlbs(self, m: Machine) -> None:
        m.kvm_flush_remote_tlbs()
