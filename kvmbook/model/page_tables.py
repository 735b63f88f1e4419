"""Who maps a gfn: trees of 512-entry tables, one per root.

Some are the TDP MMU's, some the legacy MMU's, and both can hold SPTEs of one gfn at the same time: a nested guest's beside
L1's. The kernel walks the TDP MMU's trees from the top, and finds the legacy MMU's SPTEs through rmaps, one list per level
and gfn; the model looks through the tables of the one *side* or the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kvmbook.model.arrays import each
from kvmbook.model.spte import (
    KVM_MAX_HUGEPAGE_LEVEL,
    PAGE_SHIFT,
    PG_LEVEL_1G,
    PG_LEVEL_4K,
    SPTE_MMU_PRESENT_MASK,
    SPTES_PER_TABLE,
    SpteFormat,
    pages_per_level,
)

FIRST_TABLE_PFN = 1 << 37
RMAPS, TDP = False, True  # the two sides; `Root.tdp_mmu` says which
LEVELS = PG_LEVEL_4K, KVM_MAX_HUGEPAGE_LEVEL
AT_ONCE = 1 << 19  # SPTEs that a pass works at a time


@dataclass(frozen=True)
class Root:
    """One tree's role. ``ad_disabled``: hardware keeps no A/D bits in it. ``guest_mode``: it maps a nested guest's memory.
    ``direct``: no guest page tables are shadowed, so faults have a fast path. ``tdp_mmu``: whose tree it is, the TDP MMU's or
    the legacy MMU's.

    A nested guest's memory is named by L1's gfns in this model, and a guest's virtual addresses are its gfns: shadowed page
    tables map one to one, by 1G pages. ``base_gfn``: where the nested guest's own address 0 lies; only PML tells its own.
    Source: arch/x86/include/asm/kvm_host.h: union kvm_mmu_page_role, v5.19.
    """

    name: str
    ad_disabled: bool = False
    guest_mode: bool = False
    direct: bool = True
    tdp_mmu: bool = True
    base_gfn: int = 0


@dataclass
class PageTable:
    """512 SPTEs, a uint64 array of shape (512,). Entry i maps the gfns from ``base_gfn + i * pages_per_level(level)``.

    ``rows``: the array of shape (n, 512) in which it lies, in row ``row``. A split of n huge pages beside each other makes n
    tables whose frames and gfns follow each other; all others are alone in theirs.
    Source: mmu/mmu_internal.h: struct kvm_mmu_page, v5.19."""

    pfn: int
    root: Root
    level: int
    base_gfn: int
    rows: np.ndarray
    row: int = 0

    @property
    def sptes(self) -> np.ndarray:
        return np.asarray(self.rows[self.row])

    @property
    def direct(self) -> bool:
        """Whether it shadows no guest page table. Below a guest's own huge page, tables are direct under any root."""
        return self.root.direct or self.level < PG_LEVEL_1G

    def index(self, gfn: int) -> int:
        return (gfn - self.base_gfn) // pages_per_level(self.level)

    def gfn(self, index: int) -> int:
        return self.base_gfn + index * pages_per_level(self.level)


