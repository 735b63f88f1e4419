"""Each release by its rules: which differ, why, and which of them loses a write."""

import errno

import numpy as np
import pytest
from conftest import BASE, HARDWARE, log, make_vm, missed, reported

from kvmbook import FlushPolicy, Hardware, Kernel, Outcome, SpteFormat, Vm
from kvmbook.model import REMOVED_SPTE, SPTE_TDP_AD_DISABLED_MASK, ClearYoung, ResetDirtyRings, arrays, check, each

PML = HARDWARE["pml"]
EVERY = pytest.mark.parametrize("kernel", Kernel.releases, ids=lambda kernel: kernel.name)


def names(kernel, other):
    return {difference.rule for difference in kernel.differs_from(other)}


# ---- releases as values ----------------------------------------------------------------------------------------------


def test_releases_are_in_order_and_each_differs_from_the_one_before_by_what_it_changed():
    assert Kernel.releases[:2] == (Kernel.v5_19, Kernel.v6_0)
    assert [kernel.name for kernel in Kernel.releases] == sorted(
        (kernel.name for kernel in Kernel.releases), key=lambda name: int(name.split(".")[1]) + 100 * ("v6" in name)
    )
    for before, after in zip(Kernel.releases, Kernel.releases[1:], strict=False):
        changed = after.differs_from(before)
        assert bool(changed) == (after not in (Kernel.v6_1, Kernel.v6_18))  # these two changed nothing the model has
        assert changed == before.differs_from(after)
        undone = {"v6.4"} if after is Kernel.v6_9 else set()
        assert {difference.release for difference in changed} <= {after.name.removeprefix("Linux ")} | undone


def test_every_change_in_a_switch_is_a_release_and_names_its_source():
    known = {kernel.name.removeprefix("Linux ") for kernel in Kernel.releases}
    for name, switch in Kernel.switches().items():
        assert set(switch.history) <= known, name
        assert ": " in switch.source or name == "spte_rules", name
        assert getattr(Kernel("as at first"), name) == switch.history["v5.19"][0]


def test_what_differs_is_said_with_its_commits_and_its_source():
    said = {difference.rule: difference for difference in Kernel.v6_2.differs_from(Kernel.v6_0)}
    assert set(said) == {"marks_without_vcpu", "splits_on_fault"}
    assert said["marks_without_vcpu"][2:] == (
        "virt/kvm/kvm_main.c: mark_page_dirty_in_slot()",
        "v6.2",
        "c57351a75d01",
    )
    (by_method,) = Kernel.v6_4.differs_from(Kernel.v6_2)
    assert by_method.rule == "tdp_clear_dirty" and by_method.release == "v6.4"
    assert "CVE-2024-26990" in by_method.says and "5982a5392663" in str(by_method)
    assert "tdp_clear_dirty" not in names(Kernel.v6_9, Kernel.v6_0)  # done, and undone
    assert Kernel.v6_9.differs_from(Kernel.v6_9.with_(name="another name")) == ()
    (museum,) = Kernel.v6_0.with_(srcu_grace_period=False).differs_from(Kernel.v6_0)
    assert museum.release == "" and str(museum).startswith("srcu_grace_period: publishing")


@pytest.mark.parametrize(
    ("release", "of"),
    [("5.10.0-8-amd64", "v5_19"), ("v6.0", "v6_0"), ("6.3.1", "v6_2"), ("6.8.0-31-generic", "v6_8"), ("7.2", "v6_18")],
)
def test_the_rules_of_any_release_are_those_of_the_newest_that_is_not_newer(release, of):
    assert Kernel.of(release) is getattr(Kernel, of)


@pytest.mark.parametrize(
    ("switch", "since", "value"),
    [
        ("marks_without_vcpu", "v6_2", True),
        ("splits_on_fault", "v6_2", True),
        ("clear_split_forgets_last", "v6_8", False),
        ("kicks_without_pml", "v6_8", False),
        ("clear_flush_young_flushes", "v6_13", False),
        ("pml_drains_oldest_first", "v6_14", True),
        ("recovers_in_place", "v6_13", True),
        ("ages_without_lock", "v6_15", True),
        ("reset_stops_at_signal", "v6_17", True),
        ("reset_forgets_at_signal", "v6_17", True),
        ("flush", "v6_0", FlushPolicy.ALWAYS),
    ],
)
def test_a_switch_changes_with_its_release_and_stays(switch, since, value):
    first = Kernel.releases.index(getattr(Kernel, since))
    assert [getattr(kernel, switch) == value for kernel in Kernel.releases] == [
        number >= first for number in range(len(Kernel.releases))
    ]


