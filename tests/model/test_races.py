"""Two actors, one page, and the step where they meet."""

import numpy as np
import pytest
from conftest import BASE, HARDWARE, log, make_vm, missed, reported

from kvmbook import Kernel, Outcome, Vm
from kvmbook.model import ClearYoung, GetDirtyLog, InvalidateRange, ResetDirtyRings, TrackGuestPageTable, check


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
    assert vm.fmt.spte_to_pfn(vm.spte(BASE)) == vm.host.lookup(slot.hva(BASE)).pfn


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


@pytest.mark.parametrize(("marks_first", "lost"), [(False, []), (True, [BASE])])
def test_a_mark_before_the_exchange_would_lose_a_write_to_a_harvest_in_between(marks_first, lost):
    vm = make_vm(kernel=Kernel.v6_0.with_(fast_path_marks_first=marks_first))
    vm.vcpu[0].read(BASE)
    log(vm)
    second = "fast_pf_fix_direct_spte" if marks_first else "mark_page_dirty_in_slot"
    fast = until(vm, fault(vm, 0, "write"), second)
    assert reported(vm) == lost  # the mark is taken, or is not there yet
    vm.run(fast)
    assert vm.vcpu[0].write(BASE) is Outcome.WALK
    assert missed(vm) == lost
    assert reported(vm) == ([] if lost else [BASE])


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


# ---- corners -------------------------------------------------------------------------------------------------------


def test_a_fault_whose_table_another_fault_removed_tries_again():
    """TDP MMU faults share the lock: one maps a huge page over the table in which another is about to store."""
    vm = make_vm(HARDWARE["npt"], npages=512, page_size="2M")
    late = until(vm, fault(vm, 0, "read"), "make_spte")  # began before logging: it wants a huge page
    enable = vm.start(vm.user_memory_region(0, BASE, 512, log_dirty_pages=True))
    vm.step(enable)
    small = until(vm, fault(vm, 1, "read", BASE + 1), "set_spte")  # began after: it wants a 4K page
    vm.step(late)
    assert vm.run(small) is Outcome.RETRY
    vm.run(enable)
    check(vm)
    assert vm.level(BASE) == 1 or not vm.fmt.is_writable_pte(vm.spte(BASE))


def test_an_access_waits_for_another_vcpus_frozen_entry():
    vm = make_vm(HARDWARE["npt"], Kernel.v6_0, npages=512, page_size="2M", eager_page_split=False)
    vm.vcpu[0].read(BASE)
    log(vm)
    until(vm, fault(vm, 0, "write"), "unfreeze")
    assert vm.vcpu[1].read(BASE + 1) is Outcome.SLOW_FAULT


def test_what_waits_for_slots_lock_is_checked_when_it_has_it():
    vm = make_vm(kernel=Kernel.v6_0)
    vm.vcpu[0].write(BASE)
    enable = vm.start(vm.user_memory_region(0, BASE, 64, log_dirty_pages=True))
    vm.step(enable)
    assert vm.get_dirty_log(0).shape == (64,)  # waited for enabling, so there is a log
    off, on, get = (
        vm.start(vm.user_memory_region(0, BASE, 64)),
        vm.start(vm.user_memory_region(0, BASE, 64, log_dirty_pages=True)),
        vm.start(GetDirtyLog(0)),
    )
    vm.run(get)
    assert not off.todo and not on.todo and vm.memslots.id_to_memslot(0, 0).logs_dirty
    vm.vcpu[0].write(BASE)
    assert missed(vm) == []

    deletions = [vm.start(vm.user_memory_region(0)) for _ in range(2)]
    vm.run(deletions[0])
    with pytest.raises(OSError, match="there is no slot 0"):
        vm.run(deletions[1])
    assert vm.in_flight == []


def test_an_operation_is_done_once():
    vm = make_vm(kernel=Kernel.v6_0)
    log(vm)
    vm.vcpu[0].write(BASE)
    first, second = vm.start(GetDirtyLog(0)), vm.start(GetDirtyLog(0))
    assert not vm.run(second).any()
    assert vm.run(first)[0]  # finished meanwhile: its report is kept
    with pytest.raises(ValueError, match="started already"):
        vm.start(first)
    with pytest.raises(ValueError, match="is over"):
        vm.step(first)


def test_copy_on_write_is_broken_once_and_flushes_only_if_something_was_mapped():
    vm = make_vm()
    vm.write_protect_host_page(BASE)
    with pytest.raises(ValueError, match="is mapped already"):
        vm.vcpu[0].read(BASE + 1)
        vm.write_protect_host_page(BASE + 1)
    both = [until(vm, fault(vm, cpu, "write"), "do_wp_page") for cpu in (0, 1)]
    for one in both:
        vm.run(one)
    assert vm.host.next_pfn - vm.host.lookup(vm.memslots.slots[0, 0].hva(BASE)).pfn == 1
    assert vm.counters.flushes == 0


