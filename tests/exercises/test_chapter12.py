"""Chapter 12's checks: each wrong answer gets the hint that leads on, and right ones pass."""

import numpy as np
import pytest

from kvmbook.exercises.ch12 import (
    CASES_12_1,
    GUESTS_12_2,
    cases_12_3,
    check_12_1,
    check_12_2,
    check_12_3,
    quiz_12_1,
    quiz_12_2,
    quiz_12_3,
)
from kvmbook.scenes import AtRest, Setting, Store, Workload, copied, migrate

judge_1, judge_2, judge_3 = (check.__wrapped__ for check in (check_12_1, check_12_2, check_12_3))
LIMITS = {(2, False): 2, (3, False): 1, (4, False): 1, (6, False): 0, (2, True): 0, (3, True): 0}
EARLIEST = {8: 44, 9: 39, 10: 49}


def test_the_answers_of_the_quizzes():
    assert quiz_12_1.__wrapped__().option == "more pages"
    assert quiz_12_2.__wrapped__().option == "none"
    assert quiz_12_3.__wrapped__().option == "idle in 98 of 100 ticks"


def test_the_shortest_limits_are_right_and_no_others():
    assert judge_1(LIMITS) == judge_1({case: np.int64(limit) for case, limit in LIMITS.items()}) == ""
    assert "these keys" in judge_1({(2, False): 2})
    assert "whole number" in judge_1({**LIMITS, (2, False): 2.5})
    assert "only 6 of 10 arrive" in judge_1({**LIMITS, (2, False): 1})
    assert "is it the shortest?" in judge_1({**LIMITS, (2, False): 3})
    assert set(LIMITS) == set(CASES_12_1)


def test_a_single_ageing_may_come_no_sooner():
    assert judge_2(EARLIEST) == judge_2({seed: np.int64(tick) for seed, tick in EARLIEST.items()}) == ""
    assert "these keys" in judge_2({8: 44})
    assert "32 to 63" in judge_2({**EARLIEST, 8: 31})
    assert "arrives as it was" in judge_2({**EARLIEST, 8: 43})
    assert "not the earliest; there are 1 before" in judge_2({**EARLIEST, 8: 45})
    for clients in GUESTS_12_2:
        assert 64 // EARLIEST[clients.seed] == 1, "one ageing before the migration"


def replayed(which):
    """A reader's answer, which looks at some of the wrong pages."""

    def find(source, destination, asked):
        memory, first = AtRest([b""] * 64), {}
        wrong = which([page for page in range(64) if source[page] != destination[page]])
        for number, request in enumerate(asked):
            before = list(memory.pages)
            Store(memory, 64).do(request)
            for page in wrong:
                if before[page] == destination[page] != memory.pages[page]:
                    first[page] = number
        return min(first.values())

    return find


def test_the_first_request_is_found_by_reading_all_wrong_pages():
    assert judge_3(replayed(lambda wrong: wrong)) == ""


@pytest.mark.parametrize("which", [lambda wrong: wrong[:1], lambda wrong: wrong[-1:]], ids=["lowest", "highest"])
def test_one_wrong_page_is_not_enough(which):
    assert "it is earlier; did you look at every wrong page?" in judge_3(replayed(which))


def test_the_cases_say_what_the_stories_of_their_pages_say():
    found = 0
    for seed in range(60):
        clients = Workload(seed, 0.5, rate=1)
        moved = migrate(Setting(ageing=8), clients)
        case = next((case for case in cases_12_3() if case.source == list(moved.source) and moved.wrong), None)
        if case is not None:
            ticks = [tick for tick in range(moved.rounds[-1].begin) for _ in clients.requests(tick)]
            assert ticks[case.first] == min(wrong.lost.tick for wrong in moved.wrong)
            found += 1
    assert found == 5


def test_no_guest_of_exercise_1_is_lost_otherwise():
    assert not any(copied(Setting(bandwidth=6), Workload(seed, rate=4)).differing for seed in range(10))


@pytest.mark.parametrize("said", [None, "3", 2.0, 99, -1])
def test_what_is_no_place_is_refused(said):
    assert "return a place in the list" in judge_3(lambda *_: said)
