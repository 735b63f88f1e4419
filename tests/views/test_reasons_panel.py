"""Chapter 09's panel: the picture says what the run says, in both forms, and each combination is carried."""

import xml.etree.ElementTree as ET

import pytest
from drawn import moment, overlapping, parts, texts_of

from kvmbook.scenes import ACTS, CARELESS, ENABLES, GUARDS, NOT_WRITABLE, WRITES, give_back
from kvmbook.views import may_w_come_back
from kvmbook.views.reasons_panel import give_back_picture

AGED = "4 access tracking"


@pytest.fixture(scope="module")
def panel():
    return may_w_come_back()


def test_every_combination_is_carried_small_and_has_a_sentence_for_each_moment(panel):
    assert len(panel.states) == len(NOT_WRITABLE) * len(ACTS) * 2 and len(repr(panel.states)) < 400_000
    for state in panel.states.values():
        picture = ET.fromstring(state["svg"])
        assert picture.get("role") == "img" and len(picture[0].text) > 20 and state["readout"].endswith(".")
        assert all(float(text.get("font-size", 14)) >= 15 for text in picture.iter("{http://www.w3.org/2000/svg}text"))
        assert all(said.endswith(".") for said in state["moments"])


@pytest.mark.parametrize("narrow", [False, True])
def test_nothing_overlaps_and_nothing_leaves_the_picture(narrow):
    for page in NOT_WRITABLE:
        for act in ACTS:
            picture = give_back_picture(give_back(page, act, CARELESS))
            assert not overlapping(picture, narrow)
            width, height = parts(picture.svg, narrow)[1]
            assert width <= (340 if narrow else 1033) and (narrow or height <= 391)


def test_each_moment_is_a_row_and_the_band_is_there_while_the_lock_is_held():
    act = give_back(AGED, GUARDS)
    picture = give_back_picture(act)
    assert len(picture.moments) == len(act.rows)
    for number, row in enumerate(act.rows):
        said = moment(picture.svg, number)[0]
        assert any(row.what in one for one in said) and ("empty" in " ".join(said) or "RWX" in said)
    assert [row.held for row in act.rows] == [False, True, True, False, False]
    grey = [part for part, _, _ in parts(picture.svg)[0] if part.get("fill") == "#bdbdbd" and part.get("rx") is None]
    assert len(grey) == sum(bool(row.lock) for row in act.rows)


def test_harm_is_marked_and_a_stale_entry_has_a_broken_frame():
    good, bad = (give_back_picture(give_back(AGED, GUARDS, how)) for how in ("by its rules", CARELESS))
    assert "✕" in texts_of(bad) and "✕" not in texts_of(good)
    assert good.svg.count("stroke-dasharray") == 3


def test_what_the_panel_says(panel):
    assert panel.readout == "MMU-writable is 1, so W comes back without mmu_lock; no harm is done."
    said = panel.choose(W_is_0_because_of="3 read-only in the host")
    assert said == "W comes back under mmu_lock, in a frame that is the guest's own."
    assert "shares with others" in panel.choose(KVM_acts=CARELESS)
    assert panel.choose(W_is_0_because_of=AGED, then=GUARDS).startswith(
        "The lock is dropped before the flush: a guest's"
    )
    assert panel.choose(then=ENABLES).startswith("The pass finds W=0, and asks for no flush: a write is missed")
    assert panel.choose(then=WRITES, W_is_0_because_of="2 a guest's page table").startswith("W stays 0")
