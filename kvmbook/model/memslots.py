"""Guest memory as user space declares it: slots, the rules for changing them, the dirty bitmap and the dirty ring."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import numpy as np

from kvmbook.model.arrays import ALL_BITS
from kvmbook.model.spte import PAGE_SHIFT

PAGE_SIZE = 1 << PAGE_SHIFT
KVM_USER_MEM_SLOTS = 32764
KVM_MEM_MAX_NR_PAGES = 2**31 - 1
TASK_SIZE_MAX = (1 << 47) - PAGE_SIZE  # the last page below the hole belongs to nobody
KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY = 1, 2

KVM_DIRTY_RING_RSVD_ENTRIES = 64
KVM_DIRTY_RING_MAX_ENTRIES = 65536
DIRTY_GFN_SIZE = 16


def refuse(code: int, why: str) -> OSError:
    """The error that the kernel would return, with one sentence that says which rule was broken and by what value."""
    return OSError(code, f"{os.strerror(code)}: {why}")


@dataclass(frozen=True)
class MemorySlot:
    """One memslot: ``npages`` pages of guest memory from ``base_gfn``, backed by user memory at ``userspace_addr``.

    ``dirty_bitmap`` is None, or a uint64 array of shape (2, ceil(npages / 64)): row 0 is the live bitmap, row 1 the
    buffer that a harvest fills. A new slot object shares it with the one it replaces.
    Source: include/linux/kvm_host.h: struct kvm_memory_slot, v5.19.
    """

    as_id: int
    id: int
    base_gfn: int
    npages: int
    userspace_addr: int
    flags: int = 0
    dirty_bitmap: np.ndarray | None = field(default=None, compare=False, repr=False)
    invalid: bool = False

    def __contains__(self, gfn: int | None) -> bool:
        return gfn is not None and self.base_gfn <= gfn < self.end_gfn

    @property
    def number(self) -> int:
        """What user space calls it: the id in the low 16 bits, the address space above."""
        return self.as_id << 16 | self.id

    @property
    def end_gfn(self) -> int:
        """The first gfn behind the slot."""
        return self.base_gfn + self.npages

    @property
    def logs_dirty(self) -> bool:
        """Source: include/linux/kvm_host.h: kvm_slot_dirty_track_enabled(), v5.19."""
        return bool(self.flags & KVM_MEM_LOG_DIRTY_PAGES)

    @property
    def readonly(self) -> bool:
        return bool(self.flags & KVM_MEM_READONLY)

    def hva(self, gfn: int) -> int:
        """The user address of ``gfn``. Source: include/linux/kvm_host.h: __gfn_to_hva_memslot(), v5.19."""
        return self.userspace_addr + ((gfn - self.base_gfn) << PAGE_SHIFT)

    def new_bitmap(self, full: bool) -> np.ndarray:
        """A bitmap and its second half, all clear, or (``full``) with the bit of each page set. OSError ENOMEM."""
        try:
            bitmap = np.zeros((2, -(-self.npages // 64)), np.uint64)
            if full:
                bitmap[0] = ALL_BITS
                bitmap[0, -1] >>= np.uint64(-self.npages % 64)
        except MemoryError:
            raise refuse(errno.ENOMEM, f"no memory for the dirty bitmap of {self.npages} pages") from None
        return bitmap

    def set_bit(self, gfn: int) -> None:
        """Mark ``gfn`` in the live bitmap."""
        assert self.dirty_bitmap is not None
        word, bit = divmod(gfn - self.base_gfn, 64)
        self.dirty_bitmap[0, word] |= np.uint64(1 << bit)

    def test_bit(self, gfn: int) -> bool:
        """Whether ``gfn`` is marked in the live bitmap; False without one."""
        if self.dirty_bitmap is None:
            return False
        word, bit = divmod(gfn - self.base_gfn, 64)
        return bool(int(self.dirty_bitmap[0, word]) >> bit & 1)


def to_bits(words: np.ndarray, npages: int) -> np.ndarray:
    """A bitmap's uint64 words as a bool array of shape (npages,)."""
    return np.unpackbits(words.view(np.uint8), count=npages, bitorder="little").view(bool)


