"""Chapter 02: the checks stand in the kernel's order, no moment of a harvest loses a write, panels and questions say so."""

import itertools
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest

from kvmbook import Hardware, Kernel, Vm, slot_panels, slot_scenes
from kvmbook.dirty_log import GetDirtyLog
from kvmbook.exercises import ch02
from kvmbook.memslots import MemoryRegion
from kvmbook.slot_scenes import PROTOCOLS, RULES, WHEN, WRITTEN, ask, harvest, refusals, region

PANELS = (slot_panels.which_errno, slot_panels.word_by_word)


# ---- which errno? ----------------------------------------------------------------------------------------------------


def test_every_check_is_reached_by_the_call_that_breaks_it():
    assert [(asked.checks, rule) for rule, asked in refusals()] == list(enumerate(RULES, 1))
    assert all(asked.before == asked.after for _, asked in refusals())


@pytest.mark.parametrize(("earlier", "later"), list(itertools.combinations(range(len(RULES)), 2)))
def test_of_two_broken_rules_the_earlier_one_answers(earlier, later):
    """The later rule's call, changed in the field that breaks the earlier one as well."""
    broken = RULES[later].breaks_it
    fields = {
        0: {"slot": 32764},
        1: {"flags": 4},
        2: {"guest_phys_addr": broken.guest_phys_addr + 16},
        3: {"userspace_addr": 1 << 48},
        4: {"slot": broken.slot | 2 << 16},
        5: {"guest_phys_addr": 2**64 - 4096, "memory_size": max(broken.memory_size, 8192)},
        6: {"memory_size": 2**31 * 4096, "userspace_addr": 0},
        8: {"userspace_addr": broken.userspace_addr + 4096, "slot": 0},
        9: {"memory_size": 64 * 4096, "slot": 0, "userspace_addr": 0x7F0000100000},
        10: {"flags": 2, "slot": 0, "userspace_addr": 0x7F0000100000, "memory_size": 128 * 4096},
        11: {"guest_phys_addr": 0x200 * 4096, "memory_size": 2**33 * 4096},
    }
    if earlier in (7, 11) or (later == 7 and earlier in (5, 6)):
        return  # a deletion breaks no later rule; a range above the host's width overlaps nothing, size 0 never wraps
    call = broken._replace(**fields[earlier])
    assert ask(call).checks == earlier + 1


def test_every_other_check_is_passed_in_what_the_panel_accepts():
    changes = set()
    for words in slot_panels.which_errno().combinations():
        asked = slot_scenes.ask_panel(*words)
        changes.add(asked.says if not asked.error else asked.error)
        assert (asked.before == asked.after) == bool(asked.error or asked.says == "nothing to do")
    assert changes == {"create", "delete", "move", "flags only", "nothing to do", "EINVAL", "EEXIST"}


def test_what_does_not_fit_into_the_ioctl_is_misuse():
    with pytest.raises(ValueError, match="does not fit"):
        ask(MemoryRegion(-1, 0, 0, 4096, 0))
    with pytest.raises(KeyError):
        slot_scenes.ask_panel("3", "0", "0x300", "0")


# ---- a harvest -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("protocol", "written", "when"), list(itertools.product(PROTOCOLS, WRITTEN, WHEN)))
def test_no_moment_of_a_harvest_loses_a_write(protocol, written, when):
    seen = harvest(protocol, written, when)
    assert seen.missed == ()
    wrote = {*WRITTEN[written], *([1] if when != "never" else [])}
    assert wrote <= {*seen.now, *seen.next}
    assert set(WRITTEN[written]) <= set(seen.now)
    assert (1 in seen.next) >= (when == "after the harvest")
    assert seen.flushes == bool(seen.now), "a harvest flushes if it took a bit, and only then"
    flushed = [row.what for row in seen.rows if row.flushed]
    assert flushed == ["flushes the TLBs"] * seen.flushes


def test_manual_protect_changes_nothing_before_clear():
    rows = harvest("manual protect", "page 1", "never").rows
    get = next(number for number, row in enumerate(rows) if row.who == "GET")
    assert rows[get][2:6] == rows[get - 1][2:6]


def test_initially_set_protects_nothing_when_logging_is_enabled():
    first = harvest("manual, initially set").rows[0]
    assert first.live == (2**64 - 1, 2**64 - 1, 0b11) and all(first.spte) and all(first.tlb)
    assert not any(harvest("GET clears").rows[0].spte)


def test_a_row_changes_only_by_its_step():
    """A guest's write never touches the buffer; each word is taken before its pages are protected."""
    for row, after in itertools.pairwise(harvest("GET clears", "pages 5 and 70", "W taken").rows):
        if after.who == "vCPU 0":
            assert row.buffer == after.buffer
        if after.what == "takes W from their pages":
            assert row.what == "takes the bits of a word"


def test_bad_settings_of_a_harvest():
    with pytest.raises(ValueError, match="when is one of never, "):
        harvest(when="later")
    with pytest.raises(KeyError):
        harvest("GET")
    with pytest.raises(KeyError):
        harvest(written="page 2")


