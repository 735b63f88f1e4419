"""What one vCPU remembers of the page tables, and forgets.

An entry is a copy made at one moment. Nobody tells it when the SPTE changes: only a flush, a fault of this vCPU on that
address, or chance removes it. That is the whole subject of the book.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from kvmbook.model.spte import KVM_MAX_HUGEPAGE_LEVEL, PG_LEVEL_4K, pages_per_level


class TlbEntry(NamedTuple):
    """One cached translation: the frame, how much it maps (``level``), and what the SPTE allowed *when it was read*.

    ``dirty``: a write needs no walk to set D, because D was set already or because there are no D bits.
    """

    pfn: int
    level: int
    read: bool
    write: bool
    execute: bool
    dirty: bool

    def allows(self, access: str) -> bool:
        """Whether the entry has the right for ``access``: "read", "write" or "fetch"."""
        return {"read": self.read, "write": self.write, "fetch": self.execute}[access]

    def __str__(self) -> str:
        rights = "".join(c if on else "-" for c, on in zip("RWX", (self.read, self.write, self.execute), strict=True))
        return rights + (", clean" if self.write and not self.dirty else "")


@dataclass
class Tlb:
    """One vCPU's TLB: translations, and the upper-level entries that let a walk start half-way down.

    Keys are (root, first gfn of the page, level); ``tables`` maps (root, first gfn) of a 2M range to the frame of the
    level-1 table that a walk found there. The rules are the CPU manuals', as KVM relies on them.
    """

    entries: dict[tuple[str, int, int], TlbEntry] = field(default_factory=dict)
    tables: dict[tuple[str, int], int] = field(default_factory=dict)

    def lookup(self, root: str, gfn: int) -> TlbEntry | None:
        """Return the entry that covers ``gfn``, the smallest page first, or None."""
        for key in self._keys(root, gfn):
            if key in self.entries:
                return self.entries[key]
        return None

    def fill(self, root: str, gfn: int, entry: TlbEntry) -> None:
        """Remember ``entry`` for the page around ``gfn``."""
        self.entries[root, gfn & -pages_per_level(entry.level), entry.level] = entry

    def drop(self, root: str, gfn: int) -> None:
        """Forget all that concerns ``gfn``: what a violation makes a CPU do with its own entries, and only with those."""
        for key in self._keys(root, gfn):
            self.entries.pop(key, None)
        self.tables.pop((root, gfn & -pages_per_level(2)), None)

    def flush(self) -> None:
        """Forget everything, as INVEPT does."""
        self.entries.clear()
        self.tables.clear()

    def writable(self) -> Iterator[tuple[str, int, TlbEntry]]:
        """Yield (root, first gfn, entry) of each entry through which the guest could write."""
        for (root, gfn, _level), entry in self.entries.items():
            if entry.write:
                yield root, gfn, entry

    def _keys(self, root: str, gfn: int) -> list[tuple[str, int, int]]:
        levels = range(PG_LEVEL_4K, KVM_MAX_HUGEPAGE_LEVEL + 1)
        return [(root, gfn & -pages_per_level(level), level) for level in levels]

    def __str__(self) -> str:
        sizes = {1: "4K", 2: "2M", 3: "1G"}
        guest = {"L1": "", "L2": "nested guest's "}
        lines = [
            f"{guest[root]}gfn {gfn:#x} ({sizes[level]}): {e}" for (root, gfn, level), e in sorted(self.entries.items())
        ]
        return "\n".join(lines) or "empty"
