"""Short runs, named by their verdict: what loses a write, what does not, and why.

Numbers in parentheses are upstream commit ids. "Loses" means: the guest wrote the page after enabling returned, and no
report will ever say so.
"""

import numpy as np
import pytest
from conftest import BASE, HARDWARE, log, make_vm, missed, reported

from kvmbook import FlushPolicy, Hardware, Kernel, Outcome, Vm
from kvmbook.model import GetDirtyLog, MemoryRegion, SetUserMemoryRegion, check

NO_AD = HARDWARE["ept_no_ad"]
PML = HARDWARE["pml"]
ONLY_FIRST = np.arange(64) == 0  # a mask for CLEAR: the first page of 64


def aged_then_enabled(hardware=NO_AD, kernel=Kernel.v5_19, age="clear_young", **options):
    """The seed's scene for one page, up to the guest's write: returns the VM."""
    vm = make_vm(hardware, kernel, **options)
    vm.vcpu[0].read(BASE)
    getattr(vm, age)(BASE, BASE + 1)
    log(vm)
    vm.vcpu[0].write(BASE)
    return vm


# ---- the bug, step by step -------------------------------------------------------------------------------------------


def test_conditional_flush_loses_a_write_without_ad_bits_step_by_step():
    """The minimal run, with the SPTE values worked out by hand for pfn 0x40200 (memory type write-back)."""
    vm = make_vm()
    pfn = 0x40200 << 12
    assert vm.vcpu[0].read(BASE) is Outcome.SLOW_FAULT
    assert vm.spte(BASE) == 0x0610000000000877 | pfn  # a read was enough to map it writable
    assert str(vm.vcpu[0].tlb.lookup("L1", BASE)) == "RWX"

    assert vm.clear_young(BASE, BASE + 1)
    assert vm.spte(BASE) == 0x0750000000000870 | pfn  # inaccessible, R and X saved, MMU-writable kept
    assert str(vm.vcpu[0].tlb.lookup("L1", BASE)) == "RWX"  # and nobody told the TLB

    log(vm)
    assert vm.spte(BASE) == 0x0750000000000870 | pfn  # W was 0: the pass changed nothing ...
    assert vm.counters.flushes == 0  # ... so there was no flush

    assert vm.vcpu[0].write(BASE) is Outcome.HIT
    assert reported(vm) == []
    assert missed(vm) == [BASE]

    vm.vcpu[0].write(BASE)
    assert reported(vm) == []  # an empty harvest does not flush either: the bug goes on
    assert vm.counters.flushes == 0


def test_an_eviction_ends_the_loss_for_later_writes():
    vm = aged_then_enabled()
    vm.vcpu[0].evict(BASE)
    assert vm.vcpu[0].write(BASE) is Outcome.FAST_FAULT
    assert reported(vm) == [BASE]
    assert missed(vm) == []


def test_the_worked_spte_values_of_a_page_that_comes_back():
    """A read restores R and X only; the first write then needs a second fault."""
    vm = make_vm(kernel=Kernel.v6_0)
    pfn = 0x40200 << 12
    vm.vcpu[0].read(BASE)
    vm.clear_young(BASE, BASE + 1)
    assert vm.vcpu[1].read(BASE) is Outcome.FAST_FAULT
    assert vm.spte(BASE) == 0x0610000000000875 | pfn
    assert vm.vcpu[1].write(BASE) is Outcome.FAST_FAULT
    assert vm.spte(BASE) == 0x0610000000000877 | pfn


@pytest.mark.parametrize("legacy", ["ept_no_ad", "ept_no_ad_legacy"])
@pytest.mark.parametrize("policy", FlushPolicy)
def test_without_ad_bits_only_a_flush_that_ignores_w_saves_the_write(policy, legacy):
    vm = aged_then_enabled(HARDWARE[legacy], Kernel.v5_19.with_(flush=policy))
    lost = policy in (FlushPolicy.NEVER, FlushPolicy.IF_CHANGED)
    assert missed(vm) == [BASE] * lost
    assert reported(vm) == [BASE] * (not lost)


# ---- what does not trigger it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in HARDWARE if "no_ad" not in name])
def test_ad_bits_save_it(name):
    vm = aged_then_enabled(HARDWARE[name])
    assert reported(vm) == [BASE]


def test_clear_flush_young_saves_it():
    assert reported(aged_then_enabled(age="clear_flush_young")) == [BASE]


