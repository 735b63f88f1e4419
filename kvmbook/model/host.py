"""The host's own memory management, as far as KVM sees it: which frame backs a user page, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from kvmbook.model.spte import PAGE_SHIFT, PG_LEVEL_4K, pages_per_level

USER_BASE = 0x7F00_0000_0000  # where user space puts guest memory unless told otherwise; 1G-aligned
USER_PAGES = 1 << 35  # a 47-bit user address space
FIRST_PFN = 0x40000  # the frame behind USER_BASE, 1G-aligned as well
FRESH_PFN = 1 << 36  # frames for pages that the host moved


class HostPage(NamedTuple):
    """What the host's page tables say about one user page. ``level``: how large the mapping is (1 = 4K, 2 = 2M, 3 = 1G)."""

    pfn: int
    writable: bool
    level: int


@dataclass
class HostMemory:
    """Backs every user address with a frame. ``level`` is the page size the host uses (1, 2 or 3).

    ``dirty`` holds the frames whose ``struct page`` KVM marked dirty. It is not the dirty bitmap.
    """

    level: int = PG_LEVEL_4K
    pages: dict[int, HostPage] = field(default_factory=dict)  # by user page number; what differs from the default
    next_pfn: int = FRESH_PFN
    dirty: set[int] = field(default_factory=set)

    def lookup(self, hva: int) -> HostPage:
        """Return what backs the user address ``hva`` (bytes)."""
        number = hva >> PAGE_SHIFT
        if number in self.pages:
            return self.pages[number]
        level = self.level
        while level > PG_LEVEL_4K and any((number ^ other) < pages_per_level(level) for other in self.pages):
            level -= 1  # a page that went its own way broke the host's huge page up
        return HostPage(FIRST_PFN + (number - (USER_BASE >> PAGE_SHIFT)) % USER_PAGES, True, level)

    def replace(self, hva: int, writable: bool) -> HostPage:
        """Back ``hva`` with a fresh frame (copy-on-write, page migration, KSM). The caller tells KVM's notifiers."""
        page = HostPage(self.next_pfn, writable, PG_LEVEL_4K)
        self.next_pfn += 1
        self.pages[hva >> PAGE_SHIFT] = page
        return page

    def protect(self, hva: int) -> None:
        """Map ``hva`` read-only until it is written, as a file's or a zero page is. For pages no guest has touched yet."""
        self.pages[hva >> PAGE_SHIFT] = self.lookup(hva)._replace(writable=False, level=PG_LEVEL_4K)
