"""Chapter 04's panel: the picture says what the scene says, its sentence what the text promises."""

from itertools import product

import pytest
from drawn import carries_all, moment, overlapping, texts_of

from kvmbook.scenes import FIRST, LOWERED, NEXT, REMEMBERING, who_remembers
from kvmbook.views import who_remembers_what
from kvmbook.views.remembering_panel import remembering_picture

CASES = list(product(REMEMBERING, FIRST, LOWERED, NEXT))


def test_every_combination_is_carried_and_agrees_with_a_live_answer():
    panel = who_remembers_what()
    carries_all(panel, len(CASES))


@pytest.mark.parametrize("narrow", [False, True], ids=["wide", "narrow"])
def test_nothing_overlaps_and_nothing_leaves_the_picture(narrow):
    for case in CASES:
        assert not overlapping(remembering_picture(who_remembers(*case)), narrow), case


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_each_moment_shows_what_its_vcpus_remember_and_what_came_of_it(case):
    moments = who_remembers(*case)
    picture = remembering_picture(moments)
    assert len(picture.moments) == len(moments)
    for number, (now, told) in enumerate(zip(moments, picture.moments, strict=True)):
        said = [text for texts in moment(picture.svg, number) for text in texts]
        for entry in now.tlbs:
            assert (entry.rights or "nothing") in said and (entry.verdict or "nothing") in [*said, "nothing"]
            assert f"remembers {entry.rights or 'nothing'}" in told
        assert now.who in said and now.what in said and now.spte in said and now.rights in said
        assert now.came in said or "✕ nobody notices" in said


def test_a_broken_frame_is_for_what_matters_and_the_cross_for_the_write_that_passes():
    for case in CASES:
        moments = who_remembers(*case)
        picture = remembering_picture(moments)
        matters = sum(tlb.verdict == "stale, matters" for now in moments for tlb in now.tlbs)
        assert picture.svg.count("stroke-dasharray") == matters
        crossed = moments[-2].tlbs[0].verdict == "stale, matters"
        assert texts_of(picture).count("✕ nobody notices") == crossed


def test_what_the_panel_says_first_and_what_the_text_promises():
    panel = who_remembers_what()
    stale = "vCPU 0's entry is stale, and it matters: the write passes, and neither SPTE nor KVM notices."
    assert panel.readout == stale and panel.locked == ["A/D bits"]
    assert panel.choose(and_before_it_writes="vCPU 0 faults elsewhere") == stale
    assert panel.choose(and_before_it_writes="vCPU 1 writes it").endswith("would have let it pass, too.")
    assert panel.choose(and_before_it_writes="KVM flushes").endswith("its write faults, and KVM sees it.")
    assert panel.choose(and_before_it_writes="nothing", then="logging is enabled") == stale
    assert "remembers no right to write" in panel.choose(vCPU_0_has="read it")
    spurious = panel.choose(and_before_it_writes="vCPU 1 writes it")
    assert spurious == "vCPU 0's entry allows less than the SPTE: its write faults, though there is nothing to repair."
    clean = panel.choose(A_D_bits="on, with PML", and_before_it_writes="nothing")
    assert clean == "vCPU 0 remembers a clean entry: its write has to walk to the SPTE, which notes it in D."
    assert panel.choose(vCPU_0_has="written it") == stale
    assert panel.choose(then="the host ages it").endswith("would have let it pass, too.")
    assert panel.choose(and_before_it_writes="KVM flushes").endswith("whose D is set already.")
