"""Ageing, and the other things that the host's memory management does to a guest's SPTEs.

All of them take mmu_lock for write in v5.19, and visit the rmap side and the TDP side; since v6.15 ageing takes no lock.
What they leave in the TLBs is the story of the book: *clear_young never flushes*.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np

from kvmbook.model.arrays import ALL_BITS, rewrite
from kvmbook.model.machine import Machine, Operation, step
from kvmbook.model.memslots import MemorySlot
from kvmbook.model.page_tables import RMAPS, TDP
from kvmbook.model.spte import PG_LEVEL_4K, SPTES_PER_TABLE, SpteFormat


def kvm_unmap_gfn_range(m: Machine, ranges: list[tuple[int, int]]) -> bool:
    """Zap the leaves over these ranges of gfns. Returns whether there were any.
    Source: mmu/mmu.c: kvm_unmap_gfn_range(), mmu/tdp_mmu.c: kvm_tdp_mmu_zap_leafs(), v5.19."""
    leaves = [leaf for start, end in ranges for leaf in m.page_tables.every_leaf(start, end)]
    for sptep, _, _, spte in leaves:
        m.tell_host(spte, 0)
        m.page_tables.zap(sptep)
    return bool(leaves)


@dataclass(eq=False)
class Notifier(Operation):
    """A call of the host's mm into KVM about the user memory behind the gfns of [start, end). ``ranges``: all gfns that lie
    on it. ``result``: young, or nothing."""

    actor: ClassVar[str] = "host mm"
    steps: ClassVar[tuple[str, ...]]

    start: int
    end: int
    ranges: list[tuple[int, int]] = field(default_factory=list, init=False)

    def begin(self, m: Machine) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"gfns from {self.start:#x} to {self.end:#x}: the range is empty or negative")
        self.ranges = m.memslots.on_same_memory(self.start, self.end)
        self.result = False
        self.todo = list(self.steps) if self.ranges else []

    @property
    def where(self) -> int:
        return self.start

    @step(lock="write")
    def kvm_flush_remote_tlbs(self, m: Machine) -> str | None:
        """Before unlocking, if there was a reason."""
        if not self.result:
            return "nothing was mapped"
        m.kvm_flush_remote_tlbs()
        return None


@dataclass(eq=False)
class Ageing(Notifier):
    """Clear, or ask for, what tells that pages were accessed. ``lockless``: without mmu_lock, see `Kernel`."""

    lockless: bool = field(default=False, init=False)

    def begin(self, m: Machine) -> None:
        super().begin(m)
        self.lockless = m.kernel.ages_without_lock

    def wants_lock(self, name: str) -> str | None:
        return None if self.lockless else super().wants_lock(name)


@dataclass
class Seen:
    """Young leaves that were read and not yet written: of the array of tables whose first lies in frame ``run``, from entry
    ``first`` on, which were ``young``, a bool array, and the ``sptes`` that were read."""

    run: int
    first: int
    young: np.ndarray
    sptes: np.ndarray


def young_leaves(m: Machine, side: bool, start: int, end: int) -> Iterator[Seen]:
    """Read one side's SPTEs over [start, end)."""
    for table, first, words in m.page_tables.stretches(side, start, end):
        sptes = words.copy()
        young = rewrite(partial(_whether_young, m.fmt, table.level), sptes).said
        if young.any():
            yield Seen(table.pfn, first, young.copy(), sptes)


def _whether_young(fmt: SpteFormat, level: int, spte: int) -> tuple[int, bool]:
    return spte, fmt.maps_page(spte, level) and fmt.is_accessed_spte(spte)


