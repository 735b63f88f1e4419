"""Chapter 14's panel: the run or the proof, as the scene has judged."""

from itertools import product

import pytest
from drawn import carries_all, overlapping

from kvmbook.scenes import FLUSHES, RELAXATIONS, RELAXED_ON, judge, relaxed
from kvmbook.views import take_the_flush_away
from kvmbook.views.drawing import Picture

CASES = list(product(RELAXATIONS, FLUSHES, RELAXED_ON))


def test_every_combination_is_carried_and_agrees_with_a_live_answer():
    carries_all(take_the_flush_away(), len(CASES))


@pytest.mark.parametrize("narrow", [False, True], ids=["wide", "narrow"])
def test_nothing_overlaps_and_nothing_leaves_the_picture(narrow):
    panel = take_the_flush_away()
    for case in CASES:
        svg = panel.states[" | ".join(case)]["svg"]
        assert not overlapping(Picture(svg, ""), narrow), case


def test_the_sentence_has_the_steps_of_the_run_or_the_states_of_the_proof():
    panel = take_the_flush_away()
    drawn = 0
    for name, flush, on in CASES:
        said = panel.choose(v6_12_but=name, the_flush=flush, hardware=on)
        found = judge(relaxed(name, FLUSHES[flush]), RELAXED_ON[on])
        if found.trace:
            assert f"lost, in {len(found.trace)} steps" in said and len(panel.moments) == len(found.trace) + 1
        else:
            assert f"all {found.states:,} states" in said
        drawn += bool(panel.moments)
    assert drawn == 2 * 4  # what loses, and the same calls with the flush


def test_it_opens_with_a_loss_and_the_flush_cures_each():
    panel = take_the_flush_away()
    assert "in 11 steps" in panel.readout and panel.moments
    for name, on in product(RELAXATIONS, RELAXED_ON):
        chosen = {"v6_12_but": name, "hardware": on}
        lost = panel.choose(the_flush="taken away", **chosen).startswith("A write is lost")
        assert ("the same calls" in panel.choose(the_flush="kept", **chosen)) == lost
