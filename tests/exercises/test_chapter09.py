"""Chapter 09's checks: right answers pass, wrong, lazy and cheating ones get a hint that helps."""

import pytest

from kvmbook import Kernel
from kvmbook.exercises import ch09
from kvmbook.scenes import BASE_GFN, LEAVES, reasons_of

AGED, GUARDED = 0x0750000040200870, 0x0350000040200870


def right(seed=1):
    return [reasons_of(LEAVES[name].fmt, spte) for name, spte in ch09.words_09_1(seed)]


def first_out(check, capsys, *answer):
    check(*answer)
    return capsys.readouterr().out.strip()


def test_the_quizzes_say_what_the_text_needs():
    answers = [quiz().answer for quiz in (ch09.quiz_09_1, ch09.quiz_09_2, ch09.quiz_09_3)]
    assert answers == ["1, dirty logging", "yes", "by a slow fault"]


def test_each_seed_draws_other_words_and_all_four_reasons_are_there():
    assert len({str(ch09.words_09_1(seed)) for seed in range(1, 301)}) == 300
    for seed in range(1, 101):
        assert set().union(*right(seed)) == {1, 2, 3, 4} and all(right(seed))
        assert not ch09.check_09_1.__wrapped__(right(seed), seed)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([{1}] * 8, "No: word 1 (EPT without A/D bits): look at R and X: has anybody"),
        ([{4}, {2}, *right()[2:]], "No: word 2 (NPT): look at MMU-writable: what does it say that KVM may do?"),
        ([{4}, {4}, *right()[2:]], "No: word 2 (NPT): look at R and X, and at the type"),
        ([*right()[:6], {2}, *right()[7:]], "No: word 7 (NPT): MMU-writable is 0; what does host-writable say?"),
        ([*right()[:6], {1}, *right()[7:]], "No: word 7 (NPT): look at MMU-writable once more"),
        ([*right()[:2], {2}, *right()[3:]], "No: word 3 (EPT without A/D bits): look at R and X: has anybody"),
        ([1, *right()[1:]], "No: word 1: give a set of numbers"),
        ([{5}, *right()[1:]], "No: word 1: give a set of numbers"),
        ([{1}], "No: give a list of 8 sets"),
        ("12341234", "No: give a list of 8 sets"),
        (right(2), "No: word"),
        (right(), "Yes."),
    ],
)
def test_eight_words(answer, said, capsys):
    assert first_out(ch09.check_09_1, capsys, answer).startswith(said)


def between(vm, guard):
    vm.step(guard)
    vm.vcpu[0].write(BASE_GFN)
    vm.run(guard)


def other_vcpu(vm, guard):
    vm.step(guard)
    vm.vcpu[1].write(BASE_GFN)
    vm.run(guard)


def another_kernel(vm, guard):
    vm.kernel = Kernel.v6_0
    vm.run(guard)


@pytest.mark.parametrize(
    ("prediction", "run", "said"),
    [
        ((AGED, 1), None, "No: guarding takes more than W"),
        ((0x0210000040200875, 1), None, "No: guarding gives no right back"),
        ((0x0350000040201870, 1), None, "No: your word differs from the model's in other bits"),
        ((GUARDED, 0), None, "No: the word is right; the flushes are not"),
        (GUARDED, None, "No: give a pair first"),
        (("0x0350000040200870", 1), None, "No: give the word as a number"),
        ((GUARDED, 1), None, "No: word and flushes are right; now the run"),
        ((GUARDED, 1), lambda vm, guard: None, "No: the guard is not done"),
        ((GUARDED, 1), lambda vm, guard: vm.run(guard), "No: nobody writes the page"),
        ((GUARDED, 1), lambda vm, guard: (vm.vcpu[0].write(BASE_GFN), vm.run(guard)), "No: that write came before"),
        ((GUARDED, 1), lambda vm, guard: (vm.run(guard), vm.vcpu[0].write(BASE_GFN)), "No: your write comes after"),
        ((GUARDED, 1), other_vcpu, "No: that write faults, so KVM sees it: which vCPU's TLB"),
        ((GUARDED, 1), another_kernel, "No: your run has replaced the VM's kernel"),
        ((GUARDED, 1), lambda vm, guard: vm.step(None), "No: your answer raised"),
        ((GUARDED, 1), between, "Yes."),
    ],
)
def test_aged_then_guarded(prediction, run, said, capsys):
    assert first_out(ch09.check_09_2, capsys, prediction, run).startswith(said)


def enable(vm):
    vm.set_user_memory_region(slot=0, base_gfn=0x200, npages=16, log_dirty_pages=True)


def made_twice(first=0x200, page=0x200):
    """The second hole by hand; pages below ``first`` keep their D."""

    def run(vm):
        vm.invalidate_range(first, 0x210)
        for cpu in vm.vcpu:
            cpu.attempt("read", page)
        vm.run(vm.vcpu[0].fault)
        vm.vcpu[0].read(page)
        vm.run(vm.vcpu[1].fault)
        enable(vm)
        vm.vcpu[0].write(page)

    return run


def made_once(vm):
    vm.invalidate_range(0x200, 0x210)
    enable(vm)
    vm.vcpu[0].write(0x200)


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (lambda vm: vm.vcpu[0].read(0x200), "No: your run must leave dirty logging enabled"),
        (
            lambda vm: vm.invalidate_range(0x200, 0x210) or vm.vcpu[0].attempt("read", 0x200),
            "No: KVM for vCPU0 has not",
        ),
        (lambda vm: [vm.vcpu[0].write(0x200), enable(vm)], "No: nobody writes after"),
        (lambda vm: setattr(vm, "kernel", Kernel.v6_0), "No: your run has replaced the VM's kernel"),
        (lambda vm: [enable(vm), vm.vcpu[0].write(0x200)], "No: no write is missed: enabling has flushed"),
        (made_twice(0x201, 0x20F), "No: no write is missed: enabling has flushed"),
        (made_once, "No: no write is missed; look at D"),
        (lambda vm: [enable(vm), vm.write_past_kvm(0x200)], 'No: your run loses a write under "always" as well'),
        (made_twice(), "Yes."),
    ],
)
def test_against_the_alternative(run, said, capsys):
    assert first_out(ch09.check_09_3, capsys, run).startswith(said)
