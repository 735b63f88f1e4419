"""Chapter 06's scenes: what a host is told, and what it costs."""

import itertools

import pytest

from kvmbook import Hardware, Kernel, Vm
from kvmbook.model import Outcome
from kvmbook.scenes import AGED_ON, CALLS, USES, WAYS_TO_ASK, age_touch_ask, measure

NO_AD, AD = AGED_ON


@pytest.mark.parametrize("hardware", AGED_ON)
@pytest.mark.parametrize("use", ["vCPU 0 reads", "vCPU 0 writes"])
def test_a_use_through_the_tlb_makes_no_page_young_and_a_flush_makes_it_visible(hardware, use):
    quiet, flushing = (age_touch_ask(hardware, call, use) for call in ("clear_young", "clear_flush_young"))
    assert (quiet.used, quiet.young, quiet.flushes, quiet.faults) == (True, False, 0, 0)
    assert quiet.moments[2].answered == "TLB"
    assert (flushing.used, flushing.young, flushing.flushes) == (True, True, 1)
    assert flushing.faults == (hardware == NO_AD)


def test_the_same_answers_are_wrong_with_a_bits_and_without():
    for call, use in itertools.product(CALLS, USES):
        told = [age_touch_ask(hardware, call, use) for hardware in AGED_ON]
        assert told[0].young == told[1].young and told[0].used == told[1].used


def test_r_and_x_are_saved_and_come_back_and_w_comes_back_with_a_write_only():
    fmt = AGED_ON[NO_AD].format
    read, written = (age_touch_ask(NO_AD, "clear_flush_young", f"vCPU 0 {kind}s").words for kind in ("read", "write"))
    fresh, aged = read[:2]
    assert aged ^ fresh == 0b111 | 0b101 << 54 and fmt.is_access_track_spte(aged)
    assert read[2] == fresh ^ 0b10 == fmt.spte_write_protect(fresh).spte
    assert written[2] == fresh


def test_another_vcpus_read_leaves_a_stale_writable_entry_on_an_spte_that_is_not_tracked():
    seen = age_touch_ask(NO_AD, "clear_young", "vCPU 1 reads")
    assert seen.young and seen.moments[-1].stale and seen.moments[-1].spte == "write-protected"


def test_asking_without_ageing_says_young_of_a_page_that_nobody_uses():
    assert age_touch_ask(NO_AD, "test_young", "nobody").young
    assert not age_touch_ask(NO_AD, "clear_young", "nobody").young


def test_the_log_finds_writes_only_and_ageing_finds_all_after_a_flush():
    hardware, read, written = AGED_ON[NO_AD], range(24), range(24, 32)
    found = {way: measure(way, hardware, read, written) for way in WAYS_TO_ASK}
    assert [m.found for m in found.values()] == [8, 0, 32, 32]
    assert [m.flushes for m in found.values()] == [1, 0, 1, 64]
    assert {m.used for m in found.values()} == {32}
    assert measure("clear_flush_young", AGED_ON[AD], read, written).faults == 0


def test_a_nested_guests_aged_page_is_made_anew_with_w_by_a_read():
    vm = Vm(Hardware.ept(), Kernel.v6_0, nested="ept without A/D")
    vm.set_user_memory_region(slot=0, base_gfn=0x200, npages=1)
    vm.vcpu[0].read(0x200, l2=True)
    vm.clear_flush_young(0x200, 0x201)
    assert vm.fmt.is_access_track_spte(vm.spte(0x200, l2=True))
    assert vm.vcpu[0].read(0x200, l2=True) is Outcome.SLOW_FAULT
    assert vm.fmt.is_writable_pte(vm.spte(0x200, l2=True))


def test_one_use_of_a_huge_page_makes_all_of_it_young():
    vm = Vm(AGED_ON[NO_AD], Kernel.v6_0, page_size="2M")
    vm.set_user_memory_region(slot=0, base_gfn=0x200, npages=512)
    vm.vcpu[0].read(0x200)
    vm.clear_flush_young(0x200, 0x400)
    assert not vm.test_young(0x3FF, 0x400)
    vm.vcpu[0].read(0x200)
    assert vm.test_young(0x3FF, 0x400)
