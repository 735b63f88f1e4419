"""Chapter 13: the runs that are told are those that the search found, up to where the repair ends them."""

import pytest

from kvmbook.scenes import exhibit, get_in_order, retell_exhibit, unnamed, with_repair
from kvmbook.search import EXHIBITS

# How many steps of the bad kernel's run the repaired one can do.
GOES = {1: 11, 2: 11, 3: 13, 4: 16, 5: 13, 6: 3, 7: 4, 8: 12, 9: 13, 10: 6, 11: 12, 12: 3}


def did(action):
    return tuple(action[:2])


@pytest.mark.parametrize("shown", EXHIBITS, ids=lambda shown: shown.title)
def test_the_run_is_the_searchs_and_harms_with_its_last_step_only(shown):
    run, found = retell_exhibit(shown), shown.look().run
    said = [did(moment.action)[0] for moment in run.moments]
    assert said == [action.who for action in found] and len(run.moments) == len(found)
    assert [moment.now.lost for moment in run.moments] == [False] * (len(found) - 1) + [True]
    assert run.told().endswith(f"{shown.harm})")


@pytest.mark.parametrize("shown", EXHIBITS, ids=lambda shown: shown.title)
def test_on_the_repaired_kernel_it_does_no_harm_as_far_as_it_goes(shown):
    run = retell_exhibit(shown, fixed=True)
    assert len(run.moments) == GOES[shown.number] and not any(moment.now.lost for moment in run.moments)


def test_the_two_cases_without_names():
    a, b = unnamed("A"), unnamed("B")
    assert [len(run.moments) for run in (a, b)] == [16, 15]
    assert a.moments[-1].answered == "SPTE" and b.moments[-1].answered == "TLB"
    assert get_in_order(protects_first=False).run is None
    with pytest.raises(KeyError):
        unnamed("C")


def test_the_seeds_repair_cures_rooms_4_and_10_too():
    assert exhibit(4).look().run and exhibit(10).look().run
    for room in (4, 10):
        assert with_repair(room, exhibit(11).good.flush).look().run is None


def test_rooms_that_are_not_there_are_refused():
    for number in (0, 13):
        with pytest.raises(ValueError, match="the rooms are 1 to 12"):
            exhibit(number)