def to_words(bits: np.ndarray) -> np.ndarray:
    """A bool array as the uint64 words of a bitmap, padded with clear bits."""
    padded = np.zeros(-(-bits.size // 64) * 64, bool)
    padded[: bits.size] = bits
    return np.packbits(padded, bitorder="little").view(np.uint64)


def bits_between(words: np.ndarray, first: int, count: int) -> np.ndarray | None:
    """The ``count`` bits from bit ``first`` on, as a bool array; None if none of them is set, nor others of their words."""
    part = words[first // 64 : -(-(first + count) // 64)]
    return to_bits(part, part.size * 64)[first % 64 :][:count] if part.any() else None


def count_bits(words: np.ndarray) -> int:
    """How many bits are set."""
    return int(np.bitwise_count(words).sum())


# ---- declaring memory ------------------------------------------------------------------------------------------------


class Change(Enum):
    """What a KVM_SET_USER_MEMORY_REGION call comes to. Source: include/linux/kvm_host.h: enum kvm_mr_change, v5.19."""

    CREATE = "create"
    DELETE = "delete"
    MOVE = "move"
    FLAGS_ONLY = "flags only"
    NONE = "nothing to do"


class MemoryRegion(NamedTuple):
    """The argument of KVM_SET_USER_MEMORY_REGION, in bytes. ``slot``: id in the low 16 bits, address space above."""

    slot: int
    flags: int
    guest_phys_addr: int
    memory_size: int
    userspace_addr: int


@dataclass
class Memslots:
    """The active memslots. ``generation`` counts publications; a fault holds the slot it found under one of them."""

    slots: dict[tuple[int, int], MemorySlot] = field(default_factory=dict)
    generation: int = 0

    def id_to_memslot(self, as_id: int, slot_id: int) -> MemorySlot | None:
        return self.slots.get((as_id, slot_id))

    def gfn_to_memslot(self, gfn: int, as_id: int = 0) -> MemorySlot | None:
        """The slot that holds ``gfn``, or None. Source: virt/kvm/kvm_main.c, v5.19."""
        return next((slot for slot in self.slots.values() if slot.as_id == as_id and gfn in slot), None)

    def on_same_memory(self, start: int, end: int) -> list[tuple[int, int]]:
        """The ranges of gfns that lie on the same user memory as those of [start, end): slots may share it.
        Source: virt/kvm/kvm_main.c: kvm_for_each_memslot_in_hva_range(), v5.19."""
        slots, shared = [slot for slot in self.slots.values() if slot.as_id == 0], set()
        for slot in slots:
            low, pages = max(start, slot.base_gfn), min(end, slot.end_gfn) - max(start, slot.base_gfn)
            for other in slots if pages > 0 else ():
                first = other.base_gfn + ((slot.hva(low) - other.userspace_addr) >> PAGE_SHIFT)
                shared.add((max(first, other.base_gfn), min(first + pages, other.end_gfn)))
        return sorted((first, behind) for first, behind in shared if first < behind)

    def publish(self, slot: MemorySlot | None, as_id: int, slot_id: int) -> None:
        """Replace a slot, or with None remove it. Source: virt/kvm/kvm_main.c: kvm_swap_active_memslots(), v5.19."""
        if slot is None:
            del self.slots[as_id, slot_id]
        else:
            self.slots[as_id, slot_id] = slot
        self.generation += 1

    def find(self, number: int, address_spaces: int) -> MemorySlot | None:
        """The slot that user space calls ``number`` (32 bits); OSError EINVAL for numbers that no slot can have."""
        as_id, slot_id = fits("slot", number, 32) >> 16, number & 0xFFFF
        if as_id >= address_spaces or slot_id >= KVM_USER_MEM_SLOTS:
            raise refuse(errno.EINVAL, f"address space {as_id}, slot {slot_id}: there is no such number")
        return self.id_to_memslot(as_id, slot_id)

    def classify(
        self, region: MemoryRegion, address_spaces: int
    ) -> tuple[Change, MemorySlot | None, MemorySlot | None]:
        """Check ``region`` by the kernel's rules, in the kernel's order, and return (change, old slot, new slot). One more
        check comes later, see `check_width`.

        Raises OSError: EINVAL, EEXIST. Source: virt/kvm/kvm_main.c: __kvm_set_memory_region(), v5.19.
        """
        for name, value in region._asdict().items():
            fits(name, value, 32 if name in ("slot", "flags") else 64)
        as_id, slot_id = region.slot >> 16, region.slot & 0xFFFF
        npages, base_gfn = region.memory_size >> PAGE_SHIFT, region.guest_phys_addr >> PAGE_SHIFT
        if slot_id >= KVM_USER_MEM_SLOTS:
            raise refuse(errno.EINVAL, f"slot id {slot_id}: ids go from 0 to {KVM_USER_MEM_SLOTS - 1}")
        if region.flags & ~(KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY):
            raise refuse(errno.EINVAL, f"flags {region.flags:#x}: only LOG_DIRTY_PAGES (1) and READONLY (2) are known")
        for name in ("memory_size", "guest_phys_addr", "userspace_addr"):
            if getattr(region, name) % PAGE_SIZE:
                raise refuse(errno.EINVAL, f"{name} {getattr(region, name):#x} is not a multiple of {PAGE_SIZE}")
        if region.userspace_addr + region.memory_size > TASK_SIZE_MAX:
            raise refuse(errno.EINVAL, f"userspace_addr {region.userspace_addr:#x}: the range leaves user space")
        if as_id >= address_spaces:
            there_are = "is one" if address_spaces == 1 else f"are {address_spaces}"
            raise refuse(errno.EINVAL, f"address space {as_id}: there {there_are}")
        if (region.guest_phys_addr + region.memory_size) % (1 << 64) < region.guest_phys_addr:
            raise refuse(errno.EINVAL, f"guest_phys_addr {region.guest_phys_addr:#x} + memory_size wraps around")
        if npages > KVM_MEM_MAX_NR_PAGES:
            raise refuse(errno.EINVAL, f"{npages} pages: a slot holds at most {KVM_MEM_MAX_NR_PAGES}")
        old = self.id_to_memslot(as_id, slot_id)
        if npages == 0:
            if old is None:
                raise refuse(errno.EINVAL, f"memory_size 0 deletes, but there is no slot {slot_id}")
            return Change.DELETE, old, None
        new = MemorySlot(as_id, slot_id, base_gfn, npages, region.userspace_addr, region.flags)
        change = _change(old, new)
        if change in (Change.CREATE, Change.MOVE):
            for other in self.slots.values():
                apart = new.end_gfn <= other.base_gfn or other.end_gfn <= base_gfn
                if other is not old and other.as_id == as_id and not apart:
                    raise refuse(errno.EEXIST, f"gfns {base_gfn:#x}..{new.end_gfn - 1:#x} overlap slot {other.id}")
        return change, old, new


def _change(old: MemorySlot | None, new: MemorySlot) -> Change:
    if old is None:
        return Change.CREATE
    if new.userspace_addr != old.userspace_addr:
        raise refuse(errno.EINVAL, f"slot {old.id} lies at {old.userspace_addr:#x}; its user address cannot change")
    if new.npages != old.npages:
        raise refuse(errno.EINVAL, f"slot {old.id} has {old.npages} pages; its size cannot change")
    if new.readonly != old.readonly:
        raise refuse(errno.EINVAL, f"slot {old.id}: READONLY cannot be switched")
    if new.base_gfn != old.base_gfn:
        return Change.MOVE
    return Change.NONE if new.flags == old.flags else Change.FLAGS_ONLY


def check_width(slot: MemorySlot, gpa_bits: int) -> None:
    """Refuse a slot that ends above what can be mapped. OSError EINVAL.
    Source: arch/x86/kvm/x86.c: kvm_arch_prepare_memory_region(), v5.19."""
    if slot.end_gfn - 1 >= 1 << (gpa_bits - PAGE_SHIFT):
        raise refuse(errno.EINVAL, f"last gfn {slot.end_gfn - 1:#x} lies above the host's {gpa_bits}-bit addresses")


def fits(name: str, value: int, bits: int) -> int:
    """The value of an argument that is so many bits wide; ValueError for what user space could not even say."""
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{name} {value:#x} does not fit into {bits} bits")
    return value


# ---- the dirty ring --------------------------------------------------------------------------------------------------


@dataclass
class DirtyGfn:
    """One entry of a ring. ``flags``: 1 dirty, 2 harvested by user space. ``slot`` is as_id << 16 | id, ``offset`` the
    page's number in its slot. Source: include/uapi/linux/kvm.h: struct kvm_dirty_gfn, v5.19."""

    flags: int
    slot: int
    offset: int


@dataclass
class DirtyRing:
    """One vCPU's dirty ring of ``size`` entries, by place; an entry that is free is not stored.

    The indices run on for ever; ``harvest_index`` is user space's own.
    Source: include/linux/kvm_dirty_ring.h: struct kvm_dirty_ring, v5.19.
    """

    size: int
    cpu_dirty_log_size: int
    entries: dict[int, DirtyGfn] = field(default_factory=dict)
    dirty_index: int = 0
    reset_index: int = 0
    harvest_index: int = 0

    @property
    def soft_full(self) -> bool:
        """Whether the vCPU must not enter the guest: used entries reach size - 64 - CPU log size. The rest is reserved for
        what KVM marks itself. Source: virt/kvm/dirty_ring.c: kvm_dirty_ring_soft_full(), v5.19."""
        limit = self.size - KVM_DIRTY_RING_RSVD_ENTRIES - self.cpu_dirty_log_size
        return self.dirty_index - self.reset_index >= limit

    @property
    def full(self) -> bool:
        """Whether a push overwrites the oldest entry. Source: virt/kvm/dirty_ring.c: kvm_dirty_ring_full(), v5.19."""
        return self.dirty_index - self.reset_index >= self.size

    def push(self, slot: MemorySlot, gfn: int) -> None:
        """Record one dirty page. Source: virt/kvm/dirty_ring.c: kvm_dirty_ring_push(), v5.19."""
        self.entries[self.dirty_index % self.size] = DirtyGfn(1, slot.number, gfn - slot.base_gfn)
        self.dirty_index += 1

    def harvest(self) -> list[tuple[int, int]]:
        """User space's part: take all dirty entries, oldest first, mark them harvested and return (slot, page number)s.
        Pages are to be copied after KVM_RESET_DIRTY_RINGS, which arms them again."""
        taken = []
        while (entry := self.entries.get(self.harvest_index % self.size)) is not None and entry.flags == 1:
            entry.flags = 2
            taken.append((entry.slot, entry.offset))
            self.harvest_index += 1
        return taken

    @property
    def news(self) -> set[tuple[int, int]]:
        """The (slot, page number)s that user space has harvested and not yet given back, or will meet when it harvests."""
        reached = {(entry.slot, entry.offset) for entry in self.entries.values() if entry.flags == 2}
        for index in range(self.harvest_index, self.harvest_index + self.size):
            entry = self.entries.get(index % self.size)
            if entry is None or entry.flags != 1:
                break
            reached.add((entry.slot, entry.offset))
        return reached

    @property
    def next_harvested(self) -> tuple[int, int] | None:
        """The (slot, page number) of the oldest entry, if user space has harvested it."""
        entry = self.entries.get(self.reset_index % self.size)
        return (entry.slot, entry.offset) if entry is not None and entry.flags & 2 else None

    def free_next(self) -> None:
        """The kernel's part of a reset: free the oldest entry."""
        del self.entries[self.reset_index % self.size]
        self.reset_index += 1

    @staticmethod
    def check_size(size_bytes: int, cpu_dirty_log_size: int) -> int:
        """Refuse a bad ring size (bytes); return what the kernel makes of it, whose argument has 32 bits. OSError EINVAL or
        E2BIG. Source: virt/kvm/kvm_main.c: kvm_vm_ioctl_enable_dirty_log_ring(), v5.19."""
        size = fits("size_bytes", size_bytes, 64) & 0xFFFF_FFFF
        if size == 0 or size & (size - 1):
            raise refuse(errno.EINVAL, f"a ring of {size} bytes: the size must be a power of two")
        least = max(PAGE_SIZE, (KVM_DIRTY_RING_RSVD_ENTRIES + cpu_dirty_log_size) * DIRTY_GFN_SIZE)
        if size < least:
            raise refuse(errno.EINVAL, f"a ring of {size} bytes: at least {least} are needed here")
        if size > KVM_DIRTY_RING_MAX_ENTRIES * DIRTY_GFN_SIZE:
            raise refuse(errno.E2BIG, f"a ring of {size} bytes: at most {KVM_DIRTY_RING_MAX_ENTRIES} entries")
        return size