@EVERY
def test_get_kicks_without_pml_only_before_v6_8(kernel):
    vm = make_vm(HARDWARE["ept_ad"], kernel, vcpus=1)
    vm.vcpu[0].read(BASE)
    log(vm)
    exits = vm.counters.exits
    vm.get_dirty_log()
    assert vm.counters.exits - exits == kernel.kicks_without_pml


# ---- v6.10 and v6.13: the words --------------------------------------------------------------------------------------

VE, PFN, TYPE_1 = 1 << 63, 0x4567, SPTE_TDP_AD_DISABLED_MASK


def test_v6_13_keeps_a_and_d_of_its_own_on_ept_without_them_the_worked_values():
    fmt = Kernel.v6_13.spte_format(SpteFormat.ept(ad_bits=False))
    fresh = fmt.make_spte(PFN, ad_type=TYPE_1).spte
    assert fresh == VE | 0x0610000004567B77
    assert fmt.mark_spte_for_access_track(fresh) == VE | 0x0750000004567A70
    assert fmt.mmu_spte_age(fresh)[:2] == (VE | 0x0750000004567A70, True)
    assert fmt.spte_write_protect(fresh) == (VE | 0x0610000004567B75, False)  # protected, and no flush is asked for
    assert fmt.spte_write_protect(fresh, pt_protect=True).flush
    read = fmt.restore_acc_track_spte(VE | 0x0750000004567A70)
    assert not fmt.is_accessed_spte(read) and read | fmt.shadow_accessed_mask == VE | 0x0610000004567B75
    assert not fmt.kvm_ad_enabled and (fmt.shadow_accessed_mask, fmt.shadow_dirty_mask) == (1 << 8, 1 << 9)
    assert fmt.make_spte(PFN, ad_type=TYPE_1, old_spte=fresh).spte == fresh  # W brings D


def test_v6_13_a_read_of_an_aged_page_sets_a_on_the_fast_path():
    vm = make_vm(HARDWARE["ept_no_ad"], Kernel.v6_13)
    vm.vcpu[0].read(BASE)
    assert vm.clear_young(BASE, BASE + 1) and not vm.test_young(BASE, BASE + 1)
    assert vm.vcpu[1].read(BASE) is Outcome.FAST_FAULT
    assert vm.spte(BASE) == VE | 0x0610000000000B75 | 0x40200 << 12
    assert vm.test_young(BASE, BASE + 1)


@pytest.mark.parametrize("name", ["ept_ad", "npt", "shadow"])
def test_v6_13_changes_no_word_that_hardware_keeps_a_and_d_in_but_that_w_brings_d(name):
    old, new = (kernel.spte_format(HARDWARE[name].format) for kernel in (Kernel.v6_10, Kernel.v6_13))
    fresh = new.make_spte(PFN).spte
    assert old.make_spte(PFN).spte == fresh and new.kvm_ad_enabled
    assert new.mmu_spte_age(fresh) == old.mmu_spte_age(fresh)
    assert new.make_spte(PFN, old_spte=fresh).spte == fresh
    assert old.make_spte(PFN, old_spte=fresh).spte == fresh & ~new.shadow_dirty_mask
    table = fresh & ~(1 << 7)  # in the way of a huge page
    assert new.make_spte(PFN, level=2, old_spte=table, write_tracked=True).wrprot
    assert not old.make_spte(PFN, level=2, old_spte=table, write_tracked=True).wrprot


@pytest.mark.parametrize("name", HARDWARE)
def test_since_v6_10_an_empty_entry_is_b63_and_a_present_one_has_it_in_ept_only(name):
    for kernel in (Kernel.v6_9, Kernel.v6_10, Kernel.v6_18):
        vm = make_vm(HARDWARE[name], kernel)
        ve = VE if kernel is not Kernel.v6_9 else 0
        assert vm.fmt.is_removed_spte(ve | REMOVED_SPTE) and not vm.fmt.is_removed_spte(VE - ve | REMOVED_SPTE)
        vm.vcpu[0].write(BASE)
        assert vm.spte(BASE + 1) == ve and not any(vm.fmt.hardware_rights(ve)) and not vm.fmt.is_mmio_spte(ve)
        assert vm.spte(BASE) & VE == (ve if vm.fmt.shadow_acc_track_mask else 0)
        assert vm.fmt.is_mmio_spte(vm.fmt.shadow_mmio_value)
        vm.invalidate_range(BASE, BASE + 1)
        assert vm.spte(BASE) == ve
        assert vm.vcpu[0].write(BASE) is Outcome.SLOW_FAULT
        check(vm)


