"""`RealVm`: the front door of `Vm`, on this machine's KVM."""

from __future__ import annotations

import errno
import mmap
import os
import threading
import weakref
from collections import Counter
from contextlib import ExitStack, suppress
from ctypes import addressof, c_char
from types import TracebackType
from typing import Any, Self

import numpy as np

from kvmbook.model import (
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    PAGE_SHIFT,
    PAGE_SIZE,
    MemoryRegion,
    fits,
    to_bits,
    to_words,
)
from kvmbook.real import abi, guest, host
from kvmbook.real.device import capability, create_vm, ioctl, open_kvm
from kvmbook.real.host import Statistics
from kvmbook.real.vcpu import RealVcpu

HUGE = 2 << 20
MEMORY_SIZE = guest.REACH * PAGE_SIZE  # of user memory: a page for each gfn that the guest reaches
MAP_NORESERVE = 0x4000  # x86's; Python has no name for it before 3.13
FLUSH_REQUESTS = "remote_tlb_flush_requests"
PAGE_SIZES = {"4K": 15, "2M": 14}  # MADV_NOHUGEPAGE, MADV_HUGEPAGE


class RealVm:
    """A VM of this machine's KVM, with the calls, shapes and errnos of `Vm`. Close it, or use ``with``.

    ``page_size``: the host's, "4K" or "2M" (transparent huge pages; the host may refuse, `counters` tells). ``time_limit``:
    seconds that a vCPU may be in the guest.

    User memory is there for each gfn below 2^20, at ``user_base + (gfn << 12)``, as the model has it at USER_BASE. The VM's
    own code and page tables lie in its last memslot (``own_slot``), ids and gfns of which are refused. The vCPUs are created
    when ``vcpu`` is first touched: a dirty ring must be enabled before.

    `NoKvm` where there is no usable KVM.
    """

    def __init__(self, vcpus: int = 1, *, page_size: str = "4K", time_limit: float = 5.0) -> None:
        if not 1 <= vcpus <= guest.MOST_VCPUS:
            raise ValueError(f"a VM has 1 to {guest.MOST_VCPUS} vCPUs; got {vcpus}")
        if page_size not in PAGE_SIZES:
            raise ValueError(f"page_size is one of {', '.join(PAGE_SIZES)}; got {page_size!r}")
        self.vcpus_to_create, self.time_limit = vcpus, time_limit
        self._lock = threading.RLock()  # what user space is to know of slots, and the ioctls that it is about
        self._slots: dict[int, MemoryRegion] = {}
        self._reached: set[int] = set()  # gfns that the guest may touch, with their page there, since slots changed
        self._vcpus: list[RealVcpu] = []
        self._statistics: dict[int, Statistics | None] = {}  # by file descriptor; opened when first asked
        self._dirty_ring_size = 0
        self._closing = ExitStack()
        self._finalizer = weakref.finalize(self, self._closing.close)
        try:
            self._kvm = self._owned(open_kvm())
            self._fd = self._owned(create_vm(self._kvm))
            self.own_slot = capability(self._fd, abi.KVM_CAP_NR_MEMSLOTS) - 1
            self._statistics[self._fd] = None
            self._memory, start = self._map(MEMORY_SIZE + HUGE)
            self._skipped = -start % HUGE
            self.user_base = start + self._skipped
            with suppress(OSError):  # EINVAL where Linux is built without transparent huge pages: then there are none
                self._memory.madvise(PAGE_SIZES[page_size])
            self._private, address = self._map(guest.private_pages(vcpus) * PAGE_SIZE)
            self._private[: len(guest.image())] = guest.image()
            self._set_region(MemoryRegion(self.own_slot, 0, guest.PRIVATE, len(self._private), address))
        except BaseException:
            self.close()
            raise

    def _owned(self, fd: int) -> int:
        """A file descriptor that is closed with the VM."""
        self._closing.callback(os.close, fd)
        return fd

    def _ioctl(self, number: int, argument: Any = 0, told: str = "") -> int:
        """One ioctl of the VM, which is not closed meanwhile."""
        with self._lock:
            return ioctl(self._fd, number, argument, told)

    def _map(self, size: int) -> tuple[mmap.mmap, int]:
        """Fresh memory of this process, and its address."""
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        self._closing.callback(memory.close)
        return memory, addressof(c_char.from_buffer(memory))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give everything back: file descriptors and memory. A second time does nothing. What other threads do with the VM
        ends first: a vCPU that is in the guest is called back, and its `RealVcpu.run` refused, with OSError EBADF."""
        with self._lock:
            self._kvm = self._fd = -1
            self._statistics = {-1: None}
        for vcpu in self._vcpus:
            vcpu.close()
        self._finalizer()

    def __repr__(self) -> str:
        return f"RealVm(vcpus={self.vcpus_to_create})"

    @property
    def vcpu(self) -> list[RealVcpu]:
        """The vCPUs; created at the first touch (KVM_CREATE_VCPU)."""
        with self._lock:
            if not self._vcpus:
                cpuid = abi.kvm_cpuid2(nent=256)
                ioctl(self._kvm, abi.KVM_GET_SUPPORTED_CPUID, cpuid, "KVM_GET_SUPPORTED_CPUID()")
                sizes = ioctl(self._kvm, abi.KVM_GET_VCPU_MMAP_SIZE), self._dirty_ring_size
                made = []
                for number in range(self.vcpus_to_create):
                    fd = self._owned(self._ioctl(abi.KVM_CREATE_VCPU, number, f"KVM_CREATE_VCPU({number})"))
                    ioctl(fd, abi.KVM_SET_CPUID2, cpuid, f"KVM_SET_CPUID2 of vCPU {number}")
                    made.append(RealVcpu(number, fd, sizes, self._private, self._reach, self.time_limit, self._closing))
                    self._statistics[fd] = None
                self._vcpus = made
            return self._vcpus

    # ---- guest memory -----------------------------------------------------------------------------------------------

    def set_user_memory_region(
        self,
        slot: int = 0,
        base_gfn: int = 0,
        npages: int = 0,
        *,
        log_dirty_pages: bool = False,
        readonly: bool = False,
        userspace_addr: int | None = None,
    ) -> None:
        """Create, move or delete (``npages=0``) a slot, or change its flags.

        ``userspace_addr`` (bytes) defaults to where the slot lies already, or to where its gfns have their user memory.
        Others are passed on, but the guest is kept from touching what is not this VM's memory.
        OSError EINVAL, EEXIST or ENOMEM.
        """
        flags = KVM_MEM_LOG_DIRTY_PAGES * log_dirty_pages | KVM_MEM_READONLY * readonly
        with self._lock:
            if userspace_addr is None:
                old = self._slots.get(slot)
                userspace_addr = old.userspace_addr if old else self.user_base + base_gfn * PAGE_SIZE % MEMORY_SIZE
            self.kvm_set_user_memory_region(slot, flags, base_gfn << PAGE_SHIFT, npages << PAGE_SHIFT, userspace_addr)

    def kvm_set_user_memory_region(
        self, slot: int, flags: int, guest_phys_addr: int, memory_size: int, userspace_addr: int
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION, in bytes. OSError EINVAL, EEXIST or ENOMEM."""
        if slot == self.own_slot:
            raise ValueError(f"slot {slot}, the last one, is the VM's own")
        region = MemoryRegion(slot, flags, guest_phys_addr, memory_size, userspace_addr)
        with self._lock:
            self._set_region(region)
            if memory_size:
                self._slots[slot] = region
            else:
                del self._slots[slot]
            self._reached.clear()

    def _set_region(self, region: MemoryRegion) -> None:
        for name, value in region._asdict().items():
            fits(name, value, 32 if name in ("slot", "flags") else 64)
        told = ", ".join(f"{name}={value:#x}" for name, value in region._asdict().items())
        argument = abi.kvm_userspace_memory_region(*region)
        self._ioctl(abi.KVM_SET_USER_MEMORY_REGION, argument, f"KVM_SET_USER_MEMORY_REGION({told})")

    def hva(self, gfn: int) -> int | None:
        """The user address of ``gfn``, None where no slot has it."""
        for region in list(self._slots.values()):
            offset = (gfn << PAGE_SHIFT) - region.guest_phys_addr
            if region.slot >> 16 == 0 and 0 <= offset < region.memory_size:
                return region.userspace_addr + offset
        return None

    def _page(self, gfn: int) -> slice | None:
        """Where in the VM's user memory the page lies, None where no slot has it. ValueError if its slot lies elsewhere."""
        hva = self.hva(gfn)
        if hva is None:
            return None
        if not 0 <= hva - self.user_base < MEMORY_SIZE:
            raise ValueError(f"gfn {gfn:#x} has user address {hva:#x}, which is not this VM's memory")
        at = hva - self.user_base + self._skipped
        return slice(at, at + PAGE_SIZE)

    def _reach(self, gfn: int) -> None:
        """See to it that the guest may touch the page: that it is of this VM, and that the host has it, writable, with a
        `ret` to execute. ValueError if the guest cannot reach it."""
        if gfn in self._reached:
            return
        if not 0 <= gfn < guest.REACH:
            raise ValueError(f"gfn {gfn:#x}: the guest has addresses for those below {guest.REACH:#x}")
        if gfn in guest.OWN_GFNS:
            raise ValueError(f"gfn {gfn:#x}: the guest's own code and mailbox lie from {guest.OWN_GFNS.start:#x}")
        page = self._page(gfn)
        if page is not None:
            self._memory[page.start + guest.RET_AT] = guest.RET
        self._reached.add(gfn)

    def memory(self, gfn: int) -> bytes:
        """What user space sees in the page now. ValueError if ``gfn`` is in no slot."""
        page = self._page(gfn)
        if page is None:
            raise ValueError(f"gfn {gfn:#x} is in no slot")
        return self._memory[page]

    def value(self, gfn: int, vcpu: int = 0) -> int:
        """What the vCPU's last write left in the page: its `RealVcpu.value` of that time; 0 if there was none."""
        return int.from_bytes(self.memory(gfn)[8 * vcpu : 8 * vcpu + 8], "little")

    # ---- the dirty log ----------------------------------------------------------------------------------------------

    def get_dirty_log(self, slot: int = 0) -> np.ndarray:
        """KVM_GET_DIRTY_LOG. Returns a bool array, one per page of the slot. OSError ENXIO, EINVAL or ENOENT."""
        with self._lock:  # KVM writes as many words as the slot has, and the slot must not grow meanwhile
            region = self._slots.get(fits("slot", slot, 32))
            npages = region.memory_size >> PAGE_SHIFT if region else 1
            words = np.zeros(-(-npages // 64), np.uint64)
            argument = abi.kvm_dirty_log(slot=slot, dirty_bitmap=words.ctypes.data)
            self._ioctl(abi.KVM_GET_DIRTY_LOG, argument, f"KVM_GET_DIRTY_LOG(slot={slot})")
        return to_bits(words, npages)

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, bitmap: np.ndarray) -> None:
        """KVM_CLEAR_DIRTY_LOG of the pages that are set in ``bitmap``, a bool array of shape (num_pages,).
        OSError ENXIO, EINVAL, ENOENT or EFAULT."""
        fits("slot", slot, 32), fits("first_page", first_page, 64), fits("num_pages", num_pages, 32)
        bits = np.asarray(bitmap, bool)
        words = to_words(bits)
        address = words.ctypes.data if bits.shape == (num_pages,) else 0  # where KVM finds no bitmap: EFAULT
        told = f"KVM_CLEAR_DIRTY_LOG(slot={slot}, first_page={first_page}, num_pages={num_pages})"
        self._ioctl(abi.KVM_CLEAR_DIRTY_LOG, abi.kvm_clear_dirty_log(slot, num_pages, first_page, address), told)

    def enable_manual_dirty_log_protect(self, initially_set: bool = False) -> None:
        """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: GET only reports, CLEAR re-arms; ``initially_set``: enabling sets all bits and
        protects nothing."""
        self.enable_cap_manual_dirty_log_protect2(1 | 2 * initially_set)

    def enable_cap_manual_dirty_log_protect2(self, args: int) -> None:
        """The capability's raw argument. OSError EINVAL for unknown bits, and for bit 1 without bit 0."""
        self._enable_cap("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", args)

    def enable_dirty_ring(self, size_bytes: int) -> None:
        """KVM_CAP_DIRTY_LOG_RING: log to one ring per vCPU instead of bitmaps. OSError EINVAL or E2BIG."""
        self._enable_cap("KVM_CAP_DIRTY_LOG_RING", size_bytes)
        self._dirty_ring_size = size_bytes & 0xFFFF_FFFF

    def _enable_cap(self, name: str, value: int) -> None:
        argument = abi.kvm_enable_cap(cap=getattr(abi, name))
        argument.args[0] = fits("argument", value, 64)
        self._ioctl(abi.KVM_ENABLE_CAP, argument, f"KVM_ENABLE_CAP({name}, {value:#x})")

    def reset_dirty_rings(self) -> int:
        """KVM_RESET_DIRTY_RINGS. Returns how many harvested entries were freed. OSError EINVAL without rings."""
        return self._ioctl(abi.KVM_RESET_DIRTY_RINGS, told="KVM_RESET_DIRTY_RINGS()")

    # ---- what the host does, and what it counts ---------------------------------------------------------------------

    def invalidate_range(self, start: int, end: int) -> None:
        """The host takes the pages of [start, end) away, contents and all (MADV_DONTNEED): KVM zaps. ValueError for gfns in
        no slot."""
        for gfn in range(start, end):
            page = self._page(gfn)
            if page is None:
                raise ValueError(f"gfn {gfn:#x} is in no slot")
            self._memory.madvise(mmap.MADV_DONTNEED, page.start, PAGE_SIZE)
            self._reached.clear()

    def discard(self, gfn: int) -> None:
        """`invalidate_range` of one page."""
        self.invalidate_range(gfn, gfn + 1)

    def clear_young(self, start: int, end: int) -> bool:
        """Age the gfns of [start, end) without a flush. Returns whether any was young. OSError ENOSYS, with what is missing,
        where the machine does not let us."""
        return host.clear_young([hva for gfn in range(start, end) if (hva := self.hva(gfn)) is not None])

    @property
    def counters(self) -> dict[str, int]:
        """KVM's own statistics by name: those of the VM, and those of its vCPUs, added up. Only differences tell, for the
        guest's own pages are in it; and each stay in the guest ends with an MMIO exit, which counts in ``pf_taken``,
        ``pf_emulate`` and ``insn_emulation``. OSError ENOTTY before Linux v5.14."""
        total: Counter[str] = Counter()
        with self._lock:
            for fd, statistics in self._statistics.items():
                if statistics is None:
                    self._statistics[fd] = statistics = Statistics(fd)
                    self._owned(statistics.fd)
                for name, value in statistics.read().items():
                    total[name] += value
        return dict(total)

    @property
    def flush_requests(self) -> int:
        """How often KVM has asked for a flush of all TLBs: requests, not ``remote_tlb_flush``, which counts only where a vCPU
        had to be kicked. OSError ENOTTY where the kernel does not count them."""
        counters = self.counters
        if FLUSH_REQUESTS not in counters:
            raise OSError(errno.ENOTTY, f"{os.strerror(errno.ENOTTY)}: this kernel does not count {FLUSH_REQUESTS}")
        return counters[FLUSH_REQUESTS]
