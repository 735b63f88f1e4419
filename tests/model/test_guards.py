"""Why the fast path asks for MMU-writable, and why guarding a page table flushes under the lock: each rule switched off."""

import pytest

from kvmbook import Hardware, Kernel, SpteFormat, Vm
from kvmbook.model import Outcome, TdpGuardAsksForW, TrackGuestPageTable, check, key_invariant

BASE = 0x200


def read_page(kernel, *, aged=True):
    """A page that vCPU 0 has read, on a CPU without A/D bits."""
    vm = Vm(Hardware.ept(ad_bits=False), kernel, vcpus=2)
    vm.set_user_memory_region(slot=0, base_gfn=BASE, npages=1)
    vm.vcpu[0].read(BASE)
    if aged:
        vm.clear_young(BASE, BASE + 1)
    return vm


@pytest.mark.parametrize(("asks", "how"), [(True, Outcome.EMULATED), (False, Outcome.FAST_FAULT)])
def test_a_fast_path_that_does_not_ask_writes_an_aged_page_table(asks, how):
    vm = read_page(Kernel.v6_0.with_(fast_path_asks_mmu_writable=asks), aged=False)
    vm.track_guest_page_table(BASE)
    vm.clear_young(BASE, BASE + 1)
    assert vm.vcpu[1].write(BASE) is how
    if asks:
        check(vm)
    else:
        with pytest.raises(AssertionError, match="W needs MMU-writable"):
            check(vm)


@pytest.mark.parametrize("under_lock", [True, False])
def test_a_guard_that_unlocks_before_its_flush_breaks_the_key_invariant(under_lock):
    vm = read_page(Kernel.v6_0.with_(guard_flushes_before_unlock=under_lock))
    guard = vm.start(TrackGuestPageTable(BASE))
    vm.step(guard)
    assert guard.lock == ("write" if under_lock else None)
    if under_lock:
        key_invariant(vm)
    else:
        with pytest.raises(AssertionError, match="vCPU0 may write gfn 0x200"):
            key_invariant(vm)
    vm.run(guard)
    key_invariant(vm)


def test_a_guard_that_asks_for_w_misses_a_flush_that_enabling_still_owes():
    """Between the pass of enabling and its flush W is 0 already."""
    for rules, how in ((SpteFormat, Outcome.EMULATED), (TdpGuardAsksForW, Outcome.HIT)):
        vm = read_page(Kernel.v6_0.with_(spte_rules=rules), aged=False)
        enable = vm.start(vm.user_memory_region(slot=0, base_gfn=BASE, npages=1, log_dirty_pages=True))
        while enable.todo[0] != "flush_always":
            vm.step(enable)
        vm.track_guest_page_table(BASE)
        assert vm.vcpu[0].write(BASE) is how
