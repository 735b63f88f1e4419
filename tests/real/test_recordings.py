"""What a real machine answered, held against the model. No KVM is needed here: the answers are kept in recordings/."""

import pathlib
from dataclasses import replace

import pytest

from kvmbook import FlushPolicy
from kvmbook.real import ModelVm, as_hardware, as_kernel, modelled, perform
from kvmbook.real.calls import CALLS
from kvmbook.real.machines import Recording
from kvmbook.real.sequences import NOT_ASKED, known_to_differ, sequence

PATHS = sorted(pathlib.Path(__file__).with_name("recordings").glob("*.json"))
BY_NAME = {path.stem: Recording.load(path) for path in PATHS}
recorded = pytest.mark.parametrize("recording", BY_NAME.values(), ids=BY_NAME)


def disagreements(recording, vm=None):
    """The numbers of the calls that the model of the recorded machine, or ``vm``, answers otherwise."""
    (session,) = recording.sessions
    vm = vm or ModelVm.of(recording.machine, session.vcpus, page_size=session.page_size)
    return [number for number, said in enumerate(session.said) if perform(vm, *said.call) != said.answer]


@recorded
def test_the_model_answers_as_the_machine_did(recording):
    differ = disagreements(recording)
    assert not differ, (
        f"{recording.machine.release}, {recording.machine.vendor}: {recording.sessions[0].said[differ[0]]}"
    )


def met(recording, name):
    return [call.answer for call in recording.sessions[0].said if call.name == name and call.answer not in (None, [])]


def test_the_three_kinds_are_there_and_say_something():
    assert list(BY_NAME) == ["bitmap", "manual", "ring"]
    assert all(path.stat().st_size < 60_000 and "fc" not in BY_NAME[path.stem].machine.release for path in PATHS)
    reports = [
        answer for answer in met(BY_NAME["bitmap"], "get_dirty_log") if not isinstance(answer, str) and answer[1]
    ]
    assert len(reports) >= 10
    cleared = [
        call for call in BY_NAME["manual"].sessions[0].said if call.name == "clear_dirty_log" and call.answer is None
    ]
    assert len(cleared) >= 5
    assert len(met(BY_NAME["ring"], "harvest")) >= 5 and sum(met(BY_NAME["ring"], "reset_dirty_rings")) >= 100
    assert any("dirty ring full" in answer for answer in met(BY_NAME["ring"], "run"))
    names = {call.name for recording in BY_NAME.values() for call in recording.sessions[0].said}
    assert names == set(CALLS) - NOT_ASKED
    refused = {
        call.answer
        for recording in BY_NAME.values()
        for call in recording.sessions[0].said
        if isinstance(call.answer, str)
    }
    assert refused >= {"EINVAL", "EEXIST", "ENOENT", "ENXIO", "EFAULT"}


@recorded
def test_a_falsified_answer_is_noticed(recording):
    (session,) = recording.sessions
    said = list(session.said)
    number = next(n for n, call in enumerate(said) if call.name == "run" and "done" in call.answer)
    said[number] = said[number]._replace(answer=["MMIO"] * len(said[number].answer))
    falsified = replace(recording, sessions=(replace(session, said=tuple(said)),))
    assert disagreements(falsified) == [number]


def differences(recording, kernel, **changes):
    (session,), hardware = recording.sessions, as_hardware(recording.machine)
    vm = ModelVm(hardware, kernel.with_(**changes), session.vcpus, page_size=session.page_size)
    return [session.said[number].name for number in disagreements(recording, vm)]


def test_a_model_without_its_flush_or_its_marks_is_noticed(monkeypatch):
    """What a recording can tell: a TLB that keeps what it should forget, and writes that are not logged."""
    kernel = as_kernel(BY_NAME["bitmap"].machine)
    assert not differences(BY_NAME["bitmap"], kernel)
    assert differences(BY_NAME["bitmap"], kernel, flush=FlushPolicy.NEVER)
    monkeypatch.setattr(modelled.Vm, "mark_page_dirty_in_slot", lambda *_: None)
    assert all(differences(recording, kernel) for recording in BY_NAME.values())


def test_a_loss_of_today_is_among_what_was_recorded():
    """The machine says what a kernel says that compares addresses rounded up, and overlooks a huge page."""
    loses, recording = as_kernel(BY_NAME["manual"].machine), BY_NAME["manual"]
    assert (
        loses.clear_compares_rounded_up
        and recording.sessions[0].page_size == "2M"
        and not differences(recording, loses)
    )
    assert set(differences(recording, loses, clear_compares_rounded_up=False)) == {"get_dirty_log"}
    assert any(call.counters.get("pages_2m") for call in recording.sessions[0].said)


def test_no_recorded_call_is_known_to_differ():
    for recording in BY_NAME.values():
        (session,) = recording.sessions
        vm = ModelVm.of(recording.machine, session.vcpus, page_size=session.page_size)
        for call in recording.sessions[0].said:
            assert not known_to_differ(vm, call.call)
            perform(vm, *call.call)


@recorded
def test_a_recording_says_how_it_was_made_and_can_be_saved(recording, tmp_path):
    recording.save(tmp_path / "again.json")
    assert Recording.load(tmp_path / "again.json") == recording
    _, _, _, command, *options = recording.about.split()
    values = dict(zip(options[::2], options[1::2], strict=True))
    setting, calls, answers = sequence(
        int(values["--seed"]), recording.machine, int(values["--calls"]), values["--kind"]
    )
    (session,) = recording.sessions
    assert command == "record" and (setting.vcpus, setting.page_size) == (session.vcpus, session.page_size)
    assert len(calls) == len(answers) == len(session.said)


def test_enabling_asks_for_a_flush_unless_all_bits_are_set_at_first():
    """Seen from outside: the calls that switch logging on in a slot that stays where it is, and the flushes asked for."""
    asked, slots, manual = {True: [], False: []}, {}, 0
    for name, arguments, answer, _, counters in BY_NAME["bitmap"].sessions[0].said:
        if name == "manual_protect" and answer is None:
            manual = arguments[0]
        if name == "memory_region" and answer is None:
            slot, flags, *where = arguments
            if slots.get(slot) == [flags & ~1, *where] and flags & 3 == 1:
                asked[manual == 3].append(counters.get("remote_tlb_flush_requests", 0))
            slots[slot] = [flags, *where]
    assert set(asked[False]) == {1} and set(asked[True]) == {0}
