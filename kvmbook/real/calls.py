"""A call as data, and how it is made: the same on a real VM and on the model, with answers that can be compared and kept."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import numpy as np

from kvmbook.model import PAGE_SIZE
from kvmbook.real.modelled import ModelVm
from kvmbook.real.vm import RealVm

AnyVm = RealVm | ModelVm


Call = tuple[Any, ...]  # a name of `CALLS`, and its arguments, which JSON can hold


def perform(vm: AnyVm, name: str, *arguments: Any) -> Any:
    """Make the call. Returns what JSON can hold: the answer, or the errno's name where it was refused. What is not the
    kernel's to refuse is an answer too, as text, so that it is compared."""
    try:
        return CALLS[name](vm, *arguments)
    except OSError as refusal:
        return errno.errorcode.get(refusal.errno or 0, repr(refusal))
    except (AssertionError, ValueError) as wrong:
        return repr(wrong)


# ---- what there is to call -------------------------------------------------------------------------------------------


def memory_region(vm: AnyVm, slot: int, flags: int, gfn: int, npages: int, behind: int) -> None:
    """The ioctl in pages, ``behind``: where in the VM's user memory the slot begins."""
    vm.kvm_set_user_memory_region(slot, flags, gfn * PAGE_SIZE, npages * PAGE_SIZE, vm.user_base + behind * PAGE_SIZE)


def memory_region_at(vm: AnyVm, slot: int, flags: int, address: int, size: int, user_address: int) -> None:
    """The ioctl in bytes, at any user address: for what is to be refused."""
    vm.kvm_set_user_memory_region(slot, flags, address, size, user_address)


def run(vm: AnyVm, vcpu: int, accesses: list[tuple[str, int]]) -> list[str]:
    return [seen.value for seen in vm.vcpu[vcpu].run([(kind, gfn) for kind, gfn in accesses])]


def get_dirty_log(vm: AnyVm, slot: int) -> list[int]:
    found: list[int] = np.flatnonzero(vm.get_dirty_log(slot)).tolist()
    return found


def clear_dirty_log(vm: AnyVm, slot: int, first_page: int, num_pages: int, pages: list[int]) -> None:
    """``pages``: those that are set, of ``num_pages``; one at -1 makes the bitmap too short to be read."""
    bitmap = np.zeros(max(num_pages, 1) - 1 if pages == [-1] else num_pages, bool)
    bitmap[[page for page in pages if page >= 0]] = True
    vm.clear_dirty_log(slot, first_page, num_pages, bitmap)


def harvest(vm: AnyVm, vcpu: int) -> list[list[int]] | None:
    ring = vm.vcpu[vcpu].dirty_ring
    return None if ring is None else [list(entry) for entry in ring.harvest()]


def values(vm: AnyVm, gfns: list[int], vcpus: int) -> list[list[int] | None]:
    """What each vCPU's last write left in the pages; None where there is no memory."""
    return [None if vm.hva(gfn) is None else [vm.value(gfn, vcpu) for vcpu in range(vcpus)] for gfn in gfns]


def discard(vm: AnyVm, gfn: int) -> None:
    if vm.hva(gfn) is not None:
        vm.invalidate_range(gfn, gfn + 1)


CALLS: dict[str, Callable[..., Any]] = {
    "memory_region": memory_region,
    "memory_region_at": memory_region_at,
    "run": run,
    "get_dirty_log": get_dirty_log,
    "clear_dirty_log": clear_dirty_log,
    "harvest": harvest,
    "values": values,
    "discard": discard,
    "reset_dirty_rings": lambda vm: vm.reset_dirty_rings(),
    "manual_protect": lambda vm, args: vm.enable_cap_manual_dirty_log_protect2(args),
    "enable_dirty_ring": lambda vm, size: vm.enable_dirty_ring(size),
}
