"""What holds for any number of pages and vCPUs, against VMs of 1 to 4 of each; and all flush rules."""

import pytest
from conftest import HARDWARE

from kvmbook import FlushPolicy, Kernel
from kvmbook.model import SPTE_TDP_AD_DISABLED_MASK
from kvmbook.search import (
    BITS,
    BLANK_VIEW,
    AnyNumber,
    BitRule,
    Cells,
    Grain,
    Verdict,
    all_rules,
    any_number,
    as_bits,
    cost,
    explore,
    least,
    leaves_met,
    pages_seen,
    sound_rules,
    space_of,
)

NO_AD, A_D, PML = "EPT without A/D", "A/D, logging by W", "EPT A/D with PML, TDP MMU"
LOSES = {NO_AD: {"NEVER", "IF_CHANGED"}, A_D: {"NEVER"}, PML: {"NEVER", "IF_CHANGED", "IF_MMU_WRITABLE"}}
# The legacy MMU flushes when a fault makes an SPTE again with D clear: there the PML hole is not.
MODES = {
    "ept_no_ad": NO_AD, "ept_no_ad_legacy": NO_AD, "ept_ad": A_D, "ept_ad_legacy": A_D, "pml": PML, "pml_legacy": A_D,
    "npt": A_D, "npt_legacy": A_D, "shadow": A_D,
}  # fmt: skip


@pytest.mark.parametrize("policy", FlushPolicy)
@pytest.mark.parametrize("name", MODES)
def test_the_verdicts_for_any_number_of_pages_and_vcpus(name, policy):
    verdict = any_number(HARDWARE[name], Kernel.v5_19.with_(flush=policy))
    assert verdict.safe == (policy.name not in LOSES[MODES[name]])


def concrete(name, policy, grain, pages, vcpus):
    """(control, word, kinds of view) of any page in the reachable states of one VM."""
    space = space_of(HARDWARE[name], Kernel.v5_19.with_(flush=policy), pages, vcpus, grain)
    seen = set()
    for control, page in pages_seen(space):
        word, views = space.pairs.steps.parts(page)
        seen.add((control, word, frozenset(views) - {BLANK_VIEW}))
    return seen


def abstract(name, policy, grain, most):
    """The same of the abstraction, up to ``most`` kinds at a time."""
    reach = AnyNumber(Cells(HARDWARE[name], Kernel.v5_19.with_(flush=policy), 1, grain)).search()
    return {(*node, kinds) for node in reach.found for kinds in reach.sets(node) if len(kinds) <= most}


def test_every_page_of_a_small_vm_is_in_the_abstraction():
    """That is what "safe for any number" rests on."""
    for grain, names, sizes in (
        (Grain.ACCESS, ("ept_no_ad", "npt", "pml"), [(pages, vcpus) for pages in (1, 2, 3, 4) for vcpus in (1, 2)]),
        (Grain.FAULT, ("ept_no_ad_legacy", "pml", "npt"), [(1, 1), (1, 2), (2, 2), (3, 1), (4, 1)]),
        (Grain.FAULT, ("ept_no_ad",), [(1, 3), (2, 3)]),
    ):
        for name in names:
            everything = abstract(name, FlushPolicy.IF_CHANGED, grain, 99)
            for size in sizes:
                assert concrete(name, FlushPolicy.IF_CHANGED, grain, *size) <= everything


@pytest.mark.parametrize("policy", FlushPolicy)
@pytest.mark.parametrize("name", ["ept_no_ad", "npt", "shadow"])
def test_cut_by_access_and_without_pml_it_is_exact_from_two_pages_and_two_vcpus_on(name, policy):
    everything = abstract(name, policy, Grain.ACCESS, 99)
    for size in ((2, 2), (3, 2), (4, 2), (2, 3)):
        assert concrete(name, policy, Grain.ACCESS, *size) == everything
    assert concrete(name, policy, Grain.ACCESS, 1, 2) < everything  # nobody else makes a flush


def test_four_vcpus_add_nothing():
    everything = abstract("ept_no_ad", FlushPolicy.IF_CHANGED, Grain.ACCESS, 99)
    assert concrete("ept_no_ad", FlushPolicy.IF_CHANGED, Grain.ACCESS, 2, 4) == everything


