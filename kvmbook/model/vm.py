"""`Vm` and `Vcpu`: the front door. The ioctls by name, the guest's accesses, the host's calls, and ways to look inside."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np

from kvmbook.model.access_tracking import ChangePte, ClearFlushYoung, ClearYoung, InvalidateRange, TestYoung
from kvmbook.model.dirty_log import ClearDirtyLog, GetDirtyLog, ResetDirtyRings
from kvmbook.model.faults import Outcome, access, complete
from kvmbook.model.guest_memory import WriteGuest
from kvmbook.model.hardware import Hardware
from kvmbook.model.host import USER_BASE, HostMemory
from kvmbook.model.kernel import Kernel
from kvmbook.model.machine import Machine, VcpuState
from kvmbook.model.memory_regions import SetUserMemoryRegion
from kvmbook.model.memslots import (
    DIRTY_GFN_SIZE,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    PAGE_SIZE,
    DirtyRing,
    MemoryRegion,
    MemorySlot,
    refuse,
    to_bits,
)
from kvmbook.model.page_tables import PageTables, Root
from kvmbook.model.spte import PAGE_SHIFT, PG_LEVEL_1G, PG_LEVEL_2M, PG_LEVEL_4K
from kvmbook.model.tlb import Tlb
from kvmbook.model.wrprot import TrackGuestPageTable

PAGE_LEVELS = {"4K": PG_LEVEL_4K, "2M": PG_LEVEL_2M, "1G": PG_LEVEL_1G}


class Vcpu:
    """One vCPU of a `Vm`: what its guest does, and what it remembers."""

    def __init__(self, vm: Vm, state: VcpuState) -> None:
        self._vm = vm
        self.state = state

    def read(self, gfn: int, l2: bool = False) -> Outcome:
        """Read a page to the end, faults and all, and return how it went. ``l2``: the nested guest does it."""
        return self.complete("read", gfn, l2)

    def write(self, gfn: int, l2: bool = False) -> Outcome:
        """Write a page to the end, faults and all, and return how it went. ``l2``: the nested guest does it."""
        return self.complete("write", gfn, l2)

    def fetch(self, gfn: int, l2: bool = False) -> Outcome:
        """Fetch an instruction from a page. ``l2``: the nested guest does it."""
        return self.complete("fetch", gfn, l2)

    def complete(self, kind: str, gfn: int, l2: bool = False) -> Outcome:
        """Do an access ("read", "write", "fetch") until it retires or leaves to user space."""
        return complete(self._vm, self.state, kind, gfn, self._vm.root(l2))

    def attempt(self, kind: str, gfn: int, l2: bool = False) -> Outcome:
        """Try an access once: the hardware's atomic part. After a fault, ``self.fault`` is in flight for `Vm.step`."""
        return access(self._vm, self.state, kind, gfn, self._vm.root(l2))

    def evict(self, gfn: int) -> None:
        """Let the TLB forget what it has on ``gfn``, as a CPU may do at any time."""
        for root in (self._vm.l1_root, self._vm.l2_root):
            if root is not None:
                self.tlb.drop(root.name, gfn)
        self._vm.record(self.state.name, "evict", gfn)

    def exit(self) -> None:
        """Leave the guest and come back, for whatever reason: drains the PML buffer, flushes nothing. A vCPU whose fault is
        being handled has left already: then nothing happens."""
        if self.state.fault is None:
            self._vm.record(self.state.name, "exit")
            self._vm.vcpu_exit(self.state)

    @property
    def tlb(self) -> Tlb:
        return self.state.tlb

    @property
    def fault(self) -> Any:
        """The `PageFault` in flight, or None."""
        return self.state.fault

    @property
    def dirty_ring(self) -> DirtyRing | None:
        return self.state.dirty_ring

    @property
    def pml(self) -> list[int]:
        """The gfns in the page-modification log, oldest first."""
        return self.state.pml


