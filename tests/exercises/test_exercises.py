"""Exercises and quizzes: wrong answers get a hint, no answer is never right, and what is revealed is what the model says."""

import importlib
import pathlib

import numpy as np
import pytest

from kvmbook import FlushPolicy, Hardware, Kernel
from kvmbook import exercises as mechanism
from kvmbook.exercises import Answer, checker, question
from kvmbook.search import BitRule, Grain, explore, leaves_met

NO_AD = Hardware.ept(ad_bits=False)
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
    assert quiz.predict(quiz.answer).startswith(f"Yes: {quiz.answer}. ") and quiz.because.endswith(".")
    wrong = next(option for option in quiz.options if option != quiz.answer)
    assert quiz.predict(wrong).startswith(f"You said: {wrong}. The model says: {quiz.answer}. ")
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


class ChangedOrTracked:
    """The tempting rule: flush if an access-tracked SPTE is met."""

    unconditional = False

    def after_write_protect(self, fmt, old, new, answer):
        return answer | fmt.is_access_track_spte(old)

    after_clear_dirty = after_write_protect


class AllOfThem:
    """Flush only if every page is MMU-writable: wrong as soon as there is another page."""

    unconditional = False

    def after_write_protect(self, fmt, old, new, answer):
        return np.all(fmt.is_mmu_writable_spte(old))

    after_clear_dirty = after_write_protect


def enable(vm):
    vm.set_user_memory_region(slot=0, base_gfn=0x200, npages=16, log_dirty_pages=True)


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


class Always:
    unconditional = True

    def after_write_protect(self, fmt, old, new, answer):
        return answer & False

    after_clear_dirty = after_write_protect


AGED = [f"{step} page {page}" for step in ("vCPU0 reads", "host ages") for page in (0, 1)]
ENABLING = [f"user space {name}" for name in (
    "enables", "kvm_swap_active_memslots", "synchronize_srcu", "kvm_arch_commit_memory_region", "write_protect_tdp",
    "flush_if_owed", "return_to_user_space",
)]  # fmt: skip
WRITES = ["vCPU0 writes page 0", "vCPU0 writes page 1"]


def search(hardware=NO_AD, kernel=Kernel.v5_19, flush_young=False, without=("ages",), policy=None):
    kernel = kernel.with_(flush=policy) if policy else kernel
    kernel = kernel.with_(clear_flush_young_flushes=flush_young)
    return explore(hardware, kernel, grain=Grain.ACCESS, without=without)


def rule(chooses):
    return BitRule(frozenset(kind for kind in leaves_met(Hardware.npt()) if chooses(kind)))


def nested_loss(vm):
    vm.vcpu[0].read(0x200, l2=True)
    vm.clear_young(0x200, 0x201)
    enable(vm)
    vm.vcpu[0].write(0x200, l2=True)


def unlucky(vm):
    vm.vcpu[0].read(0x200)
    vm.clear_young(0x200, 0x201)
    vm.vcpu[1].read(0x200)
    enable(vm)
    vm.vcpu[0].write(0x200)


