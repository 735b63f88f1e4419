"""Chapter 13's panel and pictures: they say what the searches say, and fit."""

import pytest
from drawn import carries_all, overlapping, texts_of

from kvmbook.scenes import retell_exhibit
from kvmbook.search import CONFUSIONS, EXHIBITS
from kvmbook.views import confusions_picture, curator, proof_picture, trace_picture


@pytest.mark.parametrize("narrow", [False, True], ids=["wide", "narrow"])
def test_the_twelve_fit_their_boxes(narrow):
    picture = confusions_picture()
    assert not overlapping(picture, narrow)
    said = texts_of(picture)
    assert all(shown.title in said for shown in EXHIBITS) and all(f"“{each}”" in said for each in CONFUSIONS)


@pytest.mark.parametrize("shown", EXHIBITS, ids=lambda shown: shown.title)
def test_each_run_fits_its_picture_and_each_proof_gives_its_number(shown):
    proof = proof_picture(shown, True, False)
    for narrow in (False, True):
        assert not overlapping(trace_picture(retell_exhibit(shown)), narrow)
        assert not overlapping(proof, narrow)
    assert f"{shown.look(fixed=True).states:,} states" in " ".join(texts_of(proof))


def test_the_curator_carries_all_and_says_where_a_repair_does_not_help():
    panel = curator()
    carries_all(panel, 12 * 2 * 2)
    harm = {key for key, state in panel.states.items() if " steps: " in state["readout"]}
    bad = {f"{shown.number} {shown.title} | bad | its own" for shown in EXHIBITS}
    last, owed = (f"{EXHIBITS[n].number} {EXHIBITS[n].title}" for n in (6, 7))
    other = {f"{last} | bad | other hardware", f"{last} | repaired | other hardware", f"{owed} | bad | other hardware"}
    assert harm == bad | other
