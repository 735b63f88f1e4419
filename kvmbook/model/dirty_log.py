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
from kvmbook.model.memslots import MemorySlot, count_bits, fits, refuse, to_bits, to_words


def no_words() -> np.ndarray:
    """A bitmap of no pages."""
    return np.zeros(0, np.uint64)


NO_SLOT = MemorySlot(0, 0, 0, 0, 0)  # before it is looked up


@dataclass(eq=False)
class DirtyLogOperation(Operation):
    """What KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG share: take bits word by word, re-arm those pages, and flush if any
    bit was taken. *The flush depends on the bitmap, never on whether an SPTE changed.*

    ``words``: the numbers of the bitmap's words that are still to take. ``taken``: the bits that were taken, as words from
    word ``first`` on; ``mask``: those of the last step, from word ``offset`` on. ``flushes_early``: before mmu_lock is let
    go.
    """

    last_step: ClassVar[str]

    slot_number: int
    slot: MemorySlot = field(default=NO_SLOT, init=False)
    flushes_early: bool = field(default=False, init=False)
    words: np.ndarray = field(default_factory=no_words, init=False)
    first: int = field(default=0, init=False)
    taken: np.ndarray = field(default_factory=no_words, init=False)
    offset: int = field(default=0, init=False)
    mask: np.ndarray = field(default_factory=no_words, init=False)

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
        return slot.number == self.slot.number and self.is_among(self.taken, gfn)

    def is_among(self, words: np.ndarray, gfn: int) -> bool:
        """Whether the bit of ``gfn`` is set in words of the slot's bitmap from word ``first`` on."""
        word, bit = divmod(gfn - self.slot.base_gfn, 64)
        return 0 <= word - self.first < words.size and bool(int(words[word - self.first]) >> bit & 1)

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
        """Exchange the next word, or ``words_per_step``: the bits that are asked for become 0 and are ours."""
        count = m.words_per_step or len(self.words)
        self.offset, behind = int(self.words[0]), int(self.words[:count][-1]) + 1
        self.words = self.words[count:]
        self.mask = self.take_words(self.offset, behind)
        self.taken[self.offset - self.first : behind - self.first] |= self.mask
        more, any_taken = len(self.words) > 0, bool(self.taken.any())
        self.todo = ["rearm"] * bool(self.mask.any()) + ["take_bits"] * more + self.ending(any_taken)
        return f"{count_bits(self.mask)} taken"

    @step(lock="write", keeps=True)
    def rearm(self, m: Machine) -> None:
        """Make the next write to those pages visible again."""
        wrprot.kvm_arch_mmu_enable_log_dirty_pt_masked(m, self.slot, self.offset * 64, self.mask)

    def take_words(self, first: int, behind: int) -> np.ndarray:
        """Take the live bitmap's words from ``first`` up to ``behind``, as far as they are asked for."""
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
        self.words, self.taken = np.flatnonzero(self.live), np.zeros_like(self.live)
        self.todo = ["take_bits"] if self.words.size else self.ending(False)

    def take_words(self, first: int, behind: int) -> np.ndarray:
        self.buffer[first:behind] = self.live[first:behind]
        self.live[first:behind] = 0
        self.words = behind + np.flatnonzero(self.live[behind:])  # as it comes to them, not as it began
        return self.buffer[first:behind].copy()

    @step()
    def copy_to_user(self, m: Machine) -> str:
        """User space has the report, and will copy those pages now: their writes so far are accounted for."""
        self.result = to_bits(self.buffer, self.slot.npages)
        m.take_told(self.slot, self.first, self.taken)
        m.note_copies(self.slot, [gfn for gfn in m.written if self.is_among(self.taken, gfn)])
        return f"{count_bits(self.taken)} dirty"


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
        words, self.first = to_words(self.bitmap), self.first_page // 64
        self.buffer[self.first : self.first + words.size] = words
        self.words, self.taken = self.first + np.flatnonzero(words), np.zeros_like(words)
        self.todo = ["take_bits"] if self.words.size else self.ending(False)
        return None

    def take_words(self, first: int, behind: int) -> np.ndarray:
        asked, live = self.buffer[first:behind], self.live[first:behind]
        ours = asked & live
        live &= ~asked
        return np.asarray(ours)

    @step()
    def return_to_user_space(self, m: Machine) -> str:
        """User space will copy the pages of which a GET has told it. If a bit was cleared of which it was not told, the write
        behind it is lost: nobody will ever name that page."""
        known = m.take_told(self.slot, self.first, self.taken)
        m.note_copies(self.slot, [gfn for gfn in m.written if self.is_among(known, gfn)])
        return f"{count_bits(self.taken)} dirty"


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
            mask = np.array([sum(1 << page - pages[0] for page in pages)], np.uint64)
            wrprot.kvm_arch_mmu_enable_log_dirty_pt_masked(m, slot, pages[0], mask)
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