@pytest.mark.parametrize(
    ("check", "answer", "said"),
    [
        ("check_01_1", lambda vm: vm.vcpu[1].read(0x200), "No: 16 writes are still missed"),
        ("check_01_1", lambda vm: [vm.vcpu[1].write(0x200), vm.vcpu[1].write(0x201)], "No: exactly one vCPU"),
        ("check_01_1", lambda vm: [cpu.write(0x200) for cpu in vm.vcpu], "No: exactly one vCPU"),
        ("check_01_1", lambda vm: [vm.vcpu[1].read(0x200), vm.kvm_flush_remote_tlbs()], "No: exactly one vCPU"),
        ("check_01_1", lambda vm: vm.vcpu[0].write(0x200), "No: your access never reached KVM"),
        ("check_01_1", lambda vm: vm.vcpu[0].write(0x999), "No: that page is in no slot"),
        ("check_01_1", lambda vm: vm.nonsense, "No: your answer raised AttributeError"),
        ("check_01_1", lambda vm: [vm.vcpu[0].evict(0x205), vm.vcpu[0].write(0x205)], "Yes."),
        ("check_01_2", lambda vm: vm.vcpu[0].write(0x200), "No: your run must leave dirty logging enabled"),
        ("check_01_2", lambda vm: enable(vm), "No: 0 pages of the slot are written"),
        ("check_01_2", lambda vm: vm.set_user_memory_region(slot=0), "No: your run must leave"),
        ("check_01_2", five_by_another_slot, "Yes."),
        ("check_01_3", lambda vm: vm.vcpu[0].evict(0x200), "No: your rescue touches slot 0"),
        ("check_01_3", lambda vm: vm.set_user_memory_region(slot=0), "No: your rescue touches slot 0"),
        ("check_01_3", lambda vm: vm.vcpu[1].write(0x1001), "No: the write is missed"),
        ("check_01_3", lambda vm: vm.invalidate_range(0, 0x300), "No: your rescue touches slot 0"),
        ("check_01_3", lambda vm: vm.invalidate_range(0x1000, 0x1001), "Yes."),
        ("check_01_3", lambda vm: vm.set_user_memory_region(slot=1), "Yes."),
        ("check_08_1", ["split_huge_tdp_sptes"], "No: step 1 is not 'split_huge_tdp_sptes'"),
        ("check_08_1", [], "No: this function takes 4 steps here, you name 0"),
        ("check_08_2", ChangedOrTracked, "No: pass an object"),
        ("check_08_2", ChangedOrTracked(), "No: a write is missed if the page is read again by vCPU 1"),
        ("check_08_2", AllOfThem(), "No: a write is missed if the page is untouched since ageing, beside one"),
        ("check_08_2", Always(), "No: it flushes although the only mapped page is read-only"),
        ("check_08_3", lambda vm: vm.vcpu[0].attempt("read", 0x200), "No: KVM for vCPU0: kvm_faultin_pfn is still"),
        ("check_08_3", lambda vm: vm.vcpu[0].read(0x200), "No: your run must leave dirty logging enabled"),
        ("check_08_3", lambda vm: [vm.vcpu[0].read(0x200), enable(vm)], "No: nobody writes"),
        ("check_08_3", lambda vm: [enable(vm), vm.vcpu[0].write(0x200)], "No: no write is missed; look at D"),
        ("check_10_1", "ages", "No: give one step in a list"),
        ("check_10_1", ("ages page 0",), "No: 'ages page 0' is none of the steps that somebody chooses; give the name"),
        ("check_10_2", "vCPU0 reads page 0", "No: give a list"),
        ("check_10_3", search(), "No: give two results"),
        ("check_10_3", (search(policy=FlushPolicy.NEVER), search(kernel=Kernel.v6_0)), "No: change that one switch"),
        ("check_10_1", ("ages", "gets"), "No: give one step in a list"),
        ("check_10_1", ("writes",), "No: that one must stay"),
        ("check_10_1", ("flushes",), "No: 'flushes' is none of the steps"),
        ("check_10_1", ("reads",), "No: a write is still lost"),
        ("check_10_1", ("ages",), "Yes."),
        (
            "check_10_2",
            ["vCPU0 reads page 2"],
            "No: step 1, 'vCPU0 reads page 2', is not possible there; possible: vCPU0",
        ),
        ("check_10_2", [*AGED, *ENABLING, "vCPU0 writes page 0"], "No: 1 of 2 writes are lost"),
        ("check_10_2", [*AGED, "vCPU0 forgets page 0", *ENABLING, *WRITES], "No: 1 of 2 writes are lost"),
        ("check_10_2", [*AGED, *ENABLING, "vCPU0 reads page 0", *WRITES], "No: both are lost, in 14 steps"),
        ("check_10_2", [*AGED, *ENABLING, *WRITES], "Yes."),
        ("check_10_3", (search(Hardware.npt()), search(Hardware.npt())), "No: the bug is about CPUs without A/D bits"),
        ("check_10_3", (search(flush_young=True), search()), "No: both kernels need clear_flush_young_flushes=False"),
        ("check_10_3", (search(without=()), search()), 'No: leave out "ages"'),
        ("check_10_3", (search(kernel=Kernel.v6_0), search()), "No: the first result should lose a write"),
        ("check_10_3", (search(), search(kernel=Kernel.v6_0)), "Yes."),
        ("check_11_1", FlushPolicy.ALWAYS, "No: give a BitRule"),
        ("check_11_1", rule(lambda kind: False), "No: a write can be lost"),
        ("check_11_1", rule(lambda kind: True), "No: it is sound, but 4 of its 8 kinds could be left out"),
        ("check_11_1", rule(lambda kind: kind.before & 1), "Yes."),
        ("check_11_2", lambda vm: unlucky(vm), "No: no write is missed; the nested guest's leaves"),
        ("check_11_2", lambda vm: vm.vcpu[0].read(0x200, l2=True), "No: your run must leave"),
        ("check_11_2", nested_loss, "Yes."),
        ("check_11_3", lambda vm: enable(vm), "No: no write is missed"),
        ("check_11_3", lambda vm: setattr(vm, "kernel", Kernel.v6_0), "No: that is another kernel"),
        ("check_11_3", unlucky, "Yes."),
    ],
)
def test_check_cells_answer_wrong_answers_with_a_hint(check, answer, said, capsys):
    call = getattr(chapter(check.split("_")[1]), check)
    call(answer)
    assert capsys.readouterr().out.startswith(said)
    call(None)
    assert capsys.readouterr().out == "Not yet: there is no answer to check.\n"
