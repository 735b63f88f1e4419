"""Chapter 15: the checks take right answers, and give wrong, lazy and cheating ones a hint that helps."""

import pytest

from kvmbook.exercises.ch15 import (
    CLAIMS,
    check_15_1,
    check_15_2,
    check_15_3,
    claims_15_1,
    quiz_15_1,
    quiz_15_2,
    quiz_15_3,
)
from kvmbook.real import QUESTIONS

RIGHT = ["flush requests", None, "bitmap", "ring", "memory", None]


def says(check, answer, capsys):
    check(answer)
    return capsys.readouterr().out.strip()


def test_the_answers_of_the_questions():
    assert [quiz().answer for quiz in (quiz_15_1, quiz_15_2, quiz_15_3)] == [
        "that its kernel is not patched, and its CPU has no A/D bits",
        "1",
        "one entry",
    ]


# ---- 1: who can tell? ------------------------------------------------------------------------------------------------


def test_each_claim_is_told_by_what_the_solution_says(capsys):
    assert says(check_15_1, RIGHT, capsys) == "Yes." and len(claims_15_1()) == len(CLAIMS) == 6
    assert all(right in claim.told_by for right, claim in zip(RIGHT, CLAIMS, strict=True))
    assert CLAIMS[3].told_by == {"ring", "memory"}  # the n-th write leaves n
    assert says(check_15_1, [*RIGHT[:3], "memory", *RIGHT[4:]], capsys) == "Yes."


@pytest.mark.parametrize(
    ("place", "wrong", "hint"),
    [
        (0, "bitmap", "claim 1: bitmap is the same whether it holds or not"),
        (0, None, "claim 1: user space can tell"),
        (1, "bitmap", "claim 2: if it holds or not, bitmap is the same; who else knows?"),
        (2, "ring", "claim 3: ring is the same"),
        (4, "bitmap", "claim 5: bitmap is the same"),
        (5, "flush requests", "claim 6: if it holds or not"),
        (5, "SPTE", "claim 6: 'SPTE' is none of flush requests, bitmap, ring, memory"),
    ],
)
def test_a_wrong_channel_is_told_so(place, wrong, hint, capsys):
    said = says(check_15_1, [*RIGHT[:place], wrong, *RIGHT[place + 1 :]], capsys)
    assert said.startswith("No: ") and hint in said


@pytest.mark.parametrize("answer", ["bitmap", [], RIGHT[:5]])
def test_it_takes_six_answers(answer, capsys):
    assert "give a list of 6" in says(check_15_1, answer, capsys)


# ---- 2: which kernel? ------------------------------------------------------------------------------------------------

SLOT = {"slot": 0, "base_gfn": 0x200, "npages": 64}


def enabling(before):
    def which(vm):
        vm.set_user_memory_region(**SLOT)
        before(vm)
        asked = vm.flush_requests
        vm.set_user_memory_region(**SLOT, log_dirty_pages=True)
        return vm.flush_requests - asked

    return which


def log_once(vm):
    vm.vcpu[0].write(0x200)
    vm.set_user_memory_region(**SLOT, log_dirty_pages=True)
    vm.set_user_memory_region(**SLOT)


def enabling_initially_set(vm):
    vm.enable_cap_manual_dirty_log_protect2(3)
    return enabling(lambda vm: None)(vm)


counted = iter(range(100))


@pytest.mark.parametrize(
    ("which", "said"),
    [
        (enabling(lambda vm: None), "Yes."),
        (enabling(log_once), "Yes."),
        (
            enabling(lambda vm: vm.vcpu[0].write(0x200)),
            "both kernels answer 1; what does v6.0 do when a pass finds nothing",
        ),
        (enabling(lambda vm: vm.clear_young(0x200, 0x240)), "Yes."),
        (lambda vm: vm.vcpu[0].read(0x200), "your run never does"),
        (lambda vm: vm.set_user_memory_region(**SLOT, log_dirty_pages=True), "the slot is made with the log on"),
        (enabling_initially_set, "with INITIALLY_SET nothing is protected"),
        (QUESTIONS["plain"].run, "what does the patch do that can be counted?"),
        (lambda vm: "v6.0", "your run makes no call"),
        (lambda vm: (vm.flush_requests, next(counted)), "two machines that are alike give two answers"),
        (lambda vm: vm.spte(0x200), "raised AttributeError"),
        (lambda: 0, "give a function of one VM"),
        (7, "give a function of one VM"),
    ],
)
def test_which_kernel(which, said, capsys):
    assert said in says(check_15_2, which, capsys)


# ---- 3: controls -----------------------------------------------------------------------------------------------------

GOOD = [{"page_size": "4K"}, {"manual": 1}, {"cleared": (0x400,)}]


@pytest.mark.parametrize(
    ("controls", "said"),
    [
        (GOOD, "Yes."),
        ([{"page_size": "4K"}, {"manual": 0}, {"cleared": (0x3FF, 0x400, 0x401)}], "Yes."),
        ([*GOOD[:2], {"cleared": (0x3FF,)}], "so its bit is still set"),
        ([*GOOD[:2], {"written": 0x401}], "so its bit is still set"),
        ([*GOOD[:2], {"written": 0x3FF}], "Yes."),
        ([*GOOD[:2], {"manual": 0}], "two of your controls change the same thing"),
        ([*GOOD[:2], {"manual": 3}], "the losing run itself"),
        ([*GOOD[:2], {"cleared": (0x400,), "manual": 1}], "it changes 2 things"),
        ([*GOOD[:2], {}], "it changes 0 things"),
        ([*GOOD[:2], {"manual": 2}], "manual 0, 1 or 3"),
        ([*GOOD[:2], {"gfn": 3}], "and no gfn"),
        ([*GOOD[:2], {"cleared": (0x3FE, 0x400)}], "the CLEAR is of 64 pages, from 0x3ff"),
        (GOOD[:2], "give a list of three"),
        ({"manual": 1}, "give a list of three"),
    ],
)
def test_controls(controls, said, capsys):
    assert said in says(check_15_3, controls, capsys)
