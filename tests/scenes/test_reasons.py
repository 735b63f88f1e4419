"""Chapter 09's scenes: what a word shows, who gives W back under which lock, and which carelessness does harm."""

from itertools import product

import pytest

from kvmbook import Outcome
from kvmbook.scenes import (
    ACTS,
    BASE_GFN,
    BY_RULES,
    CARELESS,
    ENABLES,
    GUARDS,
    NOT_WRITABLE,
    REASONS,
    WRITES,
    give_back,
    page_with,
    reasons_of,
)


@pytest.mark.parametrize("reasons", [{1}, {2}, {3}, {4}, {2, 4}, {3, 4}])
def test_a_page_shows_the_reasons_that_it_was_given(reasons):
    vm = page_with(reasons)
    assert reasons_of(vm.fmt, vm.spte(BASE_GFN)) == reasons <= set(REASONS)


def test_what_a_word_hides_and_that_a_writable_one_shows_nothing():
    both = page_with({1, 4})
    assert reasons_of(both.fmt, both.spte(BASE_GFN)) == {4}
    both.vcpu[1].read(BASE_GFN)
    assert reasons_of(both.fmt, both.spte(BASE_GFN)) == {1}
    both.vcpu[1].write(BASE_GFN)
    assert reasons_of(both.fmt, both.spte(BASE_GFN)) == set()


def test_by_the_rules_nothing_does_harm_and_carelessness_harms_where_the_text_says():
    harmed = set()
    for page, act in product(NOT_WRITABLE, ACTS):
        assert give_back(page, act, BY_RULES).harm == ""
        if give_back(page, act, CARELESS).harm:
            harmed.add((page[0], act))
    assert harmed == {("2", WRITES), ("3", WRITES), ("4", GUARDS), ("4", ENABLES)}


def test_w_comes_back_without_a_lock_only_where_mmu_writable_is_1():
    for page in NOT_WRITABLE:
        back = give_back(page).gives_back
        if give_back(page).rows[0].chain[1]:
            assert back.what == "fast_pf_fix_direct_spte" and back.lock == ""
        else:
            assert back is None or back.lock == "read"


def test_the_guard_flushes_under_the_lock_and_the_log_after_it():
    page = "4 access tracking"
    assert (give_back(page, GUARDS).flush.lock, give_back(page, ENABLES).flush.lock) == ("write", "")
    late = give_back(page, GUARDS, CARELESS)
    assert late.flush.lock == "" and late.rows[late.harmed].note == str(Outcome.HIT)


def test_a_row_does_not_hide_the_fault_that_gives_r_and_x_back():
    last = give_back("4 access tracking", GUARDS).rows[-1]
    assert last.note == "fault, emulated" and last.rights == "R X"
    assert give_back("1 dirty logging", GUARDS).rows[-1].note == "emulated"


def test_a_page_an_act_and_a_manner_must_be_known():
    for case in (("5", WRITES, BY_RULES), ("4 access tracking", "?", CARELESS), ("4 access tracking", WRITES, "?")):
        with pytest.raises(KeyError):
            give_back(*case)
