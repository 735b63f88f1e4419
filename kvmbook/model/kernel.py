"""What one Linux release does, as data: its flush rule and its switches.

The model's functions ask a `Kernel`; they never look at its name. So another release, or a release with one rule
changed, is one more value of this class: see `Kernel.with_`. A release that changes the helpers of one SPTE brings a
subclass of `SpteFormat` as its ``spte_rules``. What is known of a switch stands where its field is declared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from itertools import chain
from typing import Any, ClassVar, Protocol

from kvmbook.model.spte import SpteFormat
from kvmbook.model.spte_rules import AsksForAllRoots, AtomicTypeOne, SoftwareAd, SuppressVe
from kvmbook.model.switches import Difference, Switch, number, switch, switches_of, values_in


class FlushRule(Protocol):
    """When enabling dirty logging flushes TLBs.

    The enabling pass shows each present leaf that it visits: the SPTE before and after, and the answer of the helper
    that changed it (does it ask for a flush). A pass that met one "yes" flushes after unlocking.
    A rule judges each leaf on its own, by its bits and not by its frame; passes and searches rely on that.
    """

    @property
    def unconditional(self) -> bool:
        """Whether to flush once, after all passes, whatever they met."""

    def after_write_protect(self, fmt: SpteFormat, old: int, new: int, answer: bool) -> bool:
        """Whether this leaf makes kvm_mmu_slot_remove_write_access() flush."""

    def after_clear_dirty(self, fmt: SpteFormat, old: int, new: int, answer: bool) -> bool:
        """Whether this leaf makes kvm_mmu_slot_leaf_clear_dirty() flush."""


class FlushPolicy(Enum):
    """The four rules of the seed patch's story (b64d740ea7dd)."""

    NEVER = "never"
    IF_CHANGED = "if changed"  # up to v5.19
    IF_MMU_WRITABLE = "if MMU-writable"  # named in the patch's message, not taken
    ALWAYS = "always"  # v6.0

    @property
    def unconditional(self) -> bool:
        return self is FlushPolicy.ALWAYS

    def after_write_protect(self, fmt: SpteFormat, old: int, new: int, answer: bool) -> bool:
        if self is FlushPolicy.IF_MMU_WRITABLE:
            return fmt.is_mmu_writable_spte(old)
        return answer and self is FlushPolicy.IF_CHANGED

    def after_clear_dirty(self, fmt: SpteFormat, old: int, new: int, answer: bool) -> bool:
        # The MMU-writable test, as posted in review, did not reach this pass.
        return answer and self in (FlushPolicy.IF_CHANGED, FlushPolicy.IF_MMU_WRITABLE)