@dataclass(eq=False)
class ClearYoung(Ageing):
    """Age without a flush: a page that looks idle a little too early does no harm, the host reckons.
    Source: include/linux/mmu_notifier.h: clear_young() (of struct mmu_notifier_ops),
    virt/kvm/kvm_main.c: kvm_mmu_notifier_clear_young(), v5.19."""

    steps = ("kvm_age_gfn",)
    flushes: ClassVar[bool] = False

    seen: list[Seen] = field(default_factory=list, init=False)

    @step(lock="write", keeps=True)
    def kvm_age_gfn(self, m: Machine) -> str:
        """Huge pages are aged as one. Where it is not done at once, young SPTEs are only read, and written in a step of its
        own. Source: mmu/mmu.c, mmu/tdp_mmu.c: kvm_tdp_mmu_age_gfn_range(), v5.19."""
        apart = (RMAPS, TDP) if self.lockless else (TDP,) * m.kernel.ages_by_plain_store
        self.seen = [seen for gfns in self.ranges for side in apart for seen in young_leaves(m, side, *gfns)]
        at_once = [(side, *gfns) for side in (RMAPS, TDP) if side not in apart for gfns in self.ranges]
        aged = [m.update_leaves(*where, m.fmt.mmu_spte_age) for where in at_once]
        self.result = bool(self.seen) or any(aged)
        flush = self.result and self.flushes and m.kernel.clear_flush_young_flushes
        self.todo = ["kvm_tdp_mmu_age_spte"] * bool(self.seen) + ["kvm_flush_remote_tlbs"] * flush
        return "young" if self.result else "old"

    @step(lock="write", keeps=True)
    def kvm_tdp_mmu_age_spte(self, m: Machine) -> str | None:
        """A is cleared in what is there by now. A type-1 SPTE that has changed meanwhile is left alone; it still counts as
        young. (With a plain store, what was read is stored without its A, whatever is there by now.)
        Source: mmu/tdp_mmu.c, mmu/mmu.c: kvm_rmap_age_gfn_range(), v6.15."""
        failed = 0
        for seen in self.seen:
            if seen.run not in m.page_tables.runs:
                continue  # RCU keeps it, but nobody will look at it
            table = m.page_tables.runs[seen.run]
            words = table.rows.reshape(-1)[seen.first : seen.first + seen.young.size]
            changed = seen.young & (words != seen.sptes)
            if self.lockless:  # the host is not told which were dirty
                rewrite(lambda old: m.fmt.mmu_spte_age(old)[:2], words, seen.young & ~changed)
            else:
                m.update_words(words, table.level, m.fmt.mmu_spte_age, seen.young & ~changed)
            for at in np.flatnonzero(changed).tolist():
                if seen.run + (seen.first + at) // SPTES_PER_TABLE in m.page_tables.tables:
                    words[at] = self._aged_by_now(m, int(seen.sptes[at]), int(words[at]))
                    failed += 1
        return f"{failed} changed meanwhile" if failed else None

    def _aged_by_now(self, m: Machine, seen: int, now: int) -> int:
        """What becomes of an SPTE that was ``seen`` and is another ``now``."""
        if not self.lockless:
            m.tell_host(seen, m.fmt.mmu_spte_age(seen).spte)
            return m.fmt.mmu_spte_age(seen).spte
        return now & (ALL_BITS ^ m.fmt.shadow_accessed_mask) if m.fmt.spte_ad_enabled(seen) else now


@dataclass(eq=False)
class ClearFlushYoung(ClearYoung):
    """Age, and flush before unlocking if something was young (until v6.12).
    Source: virt/kvm/kvm_main.c: kvm_mmu_notifier_clear_flush_young(), v5.19."""

    flushes = True


@dataclass(eq=False)
class TestYoung(Ageing):
    """Ask, and change nothing. Source: virt/kvm/kvm_main.c: kvm_mmu_notifier_test_young(), v5.19."""

    steps = ("kvm_test_age_gfn",)

    @step(lock="write")
    def kvm_test_age_gfn(self, m: Machine) -> str:
        """Source: mmu/mmu.c, mmu/tdp_mmu.c: test_age_gfn(), v5.19."""
        self.result = any(
            m.any_leaf(side, *gfns, m.fmt.is_accessed_spte) for side in (RMAPS, TDP) for gfns in self.ranges
        )
        return "young" if self.result else "old"


