"""Chapter 06's panel: the bits that it draws are the words', its sentence is the scene's, nothing overlaps."""

import pytest
from drawn import moment, overlapping

from kvmbook.scenes import AGED_ON, CALLS, USES, age_touch_ask
from kvmbook.views import age_touch_and_ask
from kvmbook.views.ageing_panel import ageing_picture, ageing_readout

CASES = [(hardware, call, use) for hardware in AGED_ON for call in CALLS for use in USES]


def test_every_combination_is_carried_and_agrees_with_a_live_answer():
    panel = age_touch_and_ask()
    assert len(panel.states) == len(panel.combinations()) == len(CASES)
    assert sum(len(str(state)) for state in panel.states.values()) < 400_000
    for combination in panel.combinations():
        assert panel._state(combination) == panel.states[" | ".join(combination)]


@pytest.mark.parametrize("narrow", [False, True], ids=["wide", "narrow"])
def test_nothing_overlaps_and_nothing_leaves_the_picture(narrow):
    for case in CASES:
        assert not overlapping(ageing_picture(age_touch_ask(*case)), narrow), case


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_each_moment_shows_the_digits_and_the_bits_of_its_word(case):
    seen = age_touch_ask(*case)
    picture = ageing_picture(seen)
    assert len(picture.moments) == len(seen.moments) == len(seen.words)
    for number, (word, told) in enumerate(zip(seen.words, picture.moments, strict=True)):
        digits = f"{word:016x}"
        said = moment(picture.svg, number)[0]
        assert f"{digits[:3]} … {digits[-3:]}" in said and digits in told
        shown = [letter for letter in said if letter in ("R", "W", "X", "A", "MW", "–")]
        saved, rights = word >> 54 & 0b101, word & 0b111
        letters = [
            *("R" * (saved & 1)),
            *("X" * (saved >> 2)),
            *(c for bit, c in enumerate("RWX") if rights >> bit & 1),
        ]
        assert sorted(letter for letter in shown if letter in "RWX") == sorted(letters)


def test_what_the_panel_says_first_and_what_the_text_promises():
    panel = age_touch_and_ask()
    assert panel.readout == (
        "The page was used, but the host is told that it is idle. "
        "No flushes, no fault. vCPU 0 can still write through its TLB."
    )
    told = panel.choose(the_host_ages_by="clear_flush_young")
    assert told == "The page was used, and the host is told that it is in use. One flush, one fault."
    assert panel.choose(hardware="EPT with A/D bits").endswith("One flush, no fault.")
    told = panel.choose(the_host_ages_by="test_young", then="nobody")
    assert told.startswith("Nobody used the page, but the host is told that it is in use.")


def test_a_wrong_answer_is_marked_and_a_stale_entry_is_dashed():
    wrong = ageing_picture(age_touch_ask("EPT without A/D bits", "clear_young", "vCPU 0 reads"))
    right = ageing_picture(age_touch_ask("EPT without A/D bits", "clear_flush_young", "vCPU 0 reads"))
    assert "✕ old" in wrong.svg and "stroke-dasharray" in wrong.svg
    assert "✓ young" in right.svg and "✕" not in right.svg and "stroke-dasharray" not in right.svg
    assert "idle" not in ageing_readout(age_touch_ask("EPT with A/D bits", "clear_flush_young", "vCPU 0 writes"))
