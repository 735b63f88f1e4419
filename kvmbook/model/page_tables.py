"""Who maps a gfn: trees of 512-entry tables, and, for the legacy MMU, the rmap lists that lead back to them.

A VM has one tree per root. The TDP MMU's trees are walked from the top by gfn; the legacy MMU's SPTEs are found through
``rmaps``, one list per (level, gfn). Both can hold SPTEs of one gfn at the same time: a nested guest's beside L1's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from kvmbook.model.arrays import SPTES_PER_TABLE
from kvmbook.model.spte import KVM_MAX_HUGEPAGE_LEVEL, PG_LEVEL_4K, REMOVED_SPTE, SpteFormat, pages_per_level

ROOT_LEVEL = 4
FIRST_TABLE_PFN = 1 << 37


@dataclass(frozen=True)
class Root:
    """One tree's role. ``ad_disabled``: hardware keeps no A/D bits in it. ``guest_mode``: it maps a nested guest's memory.
    ``direct``: no guest page tables are shadowed, so faults have a fast path. ``tdp_mmu``: else the legacy MMU's.

    A nested guest's addresses equal L1's gfns in this model: L1 maps its guest one to one.
    Source: arch/x86/include/asm/kvm_host.h: union kvm_mmu_page_role, v5.19.
    """

    name: str
    ad_disabled: bool = False
    guest_mode: bool = False
    direct: bool = True
    tdp_mmu: bool = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Root:
        return self


@dataclass
class PageTable:
    """512 SPTEs, a uint64 array of shape (512,). Entry i maps the gfns from ``base_gfn + i * pages_per_level(level)``.
    Source: mmu/mmu_internal.h: struct kvm_mmu_page, v5.19."""

    pfn: int
    root: Root
    level: int
    base_gfn: int
    sptes: np.ndarray = field(default_factory=lambda: np.zeros(SPTES_PER_TABLE, np.uint64))

    def index(self, gfn: int) -> int:
        return (gfn - self.base_gfn) // pages_per_level(self.level)

    def gfn(self, index: int) -> int:
        return self.base_gfn + index * pages_per_level(self.level)

    def span(self, start: int, end: int) -> slice:
        """The entries from the one that covers ``start`` to the last that begins before ``end``."""
        first, last = self.index(start), -(-(end - self.base_gfn) // pages_per_level(self.level))
        return slice(min(max(first, 0), SPTES_PER_TABLE), min(max(last, 0), SPTES_PER_TABLE))


class Sptep(NamedTuple):
    """Where an SPTE lies: the frame of its table, and its index there."""

    table: int
    entry: int


class Found(NamedTuple):
    """Where a walk ended: the place, the level and the value of the last SPTE read."""

    sptep: Sptep
    level: int
    spte: int


@dataclass
class PageTables:
    """All trees of a VM, by the frame of each table, and the legacy MMU's rmaps.
    Source: arch/x86/include/asm/kvm_host.h: struct kvm_rmap_head, v5.19."""

    fmt: SpteFormat
    tables: dict[int, PageTable] = field(default_factory=dict)
    roots: dict[Root, int] = field(default_factory=dict)
    rmaps: dict[tuple[int, int], list[Sptep]] = field(default_factory=dict)
    next_pfn: int = FIRST_TABLE_PFN
    shadow_root_allocated: bool = False

    # ---- one entry --------------------------------------------------------------------------------------------------

    def read(self, sptep: Sptep) -> int:
        return int(self.tables[sptep.table].sptes[sptep.entry])

    def write(self, sptep: Sptep, spte: int) -> None:
        """Store an SPTE, and keep the rmaps in step if the legacy MMU owns it."""
        table = self.tables[sptep.table]
        if not table.root.tdp_mmu:
            key = (table.level, table.gfn(sptep.entry))
            was, is_now = self._maps_page(self.read(sptep), table.level), self._maps_page(spte, table.level)
            if is_now and not was:
                self.rmaps.setdefault(key, []).append(sptep)
            elif was and not is_now:
                self.rmaps[key].remove(sptep)
                if not self.rmaps[key]:
                    del self.rmaps[key]
        table.sptes[sptep.entry] = spte

    def _maps_page(self, spte: int, level: int) -> bool:
        return bool(self.fmt.is_shadow_present_pte(spte) and self.fmt.is_last_spte(spte, level))

    def walk(self, root: Root, gfn: int, start: int | None = None) -> Found | None:
        """Read down from the root (or from the level-1 table in frame ``start``) to the leaf, or to the first entry that
        leads nowhere. None if there is no root yet. Source: mmu/mmu.c: fast_pf_get_last_sptep(), v5.19."""
        pfn = self.roots.get(root) if start is None else start
        if pfn is None or not 0 <= gfn < pages_per_level(ROOT_LEVEL + 1):
            return None
        while True:
            table = self.tables[pfn]
            sptep = Sptep(pfn, table.index(gfn))
            spte = self.read(sptep)
            if not self.fmt.is_shadow_present_pte(spte) or self.fmt.is_last_spte(spte, table.level):
                return Found(sptep, table.level, spte)
            pfn = self.fmt.pfn(spte)

    def entry_at(self, root: Root, gfn: int, level: int) -> Sptep:
        """The place of the entry of ``gfn`` at ``level``, which must have its tables above."""
        pfn = self.roots[root]
        while (table := self.tables[pfn]).level > level:
            pfn = self.fmt.pfn(self.read(Sptep(pfn, table.index(gfn))))
        return Sptep(pfn, table.index(gfn))

    def descend(self, root: Root, gfn: int, level: int) -> Found:
        """Walk to the entry of ``gfn`` at ``level``, linking the tables that are missing. Stops early at a larger leaf
        and at a frozen entry."""
        if root not in self.roots:
            self.roots[root] = self._new_table(root, ROOT_LEVEL, 0)
            self.shadow_root_allocated |= not root.tdp_mmu
        found = self.walk(root, gfn)
        assert found is not None
        while found.level > level and found.spte == 0:
            child = self._new_table(root, found.level - 1, gfn & -pages_per_level(found.level))
            self.link(found.sptep, child)
            found = Found(Sptep(child, self.tables[child].index(gfn)), found.level - 1, 0)
        return found

    def link(self, sptep: Sptep, child: int) -> None:
        """Make the entry point to the table in frame ``child``."""
        self.write(sptep, self.fmt.make_nonleaf_spte(child, self.tables[child].root.ad_disabled))

    def _new_table(self, root: Root, level: int, base_gfn: int) -> int:
        pfn = self.next_pfn
        self.next_pfn += 1
        self.tables[pfn] = PageTable(pfn, root, level, base_gfn)
        return pfn

    # ---- whole tables -----------------------------------------------------------------------------------------------

    def split(self, sptep: Sptep, nx_huge_pages: bool) -> None:
        """Replace a huge leaf by a table of its 512 parts. Source: mmu/tdp_mmu.c: tdp_mmu_split_huge_page(), v5.19."""
        parent = self.tables[sptep.table]
        children = self.fmt.make_huge_page_split_spte(self.read(sptep), parent.level, nx_huge_pages)
        child = self._new_table(parent.root, parent.level - 1, parent.gfn(sptep.entry))
        if parent.root.tdp_mmu:
            self.tables[child].sptes[:] = children
        else:
            for index, spte in enumerate(children):
                self.write(Sptep(child, index), int(spte))
        self.link(sptep, child)

    def unlink(self, sptep: Sptep) -> tuple[list[int], list[int]]:
        """Cut the entry off (0) and freeze all that hangs below it. Returns the frames of the tables to free after a flush
        (until then a CPU may still walk through them), and the leaves that went.
        Source: mmu/tdp_mmu.c: handle_removed_pt(), v5.19."""
        spte, level = self.read(sptep), self.tables[sptep.table].level
        self.write(sptep, 0)
        if not self.fmt.is_shadow_present_pte(spte):
            return [], []
        if self.fmt.is_last_spte(spte, level):
            return [], [spte]
        child = self.fmt.pfn(spte)
        freed, dropped = [child], []
        for index in np.flatnonzero(self.tables[child].sptes):
            below = self.unlink(Sptep(child, int(index)))
            freed += below[0]
            dropped += below[1]
        if self.tables[child].root.tdp_mmu:
            self.tables[child].sptes[:] = REMOVED_SPTE
        return freed, dropped

    def free(self, frames: list[int]) -> None:
        """Give tables back. The caller has flushed."""
        for pfn in frames:
            del self.tables[pfn]

    def zap_all(self) -> None:
        """Forget every tree. The caller flushes."""
        self.tables.clear()
        self.roots.clear()
        self.rmaps.clear()

    # ---- who maps these gfns ----------------------------------------------------------------------------------------

    def tdp_leaves(
        self, start: int, end: int, min_level: int = PG_LEVEL_4K, max_level: int = KVM_MAX_HUGEPAGE_LEVEL
    ) -> list[tuple[PageTable, slice, np.ndarray]]:
        """Return, for each TDP MMU table with leaves over gfns of [start, end) at these levels: the table, the slice of
        its entries in question, and which of those are present leaves.
        Source: mmu/tdp_iter.h: for_each_tdp_pte_min_level(), v5.19."""
        found = []
        for root, pfn in self.roots.items():
            for table in self._tables_over(pfn, start, end) if root.tdp_mmu else ():
                sptes = table.sptes[span := table.span(start, end)]
                leaf = self.fmt.is_shadow_present_pte(sptes) & self.fmt.is_last_spte(sptes, table.level)
                if min_level <= table.level <= max_level and leaf.any():
                    found.append((table, span, leaf))
        return found

    def _tables_over(self, pfn: int, start: int, end: int) -> Iterator[PageTable]:
        table = self.tables[pfn]
        yield table
        span = table.span(start, end)
        for index in np.flatnonzero(table.sptes[span]) if table.level > PG_LEVEL_4K else ():
            spte = int(table.sptes[span.start + index])
            if self.fmt.is_shadow_present_pte(spte) and not self.fmt.is_last_spte(spte, table.level):
                yield from self._tables_over(self.fmt.pfn(spte), start, end)

    def rmap_leaves(
        self, start: int, end: int, min_level: int = PG_LEVEL_4K, max_level: int = KVM_MAX_HUGEPAGE_LEVEL
    ) -> list[Sptep]:
        """The legacy MMU's leaves that map gfns of [start, end), low levels first.
        Source: mmu/mmu.c: for_each_slot_rmap_range(), v5.19."""
        sptes: list[Sptep] = []
        for level in range(min_level, max_level + 1):
            heads = range(start & -pages_per_level(level), end, pages_per_level(level))
            if len(heads) > len(self.rmaps):
                mapped = sorted(gfn for at, gfn in self.rmaps if at == level and gfn in heads)
            else:
                mapped = [gfn for gfn in heads if (level, gfn) in self.rmaps]
            sptes += (sptep for gfn in mapped for sptep in self.rmaps[level, gfn])
        return sptes

    def leaves(self) -> Iterator[tuple[Root, int, int, int]]:
        """Yield (root, first gfn, level, spte) of each present leaf, of both MMUs."""
        for pfn in sorted(self.tables):
            table = self.tables[pfn]
            for index in np.flatnonzero(table.sptes):
                spte = int(table.sptes[index])
                if self._maps_page(spte, table.level):
                    yield table.root, table.gfn(int(index)), table.level, spte