def test_clear_flush_young_that_does_not_flush_loses_it_again():
    """Linux v6.13's ageing under v5.19's enabling: why the flush matters more today (2ebbe0308c29)."""
    vm = aged_then_enabled(kernel=Kernel.v5_19.with_(clear_flush_young_flushes=False), age="clear_flush_young")
    assert missed(vm) == [BASE]
    vm = aged_then_enabled(kernel=Kernel.v6_0.with_(clear_flush_young_flushes=False), age="clear_flush_young")
    assert reported(vm) == [BASE]


def test_test_young_changes_nothing():
    vm = aged_then_enabled(age="test_young")
    assert reported(vm) == [BASE]


def test_change_pte_flushes():
    vm = make_vm()
    vm.vcpu[0].read(BASE)
    vm.change_pte(BASE)
    log(vm)
    assert vm.vcpu[0].write(BASE) is Outcome.SLOW_FAULT
    assert reported(vm) == [BASE]


def test_invalidate_flushes():
    assert reported(aged_then_enabled(age="invalidate_range")) == [BASE]


def test_initially_set_protects_nothing_and_loses_nothing():
    vm = make_vm()
    vm.enable_manual_dirty_log_protect(initially_set=True)
    vm.vcpu[0].read(BASE)
    vm.clear_young(BASE, BASE + 1)
    log(vm)
    assert vm.counters.flushes == 0
    vm.vcpu[0].write(BASE)
    assert missed(vm) == []
    assert vm.get_dirty_log(0).all()  # every page counts as dirty
    vm.clear_dirty_log(0, 0, 64, np.ones(64, bool))
    assert vm.counters.flushes == 1  # the flush is by bitmap
    assert vm.vcpu[0].write(BASE) is Outcome.FAST_FAULT
    assert reported(vm) == [BASE]


def test_any_other_page_in_the_harvest_saves_later_writes():
    """GET flushes by bitmap: one dirty page anywhere in the slot flushes for all of them."""
    vm = aged_then_enabled()
    vm.vcpu[1].write(BASE + 1)
    assert reported(vm) == [BASE + 1]
    assert missed(vm) == [BASE]  # the old write is still lost
    assert vm.vcpu[0].write(BASE) is Outcome.FAST_FAULT
    assert reported(vm) == [BASE]


def test_ageing_between_two_harvests_is_safe():
    vm = make_vm()
    log(vm)
    vm.vcpu[0].write(BASE)
    vm.clear_young(BASE, BASE + 1)
    assert vm.vcpu[0].write(BASE) is Outcome.HIT  # stale, writable, and the bit is set
    assert reported(vm) == [BASE]
    assert vm.vcpu[0].write(BASE) is Outcome.FAST_FAULT
    assert reported(vm) == [BASE]


def test_create_with_logging_is_safe():
    vm = Vm(NO_AD, Kernel.v5_19)
    vm.set_user_memory_region(slot=0, base_gfn=BASE, npages=64, log_dirty_pages=True)
    vm.vcpu[0].write(BASE)
    assert reported(vm) == [BASE]


def test_moving_the_slot_zaps_and_flushes():
    vm = make_vm()
    vm.vcpu[0].read(BASE)
    vm.clear_young(BASE, BASE + 1)
    vm.set_user_memory_region(slot=0, base_gfn=BASE + 0x1000, npages=64, log_dirty_pages=True)
    assert vm.spte(BASE) == 0
    assert vm.vcpu[0].tlb.lookup("L1", BASE) is None
    assert vm.vcpu[0].write(BASE) is Outcome.MMIO
    vm.vcpu[0].write(BASE + 0x1000)
    assert reported(vm) == [BASE + 0x1000]


def test_an_eviction_before_the_write_saves_it():
    vm = make_vm()
    vm.vcpu[0].read(BASE)
    vm.clear_young(BASE, BASE + 1)
    log(vm)
    vm.vcpu[0].evict(BASE)
    vm.vcpu[0].write(BASE)
    assert reported(vm) == [BASE]


def test_one_page_still_writable_hides_the_bug():
    vm = make_vm()
    vm.vcpu[0].read(BASE)
    vm.vcpu[0].read(BASE + 1)
    vm.clear_young(BASE, BASE + 1)
    log(vm)  # page BASE + 1 is changed, so the whole VM is flushed
    assert vm.counters.flushes == 1
    vm.vcpu[0].write(BASE)
    assert reported(vm) == [BASE]


