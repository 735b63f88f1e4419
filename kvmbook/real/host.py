"""What else the host lets us see and do: KVM's counters by name, and the ageing of pages.

How user space asks Linux to age pages: /sys/kernel/mm/page_idle/bitmap, a bit per page frame. Setting a page's bit ages it
everywhere, in KVM by way of the notifier clear_young. When the bit is read, Linux asks again whether the page was used since,
and drops the bit if so. See Documentation/admin-guide/mm/idle_page_tracking.rst; of the counters,
Documentation/virt/kvm/api.rst, 4.133.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from contextlib import suppress
from io import FileIO
from pathlib import Path

from kvmbook.model import PAGE_SIZE
from kvmbook.real import abi
from kvmbook.real.device import ioctl


class Statistics:
    """KVM's counters of a VM or a vCPU by their names, without debugfs: what KVM_GET_STATS_FD of ``fd`` offers; single
    numbers only, no histograms. OSError ENOTTY before Linux v5.14."""

    def __init__(self, fd: int) -> None:
        self.fd = ioctl(fd, abi.KVM_GET_STATS_FD, told="KVM_GET_STATS_FD(), which Linux has since v5.14")
        head = abi.kvm_stats_header.from_buffer_copy(os.pread(self.fd, ctypes.sizeof(abi.kvm_stats_header), 0))
        self._data_offset, size = head.data_offset, ctypes.sizeof(abi.kvm_stats_desc)
        block = os.pread(self.fd, head.num_desc * (size + head.name_size), head.desc_offset)
        self._offsets: dict[str, int] = {}
        for start in range(0, len(block), size + head.name_size):
            about = abi.kvm_stats_desc.from_buffer_copy(block, start)
            name = block[start + size : start + size + head.name_size].split(b"\0")[0].decode()
            if about.size == 1:
                self._offsets[name] = about.offset
        self._length = max(self._offsets.values(), default=0) + 8

    def read(self) -> dict[str, int]:
        values = os.pread(self.fd, self._length, self._data_offset)
        return {name: struct.unpack_from("Q", values, offset)[0] for name, offset in self._offsets.items()}


# ---- ageing ----------------------------------------------------------------------------------------------------------

BITMAP, PAGEMAP = Path("/sys/kernel/mm/page_idle/bitmap"), Path("/proc/self/pagemap")
NO_HUGE_PAGES = 15  # MADV_NOHUGEPAGE


def missing() -> str | None:
    """What stands in the way of ageing, as one sentence, or None."""
    if not BITMAP.exists():
        return f"{BITMAP} is not there: the kernel is built without CONFIG_IDLE_PAGE_TRACKING."
    if not os.access(BITMAP, os.R_OK | os.W_OK):
        return f"{BITMAP} may not be written: only root may age pages."
    return None


def clear_young(hvas: list[int]) -> bool:
    """Age the pages at these user addresses (bytes). Returns whether any was young: used since it was aged last, or never
    aged before. Pages that the host has not mapped are left out. OSError ENOSYS where the machine does not let us, EAGAIN
    where the host has not aged one: it does not age the pages of a huge page, nor what it has on no LRU list yet."""
    why = missing()
    if why:
        raise OSError(errno.ENOSYS, f"{os.strerror(errno.ENOSYS)}: {why}")
    pfns = [pfn for pfn in map(_pfn, hvas) if pfn]
    with BITMAP.open("r+b", buffering=0) as bitmap:
        young = not all([_is_idle(bitmap, pfn) for pfn in pfns])
        for pfn in pfns:
            _set_idle(bitmap, pfn)
        if all(_is_idle(bitmap, pfn) for pfn in pfns):
            return young
        _fill_lru_list()
        for pfn in pfns:
            _set_idle(bitmap, pfn)
            if not _is_idle(bitmap, pfn):
                raise OSError(errno.EAGAIN, f"{os.strerror(errno.EAGAIN)}: the host does not age frame {pfn:#x}")
    return young


def _is_idle(bitmap: FileIO, pfn: int) -> bool:
    (word,) = struct.unpack("Q", os.pread(bitmap.fileno(), 8, pfn // 64 * 8))
    return bool(word >> pfn % 64 & 1)


def _set_idle(bitmap: FileIO, pfn: int) -> None:
    os.pwrite(bitmap.fileno(), struct.pack("Q", 1 << pfn % 64), pfn // 64 * 8)


def _fill_lru_list() -> None:
    """Fresh pages wait in a list of this CPU, where nobody ages them, until some dozens have come together."""
    with mmap.mmap(-1, 512 * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as others:
        with suppress(OSError):
            others.madvise(NO_HUGE_PAGES)
        for start in range(0, len(others), PAGE_SIZE):
            others[start] = 1


def _pfn(hva: int) -> int:
    """The page frame behind a user address, 0 if there is none. See Documentation/admin-guide/mm/pagemap.rst."""
    with PAGEMAP.open("rb", buffering=0) as pagemap:
        (entry,) = struct.unpack("Q", os.pread(pagemap.fileno(), 8, hva // PAGE_SIZE * 8))
    present, pfn = entry >> 63, entry & (1 << 55) - 1
    if present and not pfn:
        raise OSError(errno.EPERM, f"{os.strerror(errno.EPERM)}: {PAGEMAP} shows page frames to root only.")
    return pfn if present else 0
