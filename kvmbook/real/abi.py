"""KVM's interface as numbers and shapes, under the kernel's names. See include/uapi/linux/kvm.h; asm/kvm.h of x86."""

from __future__ import annotations

import ctypes
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64

KVM_API_VERSION = 12  # the only one there ever was
KVM_DIRTY_LOG_PAGE_OFFSET = 64  # where in a vCPU's file its dirty ring lies, in pages
KVM_DIRTY_GFN_F_DIRTY, KVM_DIRTY_GFN_F_RESET = 1, 2

# ---- capabilities, and what a vCPU leaves the guest for --------------------------------------------------------------

KVM_CAP_NR_MEMSLOTS = 10
KVM_CAP_READONLY_MEM = 81
KVM_CAP_MULTI_ADDRESS_SPACE = 118
KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 = 168
KVM_CAP_DIRTY_LOG_RING = 192
KVM_CAP_BINARY_STATS_FD = 203
KVM_CAP_DIRTY_LOG_RING_ACQ_REL = 223

KVM_EXIT_MMIO = 6
KVM_EXIT_DIRTY_RING_FULL = 31
EXIT_NAMES = {
    0: "KVM_EXIT_UNKNOWN", 2: "KVM_EXIT_IO", 5: "KVM_EXIT_HLT", 6: "KVM_EXIT_MMIO", 8: "KVM_EXIT_SHUTDOWN",
    9: "KVM_EXIT_FAIL_ENTRY", 10: "KVM_EXIT_INTR", 17: "KVM_EXIT_INTERNAL_ERROR", 31: "KVM_EXIT_DIRTY_RING_FULL",
    39: "KVM_EXIT_MEMORY_FAULT",
}  # fmt: skip

# ---- structs ---------------------------------------------------------------------------------------------------------


def _all(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class kvm_userspace_memory_region(ctypes.Structure):
    _fields_ = [
        ("slot", c_uint32), ("flags", c_uint32),
        ("guest_phys_addr", c_uint64), ("memory_size", c_uint64), ("userspace_addr", c_uint64),
    ]  # fmt: skip


class kvm_dirty_log(ctypes.Structure):
    _fields_ = [("slot", c_uint32), ("padding1", c_uint32), ("dirty_bitmap", c_uint64)]


class kvm_clear_dirty_log(ctypes.Structure):
    _fields_ = [("slot", c_uint32), ("num_pages", c_uint32), ("first_page", c_uint64), ("dirty_bitmap", c_uint64)]


class kvm_dirty_gfn(ctypes.Structure):
    _fields_ = [("flags", c_uint32), ("slot", c_uint32), ("offset", c_uint64)]


class kvm_enable_cap(ctypes.Structure):
    _fields_ = [("cap", c_uint32), ("flags", c_uint32), ("args", c_uint64 * 4), ("pad", c_uint8 * 64)]


class kvm_regs(ctypes.Structure):
    _fields_ = [
        *_all(c_uint64, "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags"),
    ]


class kvm_segment(ctypes.Structure):
    _fields_ = [
        ("base", c_uint64), ("limit", c_uint32), ("selector", c_uint16),
        *_all(c_uint8, "type present dpl db s l g avl unusable padding"),
    ]  # fmt: skip


class kvm_dtable(ctypes.Structure):
    _fields_ = [("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3)]


class kvm_sregs(ctypes.Structure):
    _fields_ = [
        *_all(kvm_segment, "cs ds es fs gs ss tr ldt"),
        ("gdt", kvm_dtable), ("idt", kvm_dtable),
        *_all(c_uint64, "cr0 cr2 cr3 cr4 cr8 efer apic_base"),
        ("interrupt_bitmap", c_uint64 * 4),
    ]  # fmt: skip


class kvm_cpuid2(ctypes.Structure):
    """With room for 256 entries of 40 bytes, whose contents nobody here reads."""

    _fields_ = [("nent", c_uint32), ("padding", c_uint32), ("entries", c_uint8 * (256 * 40))]


class kvm_signal_mask(ctypes.Structure):
    _fields_ = [("len", c_uint32), ("sigset", c_uint8 * 8)]


class kvm_stats_header(ctypes.Structure):
    _fields_ = [
        (name, c_uint32) for name in ("flags", "name_size", "num_desc", "id_offset", "desc_offset", "data_offset")
    ]


class kvm_stats_desc(ctypes.Structure):
    """Followed by the statistic's name, ``name_size`` bytes."""

    _fields_ = [
        ("flags", c_uint32), ("exponent", ctypes.c_int16), ("size", c_uint16), ("offset", c_uint32),
        ("bucket_size", c_uint32),
    ]  # fmt: skip


class _mmio(ctypes.Structure):
    _fields_ = [("phys_addr", c_uint64), ("data", c_uint8 * 8), ("len", c_uint32), ("is_write", c_uint8)]


class kvm_run(ctypes.Structure):
    """The head of what a vCPU shares with user space, as far as it is looked at here."""

    _fields_ = [
        ("request_interrupt_window", c_uint8), ("immediate_exit", c_uint8), ("padding1", c_uint8 * 6),
        ("exit_reason", c_uint32), ("ready_for_interrupt_injection", c_uint8), ("if_flag", c_uint8),
        ("flags", c_uint16), ("cr8", c_uint64), ("apic_base", c_uint64), ("mmio", _mmio),
    ]  # fmt: skip


# ---- ioctls ----------------------------------------------------------------------------------------------------------


def _io(number: int, reads: object = None, writes: object = None) -> int:
    """An ioctl's number. ``reads``: the struct that the kernel reads, ``writes``: that it writes; a number for its size.
    See include/uapi/asm-generic/ioctl.h: _IOC()."""
    shape = reads if reads is not None else writes
    size = shape if isinstance(shape, int) else ctypes.sizeof(shape) if shape is not None else 0  # type: ignore[arg-type]
    return (writes is not None) << 31 | (reads is not None) << 30 | size << 16 | 0xAE << 8 | number


KVM_GET_API_VERSION = _io(0x00)
KVM_CREATE_VM = _io(0x01)
KVM_CHECK_EXTENSION = _io(0x03)
KVM_GET_VCPU_MMAP_SIZE = _io(0x04)
KVM_GET_SUPPORTED_CPUID = _io(0x05, reads=8, writes=8)  # the struct's head counts; its entries follow
KVM_CREATE_VCPU = _io(0x41)
KVM_GET_DIRTY_LOG = _io(0x42, reads=kvm_dirty_log)
KVM_SET_USER_MEMORY_REGION = _io(0x46, reads=kvm_userspace_memory_region)
KVM_RUN = _io(0x80)
KVM_GET_REGS = _io(0x81, writes=kvm_regs)
KVM_SET_REGS = _io(0x82, reads=kvm_regs)
KVM_GET_SREGS = _io(0x83, writes=kvm_sregs)
KVM_SET_SREGS = _io(0x84, reads=kvm_sregs)
KVM_SET_SIGNAL_MASK = _io(0x8B, reads=4)  # the length; the mask follows
KVM_SET_CPUID2 = _io(0x90, reads=8)
KVM_ENABLE_CAP = _io(0xA3, reads=kvm_enable_cap)
KVM_CLEAR_DIRTY_LOG = _io(0xC0, reads=kvm_clear_dirty_log, writes=kvm_clear_dirty_log)
KVM_RESET_DIRTY_RINGS = _io(0xC7)
KVM_GET_STATS_FD = _io(0xCE)