def test_another_slot_enabled_in_between_hides_the_bug():
    vm = make_vm()
    vm.set_user_memory_region(slot=1, base_gfn=0x1000, npages=8)
    vm.vcpu[0].read(BASE)
    vm.vcpu[0].read(0x1000)
    vm.clear_young(BASE, BASE + 1)
    log(vm)
    log(vm, slot=1)
    vm.vcpu[0].write(BASE)
    assert reported(vm) == [BASE]


def test_a_read_only_host_page_needs_a_write_first():
    """If the host maps the page read-only, a read gives a read-only SPTE, and there is nothing stale to fear."""
    vm = make_vm()
    vm.write_protect_host_page(BASE)
    vm.vcpu[0].read(BASE)
    assert str(vm.vcpu[0].tlb.lookup("L1", BASE)) == "R-X"
    vm.clear_young(BASE, BASE + 1)
    log(vm)
    assert vm.vcpu[0].write(BASE) is Outcome.SLOW_FAULT  # copy-on-write
    assert reported(vm) == [BASE]


# ---- neighbours of the bug -------------------------------------------------------------------------------------------


def test_restored_read_only_loses_too():
    """The criterion is W=0 and MMU-writable, not "access-tracked"."""
    vm = make_vm()
    vm.vcpu[0].read(BASE)
    vm.clear_young(BASE, BASE + 1)
    vm.vcpu[1].read(BASE)
    assert not vm.fmt.is_access_track_spte(vm.spte(BASE))
    log(vm)
    vm.vcpu[0].write(BASE)
    assert reported(vm) == []
    assert missed(vm) == [BASE]


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("name", ["ept_no_ad", "ept_no_ad_legacy"])
def test_a_stale_huge_entry_loses_every_page_it_maps(name, eager):
    vm = make_vm(HARDWARE[name], npages=512, page_size="2M", eager_page_split=eager)
    vm.vcpu[0].read(BASE + 7)
    assert vm.level(BASE) == 2
    vm.clear_young(BASE, BASE + 1)
    log(vm)
    assert vm.level(BASE) == (1 if eager and name == "ept_no_ad" else 2)
    assert vm.fmt.is_access_track_spte(vm.spte(BASE + 100))
    vm.vcpu[0].write(BASE + 100)
    vm.vcpu[0].write(BASE + 101)
    assert reported(vm) == []
    assert missed(vm) == [BASE + 100, BASE + 101]


@pytest.mark.parametrize("name", ["ept_no_ad", "ept_no_ad_legacy"])
def test_v6_0_keeps_every_page_of_a_stale_huge_entry(name):
    vm = make_vm(HARDWARE[name], Kernel.v6_0, npages=512, page_size="2M")
    vm.vcpu[0].read(BASE + 7)
    vm.clear_young(BASE, BASE + 1)
    log(vm)
    vm.vcpu[0].write(BASE + 100)
    assert reported(vm) == [BASE + 100]


def test_nested_ept_without_ad_bits_loses_under_pml():
    vm = make_vm(PML, nested="ept without A/D")
    vm.vcpu[0].read(BASE, l2=True)
    vm.clear_young(BASE, BASE + 1)
    log(vm)
    assert vm.vcpu[0].write(BASE, l2=True) is Outcome.HIT
    assert reported(vm) == []
    assert missed(vm) == [BASE]


def test_nested_loss_is_hidden_if_l1_wrote_any_page():
    vm = make_vm(PML, nested="ept without A/D")
    vm.vcpu[0].read(BASE, l2=True)
    vm.vcpu[0].write(BASE + 1)
    vm.clear_young(BASE, BASE + 1)
    log(vm)
    vm.vcpu[0].write(BASE, l2=True)
    assert reported(vm) == [BASE]


def test_type_2_sptes_are_protected_by_w_and_not_hurt_by_ageing():
    vm = make_vm(PML, nested="ept")
    vm.vcpu[0].write(BASE, l2=True)
    vm.clear_young(BASE, BASE + 1)
    assert vm.fmt.is_writable_pte(vm.spte(BASE, l2=True))
    log(vm)
    assert not vm.fmt.is_writable_pte(vm.spte(BASE, l2=True))
    assert vm.vcpu[0].write(BASE, l2=True) is Outcome.SLOW_FAULT  # indirect MMUs have no fast path
    assert vm.vcpu[0].pml == []  # PML is off while the nested guest runs
    assert reported(vm) == [BASE]


