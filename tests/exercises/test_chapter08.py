"""Chapter 08's checks: right answers pass, wrong, lazy and cheating ones get a hint that helps."""

import pytest

from kvmbook import FlushPolicy, Hardware
from kvmbook.exercises import ch08

NO_AD = Hardware.ept(ad_bits=False)
PLAN = ["kvm_mmu_update_cpu_dirty_logging", "clear_dirty_rmap", "write_protect_rmap", "flush_always"]


class Rule:
    """A flush rule that asks the same in both passes."""

    unconditional = False

    def __init__(self, asks):
        self.asks = asks

    def after_write_protect(self, fmt, old, new, answer):
        return self.asks(fmt, old, answer)

    after_clear_dirty = after_write_protect


def changed(fmt, old, answer):
    return answer


def changed_or_tracked(fmt, old, answer):
    return answer or fmt.is_access_track_spte(old)


def mmu_writable(fmt, old, answer):
    return fmt.is_mmu_writable_spte(old)


def writable_with_ad_bits(fmt, old, answer):
    if fmt.spte_ad_enabled(old):
        return fmt.is_writable_pte(old)
    return fmt.is_mmu_writable_spte(old)


def blind_to_old_and_clean(fmt, old, answer):
    """As the one before, but for leaves that no scene of the check has: made twice, and aged after that."""
    seen = fmt.is_accessed_spte(old) or fmt.is_dirty_spte(old)
    return writable_with_ad_bits(fmt, old, answer) and (seen or not fmt.spte_ad_enabled(old))


def log(kvm, on=True):
    kvm.set_user_memory_region(slot=0, base_gfn=0x200, npages=64, log_dirty_pages=on)


def all_bits(kvm):
    kvm.enable_manual_dirty_log_protect(initially_set=True)
    log(kvm)


def cleared(kvm):
    all_bits(kvm)
    kvm.clear_dirty_log(0, 0, 64, [True] * 64)


def cleared_after_a_second_try(kvm):
    """Right, and a roundabout way."""
    log(kvm)
    log(kvm, on=False)
    all_bits(kvm)
    kvm.clear_dirty_log(0, 0, 64, kvm.get_dirty_log(0))


def without_initially_set(kvm):
    kvm.enable_manual_dirty_log_protect()
    log(kvm)
    kvm.clear_dirty_log(0, 0, 64, [True] * 64)


def made_anew(kvm):
    kvm.set_user_memory_region(slot=0, npages=0)
    log(kvm)


def by_another_slot(kvm):
    """Deleting any slot zaps all tables in v5.19."""
    kvm.set_user_memory_region(slot=1, base_gfn=0x1000, npages=64)
    kvm.set_user_memory_region(slot=1, npages=0)
    log(kvm)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (PLAN, "Yes."),
        ("flush_always", "No: give the names of the steps as a list of strings"),
        (["flush"], "No: 'flush' is no step of kvm_mmu_slot_apply_flags(); mind the spelling"),
        (["split_huge_tdp_sptes", *PLAN], "No: 'split_huge_tdp_sptes' belongs to the eager split"),
        (["split_huge_rmap_sptes", *PLAN], "No: 'split_huge_rmap_sptes' belongs to the eager split"),
        ([*PLAN[:1], "clear_dirty_tdp"], "No: 'clear_dirty_tdp' visits the TDP MMU's tables"),
        ([*PLAN[:2], "flush_if_owed"], "No: 'flush_if_owed' flushes only if a pass asked for it"),
        (["zap_collapsible_rmap_sptes"], "No: 'zap_collapsible_rmap_sptes' belongs to switching"),
        ([*PLAN, "flush_always"], "No: 'flush_always' is done once here"),
        (PLAN[1:], "No: a step is missing: the CPU must be told"),
        ([PLAN[0], *PLAN[2:]], "No: a step is missing: the CPU reports a write"),
        ([*PLAN[:2], PLAN[3]], "No: a step is missing: D reports writes to 4K"),
        (PLAN[:3], "No: a step is missing: which step has v6.0 put"),
        ([PLAN[1], PLAN[0], *PLAN[2:]], "No: these are the steps, but not in this order: 'clear_dirty_rmap'"),
    ],
)
def test_the_plan(plan, said, capsys):
    ch08.check_08_1(plan)
    assert capsys.readouterr().out.startswith(said)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (Rule, "No: pass an object"),
        (FlushPolicy.NEVER, f"No: {NO_AD.name}: a write is missed if the pages were aged\n"),
        (Rule(changed), f"No: {NO_AD.name}: a write is missed if the pages were aged\n"),
        (
            Rule(changed_or_tracked),
            f"No: {NO_AD.name}: a write is missed if the pages were aged, and read again by vCPU 1",
        ),
        (FlushPolicy.ALWAYS, f"No: {NO_AD.name}: your rule flushes, although the only mapped page is read-only"),
        (FlushPolicy.IF_MMU_WRITABLE, "No: NPT: your rule flushes when logging was"),
        (Rule(mmu_writable), "No: NPT: your rule flushes when logging was"),
        (
            Rule(blind_to_old_and_clean),
            "No: NPT: chapter 10's search finds a run under your rule that loses a write",
        ),
        (Rule(writable_with_ad_bits), "Yes."),
    ],
)
def test_a_rule_of_ones_own(rule, said, capsys):
    ch08.check_08_2(rule)
    assert capsys.readouterr().out.startswith(said)


@pytest.mark.parametrize(
    ("begin", "said"),
    [
        ([], "No: give a function of kvm"),
        (lambda kvm: None, "No: if the pages were read, slot 0 does not log"),
        (log, "No: if the pages were aged, 32 writes are missed. Which call flushes by bits"),
        (lambda kvm: [log(kvm), kvm.get_dirty_log(0)], "No: if the pages were aged, 32 writes are missed"),
        (lambda kvm: [log(kvm, on) for on in (True, False, True)], "No: if the pages were aged, 32 writes are missed"),
        (without_initially_set, "No: if the pages were aged, 32 writes are missed"),
        (all_bits, "No: if the pages were read, the report names 32 pages that nobody has written since"),
        (made_anew, "No: if the pages were read, 64 mapped pages are dropped"),
        (by_another_slot, "No: if the pages were read, 64 mapped pages are dropped"),
        (lambda kvm: kvm.kvm_flush_remote_tlbs(), "No: your answer raised AttributeError"),
        (
            lambda kvm: [kvm.clear_dirty_log(0, 0, 64, [True] * 64), log(kvm)],
            "No: your answer raised FileNotFoundError",
        ),
        (cleared, "Yes."),
        (cleared_after_a_second_try, "Yes."),
    ],
)
def test_a_host_that_cannot_be_patched(begin, said, capsys):
    ch08.check_08_3(begin)
    assert capsys.readouterr().out.startswith(said)
