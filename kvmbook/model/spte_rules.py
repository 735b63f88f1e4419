"""What other releases made of the helpers of one SPTE: a subclass of `SpteFormat` for each release that changed some, and,
at the end, for rules that were wrong before v5.19.

A method that stands here is a rule that a release changed. Its docstring ends in the source, the release and the commits;
`Kernel.differs_from` quotes it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from kvmbook.model.arrays import ALL_BITS
from kvmbook.model.spte import (
    PT_WRITABLE_MASK,
    SHADOW_ACC_TRACK_SAVED_BITS_SHIFT,
    Changed,
    Flushed,
    SpteFormat,
)

VMX_EPT_SUPPRESS_VE_BIT = 1 << 63


class AsksForAllRoots(SpteFormat):
    """v6.4 to v6.8, until 2673dfb591a3 asked each root again."""

    def tdp_clear_dirty(self, spte: int, wrprot: bool = False) -> Changed:
        """the TDP MMU forgets that a page is dirty by D wherever KVM uses A/D bits, whatever the SPTE's type: a type-2
        SPTE, of a nested guest whose writes PML does not log, keeps its W, and its next writes leave no trace (to v6.8,
        CVE-2024-26990). Source: mmu/tdp_mmu.c: clear_dirty_gfn_range(), clear_dirty_pt_masked(), v6.4 (5982a5392663)."""
        if wrprot or not self.kvm_ad_enabled:
            return self.tdp_wrprot(spte)
        return Changed(spte & (ALL_BITS ^ self.shadow_dirty_mask), spte & self.shadow_dirty_mask != 0)


class SuppressVe(SpteFormat):
    """v6.10: no EPT entry makes the CPU raise a #VE, not even one that maps nothing."""

    @classmethod
    def with_masks(cls, fmt: SpteFormat) -> Self:
        """b63 is set in each EPT entry; in any format an entry that maps nothing is b63, and a frozen one has b63 too.
        Source: mmu/spte.h: SHADOW_NONPRESENT_VALUE, FROZEN_SPTE, mmu/spte.c: kvm_mmu_set_ept_masks(), v6.10 (7fa5e2929198).
        """
        ve = VMX_EPT_SUPPRESS_VE_BIT if fmt.shadow_acc_track_mask else 0
        present, mmio = fmt.shadow_present_mask | ve, fmt.shadow_mmio_mask | ve
        with_ve = replace(fmt, shadow_present_mask=present, shadow_mmio_mask=mmio)
        return super().with_masks(replace(with_ve, shadow_nonpresent_value=VMX_EPT_SUPPRESS_VE_BIT))


@dataclass(frozen=True)
class SoftwareAd(SuppressVe):
    """v6.13: each SPTE has A and D, and where hardware keeps none, KVM does. ``has_ad_bits``: hardware does."""

    has_ad_bits: bool = True

    @classmethod
    def with_masks(cls, fmt: SpteFormat) -> Self:
        """A and D have masks on every host: on EPT without A/D bits, b8 and b9 are software's.
        Source: mmu/spte.c: kvm_mmu_set_ept_masks(), v6.13 (53510b912518, 3835819fb1b3)."""
        accessed, dirty = fmt.shadow_accessed_mask or 1 << 8, fmt.shadow_dirty_mask or 1 << 9
        masks = super().with_masks(replace(fmt, shadow_accessed_mask=accessed, shadow_dirty_mask=dirty))
        return replace(masks, has_ad_bits=fmt.kvm_ad_enabled)

    @property
    def kvm_ad_enabled(self) -> bool:
        """whether KVM uses A/D bits is a flag of its own; before, it was whether A has a mask.
        Source: mmu/spte.c, v6.13 (a5da5dde4ba4)."""
        return self.has_ad_bits

    def spte_shadow_accessed_mask(self, spte: int) -> int:
        """an SPTE of any type has an A bit: its page is young if that is set; a fault sets it, marking for access tracking
        clears it. Source: mmu/spte.h: is_accessed_spte(), mmu/spte.c: mark_spte_for_access_track(), v6.13 (7971801b5618).
        """
        return self.shadow_accessed_mask

    def spte_shadow_dirty_mask(self, spte: int) -> int:
        """an SPTE of any type has a D bit. Source: mmu/spte.c: make_spte(), v6.13 (3835819fb1b3)."""
        return self.shadow_dirty_mask

    def dirty_with_w(self, spte: int, old_spte: int) -> int:
        """W always brings D; before, not to an SPTE that is made over one with W=1.
        Source: mmu/spte.c: make_spte(), v6.13 (cc7ed3358e41, 0387d79e24d6)."""
        return self.shadow_dirty_mask

    def skips_unsync(self, old_spte: int, level: int) -> bool:
        """the write-tracking look-up is skipped over a leaf with W=1; before, over a table too (cured in stable v6.11 and
        v6.12, too). Source: mmu/spte.c: make_spte(), v6.13 (2867eb782cf7)."""
        return self.is_last_spte(old_spte, level) and self.is_writable_pte(old_spte)

    def mmu_spte_update(self, old: int, new: int) -> bool:
        """the legacy MMU owes a flush iff MMU-writable goes, not for W, A or D: so protecting a page for the dirty log asks
        for none. Source: mmu/spte.h: leaf_spte_change_needs_tlb_flush(), mmu/mmu.c, v6.13 (081976992f43, c9b625625ba3,
        b7ed46b201a4, 856cf4a60cff)."""
        self.check_spte_writable_invariants(new)
        return self.may_replace(old, new) and self.is_mmu_writable_spte(old) and not self.is_mmu_writable_spte(new)


