"""The host's own memory management, as far as KVM sees it: which frame backs a user page, and how."""

from __future__ import annotations

from collections.abc import Iterator, MutableSet
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kvmbook.model.spte import PAGE_SHIFT, PG_LEVEL_4K, pages_per_level

USER_BASE = 0x7F00_0000_0000  # where user space puts guest memory unless told otherwise; 1G-aligned
USER_PAGES = 1 << 35  # a 47-bit user address space
FIRST_PFN = 0x40000  # the frame behind USER_BASE, 1G-aligned as well
FRESH_PFN = 1 << 36  # frames for pages that the host moved
SHELF, FEW_FRAMES = 1 << 18, 512


class HostPage(NamedTuple):
    """What the host's page tables say about one user page. ``level``: how large the mapping is (1 = 4K, 2 = 2M, 3 = 1G)."""

    pfn: int
    writable: bool
    level: int


@dataclass(eq=False)
class Frames(MutableSet[int]):
    """A set of frames: one by one, and by the million, as bool arrays of SHELF frames by the number of the first / SHELF."""

    few: set[int] = field(default_factory=set)
    many: dict[int, np.ndarray] = field(default_factory=dict)

    def add(self, frame: int) -> None:
        if frame not in self:
            self.few.add(frame)

    def discard(self, frame: int) -> None:
        self.few.discard(frame)
        if frame in self:
            self.many[frame // SHELF][frame % SHELF] = False

    def clear(self) -> None:
        self.few.clear()
        self.many.clear()

    def __contains__(self, frame: object) -> bool:
        if frame in self.few or not self.many or not isinstance(frame, int):
            return frame in self.few
        return frame // SHELF in self.many and bool(self.many[frame // SHELF][frame % SHELF])

    def __iter__(self) -> Iterator[int]:
        yield from self.few
        for number, shelf in self.many.items():
            yield from (number * SHELF + np.flatnonzero(shelf)).tolist()

    def __len__(self) -> int:
        return len(self.few) + sum(int(shelf.sum()) for shelf in self.many.values())

    def add_run(self, first: int, which: np.ndarray) -> None:
        """Add those of the frames from ``first`` on that are True in a bool array."""
        while which.size:
            number, begin = divmod(first, SHELF)
            here, which = which[: SHELF - begin], which[SHELF - begin :]
            self._shelf(number)[begin : begin + here.size] |= here
            first += here.size

    def add_each(self, frames: np.ndarray) -> None:
        """Add all of an array."""
        if frames.size <= FEW_FRAMES:
            for frame in frames.tolist():
                self.add(frame)
        else:
            numbers = frames // SHELF
            for number in np.unique(numbers).tolist() if np.ptp(numbers) else [int(numbers[0])]:
                self._shelf(number)[frames[numbers == number] % SHELF] = True

    def _shelf(self, number: int) -> np.ndarray:
        """The array with that number; what was added one by one moves there."""
        if number not in self.many:
            self.many[number] = np.zeros(SHELF, bool)
            inside = {frame for frame in self.few if frame // SHELF == number}
            self.few -= inside
            self.many[number][[frame % SHELF for frame in inside]] = True
        return self.many[number]


@dataclass
class HostMemory:
    """Backs every user address with a frame. ``level`` is the page size the host uses (1, 2 or 3).

    ``dirty`` holds the frames whose ``struct page`` KVM marked dirty. It is not the dirty bitmap.
    """

    level: int = PG_LEVEL_4K
    pages: dict[int, HostPage] = field(default_factory=dict)  # by user page number; what differs from the default
    next_pfn: int = FRESH_PFN
    dirty: Frames = field(default_factory=Frames)

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