class Stretch(NamedTuple):
    """SPTEs beside each other, of one table or of tables that follow each other. ``first``: where they begin, counted in
    entries from the first table of their array, ``table``. ``words``: they themselves, to read and to write."""

    table: PageTable
    first: int
    words: np.ndarray

    @property
    def gfn(self) -> int:
        """The first gfn that the first of them maps."""
        return self.table.gfn(self.first)


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
    """All trees of a VM: ``tables`` by the frame of each, ``runs`` of those that lie in one array the first."""

    fmt: SpteFormat
    root_level: int
    tables: dict[int, PageTable] = field(default_factory=dict)
    runs: dict[int, PageTable] = field(default_factory=dict, compare=False)  # the first table of each array
    roots: dict[Root, int] = field(default_factory=dict)
    next_pfn: int = FIRST_TABLE_PFN
    shadow_root_allocated: bool = False

    # ---- one entry --------------------------------------------------------------------------------------------------

    def read(self, sptep: Sptep) -> int:
        table = self.tables[sptep.table]
        return int(table.rows[table.row, sptep.entry])

    def write(self, sptep: Sptep, spte: int) -> None:
        table = self.tables[sptep.table]
        table.rows[table.row, sptep.entry] = spte

    def zap(self, sptep: Sptep) -> None:
        """Let the entry map nothing."""
        self.write(sptep, self.fmt.shadow_nonpresent_value)

    def walk(self, root: Root, gfn: int, start: int | None = None) -> Found | None:
        """Read down from the root (or from the level-1 table in frame ``start``) to the leaf, or to the first entry that
        leads nowhere. None if there is no root yet. Source: mmu/mmu.c: fast_pf_get_last_sptep(), v5.19."""
        pfn = self.roots.get(root) if start is None else start
        if pfn is None or not 0 <= gfn < pages_per_level(self.root_level + 1):
            return None
        while True:
            table = self.tables[pfn]
            sptep = Sptep(pfn, table.index(gfn))
            spte = self.read(sptep)
            if not self.fmt.is_shadow_present_pte(spte) or self.fmt.is_last_spte(spte, table.level):
                return Found(sptep, table.level, spte)
            pfn = self.fmt.spte_to_pfn(spte)

    def entry_at(self, root: Root, gfn: int, level: int) -> Sptep:
        """The place of the entry of ``gfn`` at ``level``, which must have its tables above."""
        pfn = self.roots[root]
        while (table := self.tables[pfn]).level > level:
            pfn = self.fmt.spte_to_pfn(self.read(Sptep(pfn, table.index(gfn))))
        return Sptep(pfn, table.index(gfn))

    def descend(self, root: Root, gfn: int, level: int) -> Found:
        """Walk to the entry of ``gfn`` at ``level``, linking the tables that are missing. Stops early at a larger leaf
        and at a frozen entry."""
        if root not in self.roots:
            self.roots[root] = self._new_table(root, self.root_level, 0)
            self.shadow_root_allocated |= not root.tdp_mmu
        found = self.walk(root, gfn)
        assert found is not None
        empty = self.fmt.shadow_nonpresent_value
        while found.level > level and found.spte == empty:
            child = self._new_table(root, found.level - 1, gfn & -pages_per_level(found.level))
            self.link(found.sptep, child)
            found = Found(Sptep(child, self.tables[child].index(gfn)), found.level - 1, empty)
        return found

    def link(self, sptep: Sptep, child: int) -> None:
        """Make the entry point to the table in frame ``child``."""
        self.write(sptep, self.fmt.make_nonleaf_spte(child, self.tables[child].root.ad_disabled))

    def _new_table(self, root: Root, level: int, base_gfn: int) -> int:
        return self._add(
            root, level, base_gfn, np.full((1, SPTES_PER_TABLE), self.fmt.shadow_nonpresent_value, np.uint64)
        )

    def _add(self, root: Root, level: int, base_gfn: int, rows: np.ndarray) -> int:
        """Make tables of ``rows``, whose gfns follow each other, in frames that do. Returns the first frame."""
        first, size = self.next_pfn, SPTES_PER_TABLE * pages_per_level(level)
        self.next_pfn += len(rows)
        for row in range(len(rows)):
            self.tables[first + row] = PageTable(first + row, root, level, base_gfn + row * size, rows, row)
        self.runs[first] = self.tables[first]
        return first

    # ---- whole tables -----------------------------------------------------------------------------------------------

    def split(self, sptep: Sptep, nx_huge_pages: bool) -> None:
        """Replace a huge leaf by a table of its 512 parts. Source: mmu/tdp_mmu.c: tdp_mmu_split_huge_page(), v5.19."""
        table = self.tables[sptep.table]
        self.split_each(Stretch(table, sptep.entry, table.sptes[sptep.entry : sptep.entry + 1]), nx_huge_pages)

    def split_each(self, huge: Stretch, nx_huge_pages: bool) -> None:
        """The same for each of the huge leaves of a stretch."""
        parent, level = huge.table, huge.table.level - 1
        size = pages_per_level(level) << PAGE_SHIFT
        firsts = each(self.fmt.make_huge_page_split_spte, huge.words, parent.level, 0, nx_huge_pages)
        rows = firsts[:, np.newaxis] + np.arange(SPTES_PER_TABLE, dtype=np.uint64) * np.uint64(size)
        child = self._add(parent.root, level, huge.gfn, rows)
        linked = self.fmt.make_nonleaf_spte(child, parent.root.ad_disabled)
        huge.words[:] = np.uint64(linked) + (np.arange(len(rows), dtype=np.uint64) << np.uint64(PAGE_SHIFT))

    def unlink(self, sptep: Sptep) -> tuple[list[int], list[int]]:
        """Cut the entry off and freeze all that hangs below it. Returns the frames of the tables to free after a flush
        (until then a CPU may still walk through them), and the leaves that went.
        Source: mmu/tdp_mmu.c: handle_removed_pt(), v5.19."""
        spte, level = self.read(sptep), self.tables[sptep.table].level
        self.zap(sptep)
        if not self.fmt.is_shadow_present_pte(spte):
            return [], []
        if self.fmt.is_last_spte(spte, level):
            return [], [spte]
        child = self.fmt.spte_to_pfn(spte)
        freed, dropped = [child], []
        for index in np.flatnonzero(self.tables[child].sptes != self.fmt.shadow_nonpresent_value):
            below = self.unlink(Sptep(child, int(index)))
            freed += below[0]
            dropped += below[1]
        if self.tables[child].root.tdp_mmu:
            self.tables[child].sptes[:] = self.fmt.removed_spte
        return freed, dropped

    def free(self, frames: list[int]) -> None:
        """Give tables back. The caller has flushed. (An array goes with its last table: until then nothing in the rows of
        those that went is present.)"""
        for pfn in frames:
            del self.tables[pfn]
        self.runs = {pfn: first for pfn, first in self.runs.items() if self._lives(first)}

    def _lives(self, first: PageTable) -> bool:
        return any(pfn in self.tables for pfn in range(first.pfn, first.pfn + len(first.rows)))

    def zap_all(self) -> bool:
        """Forget every tree. Whether there was more than bare roots, so that the caller must flush."""
        linked = len(self.tables) > len(self.roots)
        self.tables.clear()
        self.runs.clear()
        self.roots.clear()
        return linked

    # ---- who maps these gfns ----------------------------------------------------------------------------------------

    def stretches(self, side: bool, start: int, end: int, levels: tuple[int, int] = LEVELS) -> Iterator[Stretch]:
        """Yield all entries of one side that map gfns of [start, end), or could, at these levels. Each walk over a slot is
        made of this. Source: mmu/tdp_iter.h: for_each_tdp_pte_min_level(), mmu/mmu.c: for_each_slot_rmap_range(),
        arch/x86/include/asm/kvm_host.h: struct kvm_rmap_head, v5.19."""
        for table in list(self.runs.values()):
            if table.root.tdp_mmu is side and levels[0] <= table.level <= levels[1]:
                words = table.rows.reshape(-1)
                first, last = max(table.index(start), 0), -(-(end - table.base_gfn) // pages_per_level(table.level))
                last = min(last, words.size)
                for at in range(first, last, AT_ONCE):
                    yield Stretch(table, at, words[at : min(at + AT_ONCE, last)])

    def leaves(
        self, side: bool, start: int, end: int, levels: tuple[int, int] = LEVELS
    ) -> Iterator[tuple[PageTable, np.ndarray]]:
        """Yield, for each table of one side with present leaves over gfns of [start, end), at these levels: the table, and
        the indices of those leaves."""
        for run, first, words in self.stretches(side, start, end, levels):
            for row in range(first // SPTES_PER_TABLE, -(-(first + words.size) // SPTES_PER_TABLE)):
                begin = max(first - row * SPTES_PER_TABLE, 0)
                table, last = self.tables.get(run.pfn + row), first + words.size - row * SPTES_PER_TABLE
                entries = run.rows[row, begin:last]
                present = np.flatnonzero(entries & np.uint64(SPTE_MMU_PRESENT_MASK))
                leaf = each(self.fmt.maps_page, entries[present], run.level)
                if table is not None and leaf.any():
                    yield table, begin + present[leaf]

    def every_leaf(self, start: int = 0, end: int = 1 << 52) -> Iterator[tuple[Sptep, PageTable, int, int]]:
        """Yield (place, table, first gfn, spte) of each present leaf of both sides that maps gfns of [start, end)."""
        for side in (RMAPS, TDP):
            for table, indices in list(self.leaves(side, start, end)):
                for index in indices.tolist():
                    yield Sptep(table.pfn, index), table, table.gfn(index), int(table.sptes[index])
