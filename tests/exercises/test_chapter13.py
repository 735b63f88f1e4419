"""Chapter 13: the checks take right answers, and give wrong and lazy ones a hint that helps."""

import pytest

from kvmbook import Hardware
from kvmbook.exercises.ch13 import (
    check_13_1,
    check_13_2,
    check_13_3,
    quiz_13_1,
    quiz_13_2,
    quiz_13_3,
)
from kvmbook.model import GetDirtyLog
from kvmbook.scenes import HIDDEN, exhibit, hidden_rooms, laboratory


def says(check, answer, capsys, **variant):
    check(answer, **variant)
    return capsys.readouterr().out.strip()


def test_the_answers_of_the_questions():
    assert [quiz().answer for quiz in (quiz_13_1, quiz_13_2, quiz_13_3)] == ["no", "no", "yes"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([(1, 3), (11, 4)], "Yes."),
        ([(1, 3)], "No: 1 found; there are more"),
        ([(1, 3), (3, 1)], "No: 1 found; there are more"),
        ([(1, 9)], "No: rooms 1 and 9: ask exhibit(1).bad.differs_from(exhibit(9).bad)"),
        ("1, 3", "No: give a list of pairs of rooms, such as [(1, 2)]"),
    ],
)
def test_pairs_of_rooms(answer, said, capsys):
    assert says(check_13_1, answer, capsys) == said


def up_to(step, guards=True):
    def run(vm):
        get = vm.start(GetDirtyLog(0))
        while get.todo[0] != step:
            vm.step(get)
        if guards:
            vm.track_guest_page_table(0x200)

    return run


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (up_to("kvm_arch_flush_remote_tlbs_memslot"), "Yes."),
        (up_to("copy_to_user"), "No: the check's last write ends as emulated"),
        (up_to("take_bits"), "Yes."),  # the guard waits for the lock, and that is let go before the flush
        (up_to("copy_to_user", guards=False), "No: gfn 0x200 is not guarded at the end"),
        (3, "No: give a function of one VM"),
    ],
)
def test_between_the_pass_and_its_flush(run, said, capsys):
    assert says(check_13_2, run, capsys).startswith(said)


def test_a_write_by_somebody_else_is_no_guest_that_goes_unseen(capsys):
    assert says(check_13_2, lambda vm: vm.write_tracked.add(0x200), capsys).startswith("No: it does harm on a good")


@pytest.mark.parametrize("seed", range(13, 18))
def test_kernels_without_names(seed, capsys):
    rooms = hidden_rooms(seed)
    assert len(set(rooms)) == 3 and set(rooms) <= set(HIDDEN)
    assert says(check_13_3, rooms, capsys, seed=seed) == "Yes."
    wrong = next(room for room in HIDDEN if room != rooms[0])
    said = says(check_13_3, [wrong, *rooms[1:]], capsys, seed=seed)
    assert said.startswith(f"No: kernel 1: room {wrong} would show it so: ")
    assert says(check_13_3, [1, 1, 1], capsys, seed=seed) == "No: kernel 1: it is one of the five rooms"
    assert says(check_13_3, rooms[:2], capsys, seed=seed) == "No: give a list of 3 rooms"


def test_a_laboratory_builds_the_rooms_kernel_and_does_not_tell_its_name():
    for room in HIDDEN:
        vm = laboratory(room)(Hardware.ept(), vcpus=2)
        assert str(room) not in vm.kernel.name and vm.kernel.differs_from(exhibit(room).bad) == ()
        assert len(vm.vcpu) == 2 and vm.memslots.slots[0, 0].base_gfn == 0x200
    assert len({seed: tuple(hidden_rooms(seed)) for seed in range(40)}.values()) > 20
