"""Declaring memory and reading its log: every check of the kernel's, in its order; refused calls change nothing."""

import errno

import numpy as np
import pytest
from conftest import BASE, HARDWARE, log, make_vm, reported
from hypothesis import given
from hypothesis import strategies as st

from kvmbook import Kernel, Vm
from kvmbook.model import USER_BASE, to_bits, to_words

PAGE = 4096
HVA = USER_BASE + BASE * PAGE


def refuses(vm, code, match, call, *args, **kwargs):
    """The call raises OSError ``code`` with ``match`` in its sentence, and leaves the VM as it was."""
    before = vm.state()
    with pytest.raises(OSError, match=match) as raised:
        call(*args, **kwargs)
    assert raised.value.errno == code
    assert vm.state() == before


@pytest.mark.parametrize(
    ("args", "code", "match"),
    [
        ((32764, 0, 0, PAGE, 0), errno.EINVAL, "slot id 32764"),
        ((1, 4, 0, PAGE, 0), errno.EINVAL, "flags 0x4"),
        ((1, 0, 0, 100, 0), errno.EINVAL, "memory_size 0x64"),
        ((1, 0, 5, PAGE, 0), errno.EINVAL, "guest_phys_addr 0x5"),
        ((1, 0, 0, PAGE, 7), errno.EINVAL, "userspace_addr 0x7"),
        ((1, 0, 0, PAGE, 1 << 47), errno.EINVAL, "leaves user space"),
        ((2 << 16, 0, 0, PAGE, 0), errno.EINVAL, "address space 2"),
        ((1, 0, 2**64 - PAGE, 2 * PAGE, 0), errno.EINVAL, "wraps around"),
        ((1, 0, 0, 2**31 * PAGE, 0), errno.EINVAL, "at most 2147483647"),
        ((1, 0, 0, 0, 0), errno.EINVAL, "there is no slot 1"),
        ((0, 0, BASE * PAGE, 64 * PAGE, HVA + PAGE), errno.EINVAL, "its user address cannot change"),
        ((0, 0, BASE * PAGE, 63 * PAGE, HVA), errno.EINVAL, "its size cannot change"),
        ((0, 2, BASE * PAGE, 64 * PAGE, HVA), errno.EINVAL, "READONLY cannot be switched"),
        ((1, 0, (BASE + 63) * PAGE, PAGE, 0), errno.EEXIST, "overlap slot 0"),
        ((1, 0, 1 << 46, PAGE, 0), errno.EINVAL, "46-bit addresses"),
        # the first rule in the kernel's order wins
        ((32764, 4, 5, 100, 7), errno.EINVAL, "slot id"),
        ((1, 4, 5, 100, 7), errno.EINVAL, "flags"),
        ((1, 0, (BASE + 1) * PAGE, 2**31 * PAGE, 0), errno.EINVAL, "at most"),
        ((0, 2, BASE * PAGE, 63 * PAGE, HVA + PAGE), errno.EINVAL, "user address"),
    ],
)
def test_set_user_memory_region_refuses(args, code, match):
    vm = make_vm()
    refuses(vm, code, match, vm.kvm_set_user_memory_region, *args)


def test_the_same_region_again_does_nothing():
    vm = make_vm()
    before, logged = vm.state(), len(vm.log)
    vm.kvm_set_user_memory_region(0, 0, BASE * PAGE, 64 * PAGE, HVA)
    assert vm.state() == before and len(vm.log) == logged


def test_create_move_flags_and_delete():
    vm = make_vm()
    vm.vcpu[0].write(BASE)
    vm.set_user_memory_region(slot=0, base_gfn=0x1000, npages=64)  # the default keeps the user address: a move
    assert vm.memslots.id_to_memslot(0, 0).base_gfn == 0x1000
    assert vm.spte(BASE) == 0
    log(vm)
    assert vm.memslots.id_to_memslot(0, 0).logs_dirty
    vm.set_user_memory_region(slot=0)
    assert vm.memslots.slots == {}
    refuses(vm, errno.ENOENT, "there is no slot 0", vm.get_dirty_log, 0)
    assert str(vm.vcpu[0].write(0x1000)) == "MMIO"


def test_address_spaces_do_not_overlap_each_other():
    vm = make_vm()
    vm.set_user_memory_region(slot=1 << 16, base_gfn=BASE, npages=64, log_dirty_pages=True)
    assert vm.get_dirty_log(1 << 16).shape == (64,)


def test_a_read_only_slot_maps_read_only_and_sends_writes_to_user_space():
    vm = Vm(HARDWARE["ept_no_ad"], Kernel.v5_19)
    vm.set_user_memory_region(slot=0, base_gfn=BASE, npages=8, readonly=True)
    vm.vcpu[0].read(BASE)
    assert not vm.spte(BASE) & vm.fmt.shadow_host_writable_mask
    assert str(vm.vcpu[0].write(BASE)) == "MMIO"
    flushes = vm.counters.flushes
    vm.set_user_memory_region(slot=0, base_gfn=BASE, npages=8, readonly=True, log_dirty_pages=True)
    assert vm.counters.flushes == flushes  # the decision tree returns early


def test_turning_logging_off_frees_the_bitmap_and_on_again_starts_clean():
    vm = make_vm()
    log(vm)
    vm.vcpu[0].write(BASE)
    log(vm, False)
    refuses(vm, errno.ENOENT, "does not log", vm.get_dirty_log, 0)
    log(vm)
    assert not vm.dirty_bitmap().any()


def test_moving_a_slot_that_logs_keeps_its_bitmap():
    vm = make_vm()
    log(vm)
    vm.vcpu[0].write(BASE + 3)
    vm.set_user_memory_region(slot=0, base_gfn=0x1000, npages=64, log_dirty_pages=True)
    assert reported(vm) == [0x1003]


