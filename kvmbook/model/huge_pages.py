"""Huge pages: how large a mapping may be, splitting before dirty logging, recovery after it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvmbook.model.arrays import each
from kvmbook.model.machine import Machine
from kvmbook.model.memslots import MemorySlot
from kvmbook.model.page_tables import RMAPS, TDP, Sptep, Stretch
from kvmbook.model.spte import KVM_MAX_HUGEPAGE_LEVEL, PAGE_SHIFT, PG_LEVEL_2M, PG_LEVEL_4K, pages_per_level


def disallow_lpage(m: Machine, slot: MemorySlot, gfn: int, level: int) -> bool:
    """Whether the range of ``level`` around ``gfn`` must not be mapped by one SPTE: it sticks out of the slot, gfn and
    user address are not aligned alike, or a write-tracked page lies in it. Dirty logging is *not* among the reasons.
    Source: arch/x86/include/asm/kvm_host.h: struct kvm_lpage_info,
    arch/x86/kvm/x86.c: kvm_alloc_memslot_metadata(), v5.19."""
    pages = pages_per_level(level)
    first = gfn & -pages
    return (
        first < slot.base_gfn
        or first + pages > slot.end_gfn
        or (slot.base_gfn ^ slot.userspace_addr >> PAGE_SHIFT) % pages != 0
        or any(first <= tracked < first + pages for tracked in m.write_tracked)
    )


def kvm_mmu_max_mapping_level(m: Machine, slot: MemorySlot, gfn: int) -> int:
    """The largest level at which ``gfn`` may be mapped, by the slot's shape and the host's page size.
    Source: mmu/mmu.c, v5.19."""
    level = m.host.lookup(slot.hva(gfn)).level
    while level > PG_LEVEL_4K and disallow_lpage(m, slot, gfn, level):
        level -= 1
    return level


def split_huge_pages(m: Machine, side: bool, start: int, end: int) -> None:
    """Split each huge leaf of one side over [start, end) down to 4K, without a flush: the parts allow what the whole did.
    On the rmap side these are the huge pages of nested guests (v6.0, ada51a9de725).
    Source: mmu/tdp_mmu.c: tdp_mmu_split_huge_pages_root(), mmu/mmu.c: kvm_shadow_mmu_try_split_huge_pages(), v6.0."""
    for level in range(KVM_MAX_HUGEPAGE_LEVEL, PG_LEVEL_4K, -1):
        for table, first, words in m.page_tables.stretches(side, start, end, (level, level)):
            huge = np.flatnonzero(each(m.fmt.maps_page, words, level))
            for run in np.split(huge, np.flatnonzero(np.diff(huge) != 1) + 1) if huge.size else ():
                begin, behind = int(run[0]), int(run[-1]) + 1
                for spte in words[begin:behind].tolist():
                    m.tell_host(spte, 0)
                m.page_tables.split_each(Stretch(table, first + begin, words[begin:behind]), m.nx_huge_pages)


def zap_collapsible_rmap_sptes(m: Machine, slot: MemorySlot) -> bool:
    """Drop the legacy MMU's leaves that could be part of a larger page, where their table shadows none of the guest's; later
    faults map it. Returns whether to flush.
    Source: mmu/mmu.c: kvm_mmu_zap_collapsible_spte(), v5.19."""
    dropped, max_level = False, PG_LEVEL_2M if m.kernel.recovers_2m_rmaps else PG_LEVEL_4K
    for table, leaves in m.page_tables.leaves(RMAPS, slot.base_gfn, slot.end_gfn, (PG_LEVEL_4K, max_level)):
        for index in leaves.tolist() if table.direct else ():
            if table.level < kvm_mmu_max_mapping_level(m, slot, table.gfn(index)):
                m.tell_host(int(table.sptes[index]), 0)
                m.page_tables.zap(Sptep(table.pfn, index))
                dropped = True
    return dropped


def zap_collapsible_tdp_sptes(m: Machine, slot: MemorySlot) -> None:
    """Cut off each TDP MMU table whose pages could be one huge page, flush, and free it.
    Source: mmu/tdp_mmu.c: zap_collapsible_spte_range(), v5.19."""
    for sptep, _, _ in collapsible_tables(m, slot):
        m.drop_table(sptep)


def kvm_tdp_mmu_recover_huge_pages(m: Machine, slot: MemorySlot) -> None:
    """Put a huge SPTE, made of its first leaf, in the place of each such table; flush once, and free them.
    Source: mmu/tdp_mmu.c, v6.13 (13e2e4f62a4b)."""
    freed: list[int] = []
    for sptep, level, first in collapsible_tables(m, slot):
        tables, dropped = m.page_tables.unlink(sptep)
        m.page_tables.write(sptep, m.fmt.make_huge_spte(first, level, m.nx_huge_pages))
        for spte in dropped:
            m.tell_host(spte, 0)
        freed += tables
    if freed:
        m.kvm_flush_remote_tlbs()
    m.page_tables.free(freed)


def collapsible_tables(m: Machine, slot: MemorySlot) -> Iterator[tuple[Sptep, int, int]]:
    """Yield (place, level, first present leaf) of each entry of the TDP MMU that points to a table and could be a leaf."""
    leaves = m.page_tables.leaves(TDP, slot.base_gfn, slot.end_gfn, (PG_LEVEL_4K, PG_LEVEL_2M))
    done: set[Sptep] = set()
    for table, indices in sorted(leaves, key=lambda found: found[0].gfn(int(found[1][0]))):
        first = table.gfn(int(indices[0]))
        level = kvm_mmu_max_mapping_level(m, slot, first)
        if level > table.level and (sptep := m.page_tables.entry_at(table.root, first, level)) not in done:
            done.add(sptep)
            yield sptep, level, int(table.sptes[indices[0]])