@pytest.mark.parametrize("name", ["ept_no_ad", "ept_ad"])
def test_the_compiled_form_of_a_later_helper_says_the_same(name, monkeypatch):
    fmt = Kernel.v6_18.spte_format(HARDWARE[name].format)
    fresh = fmt.make_spte(PFN, ad_type=TYPE_1).spte
    words = np.array([fresh, fmt.mark_spte_for_access_track(fresh), fresh & ~0b10, fmt.make_spte(PFN).spte], np.uint64)
    helpers = [fmt.is_accessed_spte, fmt.mmu_spte_age, fmt.spte_write_protect, fmt.spte_has_volatile_bits]
    plain = [each(helper, words) for helper in helpers]
    monkeypatch.setattr(arrays, "LARGE", 1)
    for helper, said in zip(helpers, plain, strict=True):
        assert np.array_equal(each(helper, words), said)


# ---- v6.4 to v6.8: the TDP MMU asks whether KVM uses A/D bits, for all roots -----------------------------------------

ASKS_FOR_ALL = (Kernel.v6_4, Kernel.v6_8)


def l2_written(kernel, hardware=PML, nested="tdp"):
    """A page that the nested guest has written. L1 never touched it."""
    vm = make_vm(hardware, kernel, nested=nested)
    vm.vcpu[0].write(BASE, l2=True)
    return vm


@EVERY
def test_enabling_loses_a_write_of_l2_straight_on_the_tdp_mmu(kernel):
    """CVE-2024-26990: D is cleared, W is not, and PML is off while L2 runs."""
    vm = l2_written(kernel)
    log(vm)
    vm.vcpu[0].write(BASE, l2=True)
    assert vm.fmt.is_writable_pte(vm.spte(BASE, l2=True))
    if kernel in ASKS_FOR_ALL:
        assert reported(vm) == [] and missed(vm) == [BASE]
    else:
        check(vm)
        assert reported(vm) == [BASE] and missed(vm) == []


@EVERY
def test_clear_loses_it_too_when_it_arms_a_single_page(kernel):
    """With INITIALLY_SET enabling protects nothing, so only KVM_CLEAR_DIRTY_LOG has touched the SPTE."""
    vm = l2_written(kernel)
    vm.enable_manual_dirty_log_protect(initially_set=True)
    log(vm)
    assert reported(vm) == list(range(BASE, BASE + 64))
    vm.clear_dirty_log(0, 0, 64, np.ones(64, bool))
    vm.vcpu[0].write(BASE, l2=True)
    assert missed(vm) == ([BASE] if kernel in ASKS_FOR_ALL else [])


@pytest.mark.parametrize(
    ("hardware", "nested"),
    [("pml", "ept"), ("pml", "ept without A/D"), ("pml_legacy", "tdp"), ("ept_ad", "tdp"), ("npt", "tdp")],
)
def test_the_legacy_mmu_and_hardware_without_pml_keep_it(hardware, nested):
    for kernel in ASKS_FOR_ALL:
        vm = l2_written(kernel, HARDWARE[hardware], nested)
        log(vm)
        vm.vcpu[0].write(BASE, l2=True)
        assert missed(vm) == [] and reported(vm) == [BASE]


def test_l1_is_not_concerned():
    vm = Vm(Hardware.ept(pml=True), Kernel.v6_4, nested="tdp")
    vm.set_user_memory_region(slot=0, base_gfn=BASE, npages=64)
    vm.vcpu[0].write(BASE)
    log(vm)
    vm.vcpu[0].write(BASE)
    assert reported(vm) == [BASE] and missed(vm) == []


# ---- v6.12: the quirk ------------------------------------------------------------------------------------------------


