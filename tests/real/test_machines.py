"""A recording answers as the machine did; the model, asked from outside, shows what user space sees and no more."""

import errno
import json
import os
import pathlib
from dataclasses import replace

import pytest

from kvmbook import Hardware, Kernel, Vm
from kvmbook.real import (
    QUESTIONS,
    ModelVm,
    Outside,
    RealVm,
    Said,
    Seen,
    as_hardware,
    as_kernel,
    ask_all,
    asking,
    calls,
    clear_reports,
    live,
    machines,
    questions,
    record,
    recorded,
    refusal,
    ring_reports,
)
from kvmbook.real.__main__ import main
from kvmbook.real.machines import NotRecorded, Recording, without_local_name
from kvmbook.views import Table

MACHINE = recorded()
MODEL = MACHINE.model()
CASES = [(name, case) for name, question in QUESTIONS.items() for case in question.cases]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_the_recorded_machine_and_its_model_say_the_same(name, case):
    here, there = (QUESTIONS[name].told(case, who) for who in (MODEL, MACHINE))
    if name == "chapter 1":  # nobody can age there
        assert there[1].said[-1].answer == there[0] == "ENOSYS" and here[0] == [0]
    else:
        assert here[0] == there[0]
        assert [one for one in here[1].said if one.name != "flush_requests"] == [
            one for one in there[1].said if one.name != "flush_requests"
        ]


def test_every_question_has_a_control_but_those_that_are_about_one_case():
    for name, question in QUESTIONS.items():
        answers = {
            repr(question.asked(case, who))
            for case in question.cases
            for who in (MODEL, MACHINE.model(kernel=Kernel.v5_19))
        }
        assert len(answers) > 1 or name in ("plain", "chapter 1"), name


def test_the_losses_run_on_a_vm_a_model_and_a_recording_unchanged():
    for made in (
        lambda size: Vm(Hardware.shadow(), Kernel.v6_0, page_size=size),
        lambda size: MACHINE.vm(page_size=size),
    ):
        assert ring_reports(made("4K"), 3) == [] and ring_reports(made("4K"), 1) == [(0, 0)]
        assert not clear_reports(made("2M")) and clear_reports(made("4K"))


def test_what_was_not_asked_is_refused_in_a_sentence_and_a_run_may_begin_as_any_of_the_recorded_ones():
    vm = MACHINE.vm()
    vm.set_user_memory_region(slot=0, base_gfn=0x200, npages=64)
    assert vm.vcpu[0].write(0x200) is Seen.DONE
    with pytest.raises(NotRecorded, match=r"was not asked vCPU 0: write 0x900"):
        vm.vcpu[0].write(0x900)
    with pytest.raises(NotRecorded):
        _ = MACHINE.vm(vcpus=2).flush_requests
    with pytest.raises(ValueError, match=r"there are recordings of 6\.18-kvm_pvm"):
        recorded("7.0-none")


def test_what_is_recorded_is_played_back(tmp_path):
    record(MODEL, [ask_all], tmp_path / "model.json")
    again = recorded("model", tmp_path)
    assert again.offers == MODEL.offers
    for name, case in CASES:
        assert QUESTIONS[name].asked(case, again) == QUESTIONS[name].asked(case, MODEL)


def test_nothing_inside_can_be_seen_and_refusals_come_through():
    with MODEL.vm() as vm:
        assert not any(hasattr(vm, name) for name in ("spte", "missed_dirty", "log", "memslots", "fmt"))
        assert not hasattr(vm.vcpu[0], "tlb")
        with pytest.raises(OSError, match="slot 0") as refusal:
            vm.get_dirty_log(0)
        assert refusal.value.errno == errno.ENOENT
        vm.set_user_memory_region(slot=0, base_gfn=0x200, npages=4)
        assert vm.vcpu[0].read(0x999) is Seen.MMIO and vm.vcpu[0].fetch(0x200) is Seen.DONE
        vm.enable_manual_dirty_log_protect()
        assert [str(one) for one in vm.said] == [
            "get_dirty_log(0)",
            "memory_region(0, 0, 0x200, 4, 0x200)",
            "vCPU 0: read 0x999",
            "vCPU 0: fetch 0x200",
            "manual_protect(1)",
        ]


def test_rings_can_be_reset_and_pages_aged_and_taken_away_from_outside():
    with Outside(asking(ModelVm(Hardware.ept(ad_bits=False), Kernel.v6_0))) as vm:
        vm.enable_dirty_ring(1 << 16)
        vm.set_user_memory_region(slot=0, base_gfn=0x200, npages=4, log_dirty_pages=True)
        vm.vcpu[0].write(0x201)
        assert vm.clear_young(0x200, 0x204) and not vm.clear_young(0x200, 0x204)
        assert vm.vcpu[0].dirty_ring.harvest() == [(0, 1)] and vm.reset_dirty_rings() == 1
        assert vm.value(0x201) == 1
        vm.invalidate_range(0x201, 0x202)
        assert vm.value(0x201) == 0


