"""The fast searches against the plain one, which drives whole VMs; the golden table; and the two verdicts that surprise."""

import random
import sys

import golden
import numpy as np
import pytest
from conftest import HARDWARE

from kvmbook import FlushPolicy, Kernel
from kvmbook.model import check
from kvmbook.search import (
    AnyNumber,
    BitRule,
    Cells,
    Grain,
    PageSteps,
    Pagewise,
    Pairs,
    Search,
    Space,
    act,
    any_number,
    control_of,
    count_any_size,
    count_states,
    explore,
    leaves_met,
    plain_search,
    possible,
    search_pagewise,
    smallest_vm,
    space_of,
    view_of,
    word_of,
)

KINDS = ["ept_no_ad", "ept_no_ad_legacy", "ept_ad", "pml", "pml_legacy", "npt", "npt_legacy", "shadow"]
LITTLE = ("forgets", "ages and flushes", "disables", "exits")  # what the largest comparison leaves out, for time


def kernel(policy):
    return Kernel.v5_19.with_(flush=FlushPolicy[policy])


def found(result):
    return result.states, result.transitions, result.depth, result.trace and len(result.trace)


def compare(name, policy, pages, vcpus, grain, without=()):
    """The plain search, the fast one and the count agree."""
    hardware = HARDWARE[name]
    plain = plain_search(smallest_vm(hardware, kernel(policy), pages, vcpus, grain), grain, without)
    fast = explore(hardware, kernel(policy), pages, vcpus, grain, without)
    assert found(fast) == found(plain)
    count = count_states(space_of(hardware, kernel(policy), pages, vcpus, grain, without))
    assert (count.states, count.safe) == (plain.states, plain.trace is None)
    return fast


@pytest.mark.parametrize("policy", FlushPolicy.__members__)
@pytest.mark.parametrize("name", KINDS)
def test_one_page_and_one_vcpu_cut_by_step_equal_the_plain_search(name, policy):
    result = compare(name, policy, 1, 1, Grain.STEP)
    vm = result.replay()
    assert vm.missed_dirty(0).tolist() == ([] if result.safe else [0x200])
    if result.safe:
        check(vm)


@pytest.mark.parametrize("name", ["ept_no_ad", "npt", "pml"])
def test_two_vcpus_equal_the_plain_search(name):
    compare(name, "IF_CHANGED", 1, 2, Grain.ACCESS)


@pytest.mark.parametrize("name", ["ept_no_ad", "npt"])
def test_two_pages_equal_the_plain_search(name):
    compare(name, "IF_CHANGED", 2, 1, Grain.ACCESS, without=LITTLE)


@pytest.mark.parametrize("name", ["ept_no_ad", "npt", "shadow"])
def test_two_of_both_equal_the_plain_search(name):
    compare(name, "IF_CHANGED", 2, 2, Grain.ACCESS, without=(*LITTLE, "reads"))


def test_a_mark_before_the_exchange_loses_a_write_and_only_a_cut_by_step_shows_it():
    marks_first = Kernel.v6_0.with_(fast_path_marks_first=True)
    plain = plain_search(smallest_vm(HARDWARE["ept_no_ad"], marks_first))
    fast = explore(HARDWARE["ept_no_ad"], marks_first)
    assert found(fast) == found(plain) == (1103, 4741, 34, 24)
    assert fast.replay().missed_dirty(0).tolist() == [0x200]
    assert explore(HARDWARE["ept_no_ad"], marks_first, grain=Grain.FAULT).safe


def number(space, search, vm):
    """The number of the state that a VM is in."""
    pairs, steps = space.pairs, space.pairs.steps
    pages = [steps.page(word_of(vm, page), [view_of(vm, v, page) for v in vm.vcpus]) for page in range(space.pages)]
    return search.state_of([pairs.number[control_of(vm), page] for page in pages])


@pytest.mark.parametrize("policy", FlushPolicy.__members__)
@pytest.mark.parametrize("name", KINDS)
def test_along_random_runs_of_two_pages_and_two_vcpus_the_steps_are_those_of_the_model(name, policy):
    """In every state of the run: the same steps are possible, and each leads to the same state."""
    rng = random.Random(f"{name} {policy}")
    for grain in (Grain.ACCESS, Grain.FAULT):
        space = Space(Pairs(golden.steps_of(name, 2, 2, grain).with_flush(FlushPolicy[policy])), 2)
        search = Search(space)
        vm = smallest_vm(HARDWARE[name], kernel(policy), 2, 2, grain)
        for _ in range(40):
            after = {}
            for action in possible(vm, grain):
                after[action] = vm.copy()
                act(after[action], action, grain)
            told = dict(search.actions(number(space, search, vm)))
            assert told == {action: number(space, search, other) for action, other in after.items()}
            busy = [a for a in after if a.who not in ("host",) and a.what not in ("forgets", "exits", "disables")]
            vm = after[rng.choice(busy)]