class AtomicTypeOne(SoftwareAd):
    """v6.15: ageing holds no lock."""

    def spte_has_volatile_bits(self, spte: int) -> bool:
        """an SPTE of type 1 is always exchanged atomically, and A alone is no reason to.
        Source: mmu/spte.c: spte_needs_atomic_update(), v6.15 (928c54b1c4ca, 61d65f2dc766)."""
        if not self.is_writable_pte(spte) and self.is_mmu_writable_spte(spte):
            return True
        return not self.spte_ad_enabled(spte) or (self.is_writable_pte(spte) and spte & self.shadow_dirty_mask == 0)


# ---- before v5.19, one rule each -------------------------------------------------------------------------------------


class GuardAsksForW(SpteFormat):
    """v3.4: the legacy MMU, before there was a bit for "MMU-writable"."""

    def spte_write_protect(self, spte: int, pt_protect: bool = False) -> Flushed:
        """guarding a page table skips an SPTE with W=0, in the legacy MMU, as if no CPU could write then.
        Source: arch/x86/kvm/mmu.c: rmap_write_protect(), v3.4 (6dbf79e7164e)."""
        return super().spte_write_protect(spte, pt_protect) if self.is_writable_pte(spte) else Flushed(spte, False)


class TdpGuardAsksForW(SpteFormat):
    """v5.10 to v5.16: the same in the TDP MMU."""

    def tdp_write_protect(self, spte: int) -> Changed:
        """guarding a page table skips an SPTE with W=0, in the TDP MMU, and leaves it MMU-writable.
        Source: mmu/tdp_mmu.c: write_protect_gfn(), v5.10 (46044f72c382)."""
        return super().tdp_write_protect(spte) if self.is_writable_pte(spte) else Changed(spte, False)


class SavesW(SpteFormat):
    """No release; to see why W is not saved with R and X."""

    def mark_spte_for_access_track(self, spte: int) -> int:
        """access tracking saves W beside R and X, and an access of any kind brings it back (in no release; to see why).
        Source: mmu/spte.c: mark_spte_for_access_track(), v4.11 (f160c7b7bb32)."""
        marked = super().mark_spte_for_access_track(spte & (ALL_BITS ^ PT_WRITABLE_MASK))
        tracks = not self.spte_ad_enabled(spte) and not self.is_access_track_spte(spte)
        saved = (spte & PT_WRITABLE_MASK) << SHADOW_ACC_TRACK_SAVED_BITS_SHIFT
        return marked | saved if tracks else super().mark_spte_for_access_track(spte)

    def restore_acc_track_spte(self, spte: int) -> int:
        saved = spte & PT_WRITABLE_MASK << SHADOW_ACC_TRACK_SAVED_BITS_SHIFT
        return super().restore_acc_track_spte(spte ^ saved) | saved >> SHADOW_ACC_TRACK_SAVED_BITS_SHIFT


class WBringsD(SpteFormat):
    """One rule of v6.13 alone."""

    dirty_with_w = SoftwareAd.dirty_with_w


class OneTypeForAll(SpteFormat):
    """To v5.3: no SPTE is of type 2."""

    def tdp_ad_type(self, ad_disabled: bool, guest_mode: bool, pml: bool) -> int:
        """an SPTE of a nested guest is of type 0, so that D tells of its writes, also where PML notes that guest's own
        addresses. Source: mmu/spte.c: make_spte(), v5.3 (1f4e5fc83a42)."""
        return super().tdp_ad_type(ad_disabled, guest_mode=False, pml=pml)
