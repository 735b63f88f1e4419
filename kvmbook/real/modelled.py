"""The model in the place of a real VM: built as a machine says it is, and showing what user space sees there, no more."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from kvmbook.model import (
    KVM_USER_MEM_SLOTS,
    PAGE_SHIFT,
    PG_LEVEL_4K,
    USER_BASE,
    DirtyRing,
    Hardware,
    HostMemory,
    HostPage,
    Kernel,
    Outcome,
    Tlb,
    Vcpu,
    Vm,
    pages_per_level,
)
from kvmbook.real import guest
from kvmbook.real.offers import Offers
from kvmbook.real.vcpu import Seen, by_mailbox
from kvmbook.real.vm import MEMORY_SIZE

ALIKE = {Outcome.MMIO: Seen.MMIO, Outcome.RING_FULL: Seen.RING_FULL}  # all others retire


def as_hardware(machine: Offers) -> Hardware:
    """The model's hardware for this machine. (With TDP its guest-physical width is the model's own: for slots that high.)"""
    spaces = machine.address_spaces > 1
    if machine.paging == "shadow":
        return Hardware.shadow().with_(smm=spaces)
    tdp_mmu = machine.tdp_mmu is not False
    if machine.paging == "NPT":
        return Hardware.npt(tdp_mmu).with_(smm=spaces)
    return Hardware.ept(machine.ad_bits, machine.pml, tdp_mmu).with_(smm=spaces)


def as_kernel(machine: Offers) -> Kernel:
    """What is known of this release, by its number: the newest of `Kernel.releases` not newer. Its name says which."""
    known = Kernel.of(machine.release)
    name = f"Linux {machine.release}, by the rules of {known.name.removeprefix('Linux ')}"
    return known.with_(name=name, neighbour_prefetch=True)


@dataclass
class TouchedMemory(HostMemory):
    """Fresh anonymous memory: the host has a page, writable, once user space has touched it. Until then KVM can prefetch
    none. Both sets are of user page numbers; where there are huge pages, of all those in one."""

    touched: set[int] = field(default_factory=set)
    looked_at: set[int] = field(default_factory=set)  # the zero page is there

    def lookup(self, hva: int) -> HostPage:
        return super().lookup(hva)._replace(writable=hva >> PAGE_SHIFT in self.touched)

    def in_one(self, hva: int) -> range:
        """The page, with all that are in one with it."""
        size = pages_per_level(self.lookup(hva).level)
        first = (hva >> PAGE_SHIFT) & -size
        return range(first, first + size)

    def take(self, hva: int) -> range:
        """MADV_DONTNEED of one page; which pages KVM is told of. A huge page is broken up.
        Source: mm/huge_memory.c: __split_huge_pmd(), v6.12."""
        number, told = hva >> PAGE_SHIFT, self.in_one(hva)
        if number not in self.touched | self.looked_at:
            return range(number, number + 1)
        self.touched.discard(number)
        if len(told) > 1:
            self.pages[number] = self.lookup(hva)._replace(level=PG_LEVEL_4K)
        return told


class ModelVcpu:
    """`RealVcpu`'s calls. ``value``: what its last write carried."""

    def __init__(self, vm: ModelVm, vcpu: Vcpu) -> None:
        self._vm, self._vcpu, self.number, self.value = vm, vcpu, vcpu.state.id, 0

    @property
    def dirty_ring(self) -> DirtyRing | None:
        return self._vcpu.dirty_ring

    @property
    def tlb(self) -> Tlb:
        """What it remembers: no real vCPU shows that."""
        return self._vcpu.tlb

    def read(self, gfn: int) -> Seen:
        return self.run([("read", gfn)])[0]

    def write(self, gfn: int) -> Seen:
        return self.run([("write", gfn)])[0]

    def fetch(self, gfn: int) -> Seen:
        return self.run([("fetch", gfn)])[0]

    def run(self, accesses: Iterable[tuple[str, int]]) -> list[Seen]:
        """As `RealVcpu.run`: how each access went; behind a RING_FULL, none is tried; OSError EFAULT for a fetch where there
        is no memory."""
        todo = list(accesses)
        for _, gfn in todo:
            self._vm.touch(gfn)
        return by_mailbox(todo, self._mailbox)

    def _mailbox(self, todo: list[tuple[str, int]]) -> list[Seen]:
        """What the guest does at a time."""
        first = self.value
        self.value += sum(kind == "write" for kind, _ in todo)
        seen: list[Seen] = []
        for kind, gfn in todo:
            first += kind == "write"
            seen.append(ALIKE.get(self._vcpu.complete(kind, gfn), Seen.DONE))
            if seen[-1] is Seen.RING_FULL:
                break
            if seen[-1] is Seen.MMIO and kind == "fetch":
                raise OSError(errno.EFAULT, f"{os.strerror(errno.EFAULT)}: gfn {gfn:#x} has nothing to execute")
            if seen[-1] is Seen.DONE and kind == "write":
                self._vm.store(gfn, self.number, first)
        return seen + [Seen.RING_FULL] * (len(todo) - len(seen))