def second_hole(policy):
    """Two vCPUs fault on one page; the second makes the SPTE again over the first one's, W=1 with D=0."""
    vm = make_vm(PML, Kernel.v5_19.with_(flush=policy))
    for cpu in (0, 1):
        assert vm.vcpu[cpu].attempt("read", BASE) is Outcome.FAULT
    vm.run(vm.vcpu[0].fault)
    assert vm.vcpu[0].read(BASE) is Outcome.WALK
    assert vm.vcpu[0].tlb.lookup("L1", BASE).dirty
    vm.run(vm.vcpu[1].fault)
    assert vm.spte(BASE) == 0x0600000000000977 | 0x40200 << 12
    log(vm)
    vm.vcpu[0].write(BASE)
    return vm


@pytest.mark.parametrize("policy", FlushPolicy)
def test_second_hole_pml_loses_a_write_even_with_the_mmu_writable_test(policy):
    vm = second_hole(policy)
    lost = policy is not FlushPolicy.ALWAYS
    assert reported(vm) == [BASE] * (not lost)
    assert missed(vm) == [BASE] * lost


def test_disable_then_enable_flushes_only_under_the_new_rules():
    flushes = {}
    for policy in FlushPolicy:
        vm = make_vm(kernel=Kernel.v5_19.with_(flush=policy))
        vm.vcpu[0].read(BASE)
        log(vm)
        log(vm, False)
        before = vm.counters.flushes
        log(vm)
        flushes[policy.name] = vm.counters.flushes - before
    assert flushes == {"NEVER": 0, "IF_CHANGED": 0, "IF_MMU_WRITABLE": 1, "ALWAYS": 1}


# ---- the traps -------------------------------------------------------------------------------------------------------


def test_trap_13_fast_path_marks_after_the_spte_and_slow_path_before():
    vm = make_vm(kernel=Kernel.v6_0)
    vm.vcpu[0].read(BASE)
    log(vm)
    vm.vcpu[0].attempt("write", BASE)
    fault = vm.vcpu[0].fault
    vm.step(fault)
    vm.step(fault)
    assert vm.fmt.is_writable_pte(vm.spte(BASE)) and not vm.dirty_bitmap()[0]
    vm.vcpu[1].write(BASE)  # another vCPU may use the SPTE in the window
    assert missed(vm) == []  # ... and the mark under way covers it
    assert reported(vm) == []  # a harvest in the window finds no bit, and so takes nothing away either
    vm.run(fault)
    assert reported(vm) == [BASE]

    vm.vcpu[0].attempt("read", BASE + 1)
    fault = vm.vcpu[0].fault
    while fault.todo[0] != "set_spte":
        vm.step(fault)
    assert vm.spte(BASE + 1) == 0 and vm.dirty_bitmap()[1]


def test_trap_8_and_9_a_harvest_flushes_by_the_bitmap_and_only_by_it():
    vm = make_vm(kernel=Kernel.v6_0)
    log(vm)
    flushes = vm.counters.flushes
    vm.kvm_write_guest(BASE)  # no SPTE has anything to do with it
    assert reported(vm) == [BASE]
    assert vm.counters.flushes == flushes + 1
    assert reported(vm) == []
    assert vm.counters.flushes == flushes + 1


def test_trap_5_and_6_types_answer_different_questions():
    """Type 2 has A/D bits and yet needs write protection; RWX=0 is access tracking for type 1 only."""
    fmt = PML.format
    type_0, type_1, type_2 = (1 << 11 | ad_type << 52 for ad_type in range(3))
    assert [fmt.spte_ad_enabled(s) for s in (type_0, type_1, type_2)] == [True, False, True]
    assert [fmt.spte_ad_need_write_protect(s) for s in (type_0, type_1, type_2)] == [False, True, True]
    assert [fmt.is_access_track_spte(s) for s in (type_0, type_1, type_2)] == [False, True, False]


def test_trap_1_w_0_does_not_mean_that_nobody_can_write():
    vm = make_vm()
    vm.vcpu[0].read(BASE)
    vm.clear_young(BASE, BASE + 1)
    assert not vm.fmt.is_writable_pte(vm.spte(BASE)) and vm.fmt.is_mmu_writable_spte(vm.spte(BASE))
    assert vm.vcpu[0].write(BASE) is Outcome.HIT
    check(vm)  # the key invariant holds all the same


