"""How user space asks Linux to age pages: /sys/kernel/mm/page_idle/bitmap, a bit per page frame.

Setting a page's bit ages it everywhere, in KVM by way of the notifier clear_young. When the bit is read, Linux asks again
whether the page was used since, and drops the bit if so. See Documentation/admin-guide/mm/idle_page_tracking.rst.
"""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

BITMAP, PAGEMAP = Path("/sys/kernel/mm/page_idle/bitmap"), Path("/proc/self/pagemap")


def missing() -> str | None:
    """What stands in the way of ageing, as one sentence, or None."""
    if not BITMAP.exists():
        return f"{BITMAP} is not there: the kernel is built without CONFIG_IDLE_PAGE_TRACKING."
    if not os.access(BITMAP, os.R_OK | os.W_OK):
        return f"{BITMAP} may not be written: only root may age pages."
    return None


def clear_young(hvas: list[int]) -> bool:
    """Age the pages at these user addresses (bytes). Returns whether any was young: used since it was aged last, or never
    aged before. Pages that the host has not mapped are left out. OSError ENOSYS where the machine does not let us."""
    why = missing()
    if why:
        raise OSError(errno.ENOSYS, f"{os.strerror(errno.ENOSYS)}: {why}")
    pfns = [pfn for pfn in map(_pfn, hvas) if pfn]
    young = False
    with BITMAP.open("r+b", buffering=0) as bitmap:
        for pfn in pfns:
            word, bit = pfn // 64 * 8, 1 << pfn % 64
            young |= not struct.unpack("Q", os.pread(bitmap.fileno(), 8, word))[0] & bit
            os.pwrite(bitmap.fileno(), struct.pack("Q", bit), word)
    return young


def _pfn(hva: int) -> int:
    """The page frame behind a user address, 0 if there is none. See Documentation/admin-guide/mm/pagemap.rst."""
    with PAGEMAP.open("rb", buffering=0) as pagemap:
        (entry,) = struct.unpack("Q", os.pread(pagemap.fileno(), 8, hva // 4096 * 8))
    present, pfn = entry >> 63, entry & (1 << 55) - 1
    if present and not pfn:
        raise OSError(errno.EPERM, f"{os.strerror(errno.EPERM)}: {PAGEMAP} shows page frames to root only.")
    return pfn if present else 0