class Vm(Machine):
    """A virtual machine on ``hardware`` under the rules of ``kernel``.

    ``page_size``: the host's, "4K", "2M" or "1G". ``eager_page_split`` and ``nx_huge_pages`` are KVM's module parameters.
    ``nested``: None, "ept" or "npt" (L1 runs a nested guest with its own EPT or NPT, which KVM shadows), "ept without A/D"
    (L1 left the A/D bits off), or "tdp" (L1 uses neither: the nested guest runs on the TDP MMU). ``nested_base_gfn``: where
    in L1's memory the nested guest's begins.

    The vCPUs are created when ``vcpu`` is first touched: a dirty ring must be enabled before.
    """

    def __init__(
        self,
        hardware: Hardware,
        kernel: Kernel,
        vcpus: int = 1,
        *,
        page_size: str = "4K",
        eager_page_split: bool = True,
        nx_huge_pages: bool = False,
        nested: str | None = None,
        nested_base_gfn: int = 0,
    ) -> None:
        if vcpus < 1:
            raise ValueError(f"a VM needs at least one vCPU; got {vcpus}")
        if page_size not in PAGE_LEVELS:
            raise ValueError(f"page_size is one of {', '.join(PAGE_LEVELS)}; got {page_size!r}")
        fmt = kernel.spte_format(hardware.format)
        l1 = Root(
            "L1", ad_disabled=hardware.tdp and not fmt.kvm_ad_enabled, direct=hardware.tdp, tdp_mmu=hardware.tdp_mmu
        )
        super().__init__(
            hardware=hardware,
            kernel=kernel,
            fmt=fmt,
            l1_root=l1,
            l2_root=_nested_root(nested, hardware, nested_base_gfn),
            page_tables=PageTables(fmt, root_level=5 if hardware.gpa_bits > 48 else 4),
            host=HostMemory(PAGE_LEVELS[page_size]),
            eager_page_split=eager_page_split,
            nx_huge_pages=nx_huge_pages,
        )
        self.vcpus_to_create = vcpus

    def __repr__(self) -> str:
        return f"Vm({self.hardware.name}, {self.kernel.name}, vcpus={self.vcpus_to_create})"

    @property
    def vcpu(self) -> list[Vcpu]:
        """The vCPUs; created at the first touch (KVM_CREATE_VCPU)."""
        if not self.vcpus:
            for number in range(self.vcpus_to_create):
                size, log_size = self.dirty_ring_size // DIRTY_GFN_SIZE, self.hardware.pml_entries
                self.vcpus.append(VcpuState(number, dirty_ring=DirtyRing(size, log_size) if size else None))
        return [Vcpu(self, state) for state in self.vcpus]

    def root(self, l2: bool = False) -> Root:
        """The tree that L1's, or with ``l2`` the nested guest's, accesses go through."""
        if l2 and self.l2_root is None:
            raise ValueError("this VM runs no nested guest: build it with nested=...")
        return self.l2_root if l2 and self.l2_root is not None else self.l1_root

    # ---- guest memory -----------------------------------------------------------------------------------------------

    def set_user_memory_region(
        self, slot: int = 0, base_gfn: int = 0, npages: int = 0, **flags_and_address: Any
    ) -> None:
        """Create, move or delete (``npages=0``) a slot, or change its flags. Arguments and errors as `user_memory_region`."""
        self.run(self.user_memory_region(slot, base_gfn, npages, **flags_and_address))

    def user_memory_region(
        self,
        slot: int = 0,
        base_gfn: int = 0,
        npages: int = 0,
        *,
        log_dirty_pages: bool = False,
        readonly: bool = False,
        userspace_addr: int | None = None,
    ) -> SetUserMemoryRegion:
        """The ioctl as an operation, not begun: for `start` and `step`.

        ``userspace_addr`` (bytes) defaults to where the slot lies already, or to `USER_BASE` plus the guest address.
        Beginning it raises OSError EINVAL, EEXIST or ENOMEM.
        """
        if userspace_addr is None:
            old = self.memslots.id_to_memslot(slot >> 16, slot & 0xFFFF)
            userspace_addr = old.userspace_addr if old is not None else USER_BASE + base_gfn * PAGE_SIZE % (1 << 39)
        flags = KVM_MEM_LOG_DIRTY_PAGES * log_dirty_pages | KVM_MEM_READONLY * readonly
        region = MemoryRegion(slot, flags, base_gfn << PAGE_SHIFT, npages << PAGE_SHIFT, userspace_addr)
        return SetUserMemoryRegion(region)

    def kvm_set_user_memory_region(
        self, slot: int, flags: int, guest_phys_addr: int, memory_size: int, userspace_addr: int
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION, in bytes. OSError EINVAL, EEXIST or ENOMEM."""
        self.run(SetUserMemoryRegion(MemoryRegion(slot, flags, guest_phys_addr, memory_size, userspace_addr)))

    def disable_quirk_slot_zap_all(self) -> None:
        """KVM_CAP_DISABLE_QUIRKS2 with KVM_X86_QUIRK_SLOT_ZAP_ALL. OSError EINVAL where the quirk is not known.
        Source: arch/x86/kvm/x86.c: kvm_vm_ioctl_enable_cap(), v6.12 (aa8d1f48d353)."""
        if not self.kernel.zaps_by_slot:
            raise refuse(errno.EINVAL, "this release knows no quirk SLOT_ZAP_ALL")
        self.slot_zap_all = False

    # ---- the dirty log ----------------------------------------------------------------------------------------------

    def get_dirty_log(self, slot: int = 0) -> np.ndarray:
        """KVM_GET_DIRTY_LOG. Returns a bool array, one per page of the slot. OSError ENXIO, EINVAL or ENOENT."""
        report: np.ndarray = self.run(GetDirtyLog(slot))
        return report

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, bitmap: np.ndarray) -> None:
        """KVM_CLEAR_DIRTY_LOG of the pages that are set in ``bitmap``, a bool array of shape (num_pages,).
        OSError ENXIO, EINVAL, ENOENT or EFAULT."""
        self.run(ClearDirtyLog(slot, first_page, num_pages, bitmap))

    def enable_manual_dirty_log_protect(self, initially_set: bool = False) -> None:
        """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: GET only reports, CLEAR re-arms; ``initially_set``: enabling sets all bits and
        protects nothing. (Together with a dirty ring there are no bits to set, and v5.19 and v6.0 still protect nothing:
        writes are lost. The model does as the kernel does.)"""
        self.enable_cap_manual_dirty_log_protect2(1 | 2 * initially_set)

    def enable_cap_manual_dirty_log_protect2(self, args: int) -> None:
        """The capability's raw argument. OSError EINVAL for unknown bits, and for bit 1 without bit 0.
        Source: virt/kvm/kvm_main.c: kvm_vm_ioctl_enable_cap_generic(), v5.19."""
        if args & ~0b11 or args == 0b10:
            raise refuse(
                errno.EINVAL, f"argument {args:#x}: bit 0 is manual protect, bit 1 (initially set) needs bit 0"
            )
        self.manual_protect, self.initially_set = bool(args & 1), bool(args & 2)

    def enable_dirty_ring(self, size_bytes: int) -> None:
        """KVM_CAP_DIRTY_LOG_RING: log to one ring per vCPU instead of bitmaps. OSError EINVAL or E2BIG."""
        size = DirtyRing.check_size(size_bytes, self.hardware.pml_entries)
        if self.dirty_ring_size:
            raise refuse(errno.EINVAL, f"the rings have {self.dirty_ring_size} bytes already; their size is set once")
        if self.vcpus:
            raise refuse(errno.EINVAL, f"{len(self.vcpus)} vCPUs exist already; rings come before vCPUs")
        self.dirty_ring_size = size

    def reset_dirty_rings(self) -> int:
        """KVM_RESET_DIRTY_RINGS. Returns how many harvested entries were freed. OSError EINVAL without rings."""
        count: int = self.run(ResetDirtyRings())
        return count

    def missed_dirty(self, slot: int = 0) -> np.ndarray:
        """The gfns (ascending, int array) whose last write will reach no copy: written since user space copied them last, or
        since logging was enabled, and named by no report to come, because neither the bitmap, a ring, a PML buffer nor an
        operation under way knows of them.

        User space is taken to copy a page when it has been told that it is dirty *and* KVM has armed it again: after a GET
        that clears; after a CLEAR, if a GET had named the page; after the reset of its ring entry. (Who copies earlier, or
        clears what no GET has named, loses writes all by himself.) KVM has no such call: this is what the model is for.
        For slots of another address space always empty. OSError ENOENT without the slot."""
        found = self.memslots.find(slot, self.hardware.address_spaces)
        if found is None:
            raise refuse(errno.ENOENT, f"there is no slot {slot & 0xFFFF}")
        missed = [
            gfn
            for gfn in sorted(self.written)
            if found.as_id == 0 and gfn in found and not self.knows_of_write(found, gfn)
        ]
        return np.array(missed, dtype=np.int64)

    # ---- what the host does -----------------------------------------------------------------------------------------

    def clear_young(self, start: int, end: int) -> bool:
        """Age the gfns of [start, end) without a flush. Returns whether any was young."""
        return bool(self.run(ClearYoung(start, end)))

    def clear_flush_young(self, start: int, end: int) -> bool:
        """Age the gfns of [start, end), and flush if any was young (until v6.12)."""
        return bool(self.run(ClearFlushYoung(start, end)))

    def test_young(self, start: int, end: int) -> bool:
        """Whether any gfn of [start, end) is young; changes nothing."""
        return bool(self.run(TestYoung(start, end)))

    def invalidate_range(self, start: int, end: int) -> None:
        """The host takes the pages of [start, end) away: zap, flush."""
        self.run(InvalidateRange(start, end))

    def change_pte(self, gfn: int, writable: bool = False) -> None:
        """The host puts another frame behind one 4K page, mapped read-only unless ``writable``."""
        self.run(ChangePte(gfn, gfn + 1, self._slot_of(gfn), writable))

    def write_protect_host_page(self, gfn: int) -> None:
        """Let the host map the page read-only until it is written, as a fresh page may be. ValueError if it is mapped."""
        shared = self.memslots.on_same_memory(gfn, gfn + 1)
        if any(True for gfns in shared for _ in self.page_tables.every_leaf(*gfns)):
            raise ValueError(f"gfn {gfn:#x} is mapped already; use change_pte")
        self.host.protect(self._slot_of(gfn).hva(gfn))
        self.mmu_notifier_seq += 1

    def track_guest_page_table(self, gfn: int) -> None:
        """KVM starts to shadow the guest page table at ``gfn``: guest writes to it are emulated from now on."""
        self.run(TrackGuestPageTable(gfn))

    def untrack_guest_page_table(self, gfn: int) -> None:
        """KVM no longer shadows that page table. Its SPTE comes back with the next write fault."""
        self.write_tracked.discard(gfn)

    def kvm_write_guest(self, gfn: int, vcpu: int | None = 0) -> None:
        """KVM itself writes guest memory, for a vCPU or (None) for nobody, and marks the page dirty. OSError EFAULT."""
        if vcpu is not None and not 0 <= vcpu < len(self.vcpu):
            raise ValueError(f"vCPU {vcpu}: this VM has {len(self.vcpu)}, from 0")
        self.run(WriteGuest(gfn, vcpu))

    def write_past_kvm(self, gfn: int) -> None:
        """Somebody else writes the page: user space through its own mapping, vhost, a device by DMA. They use no SPTE, so
        KVM cannot know, and its log has no mark. ValueError if ``gfn`` is in no slot."""
        self._slot_of(gfn)
        self.record("somebody else", "write", gfn)
        self.note_write(gfn)

    def _slot_of(self, gfn: int) -> MemorySlot:
        slot = self.memslots.gfn_to_memslot(gfn)
        if slot is None:
            raise ValueError(f"gfn {gfn:#x} is in no slot")
        return slot

    # ---- looking inside ---------------------------------------------------------------------------------------------

    def spte(self, gfn: int, l2: bool = False) -> int:
        """The last SPTE that a walk for ``gfn`` reads; 0 if nothing is mapped."""
        found = self.page_tables.walk(self.root(l2), gfn)
        return found.spte if found is not None else 0

    def level(self, gfn: int, l2: bool = False) -> int:
        """The level of the leaf that maps ``gfn`` (1 = 4K, 2 = 2M, 3 = 1G); 0 if nothing does."""
        found = self.page_tables.walk(self.root(l2), gfn)
        return found.level if found is not None and self.fmt.is_shadow_present_pte(found.spte) else 0

    def dirty_bitmap(self, slot: int = 0) -> np.ndarray:
        """The live bitmap as a bool array, one per page; reading it changes nothing. OSError ENOENT without one."""
        found = self.memslots.find(slot, self.hardware.address_spaces)
        if found is None or found.dirty_bitmap is None:
            raise refuse(errno.ENOENT, f"slot {slot & 0xFFFF} has no dirty bitmap")
        return to_bits(found.dirty_bitmap[0], found.npages)


def _nested_root(nested: str | None, hardware: Hardware, base_gfn: int) -> Root | None:
    """The nested guest's tree. Source: mmu/mmu.c: kvm_calc_shadow_ept_root_page_role(), kvm_init_mmu(), v5.19."""
    if nested is None:
        return None
    shadowed = ("ept", "ept without A/D") if hardware.format.shadow_acc_track_mask else ("npt",)
    if not hardware.tdp or nested not in (*shadowed, "tdp"):
        can = f"None, {', '.join(shadowed)} or tdp" if hardware.tdp else "None: a nested guest needs EPT or NPT below"
        raise ValueError(f"nested on {hardware.name} is {can}; got {nested!r}")
    no_ad = not hardware.format.kvm_ad_enabled
    if nested == "tdp":
        return Root("L2", no_ad, guest_mode=True, direct=True, tdp_mmu=hardware.tdp_mmu, base_gfn=base_gfn)
    no_ad = no_ad or nested == "ept without A/D"
    return Root("L2", no_ad, guest_mode=True, direct=False, tdp_mmu=False, base_gfn=base_gfn)