def test_trap_10_and_11_the_kick_flushes_nothing():
    vm = make_vm()
    vm.vcpu[0].read(BASE)
    exits = vm.counters.exits
    vm.set_user_memory_region(slot=7, base_gfn=0x9000, npages=1)
    assert vm.counters.exits > exits
    assert vm.vcpu[0].tlb.lookup("L1", BASE) is not None


def test_trap_12_without_the_grace_period_even_v6_0_loses():
    def run(kernel):
        vm = make_vm(kernel=kernel)
        vm.vcpu[0].read(BASE)
        log(vm)  # BASE is now W=0, MMU-writable
        log(vm, False)
        vm.vcpu[0].attempt("write", BASE)
        fault = vm.vcpu[0].fault  # began under the slot that does not log
        log(vm)
        if vm.vcpu[0].fault is not None:
            vm.run(fault)
        vm.vcpu[0].write(BASE)
        return missed(vm)

    assert run(Kernel.v6_0) == []
    assert run(Kernel.v6_0.with_(srcu_grace_period=False)) == [BASE]


def test_trap_12_the_commit_waits_for_a_fault_that_began_before_the_publication():
    vm = make_vm()
    vm.vcpu[0].attempt("read", BASE)
    slot = vm.memslots.id_to_memslot(0, 0)
    enable = vm.start(SetUserMemoryRegion(MemoryRegion(0, 1, BASE << 12, 64 << 12, slot.userspace_addr)))
    vm.step(enable)
    with pytest.raises(ValueError, match="must wait for KVM for vCPU0"):
        vm.step(enable)
    vm.run(vm.vcpu[0].fault)
    vm.step(enable)
    vm.vcpu[1].attempt("read", BASE + 1)  # a fault that began after it is not waited for
    vm.run(enable)
    assert vm.vcpu[1].fault is not None


def test_trap_15_a_not_present_fault_is_fast_only_without_ad_bits():
    for name, first in (("ept_no_ad", "fast_page_fault"), ("ept_ad", "kvm_faultin_pfn"), ("npt", "kvm_faultin_pfn")):
        vm = make_vm(HARDWARE[name])
        vm.vcpu[0].attempt("read", BASE)
        assert vm.vcpu[0].fault.todo == [first]


def test_trap_14_nested_type_1_sptes_come_back_through_the_slow_path():
    vm = make_vm(NO_AD, nested="ept without A/D")
    vm.vcpu[0].read(BASE, l2=True)
    vm.clear_young(BASE, BASE + 1)
    assert vm.vcpu[1].read(BASE, l2=True) is Outcome.SLOW_FAULT
    assert vm.fmt.is_writable_pte(vm.spte(BASE, l2=True))


@pytest.mark.parametrize("name", ["ept_no_ad", "npt", "npt_legacy"])
def test_trap_16_a_write_to_a_protected_huge_page_maps_4k(name):
    vm = make_vm(HARDWARE[name], npages=1024, page_size="2M", eager_page_split=False)
    vm.vcpu[0].write(BASE)
    log(vm)
    assert vm.level(BASE) == 2 and not vm.fmt.is_writable_pte(vm.spte(BASE))
    assert vm.vcpu[0].write(BASE + 3) is Outcome.SLOW_FAULT
    assert vm.level(BASE + 3) == 1
    assert vm.spte(BASE + 4) == 0  # its neighbours fault on their own
    assert reported(vm) == [BASE + 3]


@pytest.mark.parametrize(("name", "stays"), [("ept_no_ad", True), ("npt", True), ("npt_legacy", False)])
def test_since_v6_2_such_a_write_splits_the_huge_page_in_the_tdp_mmu(name, stays):
    kernel = Kernel.v6_0.with_(splits_on_fault=True)
    vm = make_vm(HARDWARE[name], kernel, npages=1024, page_size="2M", eager_page_split=False)
    vm.vcpu[0].write(BASE)
    log(vm)
    flushes = vm.counters.flushes
    assert vm.vcpu[0].write(BASE + 3) is Outcome.SLOW_FAULT
    assert vm.level(BASE + 3) == 1 and (vm.level(BASE + 4) == 1) is stays is (vm.counters.flushes == flushes)
    assert vm.vcpu[0].read(BASE + 4) is (Outcome.WALK if stays else Outcome.SLOW_FAULT)
    assert reported(vm) == [BASE + 3] + [BASE + 4] * (not stays)
    check(vm)


