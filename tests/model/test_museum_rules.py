"""The rules that museum exhibits switch: each one on and off, in a run of a few calls."""

import pytest

from kvmbook import Hardware, Kernel, Outcome, SpteFormat, Vm
from kvmbook.model import (
    ChangePte,
    ClearYoung,
    GetDirtyLog,
    GuardAsksForW,
    OneTypeForAll,
    SavesW,
    WBringsD,
    ZapGfnRange,
    check,
    key_invariant,
)

BASE = 0x200
PML = Hardware.ept(pml=True)


def page(hardware, kernel, npages=1, **options):
    vm = Vm(hardware, kernel, vcpus=2, **options)
    vm.set_user_memory_region(slot=0, base_gfn=BASE, npages=npages)
    return vm


def log(vm, on=True):
    vm.set_user_memory_region(slot=0, base_gfn=BASE, npages=vm.memslots.slots[0, 0].npages, log_dirty_pages=on)


@pytest.mark.parametrize("early", [False, True])
def test_a_harvest_holds_the_lock_until_its_flush_only_where_it_is_told_to(early):
    vm = page(Hardware.shadow(), Kernel.v6_0.with_(harvest_flushes_before_unlock=early))
    log(vm)
    vm.vcpu[0].write(BASE)
    get = vm.start(GetDirtyLog(0))
    while get.todo[0] != "kvm_arch_flush_remote_tlbs_memslot":
        vm.step(get)
    assert get.lock == ("write" if early else None)
    assert vm.run(get).tolist() == [True] and get.lock is None


@pytest.mark.parametrize(("rules", "changes"), [(SpteFormat, True), (GuardAsksForW, False)])
def test_a_guard_that_asks_for_w_leaves_a_protected_page_mmu_writable(rules, changes):
    fmt = rules.with_masks(SpteFormat.shadow())
    spte = fmt.make_spte(0x4567).spte & ~2
    new, flush = fmt.spte_write_protect(spte, pt_protect=True)
    assert (new != spte) is flush is changes
    assert fmt.spte_write_protect(spte | 2, pt_protect=True) == SpteFormat.shadow().spte_write_protect(spte | 2, True)


@pytest.mark.parametrize(("plain", "spte"), [(False, "writable"), (True, "protected")])
def test_a_plain_store_wipes_out_what_came_between(plain, spte):
    vm = page(Hardware.npt(), Kernel.v6_0.with_(ages_by_plain_store=plain))
    vm.vcpu[0].read(BASE)
    log(vm)
    log(vm, on=False)
    age = vm.start(ClearYoung(BASE, BASE + 1))
    vm.step(age)
    assert age.lock == ("write" if plain else None)  # at once, or still to be stored
    vm.vcpu[0].write(BASE)  # the fast path gives W back, without the lock
    vm.run(age)
    assert vm.fmt.is_writable_pte(vm.spte(BASE)) == (spte == "writable")
    assert age.result


def test_an_ageing_that_nobody_meets_is_the_same_by_plain_store_on_both_sides():
    for hardware in (Hardware.ept(ad_bits=False), Hardware.npt(), Hardware.shadow()):
        words = []
        for plain in (False, True):
            vm = page(hardware, Kernel.v6_0.with_(ages_by_plain_store=plain))
            vm.vcpu[0].write(BASE)
            assert vm.clear_young(BASE, BASE + 1)
            words.append((vm.spte(BASE), vm.host.dirty, vm.counters.flushes))
        assert words[0] == words[1]


@pytest.mark.parametrize("first", [True, False])
def test_a_walk_that_lets_the_lock_go_flushes_first(first):
    vm = page(Hardware.ept(), Kernel.v6_0.with_(yields_after_flush=first), npages=3)
    vm.pages_per_step = 1
    for gfn in range(BASE, BASE + 3):
        vm.vcpu[0].read(gfn)
    zap = vm.start(ZapGfnRange(BASE, BASE + 3))
    vm.step(zap)
    assert zap.todo[0] == "tdp_mmu_iter_cond_resched" and zap.lock == "write" and not zap.active
    vm.step(zap)
    assert zap.lock is None and vm.counters.flushes == int(first)
    if first:
        key_invariant(vm)
    else:
        with pytest.raises(AssertionError, match="zapped: no flush"):
            key_invariant(vm)
    flushes = vm.counters.flushes
    vm.run(zap)
    assert vm.counters.flushes - flushes == (2 if first else 1)  # the fresh TLB has nothing of page 0
    assert not vm.vcpu[0].tlb.entries and not vm.invalidating
    check(vm)


def test_a_walk_at_once_yields_nowhere_and_an_invalidation_is_active_until_its_end():
    vm = page(Hardware.ept(), Kernel.v6_0, npages=3)
    vm.vcpu[0].read(BASE)
    change = vm.start(ChangePte(BASE, BASE + 1, vm.memslots.slots[0, 0], True))
    assert not change.active
    steps = []
    while change.todo:
        steps.append(change.todo[0])
        vm.step(change)
        assert change.active
    assert steps == list(ChangePte.steps) and vm.counters.flushes == 1


@pytest.mark.parametrize("rules", [SpteFormat, SavesW])
def test_w_that_is_saved_comes_back_with_a_read_also_to_a_guarded_page(rules):
    vm = page(Hardware.ept(ad_bits=False), Kernel.v6_0.with_(spte_rules=rules))
    vm.vcpu[0].read(BASE)
    fresh = vm.spte(BASE)
    vm.clear_young(BASE, BASE + 1)
    assert vm.fmt.is_access_track_spte(vm.spte(BASE))
    vm.track_guest_page_table(BASE)
    assert vm.vcpu[0].read(BASE) is Outcome.FAST_FAULT
    assert vm.fmt.is_writable_pte(vm.spte(BASE)) == (rules is SavesW)
    fmt = rules.with_masks(SpteFormat.ept(ad_bits=False))
    assert fmt.restore_acc_track_spte(fmt.mark_spte_for_access_track(fresh)) == fresh & ~(2 * (rules is SpteFormat))


@pytest.mark.parametrize("rules", [SpteFormat, WBringsD])
def test_w_brings_d_also_to_an_spte_that_is_made_over_one_with_w(rules):
    fmt = rules.with_masks(SpteFormat.ept())
    spte = fmt.make_spte(0x4567).spte
    assert fmt.is_dirty_spte(spte)
    assert fmt.is_dirty_spte(fmt.make_spte(0x4567, old_spte=spte).spte) == (rules is WBringsD)


@pytest.mark.parametrize("nested", ["ept", "tdp"])
def test_pml_that_stays_on_notes_the_nested_guests_own_address(nested):
    kernel = Kernel.v6_0.with_(pml_logs_nested=True)
    reports = []
    for rules in (OneTypeForAll, SpteFormat):
        vm = page(PML, kernel.with_(spte_rules=rules), 2, nested=nested, nested_base_gfn=1)
        vm.vcpu[0].read(BASE + 1, l2=True)
        log(vm)
        vm.vcpu[0].write(BASE + 1, l2=True)
        reports.append((vm.missed_dirty(0).tolist(), vm.get_dirty_log(0).tolist()))
    assert reports == [([BASE + 1], [True, False]), ([], [False, True])]  # once page 0 is named in vain
    off = page(PML, Kernel.v6_0, 2, nested=nested, nested_base_gfn=1)
    log(off)
    off.vcpu[0].write(BASE + 1, l2=True)
    assert off.vcpu[0].pml == [] and off.get_dirty_log(0).tolist() == [False, True]