@pytest.mark.parametrize("name", ["npt", "npt_legacy"])
def test_nx_huge_pages_are_fetched_from_as_4k(name):
    vm = make_vm(HARDWARE[name], Kernel.v6_0, npages=1024, page_size="2M", nx_huge_pages=True)
    vm.vcpu[0].read(BASE)
    assert vm.level(BASE) == 2
    assert vm.vcpu[0].fetch(BASE) is Outcome.SLOW_FAULT
    assert vm.level(BASE) == 1
    vm.vcpu[0].write(BASE + 1)
    assert vm.level(BASE) == vm.level(BASE + 1) == 1  # the table stays
    vm.vcpu[0].write(BASE + 512)
    log(vm)
    if name == "npt":
        assert vm.level(BASE + 600) == 1 and vm.fmt.is_executable_pte(vm.spte(BASE + 600))


def test_a_huge_page_made_over_a_table_is_clean_in_the_tdp_mmu():
    """make_spte() sees a non-leaf SPTE, which has W: it skips setting D, as over a writable leaf."""
    for name, dirty in (("npt", False), ("npt_legacy", True)):
        vm = make_vm(HARDWARE[name], npages=512, page_size="2M")
        vm.track_guest_page_table(BASE + 9)
        vm.vcpu[0].read(BASE)
        vm.untrack_guest_page_table(BASE + 9)
        vm.vcpu[0].read(BASE + 1)
        assert vm.level(BASE) == 2
        assert vm.fmt.is_dirty_spte(vm.spte(BASE)) == dirty


def test_address_space_1_has_no_pages_of_the_vcpus():
    for kernel in (Kernel.v5_19, Kernel.v6_0):
        vm = make_vm(kernel=kernel)
        vm.set_user_memory_region(slot=1 << 16, base_gfn=BASE, npages=64)
        vm.vcpu[0].write(BASE)
        spte = vm.spte(BASE)
        vm.set_user_memory_region(slot=1 << 16, base_gfn=BASE, npages=64, log_dirty_pages=True)
        assert vm.spte(BASE) == spte
        vm.vcpu[0].write(BASE)
        assert missed(vm, 1 << 16) == []
        check(vm)


def test_tracking_ends_with_the_slot_and_read_only_slots_are_not_written():
    vm = make_vm(kernel=Kernel.v6_0)
    vm.track_guest_page_table(BASE)
    vm.set_user_memory_region(slot=0)
    vm.set_user_memory_region(slot=0, base_gfn=BASE, npages=64, readonly=True, log_dirty_pages=True)
    assert vm.vcpu[0].write(BASE) is Outcome.MMIO
    vm.vcpu[0].read(BASE)
    vm.track_guest_page_table(BASE)
    assert vm.vcpu[0].write(BASE) is Outcome.MMIO
    with pytest.raises(OSError, match="read-only"):
        vm.kvm_write_guest(BASE)
    assert not vm.dirty_bitmap().any() and missed(vm) == []


def test_the_host_hears_of_dirty_pages_that_are_zapped():
    vm = make_vm(HARDWARE["npt"], npages=512, page_size="2M")
    vm.vcpu[0].write(BASE)
    vm.set_user_memory_region(slot=0)
    assert vm.host.dirty == {0x40200}
    vm = make_vm(HARDWARE["npt"], Kernel.v6_0, npages=512, page_size="2M")
    log(vm)
    vm.vcpu[0].write(BASE + 3)
    log(vm, False)
    assert 0x40203 in vm.host.dirty


def test_pml_is_switched_with_the_first_slot_and_the_last():
    vm = make_vm(HARDWARE["pml"], Kernel.v6_0)
    vm.set_user_memory_region(slot=1, base_gfn=0x4000, npages=8)
    log(vm)
    assert vm.pml_on
    vm.vcpu[0].write(BASE)
    reported(vm)
    vm.vcpu[0].write(BASE)
    enable = until(
        vm, vm.start(vm.user_memory_region(1, 0x4000, 8, log_dirty_pages=True)), "kvm_mmu_update_cpu_dirty_logging"
    )
    vm.step(enable)
    assert vm.vcpu[0].pml == [BASE]  # PML was on already: nobody had to leave the guest
    vm.run(enable)
    log(vm, False)
    assert vm.pml_on
    log(vm, False, slot=1)
    assert not vm.pml_on