@EVERY
def test_without_slot_zap_all_a_delete_spares_the_other_slots(kernel):
    vm = make_vm(HARDWARE["ept_ad"], kernel)
    vm.set_user_memory_region(slot=1, base_gfn=0x1000, npages=1)
    if not kernel.zaps_by_slot:
        with pytest.raises(OSError, match="SLOT_ZAP_ALL") as refused:
            vm.disable_quirk_slot_zap_all()
        assert refused.value.errno == errno.EINVAL
        return
    for quirk in (True, False):
        for gfn in (BASE, 0x1000):
            vm.vcpu[0].write(gfn)
        flushes = vm.counters.flushes
        vm.set_user_memory_region(slot=0)
        assert vm.counters.flushes == flushes + 1 and vm.level(BASE) == 0
        assert vm.level(0x1000) == (not quirk)
        assert vm.vcpu[0].write(BASE) is Outcome.MMIO
        check(vm)
        vm.set_user_memory_region(slot=0, base_gfn=BASE, npages=64)
        vm.disable_quirk_slot_zap_all()


# ---- v6.13: recovery in place, and faults that are over --------------------------------------------------------------


@pytest.mark.parametrize("name", ["ept_no_ad", "ept_ad", "pml", "npt"])
def test_recovery_replaces_tables_in_place_with_one_flush_and_before_v6_13_it_zaps_each(name):
    for kernel in (Kernel.v6_12, Kernel.v6_13):
        vm = make_vm(HARDWARE[name], kernel, npages=1024, page_size="2M")
        for gfn in (BASE + 3, BASE + 700):
            vm.vcpu[0].write(gfn)
        log(vm)
        vm.vcpu[0].write(BASE + 3)
        assert (vm.level(BASE + 3), vm.level(BASE + 700)) == (1, 1)
        small, flushes = vm.spte(BASE), vm.counters.flushes
        log(vm, on=False)
        if kernel is Kernel.v6_12:
            assert vm.counters.flushes == flushes + 2 and vm.level(BASE) == vm.level(BASE + 700) == 0
            assert vm.vcpu[1].read(BASE + 9) is Outcome.SLOW_FAULT
        else:
            assert vm.counters.flushes == flushes + 1 and vm.level(BASE) == vm.level(BASE + 700) == 2
            assert vm.spte(BASE + 9) == small | 1 << 7
            assert vm.vcpu[1].read(BASE + 9) is Outcome.WALK
        check(vm)
        vm.vcpu[0].write(BASE + 9)
        log(vm)
        vm.vcpu[0].write(BASE + 9)
        assert reported(vm) == [BASE + 9]
        check(vm)


def test_a_recovered_page_may_not_be_executed_if_no_huge_page_may():
    vm = make_vm(HARDWARE["ept_ad"], Kernel.v6_13, npages=512, page_size="2M", nx_huge_pages=True)
    log(vm)
    vm.vcpu[0].fetch(BASE)
    log(vm, on=False)
    assert vm.level(BASE) == 2 and vm.fmt.hardware_rights(vm.spte(BASE)) == (True, True, False)
    vm.vcpu[0].fetch(BASE)
    assert vm.level(BASE) == 1


@pytest.mark.parametrize("name", ["pml", "pml_legacy"])
def test_of_two_faults_the_later_one_finds_its_access_allowed(name):
    """Made again, the SPTE would be the same since v6.13; before, W=1 and D=0."""
    for kernel in (Kernel.v6_12, Kernel.v6_13):
        vm = make_vm(HARDWARE[name], kernel)
        faults = []
        for vcpu in vm.vcpu:
            vcpu.attempt("read", BASE)
            faults.append(vcpu.fault)
        vm.run(faults[0])
        first = vm.spte(BASE)
        assert vm.run(faults[1]) is Outcome.SLOW_FAULT
        assert (vm.spte(BASE) == first) == (kernel is Kernel.v6_13)
        spurious = any(event.note == "spurious: allowed by now" for event in vm.log)
        assert spurious == (kernel is Kernel.v6_13 and name == "pml")


# ---- v6.15: ageing without mmu_lock ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HARDWARE)
def test_ageing_without_the_lock_ends_as_ageing_with_it(name):
    for age in ("clear_young", "clear_flush_young"):
        ended = []
        for kernel in (Kernel.v6_14, Kernel.v6_15):
            vm = make_vm(HARDWARE[name], kernel)
            vm.vcpu[0].write(BASE)
            assert [getattr(vm, age)(BASE, BASE + 2), getattr(vm, age)(BASE, BASE + 2)] == [True, False]
            assert not vm.test_young(BASE, BASE + 2) and vm.counters.flushes == 0
            ended.append((vm.spte(BASE), vm.spte(BASE + 1)))
        assert ended[0] == ended[1]


