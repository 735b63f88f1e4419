"""The CPU that the guest runs on, and how KVM was told to use it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from kvmbook.model.spte import SpteFormat

PML_ENTITY_NUM = 512


@dataclass(frozen=True)
class Hardware:
    """One kind of CPU. ``tdp``: it translates guest addresses itself (EPT, NPT). ``tdp_mmu``: KVM keeps its tables in
    the TDP MMU (else in the legacy MMU, with rmaps). ``pml_entries``: length of the page-modification log, 0 without.
    Source: arch/x86/kvm/mmu.h: is_tdp_mmu_enabled() (the field ``tdp_mmu``), v5.19.
    """

    format: SpteFormat
    tdp: bool = True
    tdp_mmu: bool = True
    pml_entries: int = 0
    maxphyaddr: int = 46

    def __post_init__(self) -> None:
        if self.tdp_mmu and not self.tdp:
            raise ValueError("the TDP MMU needs two-dimensional paging: shadow paging has rmaps only")
        if self.pml_entries and not (
            self.tdp and self.format.kvm_ad_enabled and self.format.shadow_dirty_mask == 1 << 9
        ):
            raise ValueError("PML needs EPT with A/D bits: the CPU logs a page when it sets D")

    def __deepcopy__(self, memo: dict[int, Any]) -> Hardware:
        return self

    @classmethod
    def ept(cls, ad_bits: bool = True, pml: bool = False, tdp_mmu: bool = True) -> Hardware:
        """An Intel CPU. ``pml`` needs ``ad_bits``; ValueError otherwise."""
        return cls(SpteFormat.ept(ad_bits), tdp_mmu=tdp_mmu, pml_entries=PML_ENTITY_NUM if pml else 0)

    @classmethod
    def npt(cls, tdp_mmu: bool = True) -> Hardware:
        """An AMD CPU."""
        return cls(SpteFormat.npt(), tdp_mmu=tdp_mmu, maxphyaddr=48)

    @classmethod
    def shadow(cls) -> Hardware:
        """Any CPU without, or with unused, two-dimensional paging: KVM shadows the guest's own page tables."""
        return cls(SpteFormat.shadow(), tdp=False, tdp_mmu=False)

    def with_(self, **changes: Any) -> Hardware:
        """The same CPU but for ``changes``, e.g. ``with_(pml_entries=4)``."""
        return replace(self, **changes)

    @property
    def cpu_dirty_log_size(self) -> int:
        """How many entries the CPU's own dirty log has; 0 = no PML.
        Source: arch/x86/include/asm/kvm_host.h: cpu_dirty_log_size (of struct kvm_x86_ops), v5.19."""
        return self.pml_entries

    @property
    def name(self) -> str:
        pml = " and PML" if self.pml_entries else ""
        mmu = "" if self.tdp_mmu or not self.tdp else ", legacy MMU"
        return self.format.name + pml + mmu
