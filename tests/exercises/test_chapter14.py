"""Chapter 14: the checks take right answers, and give wrong and lazy ones a hint that helps."""

import pytest

from kvmbook.exercises.ch14 import (
    CASES_14_1,
    HARDWARE_14_3,
    check_14_1,
    check_14_2,
    check_14_3,
    quiz_14_1,
    quiz_14_2,
    quiz_14_3,
)
from kvmbook.scenes import RELAXATIONS

RIGHT = ["lost", "safe", "safe", "lost", "safe", "lost"]
W, A, D, YOUNG, LOCK = RELAXATIONS
FEWEST = {
    "EPT without A/D": {YOUNG, LOCK},
    "shadow paging": {W},
    "PML, legacy MMU": {D},
    "NPT": set(),
    "EPT without A/D, legacy MMU": {YOUNG, LOCK, W},
}
LEGACY = "EPT without A/D, legacy MMU"


def says(check, answer, capsys):
    check(answer)
    return capsys.readouterr().out.strip()


def test_the_answers_of_the_questions():
    assert [quiz().answer for quiz in (quiz_14_1, quiz_14_2, quiz_14_3)] == ["0", "on shadow paging", "none"]


# ---- 1 ---------------------------------------------------------------------------------------------------------------


def test_the_right_verdicts_are_the_searches(capsys):
    assert ["lost" if case.lost else "safe" for case in CASES_14_1] == RIGHT
    assert says(check_14_1, RIGHT, capsys) == "Yes."
    assert says(check_14_1, None, capsys) == "Not yet: there is no answer to check."


@pytest.mark.parametrize("number", range(6))
def test_a_wrong_verdict_is_refused_with_its_cause_and_without_the_answer(number, capsys):
    wrong = list(RIGHT)
    wrong[number] = {"lost": "safe", "safe": "lost"}[RIGHT[number]]
    said = says(check_14_1, wrong, capsys)
    assert said.startswith(f"No: case {number + 1}: ") and said.endswith("?")
    assert ("PML" in said) == (number > 3) and ("means W" in said) == (number in (2, 3))


def test_lazy_and_malformed_verdicts_are_refused(capsys):
    assert says(check_14_1, ["safe"] * 6, capsys).startswith("No: case 1: ")
    assert says(check_14_1, ["lost"] * 6, capsys).startswith("No: case 2: ")
    assert "give a list of 6" in says(check_14_1, ["lost"], capsys)
    assert "give a list of 6" in says(check_14_1, "lost", capsys)
    assert "got True" in says(check_14_1, [True] * 6, capsys)


# ---- 2 ---------------------------------------------------------------------------------------------------------------


def enable(vm):
    vm.set_user_memory_region(slot=0, base_gfn=0x200, npages=16, log_dirty_pages=True)


def write(vm, *gfns):
    for gfn in gfns:
        vm.vcpu[0].write(gfn)


ALL = (0x200, 0x201, 0x202)


def one_of_three(vm):
    vm.vcpu[0].read(0x201)
    enable(vm)
    write(vm, *ALL)


def by_the_other_vcpu(vm):
    vm.vcpu[1].write(0x201)
    vm.vcpu[0].write(0x202)
    vm.vcpu[0].evict(0x202)
    enable(vm)
    vm.vcpu[1].write(0x201)
    write(vm, 0x200, 0x202)


@pytest.mark.parametrize("run", [one_of_three, by_the_other_vcpu])
def test_runs_that_lose_the_one_write_pass(run, capsys):
    assert says(check_14_2, run, capsys) == "Yes."


def ages(vm):
    vm.clear_young(0x200, 0x201)
    one_of_three(vm)


def loses_all(vm):
    write(vm, *ALL)
    enable(vm)
    write(vm, *ALL)


def loses_none(vm):
    enable(vm)
    write(vm, *ALL)


def writes_one(vm):
    vm.vcpu[0].read(0x201)
    enable(vm)
    write(vm, 0x201)


def harvests(vm):
    one_of_three(vm)
    vm.get_dirty_log(0)


def cheats(vm):
    vm.vcpu[0].read(0x201)
    enable(vm)
    write(vm, *ALL)
    vm.memslots.slots[0, 0].dirty_bitmap[:] = 0
    vm.written.difference_update({0x200, 0x202})


@pytest.mark.parametrize(
    ("run", "hint"),
    [
        (ages, "your run ages"),
        (loses_all, "lost: 0x200, 0x201, 0x202; only 0x201"),
        (loses_none, "no write is missed"),
        (writes_one, "gfn 0x200 is not written"),
        (harvests, "you have taken the log"),
        (cheats, "gfn 0x200 is not written"),
        (lambda vm: None, "must leave dirty logging enabled"),
        (lambda vm: 1 / 0, "your answer raised ZeroDivisionError"),
        (0x201, "give a function"),
    ],
)
def test_other_runs_are_told_what_is_missing(run, hint, capsys):
    said = says(check_14_2, run, capsys)
    assert said.startswith("No: ") and hint in said


# ---- 3 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [{YOUNG, LOCK, W}, (D, YOUNG, LOCK)])
def test_a_smallest_set_passes(legacy, capsys):
    assert set(FEWEST) == set(HARDWARE_14_3)
    assert says(check_14_3, {**FEWEST, LEGACY: legacy}, capsys) == "Yes."


@pytest.mark.parametrize(
    ("name", "undone", "hint"),
    [
        ("EPT without A/D", set(), "comes too late"),
        ("EPT without A/D", {LOCK}, "in 12 steps"),
        ("EPT without A/D", {YOUNG}, "in 10 steps"),
        ("EPT without A/D", {YOUNG, LOCK, W}, f"{W!r} need not be undone"),
        ("shadow paging", {D}, "who is to ask for the flush"),
        ("NPT", {A}, f"{A!r} need not be undone"),
        (LEGACY, {YOUNG, LOCK}, "who is to ask for the flush"),
        (LEGACY, {YOUNG, LOCK, W, D}, "need not be undone"),
        ("NPT", {"clear_young"}, "got 'clear_young'"),
        ("NPT", A, f"got {A!r}"),
    ],
)
def test_other_sets_are_refused(name, undone, hint, capsys):
    said = says(check_14_3, {**FEWEST, name: undone}, capsys)
    assert said.startswith(f"No: {name}: ") and hint in said


def test_all_or_some_hardware_is_refused(capsys):
    assert "need not be undone" in says(check_14_3, {name: set(RELAXATIONS) for name in FEWEST}, capsys)
    assert "give a dict" in says(check_14_3, {"NPT": set()}, capsys)
    assert "give a dict" in says(check_14_3, [set()], capsys)
