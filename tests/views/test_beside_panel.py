"""Chapter 15's panel: the picture says what the scene says, its sentence what the text promises."""

from itertools import product

import pytest
from drawn import carries_all, moment, overlapping, texts_of

from kvmbook.real import recorded
from kvmbook.scenes import ASKED, MODELS, side_by_side
from kvmbook.views import beside_picture, model_beside_machine

MACHINE = recorded()
CASES = list(product(ASKED, MODELS))


def test_every_combination_is_carried_and_agrees_with_a_live_answer():
    panel = model_beside_machine()
    carries_all(panel, len(CASES))


@pytest.mark.parametrize("narrow", [False, True], ids=["wide", "narrow"])
def test_nothing_overlaps_and_nothing_leaves_the_picture(narrow):
    for case in CASES:
        assert not overlapping(beside_picture(side_by_side(*case, MACHINE)), narrow), case


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_each_moment_shows_the_call_and_what_everybody_says(case):
    seen = side_by_side(*case, MACHINE)
    picture = beside_picture(seen)
    assert len(picture.moments) == len(seen.rows)
    for number, (row, told) in enumerate(zip(seen.rows, picture.moments, strict=True)):
        said = [text for texts in moment(picture.svg, number) for text in texts]
        assert f"{row.call}{' ✕ lost' * row.lost}" in said and row.spte in said and row.tlb in said
        assert row.model in said and (row.machine or "not asked") in said
        assert ("=" in said, "≠" in said) == (row.agree is True, row.agree is False)
        assert told.lower().startswith(row.call.lower()) and ("lost" in told) == row.lost


def test_broken_frames_are_for_what_differs_and_for_what_is_stale():
    for case in CASES:
        seen = side_by_side(*case, MACHINE)
        picture = beside_picture(seen)
        broken = sum(2 * (row.agree is False) + 2 * row.stale for row in seen.rows)
        assert picture.svg.count("stroke-dasharray") == broken  # two answers; one entry, drawn for each form
        assert texts_of(picture).count("≠") == sum(row.agree is False for row in seen.rows)


def test_what_the_panel_says_first_and_what_the_text_promises():
    panel = model_beside_machine()
    lost = "Both say the same, 8 times: memory has changed, and no report names it. In the model you see why."
    assert panel.readout == lost
    assert panel.choose(run="a ring, not initially set").endswith("In the model no write is lost.")
    assert panel.choose(run="CLEAR of two pages").startswith("Both say the same, 9 times: memory has changed")
    differ = panel.choose(run="enabling twice", the_model_is_of="v5.19 on this CPU")
    assert differ.startswith('They differ at "flushes asked for": the model says +0, the machine +1.')
    stops = panel.choose(run="chapter 1's run", the_model_is_of="v5.19, no A/D bits")
    assert "The machine cannot run this to its end. In the model a write is lost." in stops
