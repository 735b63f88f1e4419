"""Chapter 07's panel and pictures say what the scene says."""

import json

import pytest
from drawn import moment, overlapping, parts, texts_of

from kvmbook.scenes import ACCESSES, follow, harvest_before
from kvmbook.views import Picture, follow_one_access, path_picture


@pytest.fixture(scope="module")
def panel():
    return follow_one_access()


def test_every_combination_is_carried_agrees_with_a_live_answer_and_is_small_enough(panel):
    assert len(panel.states) == len(panel.combinations()) == 63
    for combination in panel.combinations():
        assert panel._state(combination) == panel.states[" | ".join(combination)]
    assert len(json.dumps(panel.states)) < 420_000


@pytest.mark.parametrize("narrow", [False, True])
def test_no_text_overlaps_or_leaves_the_picture(panel, narrow):
    for state in panel.states.values():
        assert not overlapping(Picture(state["svg"], ""), narrow)
        _, (width, height) = parts(state["svg"], narrow)
        assert width <= 1033 and (narrow or height <= 391)


def test_each_step_is_a_moment_with_its_lock_its_spte_and_its_bit():
    path = follow("shadow paging", "not mapped", "write", "the host takes the page")
    picture = path_picture(path)
    assert len(picture.moments) == len(path.steps) == 9
    for number, (step, said) in enumerate(zip(path.steps, picture.moments, strict=True)):
        new, same = moment(picture.svg, number)
        assert step.step in new and str(int(step.bit)) in new + same
        assert (step.lock in new) == bool(step.lock) == (f"mmu_lock held for {step.lock}" in said)
        assert not step.said or any(one.startswith(step.said) for one in new)
        assert f"SPTE: {step.spte}; bit {step.bit:d}." in said


def test_a_lost_write_is_said_and_no_other():
    lost, kept = (harvest_before("fast_pf_fix_direct_spte", marks_first) for marks_first in (True, False))
    assert any("lost" in said for said in texts_of(path_picture(lost)))
    assert not any("lost" in said for said in texts_of(path_picture(kept)))


def test_what_the_panel_says_first_and_what_the_text_promises(panel):
    assert panel.readout == "Fast, without mmu_lock. The page is marked dirty."
    assert (
        panel.choose(vCPU_0="reads an aged page") == "Fast, without mmu_lock. R and X come back, W does not: no mark."
    )
    assert panel.choose(vCPU_0="writes a page not mapped").startswith("Slow, after the fast path gave up (not mapped)")
    assert panel.choose(hardware="EPT with A/D").startswith("Slow at once, with mmu_lock held for read.")
    assert panel.choose(in_between="the host takes the page").endswith("the guest faults again.")
    spurious = panel.choose(
        hardware="EPT without A/D", in_between="vCPU 1 writes the page", vCPU_0="writes an aged page"
    )
    assert spurious.endswith("One exchange failed. Somebody else had done the work: spurious.")
    for access in ACCESSES:
        assert panel.choose(vCPU_0=access, hardware="shadow paging").startswith(
            ("Slow at once", "No fault", "Emulated")
        )
