"""Chapter 02's questions and check cells."""

import itertools

import numpy as np
import pytest

from kvmbook import Hardware, Kernel, Vm
from kvmbook.exercises import ch02
from kvmbook.model import GetDirtyLog, MemoryRegion
from kvmbook.scenes import region


@pytest.mark.parametrize(
    ("number", "answer"),
    [
        (1, "in this report"),
        (2, "page 1"),
        (3, "one page is cleared and protected, the others are left alone"),
    ],
)
def test_questions(number, answer):
    quiz = getattr(ch02, f"quiz_02_{number}")()
    assert quiz.answer == answer and len(quiz.options) in (3, 4) and quiz.because.endswith(".")


@pytest.mark.parametrize("seed", range(1, 8))
def test_each_variant_of_exercise_1_has_four_answers_and_its_own_solution(seed, capsys):
    right = [ch02.errno_02_1(call) for call in ch02.calls_02_1(seed)]
    assert len(set(right)) == 4 and ch02.calls_02_1(seed) == ch02.calls_02_1(seed)
    ch02.check_02_1(right, seed=seed)
    assert capsys.readouterr().out == "Yes.\n"
    wrong = ["ENXIO", *right[1:]]
    ch02.check_02_1(wrong, seed=seed)
    assert capsys.readouterr().out.startswith("No: call 1 is not answered with ENXIO")
    assert ch02.calls_02_1(seed) != ch02.calls_02_1(seed + 1)


def parts(copies_first=False, asks_for_all=False, last=200, clears=True):
    """User space's loop, right but for what is asked for."""

    def loop(vm, send):
        report = vm.get_dirty_log(0)
        for first in range(0, last, 64):
            part = report[first : first + 64]
            pages = [first + int(page) for page in part.nonzero()[0]]
            for page in pages if copies_first else []:
                send(page)
            if clears:
                vm.clear_dirty_log(0, first, part.size, np.ones(part.size, bool) if asks_for_all else part)
            for page in [] if copies_first else pages:
                send(page)

    return loop


def at_once(vm, send):
    report = vm.get_dirty_log(0)
    vm.clear_dirty_log(0, 0, 200, report)
    for page in report.nonzero()[0]:
        send(page)


def until_empty(vm, send):
    while vm.get_dirty_log(0).any():
        parts()(vm, send)


def whole_blocks(vm, send):
    """CLEARs all of a block of 64 that has a dirty page, and sends all of it."""
    report = vm.get_dirty_log(0)
    for first in range(0, 200, 64):
        part = report[first : first + 64]
        if part.any():
            vm.clear_dirty_log(0, first, part.size, np.ones(part.size, bool))
            for page in range(part.size):
                send(first + page)


def whole_slot(vm, send):
    """Sends all of the slot if any of it is dirty."""
    report = vm.get_dirty_log(0)
    if report.any():
        for first in range(0, 200, 64):
            part = report[first : first + 64]
            vm.clear_dirty_log(0, first, part.size, np.ones(part.size, bool))
        for page in range(200):
            send(page)


def twice(vm, send):
    def send_twice(page):
        send(page)
        send(page)

    parts()(vm, send_twice)


def one_by_one(vm, send):
    """A CLEAR for each page, of the block that it lies in."""
    for page in vm.get_dirty_log(0).nonzero()[0]:
        first = int(page) // 64 * 64
        part = np.arange(first, min(first + 64, 200)) == page
        vm.clear_dirty_log(0, first, part.size, part)
        send(int(page))


def all_clears_first(vm, send):
    report = vm.get_dirty_log(0)
    for first in range(0, 200, 64):
        vm.clear_dirty_log(0, first, report[first : first + 64].size, report[first : first + 64])
    for page in report.nonzero()[0][::-1]:
        send(int(page))


def a_round_behind():
    """Sends in each round what the round before has cleared, and then what it has cleared itself."""
    cleared = []

    def loop(vm, send):
        while cleared:
            send(cleared.pop())
        parts()(vm, cleared.append)
        while cleared:
            send(cleared.pop())

    return loop


def never_arms():
    """Reads, sends, and in the sixth round is tired."""
    rounds = []

    def loop(vm, send):
        rounds.append(1)
        if len(rounds) < 6:
            parts(clears=False)(vm, send)

    return loop


