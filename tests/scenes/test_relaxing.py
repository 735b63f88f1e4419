"""Chapter 14: relaxations put together by hand are those of the releases; what is counted is counted twice."""

import itertools

import pytest
from conftest import HARDWARE

from kvmbook import Hardware, Kernel
from kvmbook.model import FlushPolicy
from kvmbook.scenes import (
    JUDGED_ON,
    KEPT,
    RELAXATIONS,
    RELAXED_ON,
    TAKEN,
    being_aged,
    cycles,
    graph_of,
    judge,
    losing_runs,
    relaxed,
    run_under,
    verdicts_of,
)
from kvmbook.search import AnyNumber, Cells, Grain, any_number, explore, plain_search

W, A, D, YOUNG, LOCK = RELAXATIONS
LOST = {
    (W, "shadow paging"): 11,
    (D, "PML, legacy MMU"): 14,
    (YOUNG, "EPT without A/D"): 12,
    (LOCK, "EPT without A/D"): 10,
}
EACH = list(itertools.product(RELAXATIONS, RELAXED_ON))


@pytest.mark.parametrize(("name", "on"), EACH)
def test_a_relaxation_loses_where_the_chapter_says_and_only_without_the_flush(name, on):
    taken, kept = (judge(relaxed(name, flush), RELAXED_ON[on]) for flush in (TAKEN, KEPT))
    assert len(taken.trace or ()) == LOST.get((name, on), 0) and kept.trace is None and kept.states > 200


@pytest.mark.parametrize(("name", "on"), [(name, on) for name, on in EACH if name != LOCK])
def test_cut_by_step_the_verdicts_are_the_same(name, on):
    for flush in (TAKEN, KEPT):
        fine = explore(RELAXED_ON[on], relaxed(name, flush), without=["ages"])
        assert fine.safe is not judge(relaxed(name, flush), RELAXED_ON[on]).lost


@pytest.mark.parametrize(("name", "on"), EACH)
def test_the_run_that_is_shown_loses_or_notes_its_write(name, on):
    for flush in (TAKEN, KEPT):
        run = run_under(name, flush, RELAXED_ON[on])
        last = run.moments[-1].now
        assert last.lost == (flush is TAKEN and (name, on) in LOST)
        assert last.logging == "on" and any(m.action.what == "writes" for m in run.moments)
        page = last.pages[0]
        assert last.lost or page.bit == "1" or any(page.pml)


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("flush", [TAKEN, KEPT], ids=lambda flush: flush.value)
def test_v6_12_with_the_four_of_v6_13_loses_as_v6_13_does(hardware, flush):
    """Shortest runs too; what else v6.13 changed makes no difference here, with one vCPU."""
    ours = judge(relaxed(frozenset({W, A, D, YOUNG}), flush), HARDWARE[hardware])
    theirs = explore(HARDWARE[hardware], Kernel.v6_13.with_(flush=flush), grain=Grain.FAULT, without=["ages"])
    assert ours == (theirs.states, theirs.trace)


@pytest.mark.parametrize("hardware", HARDWARE)
def test_v6_12_with_no_relaxation_is_v6_12(hardware):
    ours = judge(relaxed(frozenset(), TAKEN), HARDWARE[hardware])
    theirs = explore(HARDWARE[hardware], Kernel.v6_12.with_(flush=TAKEN), grain=Grain.FAULT, without=["ages"])
    assert ours == (theirs.states, theirs.trace) and theirs.safe


def test_the_helper_put_together_owes_what_the_releases_owe_on_every_word_that_a_search_meets():
    """Leaves of shadow paging with each combination of W, A, D and MMU-writable, replaced by each other."""
    fmt = Hardware.shadow().format
    base = 0x1234 << 12 | fmt.shadow_present_mask | fmt.shadow_user_mask | fmt.shadow_host_writable_mask
    bits = (2, fmt.shadow_accessed_mask, fmt.shadow_dirty_mask, fmt.shadow_mmu_writable_mask)
    words = [base | sum(some) for n in range(5) for some in itertools.combinations(bits, n)]
    legal = [word for word in words if not word & 2 or word & fmt.shadow_mmu_writable_mask]
    for names, release in ((frozenset(), Kernel.v6_12), (frozenset({W, A, D}), Kernel.v6_13)):
        ours, theirs = relaxed(names).spte_format(fmt), release.spte_format(fmt)
        for old, new in itertools.product(legal, legal):
            assert ours.mmu_spte_update(old, new) == theirs.mmu_spte_update(old, new), (hex(old), hex(new))


@pytest.mark.parametrize("flush", [TAKEN, KEPT], ids=lambda flush: flush.value)
def test_without_the_lock_the_finer_cut_finds_the_same(flush):
    kernel, no_ad = relaxed(LOCK, flush), RELAXED_ON["EPT without A/D"]
    fine = plain_search(being_aged(no_ad, kernel), without=["ages", "ages and flushes", "disables"])
    assert fine.trace == judge(kernel, no_ad).trace
    assert fine.states > judge(kernel, no_ad).states


def test_a_relaxation_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"relaxations are .*; got 'everything'"):
        relaxed("everything")


# ---- releases --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", JUDGED_ON)
@pytest.mark.parametrize("release", [Kernel.v5_19, Kernel.v6_14, Kernel.v6_18], ids=lambda kernel: kernel.name)
def test_a_release_that_shares_a_search_has_the_verdict_of_its_own(release, on):
    """`tests/search/test_releases.py` judges each release on each hardware; here the two are held together."""
    hardware = JUDGED_ON[on]
    cells = Cells(hardware, release.with_(flush=TAKEN), 1, Grain.FAULT)
    alone = AnyNumber(cells).search(stop_at_loss=True).verdict().safe
    assert verdicts_of(release, hardware) == (alone, True)
    assert any_number(hardware, release.with_(flush=FlushPolicy.ALWAYS)).safe


# ---- counts ----------------------------------------------------------------------------------------------------------


def test_runs_that_lose_are_those_that_one_finds_by_walking_them():
    """Cut by access, where runs are short: every run of ten steps, one by one."""
    graph = graph_of(RELAXED_ON["EPT without A/D"], Kernel.v5_19, grain=Grain.ACCESS)

    def walk(state, steps):
        if graph.states[state].lost:
            return every(state, steps)
        return sum(walk(to, steps - 1) for _, to in graph.edges[state] if graph.distance[to] <= steps) if steps else 0

    def every(state, steps):
        return sum(every(to, steps - 1) for _, to in graph.edges[state]) if steps else 1

    assert [walk(0, steps) for steps in range(12)] == losing_runs(graph, 11)
    assert losing_runs(graph, 11)[9:] == [0, 18, 712]


def test_where_nothing_is_lost_no_run_loses():
    assert losing_runs(graph_of(RELAXED_ON["NPT"], Kernel.v6_0), 20) == [0] * 21


def test_what_a_cycle_costs_is_the_same_for_equal_seeds_and_differs_for_others():
    hardware = RELAXED_ON["EPT without A/D"]
    once, other = cycles(Kernel.v6_12, hardware), cycles(Kernel.v6_12, hardware, seed=15)
    assert once == cycles.__wrapped__(Kernel.v6_12, hardware) != other
    assert once.ageing > 100 and cycles(Kernel.v6_13, hardware).ageing == 0
    assert once.seen == once.used == cycles(Kernel.v6_13, hardware).used > cycles(Kernel.v6_13, hardware).seen
