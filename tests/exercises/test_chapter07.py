"""Chapter 07's questions and check cells: wrong, lazy and cheating answers get a hint that helps."""

import pytest

from kvmbook import Kernel
from kvmbook.exercises import ch07
from kvmbook.exercises.ch07 import WAYS_07, _way, accesses_07_1


def test_any_eight_accesses_are_judged_by_the_model(capsys):
    for seed in range(1, 21):
        rows = accesses_07_1(seed)
        right = [_way(row) for row in rows]
        assert len(set(rows)) == 8 and set(right) == set(WAYS_07)
        ch07.check_07_1(right, seed=seed)
        assert capsys.readouterr().out == "Yes.\n"
        for way in WAYS_07:
            ch07.check_07_1([way] * 8, seed)
            assert capsys.readouterr().out.startswith(
                f"No: row {1 + (right[0] == way) * (1 if right[1] != way else 2)} ("
            )
    assert len({str(accesses_07_1(seed)) for seed in range(1, 301)}) == 300


def test_the_quizzes_say_what_the_text_needs():
    answers = [quiz().answer for quiz in (ch07.quiz_07_1, ch07.quiz_07_2, ch07.quiz_07_3)]
    assert answers == ["one", "not at all", "it is lost"]


def test_an_aged_page_with_ad_bits_is_not_slow_because_of_its_age():
    assert "what has this SPTE lost beside A?" in ch07._look_at(ch07.AccessRow("EPT with A/D", "aged", "write"), "fast")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("fast", "No: give a list of 8 words"),
        (["fast"] * 7, "No: give a list of 8 words"),
        (["quick"] * 8, "No: the ways are no fault, fast, slow, emulated; got 'quick'"),
    ],
)
def test_answers_of_another_form_are_told_apart(answer, said, capsys):
    ch07.check_07_1(answer)
    assert capsys.readouterr().out.startswith(said)


def hold(vm, steps):
    vm.vcpu[0].attempt("write", 0x200)
    fault = vm.vcpu[0].fault
    for _ in range(steps):
        vm.step(fault)
    return fault


def take(vm):
    vm.clear_dirty_log(0, 0, 16, vm.get_dirty_log(0))


def take_after(steps, by=take):
    def run(vm):
        fault = hold(vm, steps)
        by(vm)
        if fault.todo:
            vm.run(fault)
        vm.vcpu[0].write(0x200)

    return run


def without_the_write(vm):
    fault = hold(vm, 2)
    take(vm)
    vm.run(fault)


def unfinished(vm):
    hold(vm, 2)
    take(vm)


def no_get(vm):
    vm.run(hold(vm, 2))


def another_kernel(vm):
    vm.kernel = Kernel.v5_19
    take_after(2)(vm)


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (take_after(2), "Yes."),
        (take_after(2, lambda vm: vm.clear_dirty_log(0, 0, 16, [True] * 16)), "Yes."),
        (lambda vm: None, "No: no write is missed; no fault has come as far as its mark."),
        (no_get, "No: no write is missed; nobody takes the mark"),
        (take_after(2, lambda vm: vm.get_dirty_log(0)), "No: no write is missed; nobody takes the mark"),
        (take_after(0), "No: no write is missed; nobody takes the mark"),
        (take_after(1), "No: no write is missed; nobody takes the mark"),
        (
            take_after(1, lambda vm: vm.clear_dirty_log(0, 0, 16, [True] * 16)),
            "No: no write is missed; bits are taken bef",
        ),
        (take_after(3), "No: no write is missed; the mark is taken after the exchange"),
        (without_the_write, "No: no write is missed; the mark is taken too early, as it should be. Who writes then"),
        (unfinished, "No: KVM for vCPU0 has not finished: its next step is fast_pf_fix_direct_spte"),
        (another_kernel, "No: your run has replaced the VM's kernel"),
        (lambda vm: vm.written.add(0x203), "No: your run loses a write under v6.0 as well"),
        (lambda vm: vm.write_past_kvm(0x200), "No: your run loses a write under v6.0 as well"),
        (lambda vm: vm.step(vm.vcpu[0].fault), "No: your answer raised ValueError"),
    ],
)
def test_losing_a_write_in_the_other_order(run, said, capsys):
    ch07.check_07_2(run)
    assert capsys.readouterr().out.startswith(said)


def disturbed(times, finish=True):
    def run(vm):
        fault = hold(vm, 1)
        for _ in range(times):
            if not vm.clear_flush_young(0x200, 0x201):
                vm.vcpu[1].read(0x200)
            vm.step(fault)
            vm.step(fault)
        if finish:
            vm.run(fault)

    return run


def spurious(vm):
    fault = hold(vm, 1)
    vm.clear_young(0x200, 0x201)
    vm.step(fault)
    vm.step(fault)
    vm.vcpu[1].write(0x200)
    vm.run(fault)


def taken_away(vm):
    fault = hold(vm, 1)
    vm.clear_young(0x200, 0x201)
    vm.step(fault)
    vm.step(fault)
    vm.invalidate_range(0x200, 0x201)
    vm.run(fault)


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (disturbed(2), "Yes."),
        (lambda vm: None, "No: vCPU 0 has not faulted."),
        (disturbed(0), "No: the exchange has failed not once."),
        (disturbed(1), "No: the exchange has failed once."),
        (disturbed(3), "No: the exchange has failed 3 times"),
        (disturbed(2, finish=False), "No: vCPU 0's fault is not finished: its next step is fast_pf_fix_direct_spte"),
        (spurious, "No: twice, but then it was spurious"),
        (taken_away, "No: twice, but then it went slow"),
        (another_kernel, "No: your run has replaced the VM's kernel"),
    ],
)
def test_two_exchanges_that_fail(run, said, capsys):
    ch07.check_07_3(run)
    assert capsys.readouterr().out.startswith(said)