def test_along_a_random_run_cut_by_step_too():
    for name in ("ept_no_ad_legacy", "pml"):
        rng = random.Random(name)
        space = space_of(HARDWARE[name], kernel("IF_CHANGED"), 2, 1, Grain.STEP)
        search, vm = Search(space), smallest_vm(HARDWARE[name], kernel("IF_CHANGED"), 2, 1)
        for _ in range(150):
            after = {action: vm.copy() for action in possible(vm)}
            for action, other in after.items():
                act(other, action)
            told = dict(search.actions(number(space, search, vm)))
            assert told == {action: number(space, search, other) for action, other in after.items()}
            vm = after[rng.choice(list(after))]


@pytest.mark.parametrize("name", golden.KINDS)
def test_the_golden_table(name):
    head, *rows = golden.FILE.read_text().splitlines()
    assert head == golden.HEAD
    assert golden.table(name) == [row for row in rows if row.split()[0] == name]


@pytest.mark.parametrize("grain", Grain)
@pytest.mark.parametrize("name", ["ept_no_ad_legacy", "pml", "shadow"])
def test_counts_without_visiting_equal_the_search(name, grain):
    for policy, size in (("IF_CHANGED", (2, 2)), ("NEVER", (3, 1)), ("ALWAYS", (3, 1))):
        if grain is Grain.STEP and size == (2, 2):
            continue
        space = space_of(HARDWARE[name], kernel(policy), *size, grain)
        search = Search(space)
        search.run()
        count = count_states(space)
        assert (count.states, count.safe) == (search.states, search.shortest_loss() is None)


@pytest.mark.parametrize("policy", FlushPolicy.__members__)
@pytest.mark.parametrize("name", ["ept_no_ad", "npt", "shadow"])
def test_the_form_for_any_number_of_pages_counts_small_slots_right(name, policy):
    for pages, vcpus in ((1, 1), (2, 1), (3, 1), (2, 2), (3, 2), (4, 1)):
        count = count_states(space_of(HARDWARE[name], kernel(policy), pages, vcpus, Grain.ACCESS))
        any_size = count_any_size(HARDWARE[name], kernel(policy), pages, vcpus)
        assert (any_size.states, any_size.safe) == (count.states, count.safe)


def test_the_states_of_a_gigabyte():
    count = count_any_size(HARDWARE["ept_no_ad"], Kernel.v6_0, 1 << 18)
    assert count.safe and count.states.bit_length() == 1_375_713
    assert str(count) == "more than 2^1375712 states in 18 boxes, no write is lost"


# ---- a search that stops at the loss ---------------------------------------------------------------------------------


def by_levels(*instance):
    """What a search that stops is to say, told from the levels of the whole one."""
    search = Search(space_of(*instance))
    search.run()
    trace = search.shortest_loss()
    levels = np.bincount(search.level, minlength=256)[: search.depth + 1 if trace is None else len(trace) + 1]
    return int(levels.sum()), len(levels) - 1, trace


@pytest.mark.parametrize("few", [0, 10**6], ids=["numbered", "asked when needed"])
@pytest.mark.parametrize("name", KINDS)
def test_a_search_that_stops_finds_the_same_trace_and_the_levels_up_to_it(name, few, monkeypatch):
    monkeypatch.setattr(sys.modules["kvmbook.search.explore"], "FEW_STATES", few)
    for policy, size in (
        ("IF_CHANGED", (1, 1, Grain.STEP)),
        ("NEVER", (2, 1, Grain.ACCESS)),
        ("ALWAYS", (1, 2, Grain.ACCESS)),
    ):
        instance = HARDWARE[name], kernel(policy), *size
        result = explore(*instance, whole=False)
        assert (result.states, result.depth, result.trace) == by_levels(*instance)
        assert result.whole is result.safe is (result.trace is None)
        assert result.whole is ("no full count" not in str(result))
        if result.safe:
            assert result == explore(*instance)


def test_who_asks_again_is_answered_from_what_the_model_has_said(monkeypatch):
    question = HARDWARE["ept_no_ad"], kernel("IF_CHANGED"), 1, 2, Grain.FAULT
    first, whole = explore(*question, whole=False), explore(*question)
    monkeypatch.setattr(Cells, "__init__", None)
    assert explore(*question, whole=False) == first != whole == explore(*question)


def test_both_ways_to_stop_count_the_same(monkeypatch):
    instance = HARDWARE["pml"], kernel("IF_MMU_WRITABLE"), 1, 2, Grain.FAULT
    told = []
    for few in (0, 10**6):
        monkeypatch.setattr(sys.modules["kvmbook.search.explore"], "FEW_STATES", few)
        told.append(explore(*instance, whole=False))
    assert told[0] == told[1]
    assert found(told[0]) == (2826, 17981, 16, 16)
    assert explore(*instance).trace == told[0].trace