@pytest.mark.parametrize("policy", FlushPolicy)
@pytest.mark.parametrize("name", ["ept_no_ad", "ept_ad", "npt", "pml", "shadow"])
def test_each_verdict_that_loses_comes_with_a_run(name, policy):
    kernel = Kernel.v5_19.with_(flush=policy)
    assert any_number(HARDWARE[name], kernel).safe == explore(HARDWARE[name], kernel, 1, 2, Grain.FAULT).safe


def test_half_done_faults_are_refused():
    with pytest.raises(ValueError, match="too many kinds"):
        any_number(HARDWARE["npt"], Kernel.v6_0, Grain.STEP)


def test_the_number_of_abstract_states():
    assert any_number(HARDWARE["ept_no_ad"], Kernel.v6_0) == Verdict(True, 2204)


# ---- flush rules -----------------------------------------------------------------------------------------------------


def test_a_rule_is_asked_of_one_word_at_a_time():
    fmt = HARDWARE["ept_no_ad"].format
    fresh = fmt.make_spte(5, ad_type=SPTE_TDP_AD_DISABLED_MASK).spte
    rule = as_bits(HARDWARE["ept_no_ad"], FlushPolicy.IF_CHANGED)
    protected = fmt.spte_write_protect(fresh).spte
    assert rule.after_write_protect(fmt, fresh, protected, True) is True
    assert rule.after_write_protect(fmt, protected, protected, False) is False


@pytest.mark.parametrize(("name", "kinds"), [("ept_no_ad", 3), ("pml", 4), ("npt", 8)])
def test_the_passes_meet_only_a_few_kinds_of_leaf(name, kinds):
    met = leaves_met(HARDWARE[name])
    assert len(met) == kinds and all(leaf.before & 1 << BITS.index("MW") for leaf in met)


def test_what_is_no_rule_over_bits_is_told():
    with pytest.raises(ValueError, match="an unconditional rule is not one over bits"):
        as_bits(HARDWARE["npt"], FlushPolicy.ALWAYS)


@pytest.mark.parametrize("name", ["ept_no_ad", "pml"])
def test_without_ad_and_with_pml_only_flushing_for_every_leaf_is_sound(name):
    rules = all_rules(HARDWARE[name])
    sound = sound_rules(HARDWARE[name], rules)
    assert sound == [rules[-1]]
    if name == "ept_no_ad":
        assert sound == [as_bits(HARDWARE[name], FlushPolicy.IF_MMU_WRITABLE)]
    assert as_bits(HARDWARE[name], FlushPolicy.IF_CHANGED) not in sound


def test_where_w_tells_the_old_rule_is_the_least_sound_one():
    old = as_bits(HARDWARE["npt"], FlushPolicy.IF_CHANGED)
    kinds = leaves_met(HARDWARE["npt"])
    less = [BitRule(old.kinds - {kind}) for kind in old.kinds]
    more = [BitRule(old.kinds | {kind}) for kind in kinds if kind not in old.kinds]
    assert sound_rules(HARDWARE["npt"], [old, *less]) == [old]
    assert sound_rules(HARDWARE["npt"], more) == more
    assert len(more) == 4 and least([*more, old]) == [old]


def test_a_workload_counts_flushes_and_misses_and_cannot_tell_sound_from_lucky():
    hardware = HARDWARE["ept_no_ad"]
    costs = {policy: cost(hardware, policy) for policy in FlushPolicy}
    assert (
        costs[FlushPolicy.NEVER].flushes == 0
        and costs[FlushPolicy.NEVER].missed > costs[FlushPolicy.IF_CHANGED].missed > 0
    )
    assert costs[FlushPolicy.IF_MMU_WRITABLE].missed == costs[FlushPolicy.ALWAYS].missed == 0
    assert costs[FlushPolicy.IF_MMU_WRITABLE].flushes < costs[FlushPolicy.ALWAYS].flushes
    lucky = [rule for rule in all_rules(hardware)[:-1] if cost(hardware, rule).missed == 0]
    assert lucky and not sound_rules(hardware, lucky)


def test_the_kinds_at_a_node_are_those_of_all_its_sets():
    found = AnyNumber(Cells(HARDWARE["ept_no_ad"], Kernel.v6_0, 1, Grain.ACCESS)).search()
    for node in found.found:
        assert {*found.kinds_at(node), BLANK_VIEW} == {BLANK_VIEW}.union(*found.sets(node))
