"""Each exhibit of the museum: the bad kernel does harm, the good one does not, and one switch is all between them."""

from dataclasses import replace

import pytest
from conftest import BASE

from kvmbook import FlushPolicy, Hardware, Kernel, Vm
from kvmbook.model import check
from kvmbook.search import (
    CONFUSIONS,
    EXHIBITS,
    Action,
    Calls,
    Cast,
    Interleavings,
    Moves,
    freed_pages,
    hunt_one,
    missed_writes,
    plain_search,
    search_plainly,
    smallest_vm,
)

# number: the switch, steps of the shortest run, states with the fix, states elsewhere with the fix
GOLDEN = {
    1: ("harvest_flushes_before_unlock", 13, 462, 482),
    2: ("fast_path_marks_first", 23, 736, 536),
    3: ("spte_rules", 13, 496, 550),
    4: ("spte_rules", 16, 3708, 2450),
    5: ("spte_rules", 15, 234, 96),
    6: ("spte_rules", 3, 175, 164),
    7: ("clear_split_forgets_last", 4, 484, 481),
    8: ("yields_after_flush", 12, 331, 331),
    9: ("spte_rules", 13, 511, 455),
    10: ("ages_by_plain_store", 16, 1172, 800),
    11: ("flush", 15, 980, 736),
    12: ("spte_rules", 3, 175, 164),
}
EACH = pytest.mark.parametrize("exhibit", EXHIBITS, ids=lambda exhibit: exhibit.title)


def test_there_are_twelve_in_order_and_each_confusion_has_three():
    assert [exhibit.number for exhibit in EXHIBITS] == list(GOLDEN)
    releases = [tuple(map(int, exhibit.release[1:].split("."))) for exhibit in EXHIBITS]
    assert sorted(releases) == sorted(
        releases[:6] + releases[7:11] + [releases[6], releases[11]]
    )  # by when they came in
    assert [sum(exhibit.confusion == each for exhibit in EXHIBITS) for each in CONFUSIONS] == [3, 3, 3, 3]


@EACH
def test_the_two_kernels_differ_in_one_switch(exhibit):
    switch, *_ = GOLDEN[exhibit.number]
    assert exhibit.switch == switch and exhibit.bad.differs_from(exhibit.good)
    assert replace(exhibit.bad, name="", **{switch: getattr(exhibit.good, switch)}) == replace(exhibit.good, name="")
    bad, good = exhibit.diff.splitlines()
    assert bad.startswith(f"- {switch} = ") and good.startswith(f"+ {switch} = ") and bad[2:] != good[2:]


@EACH
def test_the_bad_kernel_does_harm_and_the_good_one_does_not_over_the_same_space(exhibit):
    _, steps, states, _ = GOLDEN[exhibit.number]
    assert len(exhibit.look().run) == steps
    proof = exhibit.look(fixed=True)
    assert proof.run is None and proof.states == states


@EACH
def test_elsewhere_the_fix_does_no_harm_either_but_for_the_half_of_one(exhibit):
    *_, states = GOLDEN[exhibit.number]
    bad, good = exhibit.look(elsewhere=True), exhibit.look(fixed=True, elsewhere=True)
    assert (bad.run is not None) == (exhibit.number in (7, 8))
    assert (good.run is not None) == (exhibit.number == 7)  # the split does not reach the legacy MMU
    assert good.states == states


@EACH
def test_a_shortest_run_does_harm_with_its_last_step_only(exhibit):
    found, space = exhibit.look(), exhibit.space
    if isinstance(space, Moves):
        cast = space.cast(exhibit.hardware, exhibit.bad)
        for action in found.run:
            assert not cast.done() and action in cast.possible()
            cast.do(action)
            cast.key()
        assert cast.done()
    elif isinstance(space, Calls):
        configuration = space.configuration(exhibit.hardware, exhibit.bad)
        assert not hunt_one(configuration, len(found.run) - 1).found
    else:
        assert isinstance(space, Interleavings) and found.run[-1].what == "writes"


@EACH
def test_the_good_kernel_keeps_every_invariant_on_the_losing_run(exhibit):
    """As far as it can go: what the fix forbids ends it."""
    if not isinstance(exhibit.space, Moves):
        return
    cast = exhibit.space.cast(exhibit.hardware, exhibit.good)
    for action in exhibit.look().run:
        if action not in cast.possible():
            break
        cast.do(action)
        if not cast.vm.in_flight:
            check(cast.vm)
    assert not cast.done()


# ---- the cast --------------------------------------------------------------------------------------------------------


def test_a_cast_with_the_plain_searchs_actors_finds_what_that_finds():
    seed = Kernel.v6_0.with_(flush=FlushPolicy.IF_CHANGED)
    vm = smallest_vm(Hardware.ept(ad_bits=False), seed)
    plain = plain_search(vm.copy(), without=["forgets", "ages and flushes", "disables"])
    guests = [Action("vCPU0", what, 0) for what in ("reads", "writes")]
    moves = (*guests, Action("host", "ages", 0), *(Action("user space", what) for what in ("enables", "gets")))
    cast = search_plainly(Cast(vm, moves, missed_writes), stop_at_loss=True)
    assert len(cast.trace) == len(plain.trace) + 1  # ageing begins with a step of its own
    assert {(a.who, a.what) for a in plain.trace} < {(a.who, a.what) for a in cast.trace}


def test_a_page_counts_as_freed_when_the_host_has_given_its_frame_away():
    vm = Vm(Hardware.ept(), Kernel.v6_0)
    vm.set_user_memory_region(slot=0, base_gfn=BASE, npages=2)
    cast = Cast(vm, (), freed_pages)
    vm.vcpu[0].read(BASE)
    assert not cast.done()
    vm.host.replace(vm.memslots.slots[0, 0].hva(BASE), True)  # with no notifier told
    assert cast.done()
    vm.vcpu[0].evict(BASE)
    assert not cast.done()
