"""Chapter 02's panels carry every answer, and say what the text promises."""

import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from drawn import moment, overlapping, parts

from kvmbook.scenes import harvest
from kvmbook.views import Picture, slot_panels

PANELS = (slot_panels.which_errno, slot_panels.word_by_word)


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


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("make", PANELS)
def test_nothing_is_drawn_beyond_the_picture_and_no_words_overlap(make, narrow):
    panel = make()
    for state in panel.states.values():
        found, (width, height) = parts(state["svg"], narrow)
        for part, x, y in found:
            assert 0 <= x and x + float(part.get("width", 0)) <= width
            assert 0 <= y and y + float(part.get("height", 0)) <= height
        assert not overlapping(Picture(state["svg"], ""), narrow)
        assert not narrow or width <= 540  # legible on a phone


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


def test_each_moment_of_a_harvest_is_a_row():
    seen = harvest("manual protect", "pages 5 and 70", "W taken")
    picture = slot_panels.harvest_picture(seen)
    assert [said.rstrip(".") for said in picture.moments] == [f"{row.who} {row.what}".strip() for row in seen.rows]
    for number, row in enumerate(seen.rows):
        new, same = moment(picture.svg, number)
        assert any(row.what in said for said in new)
        for word in (*row.live, *row.buffer):
            assert slot_panels.word_hex(word) in new + same


def test_a_missed_write_would_be_said():
    seen = replace(harvest(), missed=(1,))
    assert slot_panels.harvest_readout(seen).endswith("Missed: page 1.")
