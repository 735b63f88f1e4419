"""Exercises and quizzes: wrong answers get a hint, no answer is never right, and what is revealed is what the model says."""

import importlib
import pathlib

import pytest

from kvmbook import FlushPolicy, Hardware, Kernel
from kvmbook import exercises as mechanism
from kvmbook.exercises import Answer, checker, question
from kvmbook.search import BitRule, act, leaves_met, smallest_vm

CHAPTERS = sorted(path.stem[2:] for path in pathlib.Path(mechanism.__file__).parent.glob("ch*.py"))


def chapter(number):
    return importlib.import_module(f"kvmbook.exercises.ch{number}")


QUESTIONS = [name for number in CHAPTERS for name in dir(chapter(number)) if name.startswith("quiz_")]


# ---- predict, then reveal --------------------------------------------------------------------------------------------


def test_every_chapter_has_questions_and_three_checks():
    for number in CHAPTERS:
        names = dir(chapter(number))
        assert sum(name.startswith(f"check_{number}_") for name in names) == 3, number
        assert sum(name.startswith(f"quiz_{number}_") for name in names) >= 3, number


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_reveals_its_answer_only_after_a_prediction(name):
    quiz = getattr(chapter(name.split("_")[1]), name)()
    assert quiz.readout == "" and quiz.because not in repr(quiz) and quiz.asked.endswith((".", "?"))
    assert quiz.predict(quiz.answer).startswith(f'Right. The answer is "{quiz.answer}". ') and quiz.because.endswith(
        "."
    )
    wrong = next(option for option in quiz.options if option != quiz.answer)
    said = f'Not what the model says. You said "{wrong}"; the answer is "{quiz.answer}". '
    assert quiz.predict(wrong).startswith(said)
    with pytest.raises(ValueError, match="the options are"):
        quiz.predict("perhaps")
    assert quiz.predicted == wrong


def test_a_question_whose_answer_is_no_option_is_refused():
    @question("yes", "no")
    def quiz():
        """Is it?"""
        return Answer("perhaps", "It may be.")

    with pytest.raises(ValueError, match="'perhaps', must be one of 2 to 4 different options"):
        quiz()


def test_a_check_hands_a_variant_on_and_a_wrong_call_is_no_wrong_answer(capsys):
    @checker
    def check(answer, seed=1):
        return "" if answer == seed else f"the answer to {seed} is another"

    check(7, seed=7)
    check(7)
    check(None, seed=3)
    assert capsys.readouterr().out.splitlines() == [
        "Yes.", "No: the answer to 1 is another", "Not yet: there is no answer to check.",
    ]  # fmt: skip
    with pytest.raises(TypeError):
        check(7, sed=7)


# ---- check cells -----------------------------------------------------------------------------------------------------


def enable(vm):
    vm.set_user_memory_region(slot=0, base_gfn=0x200, npages=16, log_dirty_pages=True)


def ages_then_writes(read, age):
    """vCPU 0 reads the first pages, the host ages the first pages, logging is enabled, vCPU 0 writes all."""

    def run(vm):
        for gfn in range(0x200, 0x200 + read):
            vm.vcpu[0].read(gfn)
        if age:
            vm.clear_young(0x200, 0x200 + age)
        enable(vm)
        for gfn in range(0x200, 0x210):
            vm.vcpu[0].write(gfn)

    return run


def five_by_another_slot(vm):
    """Right, and quite different from the book's solution: a second slot's flush saves the other eleven."""
    for gfn in range(0x200, 0x210):
        vm.vcpu[0].read(gfn)
    vm.clear_young(0x200, 0x210)
    enable(vm)
    for gfn in range(0x200, 0x205):
        vm.vcpu[0].write(gfn)
    vm.set_user_memory_region(slot=1, base_gfn=0x1000, npages=1)
    vm.vcpu[1].write(0x1000)
    vm.set_user_memory_region(slot=1, base_gfn=0x1000, npages=1, log_dirty_pages=True)
    for gfn in range(0x205, 0x210):
        vm.vcpu[0].write(gfn)


