"""Every release under every flush rule: the searches say which lose a write. Each release has its own SPTE rules."""

import functools

import pytest
from conftest import HARDWARE

from kvmbook import FlushPolicy, Kernel
from kvmbook.model import ClearYoung
from kvmbook.search import AnyNumber, Cells, Grain, explore, plain_search, smallest_vm

OLD = Kernel.releases[: Kernel.releases.index(Kernel.v6_13)]
NEW = Kernel.releases[Kernel.releases.index(Kernel.v6_13) :]
IF_CHANGED, IF_MMU_WRITABLE = FlushPolicy.IF_CHANGED, FlushPolicy.IF_MMU_WRITABLE

# Which releases lose a write if the unconditional flush is taken out again, and the flush depends on the SPTEs met.
LOSE = {
    ("ept_no_ad", IF_CHANGED): Kernel.releases,
    ("ept_no_ad_legacy", IF_CHANGED): Kernel.releases,
    ("pml", IF_CHANGED): OLD,  # two vCPUs and make_spte()'s D=0, until W always brings D
    ("pml", IF_MMU_WRITABLE): OLD,
    ("pml_legacy", IF_CHANGED): NEW,  # on the rmap side the helpers no longer ask for a flush
    ("pml_legacy", IF_MMU_WRITABLE): NEW,
    ("ept_ad_legacy", IF_CHANGED): NEW,
    ("npt_legacy", IF_CHANGED): NEW,
    ("shadow", IF_CHANGED): NEW,
}


@functools.cache
def cells(name, release):
    return Cells(HARDWARE[name], release, 1, Grain.FAULT)


def losing(name, rule=None):
    """The releases that lose a write, with their own flush rule or with ``rule``."""
    return tuple(
        release
        for release in Kernel.releases
        if not AnyNumber(cells(name, release).with_flush(rule or release.flush))
        .search(stop_at_loss=True)
        .verdict()
        .safe
    )


@pytest.mark.parametrize("name", HARDWARE)
def test_since_v6_0_each_release_is_safe_on_every_hardware_for_any_number_of_pages_and_vcpus(name):
    assert losing(name) == ((Kernel.v5_19,) if Kernel.v5_19 in LOSE.get((name, IF_CHANGED), ()) else ())


@pytest.mark.parametrize("name", HARDWARE)
def test_without_the_unconditional_flush_these_releases_lose_a_write(name):
    assert losing(name, IF_CHANGED) == LOSE.get((name, IF_CHANGED), ())


@pytest.mark.parametrize("name", ["pml", "pml_legacy"])
def test_the_flush_by_mmu_writable_loses_a_write_with_pml_only(name):
    assert losing(name, IF_MMU_WRITABLE) == LOSE[name, IF_MMU_WRITABLE]


@pytest.mark.parametrize("name", HARDWARE)
def test_the_search_of_one_page_and_two_vcpus_says_the_same_of_v6_13(name):
    for rule in FlushPolicy:
        found = explore(HARDWARE[name], Kernel.v6_13.with_(flush=rule), vcpus=2, grain=Grain.FAULT)
        loses = rule is FlushPolicy.NEVER or Kernel.v6_13 in LOSE.get((name, rule), ())
        assert found.safe is not loses
        assert loses or found.trace is None
        assert not loses or found.replay().missed_dirty(0).size == 1


@pytest.mark.parametrize("name", HARDWARE)
def test_cut_by_step_each_release_is_safe_with_one_vcpu(name):
    for kernel in (Kernel.v6_4, Kernel.v6_10, Kernel.v6_18):
        assert explore(HARDWARE[name], kernel).safe


def test_since_v6_13_reclaim_alone_leads_to_the_seeds_bug():
    """clear_flush_young() does not flush any more, so a write is lost even if nobody calls clear_young()."""
    no_ad = HARDWARE["ept_no_ad"]
    assert explore(no_ad, Kernel.v6_10.with_(flush=IF_CHANGED), without=["ages"]).safe
    found = explore(no_ad, Kernel.v6_13.with_(flush=IF_CHANGED), without=["ages"])
    assert len(found.trace) == 15
    assert "ages and flushes" in {action.what for action in found.trace}


@pytest.mark.parametrize("name", ["ept_no_ad", "ept_no_ad_legacy", "npt"])
def test_ageing_without_the_lock_loses_nothing_wherever_its_exchange_falls(name):
    """From a mapped page, with the two steps of one ageing in flight: every interleaving with all others."""
    for rule in (FlushPolicy.ALWAYS, IF_CHANGED):
        vm = smallest_vm(HARDWARE[name], Kernel.v6_15.with_(flush=rule))
        gfn = vm.memslots.slots[0, 0].base_gfn
        vm.vcpu[0].read(gfn)
        vm.start(ClearYoung(gfn, gfn + 1))
        found = plain_search(vm, without=["ages", "ages and flushes", "disables"])
        assert (found.trace is None) == (rule is FlushPolicy.ALWAYS or name == "npt")