@pytest.mark.parametrize(
    ("slot", "code"), [(2 << 16, errno.EINVAL), (32764, errno.EINVAL), (5, errno.ENOENT), (0, errno.ENOENT)]
)
def test_get_dirty_log_refuses(slot, code):
    vm = make_vm()
    refuses(vm, code, "slot", vm.get_dirty_log, slot)


@pytest.mark.parametrize(
    ("first", "count", "size", "code", "match"),
    [
        (1, 64, 64, errno.EINVAL, "not a multiple of 64"),
        (128, 1, 1, errno.EINVAL, "reach beyond"),
        (64, 37, 37, errno.EINVAL, "reach beyond"),
        (0, 63, 63, errno.EINVAL, "neither a multiple of 64"),
        (0, 64, 10, errno.EFAULT, "cannot be read as 64 pages"),
    ],
)
def test_clear_dirty_log_refuses(first, count, size, code, match):
    vm = make_vm(npages=100)
    log(vm)
    refuses(vm, code, match, vm.clear_dirty_log, 0, first, count, np.ones(size, bool))


def test_clear_dirty_log_works_without_manual_protect_and_up_to_the_end():
    vm = make_vm(npages=100, kernel=Kernel.v6_0)
    log(vm)
    for page in (0, 70, 99):
        vm.vcpu[0].write(BASE + page)
    vm.clear_dirty_log(0, 64, 36, np.ones(36, bool))
    assert np.flatnonzero(vm.dirty_bitmap()).tolist() == [0]
    assert str(vm.vcpu[0].write(BASE + 99)) == "fast fault"


def test_capability_arguments():
    vm = make_vm()
    for args in (0b10, 0b100, 0b111):
        refuses(vm, errno.EINVAL, "bit", vm.enable_cap_manual_dirty_log_protect2, args)
    vm.enable_cap_manual_dirty_log_protect2(0b11)
    assert vm.manual_protect and vm.initially_set
    vm.enable_cap_manual_dirty_log_protect2(0)
    assert not vm.manual_protect


@pytest.mark.parametrize(
    ("size", "code", "match"),
    [
        (0, errno.EINVAL, "power of two"),
        (5000, errno.EINVAL, "power of two"),
        (2048, errno.EINVAL, "at least 4096"),
        (2 << 20, errno.E2BIG, "at most 65536"),
    ],
)
def test_ring_sizes(size, code, match):
    vm = Vm(HARDWARE["ept_no_ad"], Kernel.v5_19)
    refuses(vm, code, match, vm.enable_dirty_ring, size)


def test_rings_are_set_once_before_vcpus_and_replace_the_bitmap():
    vm = Vm(HARDWARE["pml"], Kernel.v5_19)
    refuses(vm, errno.EINVAL, "at least 9216", vm.enable_dirty_ring, 8192)  # the CPU's log needs room too
    refuses(vm, errno.EINVAL, "no dirty rings", vm.reset_dirty_rings)
    vm.enable_dirty_ring(16384)
    refuses(vm, errno.EINVAL, "set once", vm.enable_dirty_ring, 16384)
    vm.set_user_memory_region(slot=0, base_gfn=BASE, npages=64, log_dirty_pages=True)
    refuses(vm, errno.ENXIO, "rings", vm.get_dirty_log, 0)
    refuses(vm, errno.ENXIO, "rings", vm.clear_dirty_log, 0, 0, 64, np.ones(64, bool))
    late = Vm(HARDWARE["ept_no_ad"], Kernel.v5_19)
    assert len(late.vcpu) == 1
    refuses(late, errno.EINVAL, "vCPUs exist", late.enable_dirty_ring, 4096)


def test_other_misuse_is_a_value_error():
    vm = make_vm()
    before = vm.state()
    for call in (
        lambda: Vm(HARDWARE["npt"], Kernel.v5_19, vcpus=0),
        lambda: Vm(HARDWARE["npt"], Kernel.v5_19, page_size="3M"),
        lambda: Vm(HARDWARE["npt"], Kernel.v5_19, nested="ept"),
        lambda: Vm(HARDWARE["shadow"], Kernel.v5_19, nested="tdp"),
        lambda: vm.vcpu[0].read(BASE, l2=True),
        lambda: vm.vcpu[0].attempt("jump", BASE),
        lambda: vm.clear_young(5, 5),
        lambda: vm.track_guest_page_table(0x9999),
        lambda: vm.change_pte(0x9999),
    ):
        with pytest.raises(ValueError, match=r"."):
            call()
    vm.vcpus.clear()
    before_vcpus = before
    assert vm.state() is not before_vcpus
    with pytest.raises(OSError, match="there is no slot 9"):
        vm.missed_dirty(9)
    with pytest.raises(OSError, match="Bad address"):
        vm.kvm_write_guest(0x9999)


@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_bits_and_words_are_the_same_thing(pages):
    bits = np.array(pages, bool)
    words = to_words(bits)
    assert words.dtype == np.uint64 and len(words) == -(-len(pages) // 64)
    assert to_bits(words, len(pages)).tolist() == pages
    set_bits = [64 * number + bit for number, word in enumerate(words.tolist()) for bit in range(64) if word >> bit & 1]
    assert set_bits == np.flatnonzero(bits).tolist()


def test_a_large_slot_is_no_trouble():
    vm = Vm(HARDWARE["ept_no_ad"], Kernel.v6_0)
    vm.set_user_memory_region(slot=0, base_gfn=0, npages=1 << 18, log_dirty_pages=True)
    for gfn in (0, 511, 512, 262143):
        vm.vcpu[0].write(gfn)
    assert np.flatnonzero(vm.get_dirty_log(0)).tolist() == [0, 511, 512, 262143]
