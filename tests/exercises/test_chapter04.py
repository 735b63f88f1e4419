"""Chapter 04's questions and check cells: right, wrong, lazy and cheating answers."""

import pytest

from kvmbook.exercises import ch04
from kvmbook.model import TlbEntry

GFN = ch04.BASE_GFN


def said(capsys, check, *answer, **variant):
    check(*answer, **variant)
    return capsys.readouterr().out


def test_the_answers_of_the_questions():
    asked = (ch04.quiz_04_1, ch04.quiz_04_2, ch04.quiz_04_3)
    assert [quiz().answer for quiz in asked] == ["walk", "nothing", "a fault: KVM sees it"]


# ---- 1 ---------------------------------------------------------------------------------------------------------------


def test_every_event_has_its_answer_and_all_four_answers_occur():
    answers = {event.said: ch04._forgets(event) for event in ch04.EVENTS}
    assert set(answers.values()) == set(ch04.WHO)
    assert answers["clear_young of page 0"] == answers["GET of slot 0"] == answers["vCPU 0 exits"] == "nobody"
    assert answers["GET of slot 1"] == answers["clear_flush_young of page 0"] == "both"


@pytest.mark.parametrize("seed", range(1, 6))
def test_who_forgets(capsys, seed):
    right = [ch04._forgets(event) for event in ch04._drawn(seed)]
    assert ch04.events_04_1(seed) == [event.said for event in ch04._drawn(seed)]
    assert said(capsys, ch04.check_04_1, right, seed=seed) == "Yes.\n"
    for number, event in enumerate(ch04._drawn(seed)):
        for other in set(ch04.WHO) - {right[number]}:
            hint = said(capsys, ch04.check_04_1, [*right[:number], other, *right[number + 1 :]], seed=seed)
            assert hint.startswith(f"No: number {number + 1}, {event.said!r}, is not right: {event.hint}")
    assert "is not right (" in said(capsys, ch04.check_04_1, ["both"] * 8, seed=seed)


@pytest.mark.parametrize(
    ("answers", "hint"),
    [("nobody", "give 8 answers"), (["nobody"], "give 8 answers"), (["all"] * 8, "'all' is none of nobody")],
)
def test_answers_in_another_form_are_told_the_form(capsys, answers, hint):
    assert hint in said(capsys, ch04.check_04_1, answers)


# ---- 2 ---------------------------------------------------------------------------------------------------------------


def three_rights(vm):
    vm.vcpu[2].read(GFN)
    vm.vcpu[0].attempt("write", GFN)
    vm.run(vm.vcpu[0].fault)
    vm.vcpu[1].read(GFN)
    vm.vcpu[0].write(GFN)


def write_first(vm):
    vm.vcpu[0].write(GFN)
    vm.vcpu[1].read(GFN)
    vm.vcpu[2].read(GFN)


def read_too_late(vm):
    vm.vcpu[2].read(GFN)
    vm.vcpu[0].write(GFN)
    vm.vcpu[1].read(GFN)


def leave_a_fault(vm):
    vm.vcpu[2].read(GFN)
    vm.vcpu[0].attempt("write", GFN)


def fill_by_hand(vm):
    for vcpu, (write, dirty) in zip(vm.vcpu, ((True, True), (True, False), (False, False)), strict=True):
        vcpu.tlb.fill("L1", GFN, TlbEntry(1, 1, True, write, True, dirty))


@pytest.mark.parametrize(
    ("run", "hint"),
    [
        (three_rights, "Yes."),
        (lambda vm: None, "vCPU 0 remembers nothing, and should remember RWX"),
        (write_first, "vCPU 1 remembers RWX, and should remember RWX, clean"),
        (read_too_late, "vCPU 1 remembers RWX, and should remember RWX, clean; an entry is clean if"),
        (leave_a_fault, "has not finished"),
        (fill_by_hand, "a TLB is filled by a walk"),
        (lambda vm: vm.vcpu[3], "your answer raised IndexError"),
    ],
)
def test_three_rights_of_one_page(capsys, run, hint):
    assert hint in said(capsys, ch04.check_04_2, run)


def test_the_page_of_exercise_2_has_neither_w_nor_d_and_no_tlb_knows_it():
    vm = ch04.protected_and_clean()
    spte = vm.spte(GFN)
    assert not vm.fmt.is_writable_pte(spte) and not spte & vm.fmt.shadow_dirty_mask
    assert vm.fmt.is_mmu_writable_spte(spte) and not any(vcpu.tlb.entries for vcpu in vm.vcpu)


# ---- 3 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predicate", "hint"),
    [
        (lambda f, e, s: e.write and e.dirty and not (f.is_writable_pte(s) and f.is_dirty_spte(s)), "Yes."),
        (lambda f, e, s: True, "a write through an entry without W faults"),
        (lambda f, e, s: False, "the entry lets a write pass that the SPTE would stop"),
        (lambda f, e, s: e.write and e.dirty, "without the entry the SPTE lets the write pass, too"),
        (lambda f, e, s: e.write and not f.is_dirty_spte(s), "a write through a clean entry has to walk"),
        (lambda f, e, s: e.write and e.dirty and not f.is_writable_pte(s), "would the CPU not set D there?"),
        (lambda f, e, s: e.write and e.dirty and not f.is_dirty_spte(s), "(write-protected): your function says False"),
        (lambda f, e, s: 1, "return True or False; your function returned 1"),
        (lambda f, e: True, "your answer raised TypeError"),
    ],
)
def test_may_it_escape(capsys, predicate, hint):
    assert hint in said(capsys, ch04.check_04_3, predicate)