@dataclass(frozen=True)
class Kernel:
    """One release, or one variant of it: a value for each switch. ``releases`` has those that are here, in order."""

    name: str
    flush: FlushRule = switch(FlushPolicy.IF_CHANGED, v6_0=(FlushPolicy.ALWAYS, "b64d740ea7dd"))
    """enabling dirty logging flushes once, whatever its passes met; before, if a pass was told to. arch/x86/kvm/x86.c:
    kvm_mmu_slot_apply_flags()."""
    spte_rules: type[SpteFormat] = switch(
        SpteFormat,
        v6_4=(AsksForAllRoots, "5982a5392663"),
        v6_9=(SpteFormat, "2673dfb591a3"),
        v6_10=(SuppressVe, "7fa5e2929198"),
        v6_13=(SoftwareAd, "7971801b5618"),
        v6_15=(AtomicTypeOne, "928c54b1c4ca"),
    )
    """the helpers of one SPTE are the methods of this class. arch/x86/kvm/mmu."""
    clear_flush_young_flushes: bool = switch(True, v6_13=(False, "2ebbe0308c29, b9883ee40d7e"))
    """clear_flush_young() ages and does not flush; before, it flushed if something was young. virt/kvm/kvm_main.c:
    kvm_mmu_notifier_clear_flush_young()."""
    ages_without_lock: bool = switch(False, v6_15=(True, "b146a9b34aed, af3b6a9eba48"))
    """ageing takes no mmu_lock: it reads an SPTE, and exchanges it if it has not changed; it counts as young in any case.
    mmu/tdp_mmu.c: kvm_tdp_mmu_age_gfn_range(), mmu/mmu.c: kvm_rmap_age_gfn_range()."""
    eager_split_rmaps: bool = switch(False, v6_0=(True, "ada51a9de725"))
    """enabling also splits huge pages of nested guests. mmu/mmu.c: kvm_shadow_mmu_try_split_huge_pages()."""
    recovers_2m_rmaps: bool = switch(False, v6_0=(True, ""))
    """switching logging off also drops the legacy MMU's 2M leaves where 1G fits. mmu/mmu.c:
    kvm_rmap_zap_collapsible_sptes()."""
    recovers_in_place: bool = switch(False, v6_13=(True, "13e2e4f62a4b"))
    """switching logging off puts a huge SPTE, made of the first leaf, in the place of a table of the TDP MMU, and flushes
    once; before, each table is zapped and flushed. mmu/tdp_mmu.c: kvm_tdp_mmu_recover_huge_pages()."""
    clear_split_forgets_last: bool = switch(True, v6_8=(False, "1aa4bb916808"))
    """KVM_CLEAR_DIRTY_LOG splits huge pages up to the last gfn; before (from v5.18), the last was left out. mmu/mmu.c:
    kvm_arch_mmu_enable_log_dirty_pt_masked()."""
    clear_compares_rounded_up: bool = switch(True)
    """with INITIALLY_SET, KVM_CLEAR_DIRTY_LOG asks whether first and last gfn lie in two huge pages by comparing
    addresses rounded up, so it overlooks a huge page that begins at the last gfn (every release; off is the repair).
    mmu/mmu.c: kvm_arch_mmu_enable_log_dirty_pt_masked()."""
    ring_skips_protection: bool = switch(True)
    """with INITIALLY_SET enabling protects nothing, also where writes go to a ring, which has no bits that could be set
    (every release; off is the repair). arch/x86/kvm/x86.c: kvm_mmu_slot_apply_flags()."""
    kicks_without_pml: bool = switch(True, v6_8=(False, ""))
    """KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG kick the vCPUs only with PML; before, always. arch/x86/kvm/x86.c:
    kvm_arch_sync_dirty_log()."""
    pml_drains_oldest_first: bool = switch(False, v6_14=(True, "37c3ddfe5238"))
    """an exit takes the PML buffer's pages in the order of the writes; before, newest first. arch/x86/kvm/vmx/vmx.c:
    vmx_flush_pml_buffer()."""
    marks_without_vcpu: bool = switch(False, v6_2=(True, "c57351a75d01"))
    """KVM can mark a page dirty on no vCPU's behalf; before, the mark is dropped. virt/kvm/kvm_main.c:
    mark_page_dirty_in_slot()."""
    splits_on_fault: bool = switch(False, v6_2=(True, "c4b33d28ea51"))
    """a fault for 4K that finds a huge page splits it, in the TDP MMU; before, it drops the huge page and flushes.
    mmu/tdp_mmu.c: kvm_tdp_mmu_map()."""
    allowed_is_spurious: bool = switch(False, v6_13=(True, "55f60a6498e7"))
    """a fault in the TDP MMU whose access the SPTE allows by now changes nothing; before, it made the SPTE again.
    mmu/tdp_mmu.c: tdp_mmu_map_handle_target_level()."""
    zaps_by_slot: bool = switch(False, v6_12=(True, "aa8d1f48d353"))
    """user space can switch the quirk SLOT_ZAP_ALL off: then DELETE and MOVE zap only the slot's leaves. mmu/mmu.c:
    kvm_mmu_zap_memslot_leafs()."""
    reset_stops_at_signal: bool = switch(False, v6_17=(True, "530a8ba71b4c, 49005a2a3d2a, 1333c35c4eea"))
    """KVM_RESET_DIRTY_RINGS stops at a signal and returns how many entries it freed. virt/kvm/dirty_ring.c:
    kvm_dirty_ring_reset()."""
    reset_forgets_at_signal: bool = switch(False, v6_17=(True, "49005a2a3d2a"))
    """a KVM_RESET_DIRTY_RINGS that stops does not arm the entries that it gathered last, though it has freed them (off is
    the repair). virt/kvm/dirty_ring.c: kvm_dirty_ring_reset()."""
    neighbour_prefetch: bool = switch(False)
    """a fault in the legacy MMU also maps up to seven neighbours (every release; off here, so that the pages of a run
    have nothing to do with each other; on, to compare with a real machine). mmu/mmu.c: direct_pte_prefetch()."""
    fast_path_marks_first: bool = switch(False)
    """a fast page fault marks the page before it makes the SPTE writable, and not after (no release; on, to see why).
    mmu/mmu.c: fast_pf_fix_direct_spte()."""
    harvest_flushes_before_unlock: bool = switch(False)
    """KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG hold mmu_lock until their flush (no release that is here; on from
    6dbf79e7164e to 198c74f43f0f). virt/kvm/kvm_main.c: kvm_get_dirty_log_protect()."""
    ages_by_plain_store: bool = switch(False)
    """ageing in the TDP MMU reads an SPTE and stores what it made of it, whatever came between (to v5.17; off since
    ba3a6120a4e7). mmu/tdp_mmu.c: age_gfn_range()."""
    yields_after_flush: bool = switch(True)
    """a walk that zaps flushes what it owes before it lets mmu_lock go (every release that is here; off, to see why:
    to v5.11, a835429cda91, 048f49809c52). mmu/tdp_mmu.c: tdp_mmu_iter_cond_resched()."""
    pml_logs_nested: bool = switch(False)
    """PML stays on while a nested guest runs, and notes that guest's own addresses (no release that is here; on, to see why:
    c3bb9a20834f). arch/x86/kvm/vmx/vmx.c: vmx_flush_pml_buffer()."""
    srcu_grace_period: bool = switch(True)
    """publishing a memslot waits for faults that began before (every release; off, to see why). virt/kvm/kvm_main.c:
    kvm_swap_active_memslots()."""
    fast_path_asks_mmu_writable: bool = switch(True)
    """the fast path gives W back only where MMU-writable allows it (every release; off, to see why). mmu/mmu.c:
    fast_page_fault()."""
    guard_flushes_before_unlock: bool = switch(True)
    """guarding a guest's page table holds mmu_lock until its flush (every release; off, to see why). mmu/page_track.c:
    kvm_slot_page_track_add_page()."""

    releases: ClassVar[tuple[Kernel, ...]]
    v5_19: ClassVar[Kernel]
    v6_0: ClassVar[Kernel]
    v6_1: ClassVar[Kernel]
    v6_2: ClassVar[Kernel]
    v6_4: ClassVar[Kernel]
    v6_8: ClassVar[Kernel]
    v6_9: ClassVar[Kernel]
    v6_10: ClassVar[Kernel]
    v6_12: ClassVar[Kernel]
    v6_13: ClassVar[Kernel]
    v6_14: ClassVar[Kernel]
    v6_15: ClassVar[Kernel]
    v6_17: ClassVar[Kernel]
    v6_18: ClassVar[Kernel]

    @classmethod
    def switches(cls) -> dict[str, Switch]:
        """What is known of each field, by its name."""
        return switches_of(cls)

    @classmethod
    def of(cls, release: str) -> Kernel:
        """The rules of a release, such as "v6.12" or "6.12.3": those of the newest of ``releases`` that is not newer, or of
        the first."""
        known = [kernel for kernel in cls.releases if number(kernel.name) <= number(release)]
        return known[-1] if known else cls.releases[0]

    def with_(self, **changes: Any) -> Kernel:
        """The same release but for ``changes``, e.g. ``Kernel.v5_19.with_(flush=FlushPolicy.ALWAYS)``."""
        said = ", ".join(f"{key}={getattr(value, 'value', value)}" for key, value in changes.items() if key != "name")
        return replace(self, **{"name": f"{self.name} with {said}", **changes})

    def differs_from(self, other: Kernel) -> tuple[Difference, ...]:
        """Which rules differ, in words, the oldest change first; each with its commits and its source."""
        pairs = {name: (getattr(self, name), getattr(other, name), known) for name, known in self.switches().items()}
        found = [known.differences(name, one, two) for name, (one, two, known) in pairs.items() if one != two]
        return tuple(sorted(chain(*found), key=lambda difference: number(difference.release)))

    def spte_format(self, fmt: SpteFormat) -> SpteFormat:
        """This release's helpers over the masks of ``fmt``."""
        return self.spte_rules.with_masks(fmt)


NAMES = [name.replace("_", ".") for name in Kernel.__annotations__ if name.startswith("v")]
Kernel.releases = tuple(Kernel(f"Linux {name}", **values_in(Kernel, name)) for name in NAMES)
for _kernel, _name in zip(Kernel.releases, NAMES, strict=True):
    setattr(Kernel, _name.replace(".", "_"), _kernel)
