"""A recording answers as the machine did; the model, asked from outside, shows what user space sees and no more."""

import errno
from dataclasses import replace

import pytest

from kvmbook import Hardware, Kernel, Vm
from kvmbook.real import (
    QUESTIONS,
    ModelVm,
    Outside,
    RealVm,
    Seen,
    ask_all,
    asking,
    calls,
    clear_reports,
    questions,
    record,
    recorded,
    ring_reports,
)
from kvmbook.real.__main__ import main
from kvmbook.real.machines import NotRecorded, without_local_name

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