@dataclass(eq=False)
class InvalidateRange(Notifier):
    """The host is about to change its mapping: zap, flush before unlocking, and until the end of the call make faults on
    these gfns retry. Also where no slot is it counts as active, for which publishing a memslot waits.
    Source: virt/kvm/kvm_main.c: kvm_mmu_notifier_invalidate_range_start(), kvm_mmu_notifier_invalidate_range_end(), v5.19."""

    steps: ClassVar[tuple[str, ...]] = ("kvm_unmap_gfn_range", "kvm_flush_remote_tlbs", "invalidate_range_end")

    to_walk: list[tuple[int, int]] | None = field(default=None, init=False)

    def begin(self, m: Machine) -> None:
        super().begin(m)
        self.todo = list(self.steps)

    def wants_lock(self, name: str) -> str | None:
        return super().wants_lock(name) if self.ranges else None

    @property
    def active(self) -> bool:
        """Whether it has begun. Source: include/linux/kvm_host.h: mn_active_invalidate_count (of struct kvm), v5.19."""
        return self.to_walk is not None

    @step(lock="write", keeps=True)
    def kvm_unmap_gfn_range(self, m: Machine) -> None:
        """Zap all of it, or the next ``pages_per_step`` pages: then the lock is let go, and the walk comes back."""
        size = m.pages_per_step or 1 << 52
        if self.to_walk is None:
            m.invalidating += self.ranges
            self.to_walk = [(at, min(at + size, end)) for start, end in self.ranges for at in range(start, end, size)]
        count = len(self.to_walk) if m.pages_per_step is None else 1
        now, self.to_walk = self.to_walk[:count], self.to_walk[count:]
        self.result = kvm_unmap_gfn_range(m, now) or self.result
        self.todo[:0] = ["tdp_mmu_iter_cond_resched", "kvm_unmap_gfn_range"] * bool(self.to_walk)

    @step(lock="write")
    def tdp_mmu_iter_cond_resched(self, m: Machine) -> str:
        """Let the lock go in mid-walk; what is owed by now is flushed before. Source: mmu/tdp_mmu.c, v5.19."""
        if not self.result or not m.kernel.yields_after_flush:
            return "a flush is owed" if self.result else "nothing is owed"
        m.kvm_flush_remote_tlbs()
        self.result = False
        return "flush before unlock"

    @step(lock="write")
    def invalidate_range_end(self, m: Machine) -> None:
        m.mmu_notifier_seq += bool(self.ranges)
        for gfns in self.ranges:
            m.invalidating.remove(gfns)


@dataclass(eq=False)
class ZapGfnRange(InvalidateRange):
    """KVM itself zaps the range, because it wants to map it anew, and makes faults retry meanwhile.
    Source: mmu/mmu.c: kvm_zap_gfn_range(), v5.19."""

    actor: ClassVar[str] = "KVM"
    active: ClassVar[bool] = False


@dataclass(eq=False)
class ChangePte(InvalidateRange):
    """The host puts another frame behind one page (KSM), between the beginning and the end of an invalidation: so
    change_pte() finds no SPTE that could follow. The next access faults.
    Source: virt/kvm/kvm_main.c: kvm_mmu_notifier_change_pte(), v5.19 (gone since v6.10)."""

    steps = ("kvm_unmap_gfn_range", "kvm_flush_remote_tlbs", "change_pte", "invalidate_range_end")

    slot: MemorySlot
    writable: bool

    def begin(self, m: Machine) -> None:
        super().begin(m)
        if (level := m.host.lookup(self.slot.hva(self.start)).level) > PG_LEVEL_4K:
            raise ValueError(
                f"gfn {self.start:#x} is part of a host page of level {level}; only 4K pages change this way"
            )

    @step()
    def change_pte(self, m: Machine) -> None:
        m.host.replace(self.slot.hva(self.start), self.writable)