AGED = [f"{step} page {page}" for step in ("vCPU0 reads", "host ages") for page in (0, 1)]
ENABLING = [f"user space {name}" for name in (
    "enables", "kvm_swap_active_memslots", "synchronize_srcu", "kvm_arch_commit_memory_region", "write_protect_tdp",
    "flush_if_owed", "return_to_user_space",
)]  # fmt: skip
WRITES = ["vCPU0 writes page 0", "vCPU0 writes page 1"]


def rule(chooses):
    return BitRule(frozenset(kind for kind in leaves_met(Hardware.npt()) if chooses(kind)))


def nested_loss(vm):
    vm.vcpu[0].read(0x200, l2=True)
    vm.clear_young(0x200, 0x201)
    enable(vm)
    vm.vcpu[0].write(0x200, l2=True)


def one_test(slots=(0, 1, 2)):
    """A run that meets one kind of leaf in each slot: writable, access-tracked, restored without W."""

    def run(vm):
        for slot in slots:
            gfn = 0x200 + 0x100 * slot
            vm.vcpu[0].read(gfn)
            if slot:
                vm.clear_young(gfn, gfn + 1)
            if slot == 2:
                vm.vcpu[1].read(gfn)
            vm.set_user_memory_region(slot=slot, base_gfn=gfn, npages=4, log_dirty_pages=True)
            vm.vcpu[0].write(gfn)

    return run


def log_all(vm):
    for slot in range(3):
        vm.set_user_memory_region(slot=slot, base_gfn=0x200 + 0x100 * slot, npages=4, log_dirty_pages=True)


def helps(run, steps=lambda run: range(1, len(run.trace) + 1)):
    """The steps of ``run``, of those asked for, after which a flush saves the write."""
    found = []
    for moment in steps(run):
        vm = smallest_vm(run.hardware, run.kernel, run.pages, run.vcpus, run.grain)
        for number, action in enumerate(run.trace, 1):
            act(vm, action, run.grain)
            if number == moment:
                vm.kvm_flush_remote_tlbs()
        if not vm.missed_dirty(0).size:
            found.append(moment)
    return found


BLAMED = [("ages",), ("ages", "ages and flushes"), None]