def test_ageing_takes_no_lock_and_a_failed_exchange_counts_as_young():
    vm = make_vm(HARDWARE["ept_no_ad"], Kernel.v6_15)
    vm.vcpu[0].read(BASE)
    vm.clear_young(BASE, BASE + 1)
    vm.vcpu[0].evict(BASE)
    vm.vcpu[0].read(BASE)  # restored: readable, young, not writable
    ageing = vm.start(ClearYoung(BASE, BASE + 1))
    vm.step(ageing)
    assert ageing.lock is None and not ageing.waits_for(vm, ageing.todo[0])
    vm.vcpu[1].write(BASE)  # the fast path comes in between
    writable = vm.spte(BASE)
    assert vm.run(ageing) is True
    assert vm.spte(BASE) == writable and vm.fmt.is_writable_pte(writable)
    assert "1 changed meanwhile" in str(vm.log[-1])
    with_lock = make_vm(HARDWARE["ept_no_ad"], Kernel.v6_14)
    assert with_lock.start(ClearYoung(BASE, BASE + 1)).wants_lock("kvm_age_gfn") == "write"


def test_a_bit_is_cleared_in_whatever_is_there_by_now():
    vm = make_vm(HARDWARE["npt"], Kernel.v6_15)
    vm.vcpu[0].read(BASE)
    ageing = vm.start(ClearYoung(BASE, BASE + 1))
    vm.step(ageing)
    log(vm)  # W goes in between, and stays away
    assert vm.run(ageing) is True
    assert not vm.fmt.is_writable_pte(vm.spte(BASE)) and not vm.test_young(BASE, BASE + 1)
    ageing = vm.start(ClearYoung(BASE, BASE + 1))
    vm.invalidate_range(BASE, BASE + 1)
    vm.run(ageing)
    assert vm.spte(BASE) == VE


# ---- v6.17: a signal during KVM_RESET_DIRTY_RINGS --------------------------------------------------------------------


def harvested(kernel, hardware=HARDWARE["ept_ad"], pages=(0, 1)):
    vm = Vm(hardware, kernel)
    vm.enable_dirty_ring(16384)
    vm.set_user_memory_region(slot=0, base_gfn=BASE, npages=256)
    log(vm)
    for page in pages:
        vm.vcpu[0].write(BASE + page)
    assert len(vm.vcpu[0].dirty_ring.harvest()) == len(pages)
    return vm


@EVERY
def test_a_signal_during_a_reset_loses_the_entries_that_were_gathered_last(kernel):
    vm = harvested(kernel, pages=(0, 1, 200))
    reset = vm.start(ResetDirtyRings())
    vm.step(reset)  # pages 0 and 1 are freed
    reset.signal_pending = True
    freed = vm.run(reset)
    vm.vcpu[0].write(BASE)
    if kernel in Kernel.releases[Kernel.releases.index(Kernel.v6_17) :]:
        assert freed == 2 and missed(vm) == [BASE]
        assert vm.reset_dirty_rings() == 1  # the rest; page 0 is in no ring
        assert vm.vcpu[0].dirty_ring.harvest() == []
    else:
        assert freed == 3 and missed(vm) == []
        assert vm.vcpu[0].dirty_ring.harvest() == [(0, 0)]


def test_a_signal_before_or_after_loses_nothing():
    vm = harvested(Kernel.v6_17)
    assert vm.run(ResetDirtyRings(signal_pending=True)) == 0
    assert vm.reset_dirty_rings() == 2
    vm.vcpu[0].write(BASE)
    assert missed(vm) == []
    earlier = harvested(Kernel.v6_17.with_(reset_stops_at_signal=False))
    assert earlier.run(ResetDirtyRings(signal_pending=True)) == 2


def test_a_reset_that_arms_before_it_stops_loses_nothing():
    vm = harvested(Kernel.v6_17.with_(reset_forgets_at_signal=False), pages=(0, 1, 200))
    reset = vm.start(ResetDirtyRings())
    vm.step(reset)
    reset.signal_pending = True
    assert vm.run(reset) == 2
    vm.vcpu[0].write(BASE)
    assert missed(vm) == [] and vm.vcpu[0].dirty_ring.harvest() == [(0, 0)]
