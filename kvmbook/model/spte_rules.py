"""What later releases made of the helpers of one SPTE: a subclass of `SpteFormat` for each release that changed some.

A method that stands here is a rule that a release changed. Its docstring ends in the source, the release and the commits;
`Kernel.differs_from` quotes it.
"""

from __future__ import annotations

from kvmbook.model.arrays import ALL_BITS
from kvmbook.model.spte import Changed, SpteFormat


class AsksForAllRoots(SpteFormat):
    """v6.4 to v6.8, until 2673dfb591a3 asked each root again."""

    def tdp_clear_dirty(self, spte: int, wrprot: bool = False) -> Changed:
        """the TDP MMU forgets that a page is dirty by D wherever KVM uses A/D bits, whatever the SPTE's type: a type-2
        SPTE, of a nested guest whose writes PML does not log, keeps its W, and its next writes leave no trace (to v6.8,
        CVE-2024-26990). Source: mmu/tdp_mmu.c: clear_dirty_gfn_range(), clear_dirty_pt_masked(), v6.4 (5982a5392663)."""
        if wrprot or not self.kvm_ad_enabled:
            return self.tdp_wrprot(spte)
        return Changed(spte & (ALL_BITS ^ self.shadow_dirty_mask), spte & self.shadow_dirty_mask != 0)
