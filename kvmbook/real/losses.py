"""Two writes that kernels of today lose, each as a run of ten lines. Both go through the front door alone, so that they work
on `Vm` and on `RealVm` unchanged.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

import numpy as np


class FrontDoor(Protocol):
    """What the runs ask of a VM: `Vm` and `RealVm` have it."""

    @property
    def vcpu(self) -> Any: ...
    def set_user_memory_region(self, slot: int = ..., base_gfn: int = ..., npages: int = ..., **flags: Any) -> None: ...
    def enable_cap_manual_dirty_log_protect2(self, args: int) -> None: ...
    def enable_dirty_ring(self, size_bytes: int) -> None: ...
    def get_dirty_log(self, slot: int = ...) -> np.ndarray: ...
    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, bitmap: np.ndarray) -> None: ...


RING_GFN = 0x100


def ring_reports(vm: FrontDoor, manual: int = 3) -> list[tuple[int, int]]:
    """A write, logging to a ring enabled, a second write: what the ring says, (slot, page number)s. Empty: it is lost.

    With ``manual`` 3 (manual protect, initially set) enabling protects nothing, for all bits are to be set; but a ring has no
    bits. With 0 or 1 it is reported."""
    vm.enable_dirty_ring(1 << 16)
    vm.enable_cap_manual_dirty_log_protect2(manual)
    vm.set_user_memory_region(slot=0, base_gfn=RING_GFN, npages=64)
    vm.vcpu[0].write(RING_GFN)
    vm.set_user_memory_region(slot=0, base_gfn=RING_GFN, npages=64, log_dirty_pages=True)
    vm.vcpu[0].write(RING_GFN)
    harvested: list[tuple[int, int]] = vm.vcpu[0].dirty_ring.harvest()
    return harvested


CLEAR_FIRST, CLEAR_PAGES, NEXT_2M = 0x3FF, 513, 0x400


def clear_reports(
    vm: FrontDoor, cleared: Collection[int] = (0x3FF, 0x400), written: int = 0x400, manual: int = 3
) -> bool:
    """A slot whose second page begins a 2M page; all its pages written, logged, and told as dirty; a CLEAR of the gfns
    ``cleared``; a write to ``written``. Whether GET says so; False: it is lost.

    In each word of 64 pages KVM compares the first and the last gfn by addresses rounded *up* to 2M, and takes them for one
    huge page's. So with the first two pages it overlooks the huge page of the second. Needs 2M pages, and ``manual`` 3
    (initially set)."""
    slot = {"slot": 0, "base_gfn": CLEAR_FIRST, "npages": CLEAR_PAGES}
    vm.enable_cap_manual_dirty_log_protect2(manual)
    vm.set_user_memory_region(**slot)
    for gfn in (CLEAR_FIRST, NEXT_2M, NEXT_2M + 1):
        vm.vcpu[0].write(gfn)
    vm.set_user_memory_region(**slot, log_dirty_pages=True)
    if not manual & 2:  # then a page is only told as dirty once it has been written
        for gfn in cleared:
            vm.vcpu[0].write(gfn)
    vm.get_dirty_log(0)
    bitmap = np.zeros(64, bool)
    bitmap[[gfn - CLEAR_FIRST for gfn in cleared]] = True
    vm.clear_dirty_log(0, 0, 64, bitmap)
    vm.vcpu[0].write(written)
    return bool(vm.get_dirty_log(0)[written - CLEAR_FIRST])