def test_a_search_that_stops_runs_only_the_steps_of_the_model_that_it_meets():
    steps = PageSteps(Cells(HARDWARE["ept_no_ad"], Kernel.v5_19), 1)
    assert len(search_pagewise(Pagewise(steps), 2000).trace) == 15
    met = len(steps.cells._known)
    Pairs(steps)
    assert met < len(steps.cells._known) / 2


# ---- what the searches find ------------------------------------------------------------------------------------------


def chosen(result):
    """The steps that are somebody's choice, not those that follow from them."""
    return [(a.who, a.what) for a in result.trace if a.page is not None or a.what == "enables"]


def test_the_shortest_run_is_the_seeds():
    result = explore(HARDWARE["ept_no_ad"], Kernel.v5_19)
    assert chosen(result) == [
        ("vCPU0", "reads"),  # a fault: KVM maps the page
        ("vCPU0", "reads"),  # the TLB is filled
        ("host", "ages"),
        ("user space", "enables"),
        ("vCPU0", "writes"),
    ]
    first, *_, last = str(result).splitlines()
    assert first == "1 page(s), 1 vCPU(s), cut by step: 1,100 states, 4,707 transitions, depth 28"
    assert last == " 15  vCPU0         writes page 0"


def test_with_pml_two_racing_faults_lose_a_write_although_the_rule_asks_for_mmu_writable():
    result = explore(HARDWARE["pml"], kernel("IF_MMU_WRITABLE"), vcpus=2, grain=Grain.FAULT)
    assert chosen(result) == [
        ("vCPU0", "reads"),
        ("vCPU1", "reads"),  # both fault; KVM maps the page for the first
        ("vCPU0", "reads"),  # which caches it, D set; then KVM makes the SPTE again, D clear
        ("user space", "enables"),
        ("vCPU0", "writes"),  # a TLB hit: no walk, no PML record
    ]
    assert result.replay().missed_dirty(0).tolist() == [0x200]
    assert explore(HARDWARE["pml"], Kernel.v6_0, vcpus=2, grain=Grain.FAULT).safe


def test_one_page_that_is_writable_hides_the_bug_of_another():
    result = explore(HARDWARE["ept_no_ad"], Kernel.v5_19, pages=2, grain=Grain.ACCESS)
    start = smallest_vm(HARDWARE["ept_no_ad"], Kernel.v5_19, 2, 1, Grain.ACCESS)
    lost, hidden = start, start.copy()
    for action in result.trace:
        act(lost, action, Grain.ACCESS)
        if action.what == "enables":  # page 1 is mapped writable just before
            act(
                hidden,
                next(a for a in possible(hidden, Grain.ACCESS) if str(a).endswith("writes page 1")),
                Grain.ACCESS,
            )
        act(hidden, action, Grain.ACCESS)
    assert lost.missed_dirty(0).tolist() == [0x200] and hidden.missed_dirty(0).tolist() == []


def test_without_ageing_the_seeds_bug_is_not_there():
    assert explore(HARDWARE["ept_no_ad"], Kernel.v5_19, without=("ages", "ages and flushes")).safe
    assert not explore(HARDWARE["ept_no_ad"], Kernel.v5_19, without=("forgets", "disables", "gets")).safe


# ---- bounds and bad input --------------------------------------------------------------------------------------------


def test_bounds_are_checked():
    with pytest.raises(ValueError, match="1 to 64 pages; got 0"):
        explore(HARDWARE["npt"], Kernel.v6_0, pages=0)
    with pytest.raises(ValueError, match="at least one vCPU"):
        explore(HARDWARE["npt"], Kernel.v6_0, vcpus=0)
    with pytest.raises(ValueError, match="at least one page, and at most 2147483647; got 0"):
        count_any_size(HARDWARE["npt"], Kernel.v6_0, 0)
    with pytest.raises(ValueError, match="PML"):
        count_any_size(HARDWARE["pml"], Kernel.v6_0, 5)
    vm = smallest_vm(HARDWARE["npt"], Kernel.v6_0)
    with pytest.raises(MemoryError, match="more than 10 states"):
        plain_search(vm, max_states=10)


def test_a_search_that_cannot_fit_says_so_before_it_begins():
    said = []
    with pytest.raises(ValueError, match=r"make up to [\d,]{14,} states, .* GiB .*; 3 page\(s\) fit") as refusal:
        explore(HARDWARE["ept_no_ad"], Kernel.v5_19, 4, 2, Grain.FAULT, progress=lambda *seen: said.append(seen))
    assert "kvmbook.search.count_states" in str(refusal.value) and not said