def test_a_ring_is_reset_outside_slots_lock():
    vm = make_vm_with_ring()
    vm.vcpu[0].write(BASE)
    vm.vcpu[0].dirty_ring.harvest()
    reset = until(vm, vm.start(ResetDirtyRings()), "kvm_flush_remote_tlbs")
    vm.set_user_memory_region(slot=1, base_gfn=0x9000, npages=1)  # need not wait
    assert reset.todo
    assert vm.vcpu[0].write(BASE) is Outcome.HIT  # before the flush: this reset's report covers it
    assert missed(vm) == []
    vm.run(reset)
    assert vm.vcpu[0].write(BASE) is Outcome.FAST_FAULT


def test_a_ring_batch_spans_less_than_64_pages():
    vm = make_vm_with_ring(npages=256)
    for page in (63, 0, 100):
        vm.vcpu[0].write(BASE + page)
    vm.vcpu[0].dirty_ring.harvest()
    vm.run(ResetDirtyRings())
    batches = [e.note for e in vm.log if e.step == "kvm_dirty_ring_reset"]
    assert batches == ["2 entries", "1 entries", "0 entries"]


def make_vm_with_ring(npages=64):
    vm = Vm(HARDWARE["ept_no_ad"], Kernel.v6_0, vcpus=2)
    vm.enable_dirty_ring(4096)
    vm.set_user_memory_region(slot=0, base_gfn=BASE, npages=npages, log_dirty_pages=True)
    return vm


def test_a_queued_call_that_is_refused_leaves_nothing_behind():
    vm = make_vm()
    vm.start(vm.user_memory_region(0, BASE, 64, log_dirty_pages=True))
    for bad in (vm.user_memory_region(1, 1 << 60, 1), vm.user_memory_region(1, BASE, 1)):
        with pytest.raises((OSError, ValueError), match=r"does not fit|overlap"):
            vm.run(vm.start(bad))
    assert vm.in_flight == [] and vm.get_dirty_log(0).shape == (64,)


def test_entering_the_nested_guest_is_an_exit_that_drains_pml():
    vm = make_vm(HARDWARE["pml"], Kernel.v6_0, nested="ept")
    log(vm)
    vm.vcpu[0].write(BASE)
    reported(vm)
    vm.vcpu[0].write(BASE)
    assert vm.vcpu[0].pml == [BASE]
    vm.vcpu[0].attempt("read", BASE + 1, l2=True)
    assert vm.vcpu[0].pml == [] and vm.dirty_bitmap()[0]


def test_the_log_of_address_space_1_says_nothing_about_the_vcpus_pages():
    vm = make_vm()
    vm.vcpu[0].read(BASE)
    vm.track_guest_page_table(BASE + 1)
    vm.clear_young(BASE, BASE + 1)
    log(vm)
    vm.vcpu[0].write(BASE)
    vm.enable_manual_dirty_log_protect(initially_set=True)
    vm.set_user_memory_region(slot=1 << 16, base_gfn=BASE, npages=64, log_dirty_pages=True)
    vm.clear_dirty_log(1 << 16, 0, 64, np.ones(64, bool))
    assert missed(vm) == [BASE]
    vm.set_user_memory_region(slot=1 << 16)
    assert vm.vcpu[0].write(BASE + 1) is Outcome.SLOW_FAULT  # the VM's shadow pages went, and tracking with them


def test_kvms_own_writes_use_the_rings_reserve():
    """Guest writes end where the reserve begins; KVM's own go on, and only a truly full ring loses its oldest entry."""
    vm = make_vm_with_ring(npages=256)
    for page in range(256 - 64):
        vm.kvm_write_guest(BASE + page)
    ring = vm.vcpu[0].dirty_ring
    assert ring.soft_full and vm.vcpu[0].write(BASE) is Outcome.RING_FULL
    for _ in range(64):
        vm.kvm_write_guest(BASE + 200)
    assert ring.full and len(ring.entries) == 256 and not any(event.step == "WARN" for event in vm.log)
    vm.kvm_write_guest(BASE + 201)
    assert vm.log[-1].note == "the dirty ring is full: its oldest entry is overwritten"
    assert missed(vm) == [BASE] and ring.harvest()[0] == (0, 201) and len(ring.entries) == 256


def test_odd_addresses_and_strangers_operations():
    vm = make_vm()
    vm.vcpu[0].read(BASE)
    assert vm.vcpu[0].read(1 << 40) is Outcome.MMIO
    elsewhere = make_vm()
    get = elsewhere.start(elsewhere.user_memory_region(0, BASE, 64, log_dirty_pages=True))
    with pytest.raises(ValueError, match="not in flight"):
        vm.step(get)
    assert elsewhere.run(get) is None