class ModelVm:
    """`RealVm`'s calls on the model; those that are not here are `Vm`'s own. ``vm``: the model, to look inside.

    It has what a run on a real machine cannot do without: the VM's own memslot, and memory whose contents can be seen."""

    def __init__(
        self,
        hardware: Hardware,
        kernel: Kernel,
        vcpus: int = 1,
        *,
        page_size: str = "4K",
        memslots: int = KVM_USER_MEM_SLOTS,
    ) -> None:
        """``memslots``: how many the machine has (KVM_CAP_NR_MEMSLOTS); the last is the VM's own."""
        self.vm = Vm(hardware, kernel, vcpus, page_size=page_size)
        self.vm.host = self.host = TouchedMemory(self.vm.host.level)
        self.user_base, self.own_slot = USER_BASE, memslots - 1
        self._vcpus: list[ModelVcpu] = []
        self._contents: dict[int, dict[int, int]] = {}  # by user page number: each vCPU's last value
        own, size = guest.PRIVATE >> PAGE_SHIFT, guest.private_pages(vcpus)
        self.vm.set_user_memory_region(self.own_slot, own, size, userspace_addr=USER_BASE - (size << PAGE_SHIFT))

    @classmethod
    def of(cls, machine: Offers, vcpus: int = 1, *, page_size: str = "4K") -> Self:
        """The model as the machine says it is."""
        hardware, kernel = as_hardware(machine), as_kernel(machine)
        return cls(hardware, kernel, vcpus, page_size=page_size, memslots=machine.memslots)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.vm, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """There is nothing to give back."""

    def __repr__(self) -> str:
        return f"ModelVm({self.vm.hardware.name}, {self.vm.kernel.name}, vcpus={self.vm.vcpus_to_create})"

    @property
    def flush_requests(self) -> int:
        """How often KVM has asked for a flush of all TLBs."""
        return int(self.vm.counters.flushes)

    @property
    def vcpu(self) -> list[ModelVcpu]:
        if not self._vcpus:
            self._vcpus = [ModelVcpu(self, vcpu) for vcpu in self.vm.vcpu]
        return self._vcpus

    def set_user_memory_region(
        self, slot: int = 0, base_gfn: int = 0, npages: int = 0, *, userspace_addr: int | None = None, **flags: bool
    ) -> None:
        """As `RealVm` has it: its user memory ends at 4 GiB, and then begins again."""
        if userspace_addr is None and self.vm.memslots.id_to_memslot(slot >> 16, slot & 0xFFFF) is None:
            userspace_addr = USER_BASE + (base_gfn << PAGE_SHIFT) % MEMORY_SIZE
        self.vm.set_user_memory_region(slot, base_gfn, npages, userspace_addr=userspace_addr, **flags)

    def hva(self, gfn: int) -> int | None:
        """The user address of ``gfn``, None where no slot has it."""
        slot = self.vm.memslots.gfn_to_memslot(gfn)
        return None if slot is None else slot.hva(gfn)

    def _page(self, gfn: int) -> int:
        hva = self.hva(gfn)
        if hva is None:
            raise ValueError(f"gfn {gfn:#x} is in no slot")
        return hva >> PAGE_SHIFT

    def touch(self, gfn: int) -> None:
        """User space touches the page, if there is one, so that the host has it."""
        hva = self.hva(gfn)
        if hva is not None:
            self.host.touched.update(self.host.in_one(hva))

    def store(self, gfn: int, vcpu: int, value: int) -> None:
        """A guest's write."""
        self._contents.setdefault(self._page(gfn), {})[vcpu] = value

    def value(self, gfn: int, vcpu: int = 0) -> int:
        """What the vCPU's last write left in the page; 0 if there was none. ValueError if ``gfn`` is in no slot."""
        page = self._page(gfn)
        self.host.looked_at.update(self.host.in_one(page << PAGE_SHIFT))
        return self._contents.get(page, {}).get(vcpu, 0)

    def invalidate_range(self, start: int, end: int) -> None:
        """The host takes the pages of [start, end) away, contents and all. ValueError for gfns in no slot."""
        for gfn in range(start, end):
            page = self._page(gfn)
            told = self.host.take(page << PAGE_SHIFT)
            for slot in self.vm.memslots.slots.values():
                behind = slot.base_gfn - (slot.userspace_addr >> PAGE_SHIFT)
                first, end = max(slot.base_gfn, told.start + behind), min(slot.end_gfn, told.stop + behind)
                if first < end:
                    self.vm.invalidate_range(first, end)
            self._contents.pop(page, None)

    def discard(self, gfn: int) -> None:
        self.invalidate_range(gfn, gfn + 1)
