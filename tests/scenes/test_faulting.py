"""Chapter 07's runs: which way an access goes, with which lock, and what a mark in the wrong order costs."""

import pytest

from kvmbook import Hardware, Outcome
from kvmbook.scenes import (
    ACCESSES,
    FAULTS_ON,
    MEANWHILE,
    PAGES_NOW,
    endings,
    exchanges_that_fail,
    follow,
    harvest_before,
    two_faults_at,
)
from kvmbook.scenes.faulting import FAST, USER_SPACE, VCPU_1

NO_AD, AD, SHADOW = FAULTS_ON


@pytest.mark.parametrize(
    ("hardware", "page", "kind", "said"),
    [
        (NO_AD, "write-protected", "write", "fast → walk"),
        (NO_AD, "aged", "read", "fast → walk"),
        (AD, "aged", "read", "walk"),
        (NO_AD, "not mapped", "read", "fast → slow (read) → walk"),
        (AD, "not mapped", "write", "slow (read) → walk"),
        (NO_AD, "2M, write-protected", "write", "fast → slow (read) → walk"),
        (SHADOW, "write-protected", "write", "slow (write) → walk"),
        (SHADOW, "guest page table", "write", "emulated"),
        (NO_AD, "2M, write-protected", "read", "walk"),
        (AD, "just written", "write", "hit"),
    ],
)
def test_the_way_of_an_access(hardware, page, kind, said):
    assert str(follow(hardware, page, kind)) == said


def test_the_fast_path_holds_no_lock_and_the_slow_path_holds_it_from_mark_to_store():
    for hardware in FAULTS_ON:
        for page, meanwhile in ((page, who) for page in PAGES_NOW for who in MEANWHILE):
            for step in follow(hardware, page, "write", meanwhile).steps:
                wants = "write" if hardware == SHADOW else "read"
                assert step.lock == (wants if step.step in ("make_spte", "unfreeze", "set_spte") else "")


def test_every_access_of_the_panel_ends_and_no_write_is_lost():
    for kind, page in ACCESSES.values():
        for hardware, meanwhile in ((hardware, who) for hardware in FAULTS_ON for who in MEANWHILE):
            path = follow(hardware, page, kind, meanwhile)
            assert path.results[-1] in (Outcome.HIT, Outcome.WALK, Outcome.EMULATED) and not path.lost
            assert kind == "read" or path.steps[-1].bit


def test_who_comes_in_between_makes_an_exchange_fail_or_a_fault_retry():
    spurious = follow(NO_AD, "write-protected", "write", MEANWHILE[1])
    assert [step.said for step in spurious.steps][-3:-1] == ["the SPTE changed meanwhile: again", "spurious"]
    assert follow(NO_AD, "not mapped", "write", MEANWHILE[2]).results[0] is Outcome.RETRY
    assert follow(NO_AD, "aged", "read", MEANWHILE[2]).ways == ("fast", "slow", "walk")


def test_all_endings_of_one_fault():
    found = endings("write")
    assert [sum(end.outcome is outcome for end in found) for outcome in (
        Outcome.FAST_FAULT, Outcome.SLOW_FAULT, Outcome.EMULATED, Outcome.MMIO, Outcome.RETRY,
    )] == [3, 2, 1, 3, 4]  # fmt: skip
    assert {end.said for end in endings("read")} - {end.said for end in found} == {"readable"}


def test_only_a_harvest_between_an_early_mark_and_the_exchange_loses_the_write():
    for step in FAST:
        for comes in ((USER_SPACE,), (VCPU_1, USER_SPACE)):
            assert not harvest_before(step, comes=comes).lost
            assert harvest_before(step, True, comes).lost == (step == "fast_pf_fix_direct_spte")


def test_a_fast_fault_goes_slow_when_its_fifth_exchange_has_failed():
    said, then = zip(*exchanges_that_fail(), strict=True)
    assert set(said) == {"the SPTE changed meanwhile: again"}
    assert then == ("fast_page_fault",) * 4 + ("kvm_faultin_pfn",)


def test_of_two_slow_faults_one_retries_and_in_the_legacy_mmu_one_waits():
    vm = two_faults_at("set_spte", Hardware.ept(ad_bits=False))
    assert [vm.run(vcpu.fault) for vcpu in vm.vcpu] == [Outcome.SLOW_FAULT, Outcome.RETRY]
    with pytest.raises(ValueError, match="make_spte must wait"):
        two_faults_at("set_spte", Hardware.ept(ad_bits=False, tdp_mmu=False))