@pytest.mark.parametrize(
    ("check", "answer", "said"),
    [
        ("check_01_1", lambda vm: vm.vcpu[1].read(0x200), "No: 16 writes are still missed"),
        ("check_01_1", lambda vm: [vm.vcpu[1].write(0x200), vm.vcpu[1].write(0x201)], "No: exactly one vCPU"),
        ("check_01_1", lambda vm: [cpu.write(0x200) for cpu in vm.vcpu], "No: exactly one vCPU"),
        ("check_01_1", lambda vm: [vm.vcpu[1].read(0x200), vm.kvm_flush_remote_tlbs()], "No: exactly one vCPU"),
        ("check_01_1", lambda vm: vm.vcpu[0].write(0x200), "No: your access never reached KVM"),
        ("check_01_1", lambda vm: vm.vcpu[0].write(0x999), "No: the page that you touch is in no slot"),
        ("check_01_1", lambda vm: [vm.vcpu[0].tlb.flush(), vm.vcpu[1].read(0x200)], "No: you reach into the model"),
        (
            "check_01_1",
            lambda vm: [setattr(vm, "kernel", Kernel.v6_0), vm.vcpu[1].read(0x200)],
            "No: you have replaced",
        ),
        ("check_01_1", lambda vm: vm.nonsense, "No: your answer raised AttributeError"),
        ("check_01_1", lambda vm: [vm.vcpu[0].evict(0x205), vm.vcpu[0].write(0x205)], "Yes."),
        ("check_01_2", lambda vm: vm.vcpu[0].write(0x200), "No: your run must leave dirty logging enabled"),
        ("check_01_2", lambda vm: enable(vm), "No: 0 pages of the slot are written"),
        ("check_01_2", lambda vm: vm.set_user_memory_region(slot=0), "No: your run must leave"),
        ("check_01_2", ages_then_writes(read=16, age=5), "No: no write is missed: enabling flushed. Which SPTE"),
        ("check_01_2", ages_then_writes(read=5, age=0), "No: no write is missed: enabling flushed. Which SPTE"),
        (
            "check_01_2",
            ages_then_writes(read=0, age=16),
            "No: 0 writes are missed, not 5; for how many pages has a TLB",
        ),
        (
            "check_01_2",
            ages_then_writes(read=16, age=16),
            "No: 16 writes are missed, not 5; for how many pages has a TLB",
        ),
        ("check_01_2", ages_then_writes(read=5, age=16), "Yes."),
        ("check_01_2", lambda vm: [ages_then_writes(5, 16)(vm), vm.kvm_flush_remote_tlbs()], "No: you reach into"),
        ("check_01_2", lambda vm: setattr(vm, "kernel", Kernel.v6_0), "No: you have replaced the VM's kernel"),
        ("check_01_2", five_by_another_slot, "Yes."),
        ("check_01_3", lambda vm: vm.vcpu[0].evict(0x200), "No: your rescue touches slot 0"),
        ("check_01_3", lambda vm: vm.set_user_memory_region(slot=0), "No: your rescue touches slot 0"),
        ("check_01_3", lambda vm: vm.vcpu[1].write(0x1001), "No: the write is missed"),
        ("check_01_3", lambda vm: vm.invalidate_range(0, 0x300), "No: your rescue touches slot 0"),
        ("check_01_3", lambda vm: vm.clear_flush_young(0x200, 0x210), "No: your rescue touches slot 0"),
        ("check_01_3", lambda vm: vm.clear_flush_young(0, 0x2000), "No: your rescue touches slot 0"),
        ("check_01_3", lambda vm: vm.vcpu[0].tlb.flush(), "No: you reach into the model"),
        ("check_01_3", lambda vm: vm.kvm_flush_remote_tlbs(), "No: you reach into the model"),
        ("check_01_3", lambda vm: setattr(vm, "kernel", Kernel.v6_0), "No: you have replaced the VM's kernel"),
        ("check_01_3", lambda vm: vm.clear_young(0x1000, 0x1008), "No: the write is missed"),
        ("check_01_3", lambda vm: vm.clear_flush_young(0x1000, 0x1008), "Yes."),
        ("check_01_3", lambda vm: vm.invalidate_range(0x1000, 0x1001), "Yes."),
        ("check_01_3", lambda vm: vm.set_user_memory_region(slot=1), "Yes."),
        ("check_10_1", "abc", "No: give three answers"),
        ("check_10_1", ("ages",), "No: give three answers"),
        ("check_10_1", ["ages", None, None], "No: a: give the steps in a list or tuple"),
        ("check_10_1", [("ages page 0",), None, None], "No: a: 'ages page 0' is none of reads, forgets"),
        ("check_10_1", [("writes",), None, None], "No: a: 'writes' must stay"),
        ("check_10_1", [("reads",), None, None], "No: a: a write is still lost"),
        ("check_10_1", [("ages", "gets"), *BLAMED[1:]], "No: a: fewer steps are enough"),
        ("check_10_1", [None, None, None], "No: a: there are steps whose absence saves every write"),
        ("check_10_1", [BLAMED[0], BLAMED[0], None], "No: b: a write is still lost"),
        ("check_10_1", [*BLAMED[:2], ("reads", "exits")], "No: c: a write is still lost"),
        ("check_10_1", BLAMED, "Yes."),
        ("check_10_2", "vCPU0 reads page 0", "No: give a list"),
        (
            "check_10_2",
            ["vCPU0 reads page 2"],
            "No: step 1, 'vCPU0 reads page 2', is not possible there; possible: vCPU0",
        ),
        ("check_10_2", [*AGED, *ENABLING, "vCPU0 writes page 0"], "No: 1 of 2 writes are lost; after enabling has"),
        ("check_10_2", [*AGED, *ENABLING[:-1], *WRITES], "No: 0 of 2 writes are lost; enabling has not returned"),
        (
            "check_10_2",
            [*AGED, *ENABLING[:-1], *WRITES, ENABLING[-1]],
            "No: 0 of 2 writes are lost; after enabling has",
        ),
        ("check_10_2", [*AGED, "vCPU0 forgets page 0", *ENABLING, *WRITES], "No: 1 of 2 writes are lost; can one pass"),
        ("check_10_2", [*AGED, *ENABLING, "vCPU0 reads page 0", *WRITES], "No: both writes are lost, in 14 steps"),
        ("check_10_2", [*AGED, *ENABLING, *WRITES], "Yes."),
        ("check_10_3", [7], "No: give a function"),
        ("check_10_3", lambda run: [0], "No: the run of reclaim alone has the steps 1 to 15; you name 0"),
        ("check_10_3", lambda run: range(5, 15), "No: the run of reclaim alone: a flush after step 5 comes too early"),
        (
            "check_10_3",
            lambda run: range(7, 16),
            "No: the run of reclaim alone: a flush after step 15 comes too early or",
        ),
        ("check_10_3", lambda run: range(7, 15), "No: the run of reclaim alone: you miss 1 of its"),
        ("check_10_3", lambda run: range(6, 15), "No: exercise 1's run c"),
        (
            "check_10_3",
            lambda run: {15: range(6, 15), 16: range(4, 16), 12: range(1, 12)}[len(run.trace)],
            "No: a run in which vCPU 0 forgets the page, and reads it again: a flush after step 1",
        ),
        ("check_10_3", helps, "Yes."),
        ("check_11_1", FlushPolicy.ALWAYS, "No: give a BitRule"),
        ("check_11_1", rule(lambda kind: False), "No: a write can be lost"),
        ("check_11_1", rule(lambda kind: True), "No: your rule is sound, but 4 of its 8 kinds could be left out"),
        ("check_11_1", rule(lambda kind: kind.before & 1), "Yes."),
        ("check_11_2", enable, "No: no write is missed; the nested guest's leaves"),
        ("check_11_2", lambda vm: vm.vcpu[0].read(0x200, l2=True), "No: your run must leave"),
        ("check_11_2", lambda vm: [enable(vm), vm.write_past_kvm(0x200)], "No: your run loses a write under"),
        ("check_11_2", nested_loss, "Yes."),
        ("check_11_3", lambda vm: vm.set_user_memory_region(slot=1), "No: keep the three slots"),
        ("check_11_3", lambda vm: [log_all(vm), vm.write_past_kvm(0x200)], "No: your run loses a write under"),
        ("check_11_3", lambda vm: None, "No: no write is missed even if nothing is ever flushed"),
        ("check_11_3", lambda vm: setattr(vm, "kernel", Kernel.v6_0), "No: your run has replaced the VM's kernel"),
        (
            "check_11_3",
            one_test([2]),
            "No: the rule that flushes for all but [W, MW, HW, A, D; loses W, D] and [MW, HW, tracked; unchanged] passes",
        ),
        (
            "check_11_3",
            one_test([0, 1]),
            "No: the rule that flushes for all but [MW, HW, A; unchanged] passes your test",
        ),
        ("check_11_3", one_test(), "Yes."),
    ],
)
def test_check_cells_answer_wrong_answers_with_a_hint(check, answer, said, capsys):
    call = getattr(chapter(check.split("_")[1]), check)
    call(answer)
    assert capsys.readouterr().out.startswith(said)
    call(None)
    assert capsys.readouterr().out == "Not yet: there is no answer to check.\n"
