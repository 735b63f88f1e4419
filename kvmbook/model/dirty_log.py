"""Reading the dirty log: KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG, KVM_RESET_DIRTY_RINGS, as operations made of steps.

They flush by what the log says, never by what happened to an SPTE.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from kvmbook.model import wrprot
from kvmbook.model.machine import Machine, Operation, step
from kvmbook.model.memslots import MemorySlot, bit_offsets, fits, refuse, to_bits, to_words

NO_SLOT = MemorySlot(0, 0, 0, 0, 0)  # before it is looked up


@dataclass(eq=False)
class DirtyLogOperation(Operation):
    """What KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG share: take bits word by word, re-arm those pages, and flush if any
    bit was taken. *The flush depends on the bitmap, never on whether an SPTE changed.*

    ``words`` are those still to take; ``taken`` the gfns whose bits were taken; ``flushes_early``: before mmu_lock is let go.
    """

    last_step: ClassVar[str]

    slot_number: int
    slot: MemorySlot = field(default=NO_SLOT, init=False)
    flushes_early: bool = field(default=False, init=False)
    words: list[int] = field(default_factory=list, init=False)
    taken: list[int] = field(default_factory=list, init=False)
    word_gfns: list[int] = field(default_factory=list, init=False)

    @property
    def needs_slots_lock(self) -> bool:
        return True

    def wants_lock(self, name: str) -> str | None:
        early = self.flushes_early and name == "kvm_arch_flush_remote_tlbs_memslot"
        return "write" if early else super().wants_lock(name)

    def find_slot(self, m: Machine, first_page: int = 0) -> MemorySlot:
        """The slot, or OSError ENXIO, EINVAL or ENOENT."""
        self.flushes_early = m.kernel.harvest_flushes_before_unlock
        if m.dirty_ring_size:
            raise refuse(errno.ENXIO, "this VM logs to dirty rings: there is no bitmap")
        slot = m.memslots.find(self.slot_number, m.hardware.address_spaces)
        if first_page % 64:
            raise refuse(errno.EINVAL, f"first_page {first_page} is not a multiple of 64")
        if slot is None:
            raise refuse(errno.ENOENT, f"there is no slot {self.slot_number & 0xFFFF}")
        if slot.dirty_bitmap is None:
            raise refuse(errno.ENOENT, f"slot {slot.id} does not log dirty pages")
        return slot

    def covers(self, slot: MemorySlot, gfn: int) -> bool:
        """A taken bit is news until user space has it."""
        return slot.number == self.slot.number and gfn in self.taken

    @property
    def live(self) -> np.ndarray:
        assert self.slot.dirty_bitmap is not None
        return np.asarray(self.slot.dirty_bitmap[0])

    @property
    def buffer(self) -> np.ndarray:
        assert self.slot.dirty_bitmap is not None
        return np.asarray(self.slot.dirty_bitmap[1])

    @step()
    def kick(self, m: Machine) -> str | None:
        """Ask the vCPUs to leave the guest, which drains PML buffers. It does not wait.
        Source: arch/x86/kvm/x86.c: kvm_arch_sync_dirty_log(), v5.19."""
        if not m.hardware.pml_entries and not m.kernel.kicks_without_pml:
            return "nothing to drain"
        m.kick_all()
        return None

    @step(lock="write", keeps=True)
    def take_bits(self, m: Machine) -> str:
        """Exchange the next word: the bits that are asked for become 0 and are ours."""
        word = self.words.pop(0)
        ours = self.take_word(word)
        self.word_gfns = [self.slot.base_gfn + word * 64 + bit for bit in bit_offsets(ours)]
        self.taken += self.word_gfns
        self.todo = ["rearm"] * (ours != 0) + ["take_bits"] * bool(self.words) + self.ending(bool(self.taken))
        return f"{len(self.word_gfns)} taken"

    @step(lock="write", keeps=True)
    def rearm(self, m: Machine) -> None:
        """Make the next write to those pages visible again."""
        wrprot.kvm_arch_mmu_enable_log_dirty_pt_masked(m, self.slot, self.word_gfns)

    def take_word(self, word: int) -> int:
        raise NotImplementedError

    def ending(self, flush: bool) -> list[str]:
        """The steps after the last word."""
        return ["kvm_arch_flush_remote_tlbs_memslot"] * flush + [self.last_step]

    @step()
    def kvm_arch_flush_remote_tlbs_memslot(self, m: Machine) -> None:
        """Every vCPU forgets. Source: mmu/mmu.c, v5.19."""
        m.kvm_flush_remote_tlbs()


@dataclass(eq=False)
class GetDirtyLog(DirtyLogOperation):
    """Report the dirty pages of a slot, and re-arm them; with manual protect only report.
    ``result``: bool array, one per page. Source: virt/kvm/kvm_main.c: kvm_get_dirty_log_protect(), v5.19."""

    last_step = "copy_to_user"

    def begin(self, m: Machine) -> None:
        self.slot = self.find_slot(m)
        self.todo = ["kick", "copy_live_bitmap" if m.manual_protect else "find_words"]

    @step()
    def copy_live_bitmap(self, m: Machine) -> None:
        """Manual protect: nothing is cleared, protected or flushed."""
        self.result = to_bits(self.live, self.slot.npages)
        m.tell(self.slot)

    @step(lock="write", keeps=True)
    def find_words(self, m: Machine) -> None:
        """Zero the second half of the bitmap, and see which words are not zero."""
        self.buffer[:] = 0
        self.words = np.flatnonzero(self.live).tolist()
        self.todo = ["take_bits"] if self.words else self.ending(False)

    def take_word(self, word: int) -> int:
        self.buffer[word], self.live[word] = self.live[word], 0
        self.words = (word + 1 + np.flatnonzero(self.live[word + 1 :])).tolist()  # as it comes to them, not as it began
        return int(self.buffer[word])

    @step()
    def copy_to_user(self, m: Machine) -> str:
        """User space has the report, and will copy those pages now: their writes so far are accounted for."""
        self.result = to_bits(self.buffer, self.slot.npages)
        m.take_told(self.slot, self.taken)
        m.note_copies(self.slot, self.taken)
        return f"{len(self.taken)} dirty"


@dataclass(eq=False)
class ClearDirtyLog(DirtyLogOperation):
    """Clear and re-arm the pages that user space names, if they are dirty.

    ``bitmap``: bool array of shape (num_pages,), the pages from ``first_page`` of the slot.
    Source: virt/kvm/kvm_main.c: kvm_clear_dirty_log_protect(), v5.19.
    """

    last_step = "return_to_user_space"

    first_page: int
    num_pages: int
    bitmap: np.ndarray

    def begin(self, m: Machine) -> None:
        first, count = fits("first_page", self.first_page, 64), fits("num_pages", self.num_pages, 32)
        slot = self.find_slot(m, first)
        if first > slot.npages or count > slot.npages - first:
            raise refuse(errno.EINVAL, f"pages {first}..{first + count - 1} reach beyond the slot's {slot.npages}")
        if count % 64 and first + count != slot.npages:
            raise refuse(errno.EINVAL, f"num_pages {count} is neither a multiple of 64 nor up to the slot's end")
        self.slot, self.bitmap = slot, np.asarray(self.bitmap, bool)
        self.todo = ["kick", "copy_from_user"]

    @step()
    def copy_from_user(self, m: Machine) -> str | None:
        """Put the request into the second half of the bitmap; only now it is seen whether it can be read."""
        if self.bitmap.shape != (self.num_pages,):
            why = f"a bitmap of shape {self.bitmap.shape} cannot be read as {self.num_pages} pages"
            self.refusal = refuse(errno.EFAULT, why)
            return "refused"
        words, first = to_words(self.bitmap), self.first_page // 64
        self.buffer[first : first + words.size] = words
        self.words = (first + np.flatnonzero(words)).tolist()
        self.todo = ["take_bits"] if self.words else self.ending(False)
        return None

    def take_word(self, word: int) -> int:
        ours = int(self.buffer[word] & self.live[word])
        self.live[word] &= ~self.buffer[word]
        return ours

    @step()
    def return_to_user_space(self, m: Machine) -> str:
        """User space will copy the pages of which a GET has told it. If a bit was cleared of which it was not told, the write
        behind it is lost: nobody will ever name that page."""
        m.note_copies(self.slot, m.take_told(self.slot, self.taken))
        return f"{len(self.taken)} dirty"


@dataclass(eq=False)
class ResetDirtyRings(Operation):
    """Free the ring entries that user space has harvested and re-arm their pages; flush once if there were any, after
    slots_lock is dropped.
    ``result``: how many entries. ``signal_pending``: a signal waits for the caller; it may come between any two steps.
    Source: virt/kvm/kvm_main.c: kvm_vm_ioctl_reset_dirty_pages(), virt/kvm/dirty_ring.c: kvm_dirty_ring_reset(), v5.19."""

    signal_pending: bool = False
    taken: list[tuple[int, int]] = field(default_factory=list, init=False)
    batch: list[tuple[int, int]] = field(default_factory=list, init=False)

    @property
    def needs_slots_lock(self) -> bool:
        return not self.started or self.todo[:1] in (["mutex_lock"], ["kvm_dirty_ring_reset"], ["kvm_reset_dirty_gfn"])

    def begin(self, m: Machine) -> None:
        if not m.dirty_ring_size:
            raise refuse(errno.EINVAL, "this VM has no dirty rings")
        self.result = 0
        self.todo = ["kvm_dirty_ring_reset"]

    def covers(self, slot: MemorySlot, gfn: int) -> bool:
        return (slot.number, gfn - slot.base_gfn) in self.taken

    @step()
    def kvm_dirty_ring_reset(self, m: Machine) -> str:
        """Free the next batch: harvested neighbours within 64 gfns, of one ring and one slot."""
        batch: list[tuple[int, int]] = []
        for vcpu in [] if self._stops(m) else m.vcpus:
            ring = vcpu.dirty_ring
            while ring is not None and (entry := ring.next_harvested) is not None:
                pages = [page for _, page in (*batch, entry)]
                if batch and (entry[0] != batch[0][0] or max(pages) - min(pages) >= 64):
                    break
                batch.append(entry)
                ring.free_next()
            if batch:
                break
        self.batch = batch
        self.taken += batch
        end = ["kvm_flush_remote_tlbs"] if self.taken else ["return_to_user_space"]
        self.todo = ["kvm_reset_dirty_gfn"] if batch else end
        return f"{len(batch)} entries"

    def _stops(self, m: Machine) -> bool:
        return self.signal_pending and m.kernel.reset_stops_at_signal

    @step(lock="write")
    def kvm_reset_dirty_gfn(self, m: Machine) -> str | None:
        """Arm its pages again. (A signal is looked for before each entry, and so before this.)
        Source: virt/kvm/dirty_ring.c, v5.19."""
        self.todo = ["kvm_dirty_ring_reset"]
        if self._stops(m) and m.kernel.reset_forgets_at_signal:
            return "a signal: not armed"
        slot = m.memslots.find(self.batch[0][0], m.hardware.address_spaces)
        pages = sorted({offset for _, offset in self.batch})
        if slot is not None and pages[-1] < slot.npages:
            wrprot.kvm_arch_mmu_enable_log_dirty_pt_masked(m, slot, [slot.base_gfn + page for page in pages])
        return None

    @step()
    def kvm_flush_remote_tlbs(self, m: Machine) -> None:
        m.kvm_flush_remote_tlbs()
        self.todo = ["return_to_user_space"]

    @step()
    def return_to_user_space(self, m: Machine) -> None:
        """User space will copy the harvested pages now: their writes so far are accounted for."""
        self.result = len(self.taken)
        for slot_number, offset in self.taken:
            slot = m.memslots.find(slot_number, m.hardware.address_spaces)
            if slot is not None:
                m.note_copies(slot, [slot.base_gfn + offset])
