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
    ``smm``: system management mode, for which guest memory has a second address space.
    Source: arch/x86/kvm/mmu.h: is_tdp_mmu_enabled() (the field ``tdp_mmu``), arch/x86/include/asm/kvm_host.h:
    cpu_dirty_log_size (the field ``pml_entries``), KVM_ADDRESS_SPACE_NUM (the field ``smm``), v5.19.
    """

    format: SpteFormat
    tdp: bool = True
    tdp_mmu: bool = True
    pml_entries: int = 0
    maxphyaddr: int = 46
    smm: bool = True

    def __post_init__(self) -> None:
        if self.tdp_mmu and not self.tdp:
            raise ValueError("the TDP MMU needs two-dimensional paging: shadow paging has rmaps only")
        has_pml = self.tdp and self.format.kvm_ad_enabled and self.format.shadow_dirty_mask == 1 << 9
        if self.pml_entries and not has_pml:
            raise ValueError("PML needs EPT with A/D bits: the CPU logs a page when it sets D")

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
    def address_spaces(self) -> int:
        """How many address spaces a VM's memory slots have."""
        return 2 if self.smm else 1

    @property
    def gpa_bits(self) -> int:
        """The width of the guest-physical addresses that can be mapped. Shadow tables are walked by the guest's virtual
        addresses, so without TDP the CPU's own width is no limit. Source: arch/x86/kvm/mmu.h: kvm_mmu_max_gfn(), v5.19."""
        return self.maxphyaddr if self.tdp else 52

    @property
    def name(self) -> str:
        pml = " and PML" if self.pml_entries else ""
        mmu = "" if self.tdp_mmu or not self.tdp else ", legacy MMU"
        return self.format.name + pml + mmu
