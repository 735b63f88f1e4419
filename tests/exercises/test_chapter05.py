"""Chapter 05: the checks take right answers, and give wrong, lazy and cheating ones a hint that helps."""

import numpy as np
import pytest

from kvmbook.exercises.ch05 import (
    check_05_1,
    check_05_2,
    check_05_3,
    quiz_05_1,
    quiz_05_2,
    quiz_05_3,
    truth_of,
    writes_05_3,
)
from kvmbook.model import GetDirtyLog, Kernel


def says(check, answer, capsys, **variant):
    check(answer, **variant)
    return capsys.readouterr().out.strip()


def test_the_answers_of_the_questions():
    assert [quiz().answer for quiz in (quiz_05_1, quiz_05_2, quiz_05_3)] == ["300", "yes", "two"]


# ---- 1: the bill -----------------------------------------------------------------------------------------------------


def bill(**other):
    """A formula, right but for the ways in ``other``."""
    right = {
        "W": lambda p, t, h: p * h,
        "D and PML": lambda p, t, h: max(p - 1, 0) // 512 * h,
        "emulation": lambda p, t, h: p * t * h,
    }
    ways = right | {name.replace("D_and_PML", "D and PML"): formula for name, formula in other.items()}
    return lambda way, pages, times, harvests: ways[way](pages, times, harvests)


@pytest.mark.parametrize("seed", [1, 2, 30])
def test_the_right_bill_is_right_for_every_seed(seed, capsys):
    assert says(check_05_1, bill(), capsys, seed=seed) == "Yes."


@pytest.mark.parametrize(
    ("formula", "hint"),
    [
        (bill(W=lambda p, t, h: p * t * h), "which writes to a page find W in the TLB?"),
        (bill(W=lambda p, t, h: p), "how often does a page lose W"),
        (bill(D_and_PML=lambda p, t, h: p // 512 * h), "a full buffer is no exit yet"),
        (bill(D_and_PML=lambda p, t, h: (p - 1) // 512 * h), "nothing is written there"),
        (bill(D_and_PML=lambda p, t, h: max(p - 1, 0) // 512), "goes on after the first harvest"),
        (bill(D_and_PML=lambda p, t, h: max(p * t - 1, 0) // 512 * h), "sets nothing, and logs nothing"),
        (bill(D_and_PML=lambda p, t, h: p * h), "when does a page come into the buffer"),
        (bill(emulation=lambda p, t, h: p * h), "does KVM ever give W back"),
        (lambda *case: 0, "how often does a page lose W"),
        (lambda *case: None, "how often does a page lose W"),
        (7, "give a function"),
    ],
)
def test_a_wrong_bill_gets_a_hint(formula, hint, capsys):
    said = says(check_05_1, formula, capsys)
    assert said.startswith("No: ") and hint in said


# ---- 2: too late for this report -------------------------------------------------------------------------------------


def stepped(vm, writes=(0x205,)):
    for gfn in writes:
        vm.vcpu[0].write(gfn)
    get = vm.start(GetDirtyLog(0))
    while get.todo:
        vm.step(get)
    return get.result


def exits_first(vm):
    vm.vcpu[0].write(0x205)
    vm.vcpu[0].exit()
    return stepped(vm, ())


def in_time(vm):
    vm.vcpu[0].write(0x205)
    return vm.get_dirty_log(0)


def writes_during(vm):
    get = vm.start(GetDirtyLog(0))
    vm.step(get)
    vm.vcpu[0].write(0x205)
    return vm.run(get)


def unfinished(vm):
    vm.vcpu[0].write(0x205)
    vm.step(vm.start(GetDirtyLog(0)))


def forged(vm):
    in_time(vm)
    return np.zeros(64, bool)


def another_kernel(vm):
    vm.kernel = Kernel.v5_19
    return stepped(vm)


def drops_the_buffer(vm):
    """Cheats: the page is nowhere any more."""
    report = stepped(vm)
    vm.vcpus[0].pml.clear()
    return report


def test_a_report_that_is_too_early_is_right(capsys):
    assert says(check_05_2, stepped, capsys) == "Yes."
    assert says(check_05_2, lambda vm: stepped(vm, (0x203, 0x205)), capsys) == "Yes."


@pytest.mark.parametrize(
    ("run", "hint"),
    [
        (in_time, "who lets the vCPU leave before the bits are taken?"),
        (exits_first, "has drained its buffer"),
        (writes_during, "the guest writes nothing before the GET begins"),
        (unfinished, "has not finished"),
        (forged, "return what KVM has reported"),
        (lambda vm: stepped(vm) is None, "return what KVM has reported"),
        (lambda vm: None, "GETs the log 0 times"),
        (lambda vm: (stepped(vm), stepped(vm))[0], "GETs the log 2 times"),
        (another_kernel, "replaced the VM's kernel"),
        (drops_the_buffer, "lost for good"),
    ],
)
def test_another_run_gets_a_hint(run, hint, capsys):
    said = says(check_05_2, run, capsys)
    assert said.startswith("No: ") and hint in said


# ---- 3: pages of a nested guest --------------------------------------------------------------------------------------


def test_the_truth_is_right_for_every_seed_and_tasks_differ(capsys):
    for seed in range(1, 6):
        assert says(check_05_3, [truth_of(write) for write in writes_05_3(seed)], capsys, seed=seed) == "Yes."
    assert len({str(writes_05_3(seed)) for seed in range(1, 301)}) == 300
    assert all(len(str(write)) <= 88 for seed in range(1, 50) for write in writes_05_3(seed))


def test_under_pml_an_l2_page_is_of_type_2_goes_by_w_and_its_own_gfn_would_be_logged():
    for write in writes_05_3(seed=1):
        ad_type, bit, logged = truth_of(write)
        assert (bit == "D") == (ad_type == 0 and "PML" in write.cpu)
        if ad_type == 2:
            assert write.l2 and bit == "W" and logged == write.l2_gfn != write.gfn
        elif ad_type == 1 or "PML" not in write.cpu:
            assert logged is None


@pytest.mark.parametrize(
    ("place", "value", "hint"),
    [(0, 3, "its type is not 3"), (1, "A", "enabling does not take A"), (2, 0x123, "would not log 0x123")],
)
def test_one_wrong_part_gets_its_hint(place, value, hint, capsys):
    answer = [list(truth_of(write)) for write in writes_05_3(1)]
    answer[2][place] = value
    said = says(check_05_3, answer, capsys)
    assert said.startswith("No: write 3: ") and hint in said
    assert "triples" in says(check_05_3, answer[:2], capsys) and "triples" in says(check_05_3, "WWWW", capsys)
