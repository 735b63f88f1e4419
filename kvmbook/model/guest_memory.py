"""KVM reaches for a page of guest memory itself: to map it, to write it, to guard it."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import ClassVar

from kvmbook.model.access_tracking import kvm_unmap_gfn_range
from kvmbook.model.machine import Machine, Operation, VcpuState, step
from kvmbook.model.memslots import MemorySlot, refuse


@dataclass(eq=False)
class GuestAccess(Operation):
    """KVM reaches for a page of guest memory. ``slot`` and ``generation`` are as of its beginning: that is why publishing a
    memslot must wait for it."""

    gfn: int
    slot: MemorySlot | None = field(default=None, init=False)
    generation: int = field(default=0, init=False)

    def begin(self, m: Machine) -> None:
        self.slot = m.memslots.gfn_to_memslot(self.gfn)
        self.generation = m.memslots.generation

    @property
    def where(self) -> int:
        return self.gfn

    @step(lock="write")
    def do_wp_page(self, m: Machine) -> str | None:
        """The host breaks copy-on-write: another frame, and its notifiers make KVM zap the old one, and flush if it was
        mapped. Source: mm/memory.c, v5.19."""
        assert self.slot is not None
        if m.host.lookup(self.slot.hva(self.gfn)).writable:
            return "another fault did it"
        m.host.replace(self.slot.hva(self.gfn), writable=True)
        if kvm_unmap_gfn_range(m, m.memslots.on_same_memory(self.gfn, self.gfn + 1)):
            m.kvm_flush_remote_tlbs()
        m.mmu_notifier_seq += 1
        return None

    def write_guest(self, m: Machine, vcpu: VcpuState | None, name: str) -> bool:
        """Write the page and mark it dirty; whether that is done. If not, the host has a page to make first, and then the
        step ``name`` comes again."""
        assert self.slot is not None
        if not m.host.lookup(self.slot.hva(self.gfn)).writable:
            self.todo = ["do_wp_page", name]
            return False
        m.note_write(self.gfn)
        m.mark_page_dirty_in_slot(self.slot, self.gfn, vcpu)
        return True


@dataclass(eq=False)
class WriteGuest(GuestAccess):
    """KVM writes the page itself and marks it dirty, on a vCPU's behalf or (None) on nobody's. It does not ask whether a
    dirty ring is soft-full: the reserved entries are for that. OSError EFAULT where there is no memory to write.
    Source: virt/kvm/kvm_main.c: kvm_vcpu_write_guest(), kvm_write_guest(), v5.19."""

    actor: ClassVar[str] = "KVM"

    vcpu: int | None

    def begin(self, m: Machine) -> None:
        super().begin(m)
        if self.slot is None or self.slot.readonly or self.slot.invalid:
            raise refuse(errno.EFAULT, f"gfn {self.gfn:#x} lies in no slot, or in one that is read-only or about to go")
        self.todo = ["kvm_write_guest"]

    @step()
    def kvm_write_guest(self, m: Machine) -> str | None:
        vcpu = None if self.vcpu is None else m.vcpus[self.vcpu]
        return None if self.write_guest(m, vcpu, "kvm_write_guest") else "the host maps it read-only"