def test_tables_that_would_take_forever_are_refused_before_they_are_begun(monkeypatch):
    monkeypatch.setattr(Pairs, "__init__", None)
    with pytest.raises(
        ValueError, match=r"3 vCPUs cut by step make tables of some [\d,]{9} page states, .* GiB; 2 vCPU"
    ):
        explore(HARDWARE["npt"], Kernel.v6_0, vcpus=3)
    with pytest.raises(ValueError, match=r"1000 vCPUs cut by access .*; 5 vCPU"):
        explore(HARDWARE["npt"], Kernel.v6_0, vcpus=1000, grain=Grain.ACCESS)


def test_a_search_tells_how_far_it_is_and_can_be_interrupted():
    seen = []

    def stop(level, states, bound):
        seen.append((level, states))
        assert 0 < states <= bound
        if level == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        explore(HARDWARE["npt"], Kernel.v6_0, 2, 1, Grain.ACCESS, progress=stop)
    assert seen == sorted(seen) and seen[-1][0] == 20
    assert found(explore(HARDWARE["npt"], Kernel.v6_0, 1, 1, Grain.ACCESS)) == (232, 1289, 20, None)


def test_cells_leave_nothing_behind():
    """The same cells, asked again after many other steps, say the same."""
    cells = Cells(HARDWARE["pml"], Kernel.v5_19)
    pairs = Pairs(PageSteps(cells, 1))
    known = dict(cells._known)
    cells._known.clear()
    for (method, *args), found in reversed(known.items()):
        assert getattr(cells, method.__name__)(*args) == found
    assert len(cells._known) == len(known) > len(pairs.pairs)


@pytest.mark.parametrize(
    ("name", "policy"), [("ept_no_ad", "IF_MMU_WRITABLE"), ("pml", "IF_CHANGED"), ("pml", "ALWAYS")]
)
def test_cut_by_step_two_vcpus_have_the_verdict_that_is_said_for_any_number(name, policy):
    space = space_of(HARDWARE[name], kernel(policy), 1, 2, Grain.STEP)
    assert count_states(space).safe == any_number(HARDWARE[name], kernel(policy)).safe


def test_bad_arguments_are_told_and_not_taken_for_something_else():
    npt = HARDWARE["npt"]
    with pytest.raises(TypeError, match="list or tuple; got the string 'ages'"):
        explore(npt, Kernel.v6_0, without="ages")
    with pytest.raises(ValueError, match=r"reads, writes, .*; got 'age'"):
        plain_search(smallest_vm(npt, Kernel.v6_0), without=("age",))
    with pytest.raises(ValueError, match="'step by step' is not a valid Grain"):
        explore(npt, Kernel.v6_0, grain="step by step")
    with pytest.raises(ValueError, match="no step is left out; got ages"):
        AnyNumber(Cells(npt, Kernel.v6_0, 1, Grain.FAULT, ("ages",)))
    with pytest.raises(ValueError, match="buffer of 1 entries could fill"):
        explore(HARDWARE["pml"].with_(pml_entries=1), Kernel.v6_0, 2)
    with pytest.raises(ValueError, match="without a grace period"):
        explore(npt, Kernel.v6_0.with_(srcu_grace_period=False))
    for pages in (2.5, "2"):
        with pytest.raises(TypeError):
            count_any_size(npt, Kernel.v6_0, pages)
        with pytest.raises(TypeError):
            explore(npt, Kernel.v6_0, pages)
    assert count_any_size(npt, Kernel.v6_0, np.int64(20)) == count_any_size(npt, Kernel.v6_0, 20)


def test_a_start_without_a_way_on_is_a_search_of_few_states():
    assert found(explore(HARDWARE["npt"], Kernel.v6_0, grain=Grain.ACCESS, without=("reads", "writes", "enables"))) == (
        1, 2, 0, None,
    )  # fmt: skip


def test_many_pages_are_too_many_by_the_right_number():
    with pytest.raises(ValueError, match="make up to 335,668,911,559,513,135,673 states"):
        explore(HARDWARE["npt"], Kernel.v6_0, 14, grain=Grain.ACCESS)


@pytest.mark.parametrize("name", ["ept_no_ad", "ept_no_ad_legacy"])
def test_another_release_and_a_rule_over_bits_equal_the_plain_search(name):
    odd = Kernel.v6_0.with_(clear_flush_young_flushes=False, flush=BitRule(frozenset(leaves_met(HARDWARE[name])[:1])))
    plain = plain_search(smallest_vm(HARDWARE[name], odd, 1, 1), without=("gets",))
    assert found(explore(HARDWARE[name], odd, without=("gets",))) == found(plain)