def test_trap_17_clear_with_initially_set_takes_mmu_writable_from_huge_pages_only():
    vm = make_vm(HARDWARE["npt"], Kernel.v6_0, npages=1024, page_size="2M", eager_page_split=False)
    vm.enable_manual_dirty_log_protect(initially_set=True)
    vm.vcpu[0].write(BASE)
    log(vm)
    vm.clear_dirty_log(0, 0, 64, ONLY_FIRST)
    assert vm.level(BASE) == 2 and not vm.fmt.is_mmu_writable_spte(vm.spte(BASE))
    vm.vcpu[0].write(BASE)
    assert vm.level(BASE) == 1 and vm.dirty_bitmap()[0]
    vm.clear_dirty_log(0, 0, 64, ONLY_FIRST)
    assert vm.fmt.is_mmu_writable_spte(vm.spte(BASE)) and not vm.fmt.is_writable_pte(vm.spte(BASE))


def test_clear_split_forgets_the_last_page_until_v6_8():
    """The off-by-one that 1aa4bb916808 repaired: the huge page of the last set gfn is not split."""
    for forgets in (True, False):
        vm = make_vm(kernel=Kernel.v6_0.with_(clear_split_forgets_last=forgets), npages=1024, page_size="2M")
        vm.enable_manual_dirty_log_protect(initially_set=True)
        vm.vcpu[0].write(BASE)
        log(vm)
        vm.clear_dirty_log(0, 0, 64, ONLY_FIRST)
        assert vm.level(BASE) == (2 if forgets else 1)
        vm.vcpu[0].write(BASE)
        assert missed(vm) == []  # a slower first write, and no loss


def test_trap_18_struct_page_is_not_the_dirty_bitmap():
    vm = make_vm()
    log(vm)
    vm.vcpu[0].write(BASE)
    reported(vm)
    vm.vcpu[0].write(BASE)
    vm.host.dirty.clear()
    before = vm.dirty_bitmap().copy()
    vm.clear_young(BASE, BASE + 1)
    assert vm.host.dirty == {0x40200}
    assert (vm.dirty_bitmap() == before).all()


@pytest.mark.parametrize("name", HARDWARE)
def test_trap_19_pt_protection_flushes_before_it_unlocks(name):
    vm = make_vm(HARDWARE[name])
    vm.vcpu[0].write(BASE)
    log(vm)  # may leave the SPTE W=0: that is no promise
    vm.vcpu[0].write(BASE)
    vm.clear_young(BASE, BASE + 1)
    vm.track_guest_page_table(BASE)
    assert not vm.fmt.is_mmu_writable_spte(vm.spte(BASE))
    assert vm.vcpu[0].tlb.lookup("L1", BASE) is None
    check(vm)
    assert vm.vcpu[0].write(BASE) is Outcome.EMULATED
    assert vm.dirty_bitmap()[0]
    vm.untrack_guest_page_table(BASE)
    assert vm.vcpu[0].write(BASE) is Outcome.SLOW_FAULT


def test_trap_20_a_clean_entry_walks_again_on_a_write():
    vm = make_vm(PML, Kernel.v6_0)
    log(vm)
    vm.vcpu[0].write(BASE)
    assert reported(vm) == [BASE]  # D cleared, TLB flushed
    assert vm.vcpu[0].read(BASE) is Outcome.WALK
    assert str(vm.vcpu[0].tlb.lookup("L1", BASE)) == "RWX, clean"
    assert vm.vcpu[0].write(BASE) is Outcome.WALK  # D is set, PML logs
    assert vm.vcpu[0].pml == [BASE]
    assert vm.vcpu[0].write(BASE) is Outcome.HIT
    assert reported(vm) == [BASE]


def test_trap_20_a_stale_clean_entry_is_harmless():
    vm = make_vm(HARDWARE["ept_ad"], Kernel.v5_19.with_(flush=FlushPolicy.NEVER))
    log(vm)
    vm.vcpu[0].write(BASE)
    reported(vm)
    log(vm, False)
    vm.vcpu[0].write(BASE)
    fmt, found = vm.fmt, vm.page_tables.walk(vm.l1_root, BASE)
    vm.page_tables.write(found.sptep, found.spte & ~fmt.shadow_dirty_mask)  # as an ageing host may leave it
    vm.vcpu[0].evict(BASE)
    vm.vcpu[0].read(BASE)
    assert str(vm.vcpu[0].tlb.lookup("L1", BASE)) == "RWX, clean"
    log(vm)  # W taken, no flush
    assert vm.vcpu[0].write(BASE) is Outcome.FAST_FAULT
    assert reported(vm) == [BASE]