def test_a_kernel_that_does_not_count_and_a_guest_that_hangs(monkeypatch, capsys):
    """The one cannot be asked; the other is a sentence, not an answer."""
    vm = RealVm.__new__(RealVm)
    monkeypatch.setattr(RealVm, "counters", {"remote_tlb_flush": 3})
    with pytest.raises(OSError, match="does not count") as refusal:
        _ = Outside(asking(vm)).flush_requests
    assert refusal.value.errno == errno.ENOTTY

    def hang(vm, *_):
        raise TimeoutError(errno.ETIMEDOUT, "called back")

    monkeypatch.setitem(calls.CALLS, "run", hang)
    with pytest.raises(TimeoutError):
        QUESTIONS["plain"].asked("written", MODEL)
    monkeypatch.setattr(questions, "live", lambda: MODEL)
    assert main(["ask"]) == 1 and capsys.readouterr().err == "called back\n"


def test_a_recording_does_not_say_whose_machine_it_was():
    assert without_local_name(replace(MACHINE.offers, release="6.1.0-13-mine")).release == "6.1.0"
    assert MACHINE.offers == without_local_name(MACHINE.offers)


def test_the_command_is_there(capsys):
    with pytest.raises(SystemExit):
        main(["ask", "--help"])
    assert "chapter 15" in capsys.readouterr().out


# ---- machines that refuse --------------------------------------------------------------------------------------------


def refusing(name, *arguments):
    return Said(name, list(arguments), "ENOTTY", "Inappropriate ioctl for device: not here")


REFUSES = replace(MACHINE, make=lambda vcpus, page_size: Outside(refusing, vcpus=vcpus))
CHAPTER = pathlib.Path(__file__).parents[2] / "notebooks/15-on-a-real-kernel.ipynb"


@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_refusal_is_an_answer_with_as_many_parts_and_says_why(name, case):
    refused, answer = QUESTIONS[name].asked(case, REFUSES), QUESTIONS[name].asked(case, MODEL)
    assert refusal(refused) == "ENOTTY" and refusal(refused).says.endswith("not here") and refusal(answer) is None
    if isinstance(answer, tuple):
        assert refused == ("ENOTTY",) * len(answer)


@pytest.mark.parametrize(
    "asks", ['QUESTIONS["who asks"]', 'QUESTIONS["CLEAR"]', 'QUESTIONS["enabling"]', '("read", "neighbour")']
)
def test_the_chapters_cells_show_what_a_machine_refuses(asks):
    """They are run as they stand, on a machine that refuses every call."""
    cells = [
        "".join(cell["source"]) for cell in json.loads(CHAPTER.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    (cell,) = [cell for cell in cells if asks in cell]
    known = {"machine": REFUSES, "model": MODEL, "offers": MACHINE.offers, "Kernel": Kernel, "Table": Table}
    exec(cell, names := known | {"QUESTIONS": QUESTIONS, "as_kernel": as_kernel})
    assert any("ENOTTY" in row for row in names["rows"]) and "ENOTTY" in repr(
        Table(["?"] * len(names["rows"][0]), names["rows"])
    )


def test_the_command_says_why_a_question_cannot_be_tried(monkeypatch, capsys):
    monkeypatch.setattr(questions, "live", lambda: REFUSES)
    assert main(["ask"]) == 0
    assert "cannot be tried here: Inappropriate ioctl for device: not here" in capsys.readouterr().out


def test_a_host_without_huge_pages_is_not_asked_about_them(monkeypatch):
    """It would answer another question, and seem to differ."""
    monkeypatch.setattr(machines, "ask_machine", lambda: replace(MACHINE.offers, huge_pages=False))
    answer = QUESTIONS["CLEAR"].asked("3ff and 400", live())
    assert answer == ("ENOTSUP",) * 2 and "no transparent huge pages" in refusal(answer).says


class Uncounted(ModelVm):
    """In the place of a KVM before v5.14."""

    def __init__(self, vcpus, page_size):
        super().__init__(as_hardware(MACHINE.offers), as_kernel(MACHINE.offers), vcpus, page_size=page_size)

    def close(self):
        pass

    @property
    def counters(self):
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))


def test_a_machine_without_counters_can_be_recorded(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machines, "RealVm", Uncounted)
    monkeypatch.setattr(machines, "ask_machine", lambda: replace(MACHINE.offers, statistics=False))
    assert main(["record", str(tmp_path / "old.json"), "--calls", "30"]) == 0
    (session,) = Recording.load(tmp_path / "old.json").sessions
    assert len(session.said) == 30 and not any(said.counters for said in session.said)
    assert "the model agrees with 30" in capsys.readouterr().out
