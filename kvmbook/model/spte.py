"""One 64-bit shadow page table entry (SPTE): its bits, and what KVM asks and does of them.

Every helper is a plain function of one word, as in the kernel; `each` asks one of a whole array.

Names are the kernel's. Sources are files below ``arch/x86/kvm/mmu`` of Linux v5.19 unless a docstring says otherwise.
"Present" without more words means MMU-present (bit 11): KVM's own mark, which hardware ignores.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple, Self

from kvmbook.model.arrays import ALL_BITS, SPTE_BASE_ADDR_MASK

PG_LEVEL_4K, PG_LEVEL_2M, PG_LEVEL_1G = 1, 2, 3
KVM_MAX_HUGEPAGE_LEVEL = PG_LEVEL_1G
PAGE_SHIFT = 12
SPTES_PER_TABLE = 512

ACC_EXEC_MASK, ACC_WRITE_MASK, ACC_USER_MASK = 1, 2, 4
ACC_ALL = 7

READ_MASK = 1 << 0  # EPT: readable. NPT and shadow: present, which there means readable too
PT_WRITABLE_MASK = 1 << 1
PT_PAGE_SIZE_MASK = 1 << 7
SPTE_MMU_PRESENT_MASK = 1 << 11
SPTE_TDP_AD_MASK = 3 << 52
SPTE_TDP_AD_ENABLED_MASK = 0 << 52
SPTE_TDP_AD_DISABLED_MASK = 1 << 52
SPTE_TDP_AD_WRPROT_ONLY_MASK = 2 << 52
EPT_RX_MASK = 0b101
EPT_RWX_MASK = 0b111
SHADOW_ACC_TRACK_SAVED_BITS_SHIFT = 54
SHADOW_ACC_TRACK_SAVED_MASK = EPT_RX_MASK << SHADOW_ACC_TRACK_SAVED_BITS_SHIFT
REMOVED_SPTE = 0x5A0  # the TDP MMU's "frozen, hands off"


def pages_per_level(level: int) -> int:
    """Return how many 4K pages one entry of a table at ``level`` (1 = 4K, 2 = 2M, 3 = 1G) covers.
    Source: arch/x86/include/asm/kvm_host.h: KVM_PAGES_PER_HPAGE(), KVM_MAX_HUGEPAGE_LEVEL,
    arch/x86/include/asm/pgtable_types.h: PG_LEVEL_4K, v5.19."""
    return 1 << (9 * (level - 1))


class Flushed(NamedTuple):
    """A new SPTE, and whether the helper asks its caller for a TLB flush."""

    spte: int
    flush: bool


class Changed(NamedTuple):
    """A new SPTE, and whether that counts as a change."""

    spte: int
    changed: bool


class Aged(NamedTuple):
    """A new SPTE, whether the page was young, and whether the host is told that the page is dirty."""

    spte: int
    young: bool
    pfn_dirty: bool


class Made(NamedTuple):
    """A new leaf, and whether it stayed read-only because the gfn is write-tracked."""

    spte: int
    wrprot: bool


class Rights(NamedTuple):
    """What hardware allows through an SPTE."""

    read: bool
    write: bool
    execute: bool

    def allow(self, access: str) -> bool:
        """Whether they suffice for ``access``: "read", "write" or "fetch"."""
        return self[ACCESSES.index(access)]


ACCESSES = ("read", "write", "fetch")


@dataclass(frozen=True)
class SpteFormat:
    """The masks that KVM computes once per host (`kvm_mmu_reset_all_pte_masks`, `kvm_mmu_set_ept_masks`), and all the
    helpers that read and write SPTEs through them.

    A kernel release that changes a helper is a subclass; see `kernel`.
    Source: mmu/spte.c: kvm_mmu_reset_all_pte_masks(), kvm_mmu_set_ept_masks(), shadow_host_writable_mask,
    shadow_mmu_writable_mask, v5.19.
    """

    name: str
    shadow_user_mask: int = 1 << 2  # by default as kvm_mmu_reset_all_pte_masks() has them
    shadow_accessed_mask: int = 1 << 5
    shadow_dirty_mask: int = 1 << 6
    shadow_nx_mask: int = 1 << 63
    shadow_x_mask: int = 0
    shadow_present_mask: int = READ_MASK
    shadow_acc_track_mask: int = 0
    shadow_host_writable_mask: int = 1 << 9
    shadow_mmu_writable_mask: int = 1 << 10
    shadow_memtype_mask: int = 0
    shadow_mmio_value: int = 1 << 51 | READ_MASK
    shadow_mmio_mask: int = 1 << 51 | READ_MASK
    shadow_nonpresent_value: int = 0  # what an entry is that maps nothing

    # ---- the formats ------------------------------------------------------------------------------------------------

    @classmethod
    def with_masks(cls, fmt: SpteFormat) -> Self:
        """These helpers over the masks of ``fmt``, and what their release made of them."""
        return cls(**{field.name: getattr(fmt, field.name) for field in fields(SpteFormat)})

    @classmethod
    def npt(cls) -> SpteFormat:
        """Return AMD's nested paging format, which always has A and D bits.
        Source: mmu/spte.c: kvm_mmu_reset_all_pte_masks(), v5.19."""
        return cls.with_masks(SpteFormat("NPT"))

    @classmethod
    def shadow(cls) -> SpteFormat:
        """Return the format of shadow paging: the guest's own x86-64 format.
        Source: mmu/spte.c: kvm_mmu_reset_all_pte_masks(), v5.19."""
        return cls.with_masks(SpteFormat("shadow paging"))

    @classmethod
    def ept(cls, ad_bits: bool = True, exec_only: bool = True) -> SpteFormat:
        """Return Intel's EPT format. ``ad_bits=False``: a CPU before Haswell, or ``kvm_intel.eptad=0``.
        Source: mmu/spte.c: kvm_mmu_set_ept_masks(), v5.19."""
        masks = SpteFormat(
            name="EPT with A/D bits" if ad_bits else "EPT without A/D bits",
            shadow_user_mask=READ_MASK,
            shadow_accessed_mask=1 << 8 if ad_bits else 0,
            shadow_dirty_mask=1 << 9 if ad_bits else 0,
            shadow_nx_mask=0,
            shadow_x_mask=1 << 2,
            shadow_present_mask=0 if exec_only else READ_MASK,
            shadow_acc_track_mask=EPT_RWX_MASK,
            shadow_host_writable_mask=1 << 57,
            shadow_mmu_writable_mask=1 << 58,
            shadow_memtype_mask=6 << 3 | 1 << 6,
            shadow_mmio_value=0b110,
            shadow_mmio_mask=0b111,
        )
        return cls.with_masks(masks)

    # ---- predicates -------------------------------------------------------------------------------------------------

    @property
    def kvm_ad_enabled(self) -> bool:
        """Whether KVM uses A/D bits at all. Source: mmu/spte.h, v5.19."""
        return self.shadow_accessed_mask != 0

    def is_shadow_present_pte(self, spte: int) -> bool:
        """Whether the SPTE maps something, a page or a table. Source: mmu/spte.h, v5.19."""
        return spte & SPTE_MMU_PRESENT_MASK != 0

    def is_removed_spte(self, spte: int) -> bool:
        """Whether the TDP MMU has frozen the entry. Source: mmu/spte.h, v5.19."""
        return spte == self.removed_spte

    @property
    def removed_spte(self) -> int:
        """What the TDP MMU freezes an entry with. Source: mmu/spte.h: REMOVED_SPTE, v5.19."""
        return self.shadow_nonpresent_value | REMOVED_SPTE

    def is_mmio_spte(self, spte: int) -> bool:
        """Whether the entry caches "no memory here". Such an entry is never MMU-present. Source: mmu/spte.h, v5.19."""
        return not self.is_shadow_present_pte(spte) and spte & self.shadow_mmio_mask == self.shadow_mmio_value

    def is_writable_pte(self, spte: int) -> bool:
        """Whether hardware lets the guest write through it. False does *not* mean that no CPU can write: a TLB may
        remember more. Source: mmu/spte.h, v5.19."""
        return spte & PT_WRITABLE_MASK != 0

    def is_mmu_writable_spte(self, spte: int) -> bool:
        """Whether KVM may set W again without mmu_lock. This is the bit that tells the truth about TLBs: if it is
        clear, no TLB may hold a writable entry.
        Source: mmu/spte.h (before v5.18: spte_can_locklessly_be_made_writable), v5.19."""
        return spte & self.shadow_mmu_writable_mask != 0

    def is_large_pte(self, spte: int) -> bool:
        """Whether the entry has the PS bit, a leaf above level 1. Source: mmu/spte.h, v5.19."""
        return spte & PT_PAGE_SIZE_MASK != 0

    def is_last_spte(self, spte: int, level: int) -> bool:
        """Whether a present entry of a table at ``level`` maps a page and not a table. Source: mmu/spte.h, v5.19."""
        return level == PG_LEVEL_4K or self.is_large_pte(spte)

    def maps_page(self, spte: int, level: int) -> bool:
        """Whether an entry of a table at ``level`` is a present leaf: what a pass looks for.
        Source: mmu/tdp_mmu.c: tdp_root_for_each_leaf_pte(), v5.19."""
        return self.is_shadow_present_pte(spte) and self.is_last_spte(spte, level)

    def is_executable_pte(self, spte: int) -> bool:
        """Whether hardware lets the guest fetch instructions through it. Source: mmu/spte.h, v5.19."""
        return spte & (self.shadow_x_mask | self.shadow_nx_mask) == self.shadow_x_mask

    def spte_ad_enabled(self, spte: int) -> bool:
        """Whether hardware keeps A and D in this SPTE: types 0 and 2. Source: mmu/spte.h, v5.19."""
        return spte & SPTE_TDP_AD_MASK != SPTE_TDP_AD_DISABLED_MASK

    def spte_ad_need_write_protect(self, spte: int) -> bool:
        """Whether dirty logging must use W, and never D, for this SPTE: types 1 and 2. Source: mmu/spte.h, v5.19."""
        return spte & SPTE_TDP_AD_MASK != SPTE_TDP_AD_ENABLED_MASK

    def spte_shadow_accessed_mask(self, spte: int) -> int:
        """The mask of this SPTE's A bit, 0 if it has none. Source: mmu/spte.h, v5.19."""
        return self.shadow_accessed_mask if self.spte_ad_enabled(spte) else 0

    def spte_shadow_dirty_mask(self, spte: int) -> int:
        """The mask of this SPTE's D bit, 0 if it has none. Source: mmu/spte.h, v5.19."""
        return self.shadow_dirty_mask if self.spte_ad_enabled(spte) else 0

    def is_access_track_spte(self, spte: int) -> bool:
        """Whether the SPTE was made inaccessible to notice the next access: type 1 with R = W = X = 0.
        Source: mmu/spte.h, v5.19."""
        return not self.spte_ad_enabled(spte) and spte & self.shadow_acc_track_mask == 0

    def is_accessed_spte(self, spte: int) -> bool:
        """Whether the page counts as young. Source: mmu/spte.h, v5.19."""
        accessed_mask = self.spte_shadow_accessed_mask(spte)
        return spte & accessed_mask != 0 if accessed_mask else not self.is_access_track_spte(spte)

    def is_dirty_spte(self, spte: int) -> bool:
        """Whether the page may have been written through this SPTE: D where there is a D bit, else W.
        Source: mmu/spte.h, v5.19."""
        dirty_mask = self.spte_shadow_dirty_mask(spte)
        return spte & dirty_mask != 0 if dirty_mask else self.is_writable_pte(spte)

    def spte_has_volatile_bits(self, spte: int) -> bool:
        """Whether the SPTE may change outside mmu_lock, so that an update must be an atomic exchange.
        Source: mmu/spte.c, v5.19."""
        if not self.is_writable_pte(spte) and self.is_mmu_writable_spte(spte):
            return True
        if self.is_access_track_spte(spte):
            return True
        if not self.spte_ad_enabled(spte):
            return False
        cpu_may_set_dirty = self.is_writable_pte(spte) and spte & self.shadow_dirty_mask == 0
        return spte & self.shadow_accessed_mask == 0 or cpu_may_set_dirty

    def check_spte_writable_invariants(self, spte: int) -> None:
        """Assert that a present SPTE has a legal (HW, MW, W) triple: 1,1,1 or 1,1,0 or 1,0,0 or 0,0,0.

        Raises AssertionError if the chain W -> MMU-writable -> host-writable is broken.
        Source: mmu/spte.h (there a warning), v5.19.
        """
        if self.is_shadow_present_pte(spte):
            host_writable = spte & self.shadow_host_writable_mask != 0
            assert host_writable or not self.is_mmu_writable_spte(spte), self._broken_chain(spte)
            assert self.is_mmu_writable_spte(spte) or not self.is_writable_pte(spte), self._broken_chain(spte)

    def _broken_chain(self, spte: int) -> str:
        masks = {"HW": self.shadow_host_writable_mask, "MW": self.shadow_mmu_writable_mask, "W": PT_WRITABLE_MASK}
        triple = ", ".join(f"{name}={int(spte & mask != 0)}" for name, mask in masks.items())
        rule = "W needs MMU-writable, MMU-writable needs host-writable"
        return f"SPTE {spte:#018x} ({self.name}) has {triple}: {rule}"

    def hardware_rights(self, spte: int) -> Rights:
        """What a CPU reads out of the SPTE; all false if hardware finds it not present."""
        read = spte & READ_MASK != 0
        walks = read or spte & self.shadow_acc_track_mask != 0
        return Rights(read, walks and self.is_writable_pte(spte), walks and self.is_executable_pte(spte))

    def spte_to_pfn(self, spte: int) -> int:
        """The host frame that the SPTE points to. Source: mmu/spte.h, v5.19."""
        return (spte & SPTE_BASE_ADDR_MASK) >> PAGE_SHIFT

    # ---- access tracking --------------------------------------------------------------------------------------------

    def mark_spte_for_access_track(self, spte: int) -> int:
        """Make the next access visible: clear A, or, on a type-1 SPTE, save R and X and clear R, W and X.

        W is not saved. It comes back only on a write fault, because MMU-writable says that it may.
        Raises AssertionError if R and X were saved already. Source: mmu/spte.c, v5.19.
        """
        if self.spte_ad_enabled(spte):
            return spte & (ALL_BITS ^ self.shadow_accessed_mask)
        if self.is_access_track_spte(spte):
            return spte
        self.check_spte_writable_invariants(spte)
        assert spte & SHADOW_ACC_TRACK_SAVED_MASK == 0, (
            "an accessible SPTE has saved R or X bits: it was marked for access tracking twice"
        )
        saved = (spte & EPT_RX_MASK) << SHADOW_ACC_TRACK_SAVED_BITS_SHIFT
        return (spte | saved) & (ALL_BITS ^ (self.shadow_acc_track_mask | self.spte_shadow_accessed_mask(spte)))

    def restore_acc_track_spte(self, spte: int) -> int:
        """Put the saved R and X back. W stays 0, always. Source: mmu/spte.h, v5.19."""
        saved = (spte >> SHADOW_ACC_TRACK_SAVED_BITS_SHIFT) & EPT_RX_MASK
        return (spte & (ALL_BITS ^ (self.shadow_acc_track_mask | SHADOW_ACC_TRACK_SAVED_MASK))) | saved

    def mmu_spte_age(self, spte: int) -> Aged:
        """Age one leaf; an old one is left alone. Whether to flush is not decided here.

        ``pfn_dirty`` is about the host's ``struct page``, never about KVM's dirty bitmap.
        Source: mmu/mmu.c: mmu_spte_age(), mmu/tdp_mmu.c: age_gfn_range(), v5.19.
        """
        young = self.is_accessed_spte(spte)
        pfn_dirty = young and not self.spte_ad_enabled(spte) and self.is_writable_pte(spte)
        return Aged(self.mark_spte_for_access_track(spte) if young else spte, young, pfn_dirty)

    def make_spte_executable(self, spte: int) -> int:
        """Add execute permission, also to one that is being access-tracked. Source: mmu/spte.c, v5.19."""
        return self.modify_spte_protections(spte, self.shadow_x_mask, self.shadow_nx_mask)

    def modify_spte_protections(self, spte: int, set_bits: int, clear_bits: int) -> int:
        """Set and clear rights, also of one that is being access-tracked. Source: mmu/spte.c, v6.13."""
        tracked = self.is_access_track_spte(spte)
        if tracked:
            spte = self.restore_acc_track_spte(spte)
        spte = (spte | set_bits) & (ALL_BITS ^ clear_bits)
        return self.mark_spte_for_access_track(spte) if tracked else spte

    # ---- updates of a present leaf, and the rmap side ---------------------------------------------------------------

    def mmu_spte_update(self, old: int, new: int) -> bool:
        """Whether the legacy MMU owes a flush after replacing the present leaf ``old`` (the value exchanged out) by ``new``.

        Note the first reason to flush: MMU-writable of *old* and W of *new*. An SPTE that was already W=0 says
        "flush" too, if a caller gets that far; see `spte_write_protect` for one that does not.
        Raises AssertionError for an illegal ``new`` and for another pfn. Source: mmu/mmu.c, v5.19 (to v6.12).
        """
        self.check_spte_writable_invariants(new)
        if not self.may_replace(old, new):
            return False
        protected = self.is_mmu_writable_spte(old) and not self.is_writable_pte(new)
        aged = self.is_accessed_spte(old) and not self.is_accessed_spte(new)
        cleaned = self.is_dirty_spte(old) and not self.is_dirty_spte(new)
        return protected or aged or cleaned

    def may_replace(self, old: int, new: int) -> bool:
        """Whether ``old`` is a present leaf. Raises AssertionError if ``new`` then has another pfn."""
        present = self.is_shadow_present_pte(old)
        assert not present or self.spte_to_pfn(old) == self.spte_to_pfn(new), (
            "a present leaf was replaced by one with another pfn: it must be zapped first"
        )
        return present

    def spte_write_protect(self, spte: int, pt_protect: bool = False) -> Flushed:
        """Clear W, and with ``pt_protect`` also MMU-writable.

        ``pt_protect=False`` is dirty logging's way, and its early return is the hole of the seed bug: an SPTE with
        W=0 is skipped and asks for no flush, whatever a TLB still holds. ``pt_protect=True`` guards a guest's page
        table and looks at MMU-writable. Source: mmu/mmu.c, v5.19.
        """
        if not self.is_writable_pte(spte) and not (pt_protect and self.is_mmu_writable_spte(spte)):
            return Flushed(spte, False)
        new = spte & (ALL_BITS ^ PT_WRITABLE_MASK)
        if pt_protect:
            new = new & (ALL_BITS ^ self.shadow_mmu_writable_mask)
        return Flushed(new, self.mmu_spte_update(spte, new))

    def spte_clear_dirty(self, spte: int) -> Flushed:
        """Clear D. A W=0, MMU-writable SPTE asks for a flush even if D was clear, as `mmu_spte_update` has it.
        Raises AssertionError for a type-1 SPTE, which has no D. Source: mmu/mmu.c, v5.19."""
        assert self.spte_ad_enabled(spte), "clearing D of a type-1 SPTE: it has none, it must be write-protected"
        new = spte & (ALL_BITS ^ self.shadow_dirty_mask)
        return Flushed(new, self.mmu_spte_update(spte, new))

    def spte_wrprot_for_clear_dirty(self, spte: int) -> Changed:
        """Test and clear W, without a look at MMU-writable. Source: mmu/mmu.c, v5.19."""
        return Changed(spte & (ALL_BITS ^ PT_WRITABLE_MASK), self.is_writable_pte(spte))

    def rmap_clear_dirty(self, spte: int) -> Flushed:
        """Forget that the page is dirty, by W or by D as the SPTE's type asks.
        Source: mmu/mmu.c: __rmap_clear_dirty(), v5.19."""
        if self.spte_ad_need_write_protect(spte):
            new, was_writable = self.spte_wrprot_for_clear_dirty(spte)
            return Flushed(new, was_writable)
        return self.spte_clear_dirty(spte)

    def kvm_mmu_changed_pte_notifier_make_spte(self, spte: int, pfn: int) -> int:
        """Point the SPTE at the host's new, read-only page ``pfn``. Source: mmu/spte.c, v5.19."""
        gone = SPTE_BASE_ADDR_MASK | PT_WRITABLE_MASK | self.shadow_host_writable_mask | self.shadow_mmu_writable_mask
        return self.mark_spte_for_access_track(spte & (ALL_BITS ^ gone) | pfn << PAGE_SHIFT)

    # ---- the same jobs in the TDP MMU: present leaves only; its walkers choose those ---------------------------------

    def tdp_wrprot(self, spte: int) -> Changed:
        """Clear W where it is set. Source: mmu/tdp_mmu.c: wrprot_gfn_range(), v5.19."""
        return Changed(spte & (ALL_BITS ^ PT_WRITABLE_MASK), self.is_writable_pte(spte))

    def tdp_clear_dirty(self, spte: int, wrprot: bool = False) -> Changed:
        """Clear D of a type-0 SPTE, W of another; with ``wrprot``, W of each.
        Source: mmu/tdp_mmu.c: clear_dirty_gfn_range(), clear_dirty_pt_masked(), v5.19."""
        if wrprot or self.spte_ad_need_write_protect(spte):
            return self.tdp_wrprot(spte)
        return Changed(spte & (ALL_BITS ^ self.shadow_dirty_mask), spte & self.shadow_dirty_mask != 0)

    def tdp_write_protect(self, spte: int) -> Changed:
        """Clear W and MMU-writable, to guard a guest's page table. Source: mmu/tdp_mmu.c: write_protect_gfn(), v5.19."""
        mask = PT_WRITABLE_MASK | self.shadow_mmu_writable_mask
        return Changed(spte & (ALL_BITS ^ mask), spte & mask != 0)

    # ---- building entries -------------------------------------------------------------------------------------------

    def tdp_ad_type(self, ad_disabled: bool, guest_mode: bool, pml: bool) -> int:
        """The type bits of a leaf: 1 where the table's role has no A/D bits, 2 for an L2 guest under PML, else 0."""
        if ad_disabled:
            return SPTE_TDP_AD_DISABLED_MASK
        return SPTE_TDP_AD_WRPROT_ONLY_MASK if pml and guest_mode else SPTE_TDP_AD_ENABLED_MASK

    def make_spte(
        self,
        pfn: int,
        *,
        level: int = PG_LEVEL_4K,
        ad_type: int = SPTE_TDP_AD_ENABLED_MASK,
        access: int = ACC_ALL,
        old_spte: int = 0,
        prefetch: bool = False,
        host_writable: bool = True,
        write_tracked: bool = False,
        nx_huge_pages: bool = False,
    ) -> Made:
        """Build a leaf for host frame ``pfn``.

        ``access`` is a sum of ACC_EXEC_MASK, ACC_WRITE_MASK and ACC_USER_MASK (in EPT: read). ``ad_type`` comes from
        `tdp_ad_type`. ``write_tracked``: KVM watches the gfn as a guest page table.
        Over an ``old_spte`` with W=1 the last steps are skipped: such an SPTE gets W=1 and **D=0** (to v6.12).
        Raises AssertionError for an SPTE that would allow nothing. Source: mmu/spte.c, v5.19.
        """
        if access | self.shadow_present_mask == self.shadow_nonpresent_value:
            raise AssertionError("make_spte: no access asked for, and no present bit: the SPTE would be invisible")
        spte = SPTE_MMU_PRESENT_MASK | ad_type | self.shadow_present_mask | self.shadow_memtype_mask
        if not prefetch:
            spte |= self.spte_shadow_accessed_mask(spte)
        if level > PG_LEVEL_4K:
            spte |= PT_PAGE_SIZE_MASK
            if nx_huge_pages:
                access &= ~ACC_EXEC_MASK
        spte |= self.shadow_x_mask if access & ACC_EXEC_MASK else self.shadow_nx_mask
        if access & ACC_USER_MASK:
            spte |= self.shadow_user_mask
        if host_writable:
            spte |= self.shadow_host_writable_mask
        spte |= pfn << PAGE_SHIFT
        wrprot = False
        if access & ACC_WRITE_MASK and host_writable:
            wrprot = write_tracked and not self.skips_unsync(old_spte, level)
            if not wrprot:
                spte |= PT_WRITABLE_MASK | self.shadow_mmu_writable_mask | self.dirty_with_w(spte, old_spte)
        return Made(self.mark_spte_for_access_track(spte) if prefetch else spte, wrprot)

    def skips_unsync(self, old_spte: int, level: int) -> bool:
        """Whether make_spte() may skip the write-tracking look-up."""
        return self.is_writable_pte(old_spte)

    def dirty_with_w(self, spte: int, old_spte: int) -> int:
        """The D that make_spte() sets with W: none over an SPTE with W=1, as the look-up and this were skipped together."""
        return 0 if self.is_writable_pte(old_spte) else self.spte_shadow_dirty_mask(spte)

    def make_nonleaf_spte(self, table_pfn: int, ad_disabled: bool) -> int:
        """Build the entry for a child table; it grants every right. Source: mmu/spte.c, v5.19."""
        spte = SPTE_MMU_PRESENT_MASK | table_pfn << PAGE_SHIFT | self.shadow_present_mask | PT_WRITABLE_MASK
        spte |= self.shadow_user_mask | self.shadow_x_mask
        return spte | (SPTE_TDP_AD_DISABLED_MASK if ad_disabled else self.shadow_accessed_mask)

    def make_huge_page_split_spte(
        self, huge_spte: int, huge_level: int, index: int, nx_huge_pages: bool = False
    ) -> int:
        """Child ``index`` of the 512 that a huge SPTE is split into. It inherits everything: an access-tracked one has 512
        access-tracked children. Source: mmu/spte.c, v5.19."""
        child_level = huge_level - 1
        child = huge_spte | index * pages_per_level(child_level) << PAGE_SHIFT
        if child_level > PG_LEVEL_4K:
            return child
        child &= ALL_BITS ^ PT_PAGE_SIZE_MASK
        return self.make_spte_executable(child) if nx_huge_pages else child

    def make_huge_spte(self, small_spte: int, level: int, nx_huge_pages: bool = False) -> int:
        """The huge SPTE of which ``small_spte`` could be a part; in all but address and size as that is.
        Source: mmu/spte.c, v6.13 (13e2e4f62a4b)."""
        huge = (small_spte | PT_PAGE_SIZE_MASK) & (ALL_BITS ^ (pages_per_level(level) - 1 << PAGE_SHIFT))
        return self.modify_spte_protections(huge, self.shadow_nx_mask, self.shadow_x_mask) if nx_huge_pages else huge
