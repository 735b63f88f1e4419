"""Two actors, one page, and the step where they meet."""

import pytest
from conftest import BASE, HARDWARE, log, make_vm, missed, reported

from kvmbook import Kernel, Outcome
from kvmbook.access_tracking import ClearYoung, InvalidateRange
from kvmbook.invariants import check
from kvmbook.ioctls import GetDirtyLog, TrackGuestPageTable


def until(vm, operation, name):
    """Step an operation up to, and not including, the step ``name``."""
    while operation.todo[0] != name:
        vm.step(operation)
    return operation


def fault(vm, cpu, kind, gfn=BASE):
    assert vm.vcpu[cpu].attempt(kind, gfn) is Outcome.FAULT
    return vm.vcpu[cpu].fault


@pytest.mark.parametrize("name", HARDWARE)
def test_a_fault_that_raced_with_the_host_tries_again(name):
    vm = make_vm(HARDWARE[name])
    slow = until(vm, fault(vm, 0, "read"), "make_spte")
    vm.change_pte(BASE, writable=True)
    assert vm.run(slow) is Outcome.RETRY
    assert vm.spte(BASE) == 0
    vm.vcpu[0].read(BASE)
    slot = vm.memslots.id_to_memslot(0, 0)
    assert vm.fmt.pfn(vm.spte(BASE)) == vm.host.lookup(slot.hva(BASE)).pfn


def test_a_fault_during_an_invalidation_waits_for_its_end():
    vm = make_vm()
    invalidation = until(vm, vm.start(InvalidateRange(BASE, BASE + 1)), "invalidate_range_end")
    slow = fault(vm, 0, "read")
    assert vm.run(slow) is Outcome.RETRY
    assert vm.vcpu[0].read(BASE) is Outcome.SLOW_FAULT  # the plain call lets the host finish
    assert not invalidation.todo


def test_of_two_slow_faults_in_the_tdp_mmu_the_second_loses_the_exchange():
    vm = make_vm()
    first, second = fault(vm, 0, "read"), fault(vm, 1, "write")
    until(vm, first, "set_spte")
    until(vm, second, "set_spte")  # both hold mmu_lock for read
    assert vm.run(first) is Outcome.SLOW_FAULT
    assert vm.run(second) is Outcome.RETRY
    assert vm.vcpu[1].write(BASE) is Outcome.WALK


def test_the_legacy_mmu_takes_slow_faults_one_by_one():
    vm = make_vm(HARDWARE["ept_no_ad_legacy"])
    first, second = fault(vm, 0, "read"), fault(vm, 1, "read")
    until(vm, first, "set_spte")
    until(vm, second, "make_spte")
    with pytest.raises(ValueError, match="make_spte must wait for KVM for vCPU0: set_spte"):
        vm.step(second)
    vm.run(first)
    assert vm.run(second) is Outcome.SLOW_FAULT


def test_a_fast_fault_whose_spte_changed_reads_again():
    vm = make_vm()
    vm.vcpu[0].read(BASE)
    log(vm)
    fast = until(vm, fault(vm, 0, "write"), "fast_pf_fix_direct_spte")
    vm.run(ClearYoung(BASE, BASE + 1))  # between its read and its exchange
    vm.step(fast)
    assert (fast.retries, fast.todo) == (1, ["fast_page_fault"])
    assert vm.run(fast) is Outcome.FAST_FAULT
    assert vm.fmt.is_writable_pte(vm.spte(BASE))


def test_a_fast_fault_gives_up_after_four_retries():
    vm = make_vm()
    vm.vcpu[0].read(BASE)
    log(vm)
    fast = fault(vm, 0, "write")
    for _ in range(5):
        until(vm, fast, "fast_pf_fix_direct_spte")
        if not vm.clear_young(BASE, BASE + 1):
            vm.vcpu[1].evict(BASE)
            vm.vcpu[1].read(BASE)
        vm.step(fast)
    assert fast.todo == ["kvm_faultin_pfn"]


def test_a_fast_fault_cannot_undo_the_guard_of_a_guest_page_table():
    vm = make_vm()
    vm.vcpu[0].read(BASE)
    log(vm)
    fast = until(vm, fault(vm, 0, "write"), "fast_pf_fix_direct_spte")
    vm.track_guest_page_table(BASE)
    vm.run(fast)
    check(vm)
    assert vm.vcpu[0].write(BASE) is Outcome.EMULATED


@pytest.mark.parametrize("name", ["ept_no_ad", "ept_no_ad_legacy", "npt"])
def test_a_frozen_entry_turns_other_faults_away(name):
    vm = make_vm(HARDWARE[name], Kernel.v6_0, npages=512, page_size="2M", eager_page_split=False)
    vm.vcpu[0].read(BASE)
    log(vm)
    zapper = fault(vm, 0, "write")
    while vm.level(BASE) == 2:
        vm.step(zapper)
    if name.endswith("legacy"):
        assert zapper.todo[0] == "make_spte" and vm.spte(BASE) == 0
    else:
        assert vm.fmt.is_removed_spte(vm.spte(BASE))
        assert vm.run(fault(vm, 1, "read", BASE + 1)) is Outcome.RETRY
    vm.run(zapper)
    assert vm.vcpu[1].write(BASE + 1) is Outcome.SLOW_FAULT
    assert missed(vm) == []


def test_a_harvest_keeps_mmu_lock_from_taking_the_bit_to_rearming():
    vm = make_vm(kernel=Kernel.v6_0)
    log(vm)
    vm.vcpu[0].write(BASE)
    get = until(vm, vm.start(GetDirtyLog(0)), "rearm")
    ageing = vm.start(ClearYoung(BASE, BASE + 1))
    with pytest.raises(ValueError, match="kvm_age_gfn must wait for user space: rearm"):
        vm.step(ageing)
    vm.step(get)
    assert get.lock is None  # the flush comes outside the lock
    vm.run(ageing)
    assert vm.run(get)[0]


def test_pt_protection_meets_a_harvest_that_has_not_flushed_yet():
    """The oldest bug of the museum (6dbf79e7164e): W=0 must not be read as "nobody can write"."""
    vm = make_vm(kernel=Kernel.v6_0)
    log(vm)
    vm.vcpu[0].write(BASE)
    get = until(vm, vm.start(GetDirtyLog(0)), "kvm_arch_flush_remote_tlbs_memslot")
    assert not vm.fmt.is_writable_pte(vm.spte(BASE)) and vm.vcpu[0].tlb.lookup("L1", BASE).write
    vm.run(TrackGuestPageTable(BASE))
    assert vm.vcpu[0].tlb.lookup("L1", BASE) is None
    vm.run(get)


def test_slots_lock_makes_log_operations_queue():
    vm = make_vm()
    log(vm)
    first, second = vm.start(GetDirtyLog(0)), vm.start(GetDirtyLog(0))
    with pytest.raises(ValueError, match="must wait for user space"):
        vm.step(second)
    vm.run(second)  # the plain call lets the first one finish
    assert not first.todo


def test_a_state_can_be_copied_compared_and_gone_back_to():
    vm = make_vm(kernel=Kernel.v6_0)
    vm.vcpu[0].read(BASE)
    log(vm)
    fast = until(vm, fault(vm, 0, "write"), "fast_pf_fix_direct_spte")
    before, kept = vm.state(), vm.copy()
    assert hash(before) == hash(kept.state()) and before == kept.state()
    vm.run(fast)
    assert vm.state() != before
    assert kept.state() == before
    kept.run(kept.vcpu[0].fault)
    assert kept.state() == vm.state()
    assert reported(kept) == [BASE] and vm.dirty_bitmap()[0]