def test_what_changes_says_each_kind_of_change_and_a_refusal_changes_nothing():
    vm = slot_scenes.two_slots()
    calls = ({"base_gfn": 0x300, "npages": 8}, {"base_gfn": 0x300, "npages": 8, "log_dirty_pages": True}, {})
    said = [slot_scenes.what_changes(vm, slot=2, **call).split("  ")[0] for call in calls]
    assert said == ["create", "flags only", "delete"]
    with pytest.raises(OSError, match="overlap"):
        slot_scenes.what_changes(vm, slot=2, base_gfn=0x1FF, npages=2)
    assert slot_scenes.what_changes(vm, slot=1, base_gfn=0x240, npages=64).split() == (
        ["move", "slot", "0", "at", "0x100,", "slot", "1", "at", "0x240"]
    )


def test_ask_twice_and_send_again():
    assert [slot_scenes.ask_twice(protocol) for protocol in PROTOCOLS] == [(3, 0), (3, 3), (64, 64)]
    assert slot_scenes.sent_again("GET clears", 0, 128) == 0
    cleared, manual = (slot_scenes.sent_again(protocol, 16, 256) for protocol in ("GET clears", "manual protect"))
    assert 0 < manual < cleared


# ---- panels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", PANELS)
def test_every_combination_is_carried_and_agrees_with_a_live_answer(make):
    panel = make()
    assert len(panel.states) == len(panel.combinations()) <= 110
    for combination in panel.combinations():
        live = panel._state(combination)
        assert live == panel.states[" | ".join(combination)]
        picture = ET.fromstring(live["svg"])
        assert picture.get("role") == "img" and picture[0].tag.endswith("title") and len(picture[0].text) > 20
        assert live["readout"].endswith(".")
        assert all(float(text.get("font-size", 14)) >= 13 for text in picture.iter("{http://www.w3.org/2000/svg}text"))


@pytest.mark.parametrize("make", PANELS)
def test_nothing_is_drawn_beyond_the_picture(make):
    panel = make()
    for state in panel.states.values():
        picture = ET.fromstring(state["svg"])
        _, _, width, height = map(float, picture.get("viewBox").split())
        for part in picture.iter():
            if part.get("x") is not None:
                x, y = float(part.get("x")), float(part.get("y"))
                assert 0 <= x and x + float(part.get("width", 0)) <= width
                assert 0 <= y and y + float(part.get("height", 0)) <= height


def test_what_the_panels_say_first_and_what_the_text_promises():
    errno_panel, harvest_panel = (make() for make in PANELS)
    assert errno_panel.readout == "EEXIST: gfns 0x1c0..0x23f overlap slot 1."
    assert errno_panel.choose(size="64 pages").startswith("Done: create.")
    broken = errno_panel.choose(slot="0 (exists)", flags="READONLY", size="128 pages")
    assert broken == "EINVAL: slot 0: READONLY cannot be switched."
    assert errno_panel.choose(size="0").startswith("Done: delete.")
    assert "not a multiple" in errno_panel.choose(first_gfn="0x300 and 16 bytes")
    both = harvest_panel.choose(page_1_is_written_again_="flushed")
    assert both.startswith("This report: page 1. The next one: page 1. One flush")
    empty = harvest_panel.choose(written_before="no page", page_1_is_written_again_="never")
    assert empty == "This report: no page. The next one: no page. No flushes in this harvest. No write is missed."


def test_the_harvest_picture_marks_stale_entries_and_flushes():
    svg = slot_panels.harvest_picture(harvest("GET clears", "page 1", "W taken")).svg
    assert "stroke-dasharray" in svg and "⟳ flushes the TLBs" in svg
    assert "stroke-dasharray" not in slot_panels.harvest_picture(harvest("GET clears", "no page", "never")).svg


def test_a_missed_write_would_be_said():
    seen = replace(harvest(), missed=(1,))
    assert slot_panels.harvest_readout(seen).endswith("Missed: page 1.")


# ---- questions and check cells ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "answer"),
    [
        (1, "a slow fault: its mapping is gone"),
        (2, "in this report"),
        (3, "the next GET names the page"),
        (4, "one page is cleared and protected, the others are left alone"),
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
        ("check_02_2", parts(copies_first=True), "No: the guest has stopped, and"),
        ("check_02_2", parts(asks_for_all=True), "No: the guest has stopped, and"),
        ("check_02_2", parts(last=192), "No: the guest has stopped, and"),
        ("check_02_2", parts(clears=False), "No: the guest wrote nothing since"),
        ("check_02_2", at_once, "No: one CLEAR speaks of 200 pages"),
        ("check_02_2", lambda vm, send: [send(page) for page in range(200)], "No: 1000 times you send a page"),
        ("check_02_2", lambda vm, send: send(200), "No: your answer raised ValueError: page 200 is not in the slot"),
        ("check_02_2", lambda vm, send: None, "No: the guest has stopped, and"),
        ("check_02_3", lose(), "Yes."),
        ("check_02_3", lose(again=0), "Yes."),
        ("check_02_3", lose(again=None), "No: no write is missed; when is the SPTE writable"),
        ("check_02_3", lose(who=0), "No: your write in the middle is a TLB hit"),
        ("check_02_3", lambda vm, get: vm.run(get), "No: nobody writes while the harvest runs"),
        ("check_02_3", lambda vm, get: None, "No: begin the harvest you are given"),
        ("check_02_3", lambda vm, get: vm.start(get), "No: user space: kick is still to be done"),
        ("check_02_3", lambda vm, get: setattr(vm, "kernel", Kernel.v5_19), "No: keep the VM"),
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