def lose(who=1, again=1, until="take_bits"):
    def run(vm, get):
        vm.start(get)
        while get.todo[0] != until:
            vm.step(get)
        vm.vcpu[who].write(0x200)
        vm.run(get)
        if again is not None:
            vm.vcpu[again].write(0x200)

    return run


OLD, OF_THEM = "No: the guest has stopped, and", "pages of the destination are old. One is page"


@pytest.mark.parametrize(
    ("check", "answer", "said"),
    [
        ("check_02_1", "EINVAL", "No: give a list of 6"),
        ("check_02_1", ["0"], "No: give a list of 6"),
        ("check_02_1", ["EPERM"] * 6, "No: 'EPERM' is none of"),
        ("check_02_1", [0] * 6, 'No: write the names as strings, also "0"'),
        ("check_02_2", parts(), "Yes."),
        ("check_02_2", until_empty, "Yes."),
        ("check_02_2", one_by_one, "Yes."),
        ("check_02_2", all_clears_first, "Yes."),
        ("check_02_2", a_round_behind(), "Yes."),
        ("check_02_2", whole_blocks, "No: 788 times you send a page that no report has named since you sent it last"),
        ("check_02_2", whole_slot, "No: 748 times you send a page"),
        ("check_02_2", twice, "No: 182 times you send a page"),
        ("check_02_2", never_arms(), "No: page 0 is still writable, though you sent it"),
        ("check_02_2", parts(copies_first=True), f"{OLD} 11 {OF_THEM} 12: you copied it, and then you had its"),
        ("check_02_2", parts(asks_for_all=True), f"{OLD} 29 {OF_THEM} 6: a CLEAR took its bit, and no report"),
        (
            "check_02_2",
            parts(last=192),
            f"{OLD} 3 {OF_THEM} 192: a report has named it, and you have not sent it",
        ),
        ("check_02_2", parts(clears=False), "No: the guest has written nothing more, and you send 69"),
        ("check_02_2", at_once, "No: one CLEAR spans 200 pages"),
        ("check_02_2", lambda vm, send: [send(page) for page in range(200)], "No: 1000 times you send a page"),
        ("check_02_2", lambda vm, send: send(200), "No: your answer raised ValueError: page 200 is not in the slot"),
        ("check_02_2", lambda vm, send: None, f"{OLD} 36 {OF_THEM} 0: no report has named it"),
        ("check_02_3", lose(), "Yes."),
        ("check_02_3", lose(again=0), "Yes."),
        ("check_02_3", lose(again=None), "No: no write is missed; when is the SPTE writable"),
        ("check_02_3", lose(who=0), "No: your write in the middle is a TLB hit"),
        ("check_02_3", lambda vm, get: vm.run(get), "No: nobody writes while the harvest runs"),
        ("check_02_3", lambda vm, get: None, "No: begin the harvest that you are given"),
        ("check_02_3", lambda vm, get: vm.start(get), "No: user space has not finished: its next step is kick;"),
        (
            "check_02_3",
            lambda vm, get: setattr(vm, "kernel", Kernel.v5_19),
            "No: your run has replaced the VM's kernel",
        ),
    ],
)
def test_check_cells_answer_wrong_answers_with_a_hint(check, answer, said, capsys):
    getattr(ch02, check)(answer)
    assert capsys.readouterr().out.startswith(said)
    getattr(ch02, check)(None)
    assert capsys.readouterr().out == "Not yet: there is no answer to check.\n"


def test_the_kernels_own_order_survives_what_breaks_the_other():
    """Exercise 3's run, between any two steps of GET as it is, whichever vCPU writes."""
    for until in ("take_bits", "rearm", "kvm_arch_flush_remote_tlbs_memslot", "copy_to_user"):
        for who, again in itertools.product((0, 1), repeat=2):
            vm = Vm(Hardware.ept(ad_bits=False), Kernel.v6_0, vcpus=2)
            vm.set_user_memory_region(slot=0, base_gfn=0x200, npages=64, log_dirty_pages=True)
            vm.vcpu[0].write(0x200)
            lose(who, again, until)(vm, GetDirtyLog(0))
            assert not vm.missed_dirty(0).size


def test_region_counts_in_pages():
    assert region(1, 0, 2, 3, 0) == MemoryRegion(1, 0, 8192, 12288, 0)
