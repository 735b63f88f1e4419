"""What user space asks of KVM, as operations made of steps: memslot changes, and the ways to read the dirty log.

Each ``begin`` makes the kernel's checks and writes the plan; the plan of `SetUserMemoryRegion` is the decision tree that
the seed patch (b64d740ea7dd) changed. All hold slots_lock from their first step to their last.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from kvmbook import huge_pages, wrprot
from kvmbook.machine import Machine, Operation, step
from kvmbook.memslots import Change, MemoryRegion, MemorySlot, bit_offsets, refuse, to_bits, to_words
from kvmbook.spte import PG_LEVEL_2M, PG_LEVEL_4K

# ---- KVM_SET_USER_MEMORY_REGION --------------------------------------------------------------------------------------


def kvm_mmu_slot_apply_flags(m: Machine, change: Change, old: MemorySlot | None, new: MemorySlot | None) -> list[str]:
    """The steps that x86 takes after a memslot change was published, in order: the decision tree, as a plan.

    Source: arch/x86/kvm/x86.c: kvm_mmu_slot_apply_flags(), v5.19 and v6.0.
    """
    logged, logs = bool(old and old.logs_dirty), bool(new and new.logs_dirty)
    pml = bool(m.hardware.cpu_dirty_log_size)
    switch_pml = ["kvm_mmu_update_cpu_dirty_logging"] * (pml and logged != logs)
    if change is not Change.FLAGS_ONLY or new is None or new.readonly:
        return switch_pml
    rmaps, tdp = m.have_rmaps, m.hardware.tdp_mmu
    if not logs:
        return switch_pml + ["zap_collapsible_rmap_sptes"] * rmaps + ["zap_collapsible_tdp_sptes"] * tdp
    if m.initially_set:
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

    needs_slots_lock = True

    region: MemoryRegion
    change: Change = Change.NONE
    old: MemorySlot | None = None
    new: MemorySlot | None = None
    flush: bool = False
    cursor: int | None = None

    def begin(self, m: Machine) -> None:
        self.change, self.old, new = m.memslots.classify(self.region, m.hardware.maxphyaddr)
        if self.change is Change.NONE:
            return
        if new is not None and new.logs_dirty and not m.dirty_ring_size:
            bitmap = self.old.dirty_bitmap if self.old is not None else None
            new = replace(new, dirty_bitmap=new.new_bitmap(m.initially_set) if bitmap is None else bitmap)
        self.new = new
        publish = ["kvm_swap_active_memslots", "synchronize_srcu"]
        zap = ["kvm_invalidate_memslot", "synchronize_srcu", "kvm_mmu_zap_all_fast"]
        self.todo = zap * (self.change in (Change.MOVE, Change.DELETE)) + publish + ["kvm_arch_commit_memory_region"]

    def waits_for(self, m: Machine, name: str) -> list[Operation]:
        """After the publication nothing goes on before each fault that began with the old slot is over."""
        blockers = super().waits_for(m, name)
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
        """Replace the slot by an invalid copy, so that new faults keep off it."""
        assert self.old is not None
        m.unwatch(self.old)
        m.memslots.publish(replace(self.old, invalid=True), self.old.as_id, self.old.id)
        m.kick_all()

    @step(lock="write")
    def kvm_mmu_zap_all_fast(self, m: Machine) -> None:
        """Drop all tables of the VM and flush; v5.19 does not zap by slot."""
        m.page_tables.zap_all()
        m.kvm_flush_remote_tlbs()

    @step()
    def kvm_swap_active_memslots(self, m: Machine) -> None:
        """Publish, and kick the vCPUs: they leave the guest, and nothing is flushed."""
        if not (self.new and self.new.logs_dirty):
            m.unwatch(self.slot)
        m.memslots.publish(self.new, self.slot.as_id, self.slot.id)
        m.kick_all()

    @step()
    def synchronize_srcu(self, m: Machine) -> None:
        """Every vCPU that was handling an exit with the old slot has finished."""

    @step()
    def kvm_arch_commit_memory_region(self, m: Machine) -> None:
        """Look at the change and plan the rest."""
        self.todo = kvm_mmu_slot_apply_flags(m, self.change, self.old, self.new) + ["return_to_user_space"]

    # ---- the steps of kvm_mmu_slot_apply_flags() --------------------------------------------------------------------

    @step()
    def kvm_mmu_update_cpu_dirty_logging(self, m: Machine) -> str:
        """Switch PML with the first slot that logs and the last; each vCPU leaves the guest to do so."""
        m.nr_memslots_dirty_logging += 1 if self.new and self.new.logs_dirty else -1
        for vcpu in m.vcpus:
            if vcpu.fault is None:
                m.vcpu_exit(vcpu)
        return "PML on" if m.pml_on else "PML off"

    @step(lock="write")
    def zap_collapsible_rmap_sptes(self, m: Machine) -> None:
        if huge_pages.zap_collapsible_rmap_sptes(m, self.slot):
            m.kvm_flush_remote_tlbs()

    @step(lock="read")
    def zap_collapsible_tdp_sptes(self, m: Machine) -> None:
        huge_pages.zap_collapsible_tdp_sptes(m, self.slot)

    @step(lock="write")
    def split_huge_rmap_sptes(self, m: Machine) -> None:
        huge_pages.shadow_mmu_split_huge_pages(m, self.slot.base_gfn, self.slot.end_gfn)

    @step(lock="read")
    def split_huge_tdp_sptes(self, m: Machine) -> None:
        huge_pages.tdp_mmu_split_huge_pages(m, self.slot.base_gfn, self.slot.end_gfn)

    @step(lock="write")
    def clear_dirty_rmap(self, m: Machine) -> str | None:
        """kvm_mmu_slot_leaf_clear_dirty(), rmap side."""
        return self._pass(m, "clear_dirty_rmap", lambda a, b: wrprot.slot_rmap_clear_dirty(m, a, b))

    @step(lock="read")
    def clear_dirty_tdp(self, m: Machine) -> str | None:
        """kvm_mmu_slot_leaf_clear_dirty(), TDP side."""
        return self._pass(m, "clear_dirty_tdp", lambda a, b: wrprot.kvm_tdp_mmu_clear_dirty_slot(m, a, b))

    @step(lock="write")
    def write_protect_rmap(self, m: Machine) -> str | None:
        """kvm_mmu_slot_remove_write_access(), rmap side."""
        level = self._start_level(m)
        return self._pass(m, "write_protect_rmap", lambda a, b: wrprot.slot_rmap_write_protect(m, a, b, level))

    @step(lock="read")
    def write_protect_tdp(self, m: Machine) -> str | None:
        """kvm_mmu_slot_remove_write_access(), TDP side."""
        level = self._start_level(m)
        return self._pass(m, "write_protect_tdp", lambda a, b: wrprot.kvm_tdp_mmu_wrprot_slot(m, a, b, level))

    @step()
    def flush_if_owed(self, m: Machine) -> str:
        """Up to v5.19: flush iff the pass before found a reason."""
        owed, self.flush = self.flush, False
        if owed:
            m.kvm_flush_remote_tlbs()
        return "flush" if owed else "no flush"

    @step()
    def flush_always(self, m: Machine) -> str:
        """Since b64d740ea7dd: flush once, whatever the passes met."""
        m.kvm_flush_remote_tlbs()
        return "flush"

    @step()
    def return_to_user_space(self, m: Machine) -> None:
        """From here on user space relies on the log: what was written before, it reads anyway."""
        if self.new and self.new.logs_dirty:
            m.watch(self.new)

    def _start_level(self, m: Machine) -> int:
        """With PML the 4K leaves are left writable: D tells."""
        return PG_LEVEL_2M if m.hardware.cpu_dirty_log_size else PG_LEVEL_4K

    def _pass(self, m: Machine, name: str, visit: Callable[[int, int], bool]) -> str | None:
        """Visit the next pages of the slot, all of them or ``pages_per_step``, and come back for the rest."""
        start = self.slot.base_gfn if self.cursor is None else self.cursor
        end = min(start + (m.pages_per_step or self.slot.npages), self.slot.end_gfn)
        asked = visit(start, end)
        self.flush |= asked
        self.cursor = None if end == self.slot.end_gfn else end
        if self.cursor is not None:
            self.todo.insert(0, name)
        return "asks for a flush" if asked else None


# ---- reading the log -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class DirtyLogOperation(Operation):
    """What KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG share: take bits word by word, re-arm those pages, and flush if any
    bit was taken. *The flush depends on the bitmap, never on whether an SPTE changed.*

    ``words`` are those still to take; ``taken`` the gfns whose bits were taken.
    """

    needs_slots_lock = True

    slot_number: int
    slot: MemorySlot | None = field(default=None, init=False)
    words: list[int] = field(default_factory=list, init=False)
    taken: list[int] = field(default_factory=list, init=False)
    word_gfns: list[int] = field(default_factory=list, init=False)

    def find_slot(self, m: Machine) -> MemorySlot:
        """The slot, or OSError ENXIO, EINVAL or ENOENT."""
        as_id, slot_id = self.slot_number >> 16, self.slot_number & 0xFFFF
        if m.dirty_ring_size:
            raise refuse(errno.ENXIO, "this VM logs to dirty rings: there is no bitmap")
        if not (0 <= as_id < 2 and slot_id < 32764):
            raise refuse(errno.EINVAL, f"address space {as_id}, slot {slot_id}: there is no such number")
        slot = m.memslots.id_to_memslot(as_id, slot_id)
        if slot is None:
            raise refuse(errno.ENOENT, f"there is no slot {slot_id}")
        if slot.dirty_bitmap is None:
            raise refuse(errno.ENOENT, f"slot {slot_id} does not log dirty pages")
        return slot

    def covers(self, slot: MemorySlot, gfn: int) -> bool:
        """A taken bit is news until user space has it."""
        return self.slot is not None and slot.id == self.slot.id and slot.as_id == self.slot.as_id and gfn in self.taken

    @property
    def live(self) -> np.ndarray:
        assert self.slot is not None and self.slot.dirty_bitmap is not None
        row: np.ndarray = self.slot.dirty_bitmap[0]
        return row

    @property
    def buffer(self) -> np.ndarray:
        assert self.slot is not None and self.slot.dirty_bitmap is not None
        row: np.ndarray = self.slot.dirty_bitmap[1]
        return row

    @step()
    def kick(self, m: Machine) -> None:
        """Ask the vCPUs to leave the guest, which drains PML buffers. It does not wait."""
        m.kick_all()

    @step(lock="write", keeps=True)
    def take_bits(self, m: Machine) -> str:
        """Exchange the next word: the bits that are asked for become 0 and are ours."""
        assert self.slot is not None
        word = self.words.pop(0)
        ours = self.take_word(word)
        self.word_gfns = [self.slot.base_gfn + word * 64 + bit for bit in bit_offsets(ours)]
        self.taken += self.word_gfns
        self.todo = ["rearm"] * (ours != 0) + ["take_bits"] * bool(self.words) + self.ending(bool(self.taken))
        return f"{len(self.word_gfns)} taken"

    @step(lock="write", keeps=True)
    def rearm(self, m: Machine) -> None:
        """Make the next write to those pages visible again."""
        assert self.slot is not None
        wrprot.kvm_arch_mmu_enable_log_dirty_pt_masked(m, self.slot, self.word_gfns)

    def take_word(self, word: int) -> int:
        raise NotImplementedError

    def ending(self, flush: bool) -> list[str]:
        """The steps after the last word."""
        return ["kvm_arch_flush_remote_tlbs_memslot"] * flush + ["copy_to_user"]

    @step()
    def kvm_arch_flush_remote_tlbs_memslot(self, m: Machine) -> None:
        m.kvm_flush_remote_tlbs()

    @step()
    def copy_to_user(self, m: Machine) -> str:
        """User space has the report, and will read those pages now: their writes so far are accounted for."""
        m.written.difference_update(self.taken)
        return f"{len(self.taken)} dirty"


@dataclass(eq=False)
class GetDirtyLog(DirtyLogOperation):
    """Report the dirty pages of a slot, and re-arm them; with manual protect only report.
    ``result``: bool array, one per page. Source: kvm_get_dirty_log_protect(), v5.19."""

    def begin(self, m: Machine) -> None:
        self.slot = self.find_slot(m)
        self.todo = ["kick", "copy_live_bitmap" if m.manual_protect else "find_words"]

    @step()
    def copy_live_bitmap(self, m: Machine) -> None:
        """Manual protect: nothing is cleared, protected or flushed."""
        assert self.slot is not None
        self.result = to_bits(self.live.copy(), self.slot.npages)

    @step(lock="write", keeps=True)
    def find_words(self, m: Machine) -> None:
        """Zero the second half of the bitmap, and see which words are not zero."""
        self.buffer[:] = 0
        self.words = np.flatnonzero(self.live).tolist()
        self.todo = ["take_bits"] if self.words else self.ending(False)

    def take_word(self, word: int) -> int:
        self.buffer[word], self.live[word] = self.live[word], 0
        return int(self.buffer[word])

    @step()
    def copy_to_user(self, m: Machine) -> str:
        assert self.slot is not None
        self.result = to_bits(self.buffer.copy(), self.slot.npages)
        return super().copy_to_user(m)


@dataclass(eq=False)
class ClearDirtyLog(DirtyLogOperation):
    """Clear and re-arm the pages that user space names, if they are dirty.

    ``bitmap``: bool array of shape (num_pages,), the pages from ``first_page`` of the slot.
    Source: kvm_clear_dirty_log_protect(), v5.19.
    """

    first_page: int
    num_pages: int
    bitmap: np.ndarray

    def begin(self, m: Machine) -> None:
        slot = self.find_slot(m)
        first, count = self.first_page, self.num_pages
        if first % 64:
            raise refuse(errno.EINVAL, f"first_page {first} is not a multiple of 64")
        if not 0 <= first <= slot.npages or not 0 <= count <= slot.npages - first:
            raise refuse(errno.EINVAL, f"pages {first}..{first + count - 1} reach beyond the slot's {slot.npages}")
        if count % 64 and first + count != slot.npages:
            raise refuse(errno.EINVAL, f"num_pages {count} is neither a multiple of 64 nor up to the slot's end")
        bits = np.asarray(self.bitmap, bool)
        if bits.shape != (count,):
            raise refuse(errno.EFAULT, f"a bitmap of shape {bits.shape} cannot be read as {count} pages")
        self.slot, self.bitmap = slot, bits
        self.todo = ["kick", "copy_from_user"]

    @step()
    def copy_from_user(self, m: Machine) -> None:
        """Put the request into the second half of the bitmap."""
        words, first = to_words(self.bitmap), self.first_page // 64
        self.buffer[first : first + words.size] = words
        self.words = (first + np.flatnonzero(words)).tolist()
        self.todo = ["take_bits"] if self.words else self.ending(False)

    def take_word(self, word: int) -> int:
        ours = int(self.buffer[word] & self.live[word])
        self.live[word] &= ~self.buffer[word]
        return ours


@dataclass(eq=False)
class ResetDirtyRings(Operation):
    """Free the ring entries that user space has harvested and re-arm their pages; flush once if there were any.
    ``result``: how many entries. Source: kvm_vm_ioctl_reset_dirty_pages(), kvm_dirty_ring_reset(), v5.19."""

    needs_slots_lock = True

    taken: list[tuple[int, int]] = field(default_factory=list, init=False)

    def begin(self, m: Machine) -> None:
        if not m.dirty_ring_size:
            raise refuse(errno.EINVAL, "this VM has no dirty rings")
        self.result = 0
        self.todo = ["kvm_dirty_ring_reset"]

    def covers(self, slot: MemorySlot, gfn: int) -> bool:
        return (slot.as_id << 16 | slot.id, gfn - slot.base_gfn) in self.taken

    @step(lock="write")
    def kvm_dirty_ring_reset(self, m: Machine) -> str:
        """Take the next batch: harvested neighbours within 64 gfns, of one ring and one slot."""
        batch: list[tuple[int, int]] = []
        for vcpu in m.vcpus:
            ring = vcpu.dirty_ring
            while ring is not None and (entry := ring.next_harvested) is not None:
                if batch and (entry[0] != batch[0][0] or abs(entry[1] - batch[0][1]) >= 64):
                    break
                batch.append(entry)
                ring.free_next()
            if batch:
                break
        if batch:
            slot = m.memslots.id_to_memslot(batch[0][0] >> 16, batch[0][0] & 0xFFFF)
            pages = sorted({offset for _, offset in batch})
            if slot is not None and pages[-1] < slot.npages:
                wrprot.kvm_arch_mmu_enable_log_dirty_pt_masked(m, slot, [slot.base_gfn + page for page in pages])
            self.taken += batch
            self.todo = ["kvm_dirty_ring_reset"]
        else:
            self.todo = ["kvm_flush_remote_tlbs"] if self.taken else ["return_to_user_space"]
        return f"{len(batch)} entries"

    @step()
    def kvm_flush_remote_tlbs(self, m: Machine) -> None:
        m.kvm_flush_remote_tlbs()
        self.todo = ["return_to_user_space"]

    @step()
    def return_to_user_space(self, m: Machine) -> None:
        """User space reads the pages after the reset: their writes so far are accounted for."""
        self.result = len(self.taken)
        for slot_number, offset in self.taken:
            slot = m.memslots.id_to_memslot(slot_number >> 16, slot_number & 0xFFFF)
            if slot is not None:
                m.written.discard(slot.base_gfn + offset)


# ---- guarding a guest's page table -----------------------------------------------------------------------------------


@dataclass(eq=False)
class TrackGuestPageTable(Operation):
    """KVM starts to shadow the guest page table at ``gfn``: nobody may write it unseen once the lock is dropped.
    Source: kvm_slot_page_track_add_page(), account_shadowed(), v5.19."""

    actor: ClassVar[str] = "KVM"

    gfn: int

    def begin(self, m: Machine) -> None:
        if m.memslots.gfn_to_memslot(self.gfn) is None:
            raise ValueError(f"gfn {self.gfn:#x} is in no slot")
        self.todo = ["kvm_mmu_slot_gfn_write_protect"]

    @property
    def where(self) -> int:
        return self.gfn

    @step(lock="write", keeps=True)
    def kvm_mmu_slot_gfn_write_protect(self, m: Machine) -> str:
        m.write_tracked.add(self.gfn)
        owed = wrprot.kvm_mmu_slot_gfn_write_protect(m, self.gfn)
        self.todo = ["kvm_flush_remote_tlbs"] * owed
        return "flush before unlock" if owed else "no CPU can write"

    @step(lock="write")
    def kvm_flush_remote_tlbs(self, m: Machine) -> None:
        m.kvm_flush_remote_tlbs()