def test_trap_21_clear_dirty_visits_huge_leaves_on_the_tdp_side_only():
    for name, cleared in (("pml", True), ("pml_legacy", False)):
        vm = make_vm(HARDWARE[name], npages=512, page_size="2M", eager_page_split=False)
        vm.vcpu[0].write(BASE)
        log(vm)
        assert vm.level(BASE) == 2
        assert vm.fmt.is_dirty_spte(vm.spte(BASE)) == (not cleared)
        assert not vm.fmt.is_writable_pte(vm.spte(BASE))
        vm.vcpu[0].write(BASE + 1)
        assert reported(vm) == [BASE + 1]


def test_trap_22_switching_logging_off_does_not_restore_w():
    vm = make_vm(kernel=Kernel.v6_0)
    vm.vcpu[0].write(BASE)
    log(vm)
    log(vm, False)
    assert not vm.fmt.is_writable_pte(vm.spte(BASE))
    assert vm.vcpu[0].write(BASE) is Outcome.FAST_FAULT


def test_trap_23_a_pass_visits_the_rmap_side_and_the_tdp_side():
    vm = make_vm(NO_AD, Kernel.v6_0, nested="ept without A/D")
    vm.vcpu[0].write(BASE)
    vm.vcpu[1].write(BASE, l2=True)
    assert vm.spte(BASE) and vm.spte(BASE, l2=True)
    log(vm)
    assert not vm.fmt.is_writable_pte(vm.spte(BASE)) and not vm.fmt.is_writable_pte(vm.spte(BASE, l2=True))
    vm.vcpu[1].write(BASE, l2=True)
    assert reported(vm) == [BASE]
    vm.vcpu[0].write(BASE)
    assert reported(vm) == [BASE]


@pytest.mark.parametrize("name", ["ept_no_ad", "ept_no_ad_legacy"])
def test_zapping_a_larger_page_leaves_no_stale_huge_entry(name):
    """Its 511 neighbours are unmapped then: a TLB that still maps them would write behind KVM's back."""
    vm = make_vm(HARDWARE[name], Kernel.v6_0, npages=512, page_size="2M")
    vm.enable_manual_dirty_log_protect(initially_set=True)
    vm.vcpu[0].read(BASE)
    log(vm)
    vm.clear_young(BASE, BASE + 1)
    assert vm.vcpu[1].write(BASE) is Outcome.SLOW_FAULT
    assert vm.level(BASE) == 1
    check(vm)


def test_huge_pages_come_back_when_logging_goes_off():
    for name in ("ept_no_ad", "ept_no_ad_legacy", "npt"):
        vm = make_vm(HARDWARE[name], npages=1024, page_size="2M")
        vm.vcpu[0].write(BASE)
        log(vm)
        vm.vcpu[0].write(BASE + 5)
        assert vm.level(BASE + 5) == 1
        log(vm, False)
        assert vm.spte(BASE + 5) == 0
        vm.vcpu[0].write(BASE + 6)
        assert vm.level(BASE + 5) == 2
        check(vm)


# ---- harvests --------------------------------------------------------------------------------------------------------


def test_a_write_between_taking_the_bit_and_the_flush_is_in_this_report_or_in_the_next():
    vm = make_vm(kernel=Kernel.v6_0)
    log(vm)
    vm.vcpu[0].write(BASE)
    get = vm.start(GetDirtyLog(0))
    while get.todo[0] != "kvm_arch_flush_remote_tlbs_memslot":
        vm.step(get)
    assert vm.vcpu[0].write(BASE) is Outcome.HIT  # through the entry that the flush will remove
    assert missed(vm) == []
    assert vm.run(get)[0]
    assert vm.vcpu[0].write(BASE) is Outcome.FAST_FAULT
    assert reported(vm) == [BASE]


def test_manual_protect_get_neither_clears_nor_flushes():
    vm = make_vm(kernel=Kernel.v6_0)
    vm.enable_manual_dirty_log_protect()
    log(vm)
    vm.vcpu[0].write(BASE)
    flushes = vm.counters.flushes
    assert reported(vm) == reported(vm) == [BASE]
    assert vm.counters.flushes == flushes
    vm.clear_dirty_log(0, 0, 64, vm.get_dirty_log(0))
    assert vm.counters.flushes == flushes + 1
    assert reported(vm) == []


