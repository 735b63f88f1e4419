"""KVM_SET_USER_MEMORY_REGION: create, delete, move a slot, or change its flags, as an operation made of steps.

`kvm_mmu_slot_apply_flags` is the decision tree that the seed patch (b64d740ea7dd) changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from kvmbook.model import huge_pages
from kvmbook.model.access_tracking import InvalidateRange, kvm_unmap_gfn_range
from kvmbook.model.machine import Machine, Operation, Rule, step
from kvmbook.model.memslots import Change, MemoryRegion, MemorySlot, check_width
from kvmbook.model.page_tables import LEVELS, RMAPS, TDP
from kvmbook.model.spte import KVM_MAX_HUGEPAGE_LEVEL, PG_LEVEL_2M, PG_LEVEL_4K, Flushed

PUBLICATIONS = ("kvm_invalidate_memslot", "kvm_swap_active_memslots", "kvm_activate_memslot")


def kvm_mmu_slot_apply_flags(m: Machine, change: Change, old: MemorySlot | None, new: MemorySlot | None) -> list[str]:
    """The steps that x86 takes after a memslot change was published, in order: the decision tree, as a plan.

    Source: arch/x86/kvm/x86.c: kvm_mmu_slot_apply_flags(), v5.19 and v6.0.
    """
    logged, logs = bool(old and old.logs_dirty), bool(new and new.logs_dirty)
    pml = bool(m.hardware.pml_entries)
    switch_pml = ["kvm_mmu_update_cpu_dirty_logging"] * (pml and logged != logs)
    if change is not Change.FLAGS_ONLY or new is None or new.readonly:
        return switch_pml
    mapped = new.as_id == 0
    rmaps, tdp = mapped and m.have_rmaps, mapped and m.hardware.tdp_mmu
    if not logs:
        return switch_pml + ["zap_collapsible_rmap_sptes"] * rmaps + ["zap_collapsible_tdp_sptes"] * tdp
    if m.initially_set and (m.kernel.ring_skips_protection or not m.dirty_ring_size):
        return switch_pml
    plan = switch_pml
    if m.eager_page_split and tdp:
        plan += ["split_huge_rmap_sptes"] * (rmaps and m.kernel.eager_split_rmaps) + ["split_huge_tdp_sptes"]
    unconditional = m.kernel.flush.unconditional
    if pml:
        plan += ["clear_dirty_rmap"] * rmaps + ["clear_dirty_tdp"] * tdp + ["flush_if_owed"] * (not unconditional)
    plan += ["write_protect_rmap"] * rmaps + ["write_protect_tdp"] * tdp + ["flush_if_owed"] * (not unconditional)
    return plan + ["flush_always"] * unconditional


@dataclass(eq=False)
class SetUserMemoryRegion(Operation):
    """Create, delete or move a slot, or change its flags.

    Learned on the way: ``flush``, whether a pass asked for a flush; ``cursor``, the next gfn of a pass.
    Source: virt/kvm/kvm_main.c: kvm_set_memslot(), v5.19.
    """

    region: MemoryRegion
    change: Change = Change.NONE
    old: MemorySlot | None = None
    new: MemorySlot | None = None
    flush: bool = False
    cursor: int | None = None

    @property
    def needs_slots_lock(self) -> bool:
        return True

    def begin(self, m: Machine) -> None:
        self.todo = []
        self.change, self.old, self.new = m.memslots.classify(self.region, m.hardware.address_spaces)
        if self.change is Change.NONE:
            return
        zap = ["kvm_invalidate_memslot", "synchronize_srcu", "kvm_mmu_zap_all_fast"]
        publish = ["kvm_swap_active_memslots", "synchronize_srcu", "kvm_arch_commit_memory_region"]
        if self.change is Change.MOVE:
            self.todo = [*zap, "kvm_prepare_memory_region", *publish]
        elif self.change is Change.DELETE:
            self.todo = [*zap, *publish]
        else:
            self._prepare(m)  # nothing can have changed before it
            self.todo = publish

    def waits_for(self, m: Machine, name: str) -> list[Operation]:
        """A publication waits until no invalidation of the host's is active. After it nothing goes on before each fault that
        began with the old slot is over. Source: virt/kvm/kvm_main.c: kvm_swap_active_memslots(), v5.19."""
        blockers = super().waits_for(m, name)
        if name in PUBLICATIONS:
            blockers += [op for op in m.in_flight if isinstance(op, InvalidateRange) and op.active]
        if name == "synchronize_srcu" and m.kernel.srcu_grace_period:
            blockers += [
                op for op in m.in_flight if getattr(op, "generation", m.memslots.generation) < m.memslots.generation
            ]
        return blockers

    @property
    def slot(self) -> MemorySlot:
        """The slot as it will be, or, if it is deleted, as it was."""
        slot = self.new or self.old
        assert slot is not None
        return slot

    # ---- publication ------------------------------------------------------------------------------------------------

    @step()
    def kvm_invalidate_memslot(self, m: Machine) -> None:
        """Replace the slot by an invalid copy, so that new faults keep off it. Source: virt/kvm/kvm_main.c, v5.19."""
        assert self.old is not None
        m.memslots.publish(replace(self.old, invalid=True), self.old.as_id, self.old.id)

    @step(lock="write")
    def kvm_mmu_zap_all_fast(self, m: Machine) -> None:
        """Drop all tables of the VM and flush; tracking of guest page tables ends with it. Without the quirk SLOT_ZAP_ALL,
        which v6.12 has, only the slot's leaves go. Source: mmu/mmu.c, v5.19."""
        assert self.old is not None
        if m.slot_zap_all:
            m.zap_all()
            m.write_tracked.clear()
        elif self.old.as_id == 0 and kvm_unmap_gfn_range(m, [(self.old.base_gfn, self.old.end_gfn)]):
            m.kvm_flush_remote_tlbs()

    @step()
    def kvm_prepare_memory_region(self, m: Machine) -> str | None:
        """Only now a MOVE's address and memory are looked at. A refusal brings the old slot back, but not its SPTEs.
        Source: virt/kvm/kvm_main.c, v5.19."""
        try:
            self._prepare(m)
        except OSError as refusal:
            self.refusal = refusal
            self.todo = ["kvm_activate_memslot", "synchronize_srcu"]
            return "refused"
        return None

    def _prepare(self, m: Machine) -> None:
        new = self.new
        assert new is not None
        if new.logs_dirty and not m.dirty_ring_size:
            bitmap = self.old.dirty_bitmap if self.old is not None else None
            self.new = replace(new, dirty_bitmap=new.new_bitmap(m.initially_set) if bitmap is None else bitmap)
        if self.change is not Change.FLAGS_ONLY:
            check_width(new, m.hardware.gpa_bits)

    @step()
    def kvm_activate_memslot(self, m: Machine) -> None:
        """The old slot is valid again. Source: virt/kvm/kvm_main.c, v5.19."""
        assert self.old is not None
        m.memslots.publish(self.old, self.old.as_id, self.old.id)

    @step()
    def kvm_swap_active_memslots(self, m: Machine) -> None:
        """Publish: whoever looks a slot up from here on finds the new one. Source: virt/kvm/kvm_main.c, v5.19."""
        if self.old is not None:
            m.unwatch(self.old)
        m.memslots.publish(self.new, self.slot.as_id, self.slot.id)

    @step()
    def synchronize_srcu(self, m: Machine) -> None:
        """Every vCPU that was handling an exit with the old slot has finished. Then all are kicked: they leave the guest,
        and nothing is flushed. Source: virt/kvm/kvm_main.c: kvm_swap_active_memslots() (the wait in it), v5.19."""
        m.kick_all()

    @step()
    def kvm_arch_commit_memory_region(self, m: Machine) -> None:
        """Look at the change and plan the rest. Source: arch/x86/kvm/x86.c, v5.19."""
        self.todo = kvm_mmu_slot_apply_flags(m, self.change, self.old, self.new) + ["return_to_user_space"]

    # ---- the steps of kvm_mmu_slot_apply_flags() --------------------------------------------------------------------

    @step()
    def kvm_mmu_update_cpu_dirty_logging(self, m: Machine) -> str:
        """Switch PML with the first slot that logs and the last; each vCPU leaves the guest to do so.
        Source: arch/x86/kvm/x86.c, v5.19."""
        before = m.pml_on
        m.nr_memslots_dirty_logging += 1 if self.new and self.new.logs_dirty else -1
        for vcpu in m.vcpus:
            if vcpu.fault is None and m.pml_on != before:
                m.vcpu_exit(vcpu)
        return "PML on" if m.pml_on else "PML off"

    @step(lock="write")
    def zap_collapsible_rmap_sptes(self, m: Machine) -> None:
        if huge_pages.zap_collapsible_rmap_sptes(m, self.slot):
            m.kvm_flush_remote_tlbs()

    @step(lock="read")
    def zap_collapsible_tdp_sptes(self, m: Machine) -> None:
        in_place = m.kernel.recovers_in_place
        (huge_pages.kvm_tdp_mmu_recover_huge_pages if in_place else huge_pages.zap_collapsible_tdp_sptes)(m, self.slot)

    @step(lock="write")
    def split_huge_rmap_sptes(self, m: Machine) -> None:
        huge_pages.split_huge_pages(m, RMAPS, self.slot.base_gfn, self.slot.end_gfn)

    @step(lock="read")
    def split_huge_tdp_sptes(self, m: Machine) -> None:
        huge_pages.split_huge_pages(m, TDP, self.slot.base_gfn, self.slot.end_gfn)

    @step(lock="write")
    def clear_dirty_rmap(self, m: Machine) -> str | None:
        """4K leaves only: the legacy MMU logs at no other size.
        Source: mmu/mmu.c: kvm_mmu_slot_leaf_clear_dirty(), __rmap_clear_dirty(), v5.19."""
        small, asks = (PG_LEVEL_4K, PG_LEVEL_4K), m.kernel.flush.after_clear_dirty
        return self._pass(m, "clear_dirty_rmap", RMAPS, m.fmt.rmap_clear_dirty, small, asks)

    @step(lock="read")
    def clear_dirty_tdp(self, m: Machine) -> str | None:
        """Leaves of every size. Source: mmu/mmu.c: kvm_mmu_slot_leaf_clear_dirty(), mmu/tdp_mmu.c:
        kvm_tdp_mmu_clear_dirty_slot(), clear_dirty_gfn_range(), v5.19."""
        return self._pass(m, "clear_dirty_tdp", TDP, m.fmt.tdp_clear_dirty, LEVELS, m.kernel.flush.after_clear_dirty)

    @step(lock="write")
    def write_protect_rmap(self, m: Machine) -> str | None:
        """With PML from 2M up: 4K leaves are left writable, as D tells.
        Source: mmu/mmu.c: kvm_mmu_slot_remove_write_access(), slot_rmap_write_protect(), v5.19."""
        levels, asks = self._levels(m), m.kernel.flush.after_write_protect
        return self._pass(m, "write_protect_rmap", RMAPS, m.fmt.spte_write_protect, levels, asks)

    @step(lock="read")
    def write_protect_tdp(self, m: Machine) -> str | None:
        """The same. Source: mmu/mmu.c: kvm_mmu_slot_remove_write_access(), mmu/tdp_mmu.c: kvm_tdp_mmu_wrprot_slot(),
        wrprot_gfn_range(), v5.19."""
        levels, asks = self._levels(m), m.kernel.flush.after_write_protect
        return self._pass(m, "write_protect_tdp", TDP, m.fmt.tdp_wrprot, levels, asks)

    @step()
    def flush_if_owed(self, m: Machine) -> str:
        """Up to v5.19: flush iff the pass before found a reason.
        Source: mmu/mmu.c: kvm_mmu_slot_remove_write_access(), kvm_mmu_slot_leaf_clear_dirty(), v5.19."""
        owed, self.flush = self.flush, False
        if owed:
            m.kvm_flush_remote_tlbs()
        return "flush" if owed else "no flush"

    @step()
    def flush_always(self, m: Machine) -> str:
        """Since b64d740ea7dd: flush once, whatever the passes met.
        Source: arch/x86/kvm/x86.c: kvm_mmu_slot_apply_flags(), mmu/mmu.c: kvm_arch_flush_remote_tlbs_memslot(), v6.0."""
        m.kvm_flush_remote_tlbs()
        return "flush"

    @step()
    def return_to_user_space(self, m: Machine) -> str:
        """From here on user space relies on the log: what was written before, it reads anyway."""
        if self.new and self.new.logs_dirty:
            m.watch(self.new)
            if m.initially_set and not (self.old and self.old.logs_dirty) and not m.dirty_ring_size:
                m.tell(self.new)  # by agreement all pages are dirty
        return f"slot {self.slot.id}"

    def _levels(self, m: Machine) -> tuple[int, int]:
        return PG_LEVEL_2M if m.hardware.pml_entries else PG_LEVEL_4K, KVM_MAX_HUGEPAGE_LEVEL

    def _pass(
        self, m: Machine, name: str, side: bool, helper: Rule, levels: tuple[int, int], asks: Callable[..., bool]
    ) -> str | None:
        """Visit the next pages of the slot, all of them or ``pages_per_step``, and come back for the rest. Each leaf, before
        and after the ``helper`` and with its answer, is put before the flush rule's question ``asks``."""

        def visit(old: int) -> Flushed:
            new, answer = helper(old)
            return Flushed(new, asks(m.fmt, old, new, answer))

        start = self.slot.base_gfn if self.cursor is None else self.cursor
        end = min(start + (m.pages_per_step or self.slot.npages), self.slot.end_gfn)
        asked = m.update_leaves(side, start, end, visit, levels)
        self.flush |= asked
        self.cursor = None if end == self.slot.end_gfn else end
        if self.cursor is not None:
            self.todo.insert(0, name)
        return "asks for a flush" if asked else None
