"""What one Linux release does, as data: its flush rule and its switches.

The model's functions ask a `Kernel`; they never look at its name. So another release, or a release with one rule
changed, is one more value of this class: see `Kernel.with_`. A release that changes the helpers of one SPTE brings a
subclass of `SpteFormat` as its ``spte_rules``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any, ClassVar, Protocol

from kvmbook.model.spte import SpteFormat


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
    """One release, or one variant of it.

    ``flush``: the rule when dirty logging is enabled (arch/x86/kvm/x86.c: kvm_mmu_slot_apply_flags()).
    ``spte_rules``: the class whose methods are this release's SPTE helpers.
    ``clear_flush_young_flushes``: what the name says (no longer since v6.13).
    ``eager_split_rmaps``: enabling also splits huge pages of nested guests (v6.0, ada51a9de725).
    ``recovers_2m_rmaps``: switching logging off also drops the legacy MMU's 2M leaves where 1G fits (v6.0).
    ``clear_split_forgets_last``: KVM_CLEAR_DIRTY_LOG takes the last gfn as an exclusive end when it splits huge pages
    (v5.18 to v6.7, fixed by 1aa4bb916808).
    ``clear_compares_rounded_up``: with INITIALLY_SET it asks whether first and last gfn lie in two huge pages by comparing
    addresses rounded *up*, so it overlooks a huge page that begins at the last gfn (every release; off is the repair).
    ``ring_skips_protection``: with INITIALLY_SET enabling protects nothing, also where writes go to a ring, which has no bits
    that could be set (every release; off is the repair).
    ``pml_drains_oldest_first``: an exit takes the PML buffer's pages in the order of the writes (v6.14, 37c3ddfe5238);
    before, newest first.
    ``marks_without_vcpu``: KVM can mark a page dirty on no vCPU's behalf (v6.2, c57351a75d01); before, the mark is dropped.
    ``splits_on_fault``: a fault for 4K that finds a huge page splits it, in the TDP MMU (v6.2, c4b33d28ea51); before, it
    drops the huge page and flushes.
    ``neighbour_prefetch``: a fault in the legacy MMU also maps up to seven neighbours (every release; off here, so that
    the pages of a run have nothing to do with each other; on, to compare with a real machine).
    ``fast_path_marks_first``: a fast page fault marks the page before it makes the SPTE writable, and not after (no
    release; switch it on to see why).
    ``srcu_grace_period``: publishing a memslot waits for faults that began before (every release; switch it off to
    see why).
    ``fast_path_asks_mmu_writable``: the fast path gives W back only where MMU-writable allows it (every release; likewise).
    ``guard_flushes_before_unlock``: guarding a guest's page table holds mmu_lock until its flush (every release; likewise).
    """

    name: str
    flush: FlushRule
    spte_rules: type[SpteFormat] = SpteFormat
    clear_flush_young_flushes: bool = True
    eager_split_rmaps: bool = False
    recovers_2m_rmaps: bool = False
    clear_split_forgets_last: bool = True
    clear_compares_rounded_up: bool = True
    ring_skips_protection: bool = True
    pml_drains_oldest_first: bool = False
    marks_without_vcpu: bool = False
    splits_on_fault: bool = False
    neighbour_prefetch: bool = False
    fast_path_marks_first: bool = False
    srcu_grace_period: bool = True
    fast_path_asks_mmu_writable: bool = True
    guard_flushes_before_unlock: bool = True

    v5_19: ClassVar[Kernel]
    v6_0: ClassVar[Kernel]

    def with_(self, **changes: Any) -> Kernel:
        """The same release but for ``changes``, e.g. ``Kernel.v5_19.with_(flush=FlushPolicy.ALWAYS)``."""
        said = ", ".join(f"{key}={getattr(value, 'value', value)}" for key, value in changes.items() if key != "name")
        return replace(self, **{"name": f"{self.name} with {said}", **changes})

    def spte_format(self, fmt: SpteFormat) -> SpteFormat:
        """This release's helpers over the masks of ``fmt``."""
        return self.spte_rules(**{field.name: getattr(fmt, field.name) for field in fields(fmt)})


Kernel.v5_19 = Kernel("Linux v5.19", flush=FlushPolicy.IF_CHANGED)
Kernel.v6_0 = Kernel("Linux v6.0", flush=FlushPolicy.ALWAYS, eager_split_rmaps=True, recovers_2m_rmaps=True)