def test_pml_drains_on_every_exit_and_overflows_into_one():
    vm = make_vm(PML.with_(pml_entries=4), Kernel.v6_0)
    for page in range(8):
        vm.vcpu[0].write(BASE + page)
    log(vm)
    for page in range(4):
        assert vm.vcpu[0].write(BASE + page) is Outcome.WALK
    assert len(vm.vcpu[0].pml) == 4 and not vm.dirty_bitmap().any()
    assert vm.vcpu[0].attempt("write", BASE + 4) is Outcome.PML_FULL
    assert vm.vcpu[0].pml == [] and vm.dirty_bitmap().sum() == 4
    assert vm.vcpu[0].write(BASE + 4) is Outcome.WALK
    vm.vcpu[0].exit()
    assert vm.dirty_bitmap().sum() == 5
    assert reported(vm) == [BASE + page for page in range(5)]


def test_the_dirty_ring_fills_stops_the_vcpu_and_is_reset():
    vm = Vm(NO_AD, Kernel.v6_0, vcpus=2)
    vm.enable_dirty_ring(4096)
    vm.set_user_memory_region(slot=0, base_gfn=BASE, npages=512, log_dirty_pages=True)
    for page in range(256 - 64 - 1):
        assert vm.vcpu[0].write(BASE + page) is Outcome.SLOW_FAULT
    assert vm.vcpu[0].write(BASE + 191) is Outcome.RING_FULL  # its fault took the last entry but the reserved ones
    assert vm.vcpu[0].write(BASE) is Outcome.RING_FULL
    assert vm.vcpu[1].write(BASE + 301) is Outcome.SLOW_FAULT
    assert missed(vm) == []
    taken = vm.vcpu[0].dirty_ring.harvest()
    assert taken == [(0, page) for page in range(192)]
    flushes = vm.counters.flushes
    assert vm.reset_dirty_rings() == 192
    assert vm.counters.flushes == flushes + 1
    assert vm.reset_dirty_rings() == 0
    assert vm.counters.flushes == flushes + 1
    assert vm.vcpu[0].write(BASE) is Outcome.FAST_FAULT  # re-armed
    assert vm.vcpu[0].dirty_ring.harvest() == [(0, 0)]


def test_the_bug_does_not_care_whether_the_log_is_a_bitmap_or_a_ring():
    for kernel, lost in ((Kernel.v5_19, True), (Kernel.v6_0, False)):
        vm = Vm(NO_AD, kernel)
        vm.enable_dirty_ring(4096)
        vm.set_user_memory_region(slot=0, base_gfn=BASE, npages=64)
        vm.vcpu[0].read(BASE)
        vm.clear_young(BASE, BASE + 1)
        log(vm)
        vm.vcpu[0].write(BASE)
        assert missed(vm) == [BASE] * lost
        assert vm.vcpu[0].dirty_ring.harvest() == [(0, 0)] * (not lost)


def test_an_unlinked_table_can_still_be_walked_until_the_flush():
    """Upper-level entries are cached too; what hangs below is frozen, so the walk finds nothing."""
    vm = make_vm(kernel=Kernel.v6_0, npages=512, page_size="2M")
    vm.vcpu[0].write(BASE)
    log(vm)
    vm.vcpu[0].read(BASE)
    assert vm.vcpu[0].tlb.tables
    parent = vm.page_tables.entry_at(vm.l1_root, BASE, 2)
    freed, _ = vm.page_tables.unlink(parent)
    vm.vcpu[0].tlb.entries.clear()
    assert vm.vcpu[0].attempt("write", BASE) is Outcome.FAULT
    vm.kvm_flush_remote_tlbs()
    vm.page_tables.free(freed)
    vm.run(vm.vcpu[0].fault)
    vm.vcpu[0].write(BASE)
    assert reported(vm) == [BASE]


def test_hardware_kinds_say_what_they_are():
    assert [hardware.name for hardware in HARDWARE.values()] == [
        "EPT without A/D bits",
        "EPT without A/D bits, legacy MMU",
        "EPT with A/D bits",
        "EPT with A/D bits, legacy MMU",
        "EPT with A/D bits and PML",
        "EPT with A/D bits and PML, legacy MMU",
        "NPT",
        "NPT, legacy MMU",
        "shadow paging",
    ]
    with pytest.raises(ValueError, match="PML needs EPT with A/D bits"):
        Hardware.ept(ad_bits=False, pml=True)
