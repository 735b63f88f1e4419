"""Chapter 05's panel carries every answer, draws what the scene says, and says what the text promises."""

import json
import re

import pytest
from drawn import moment, overlapping, parts, texts_of

from kvmbook.scenes import WAYS, caught
from kvmbook.views import one_write_four_ways
from kvmbook.views.writes_panel import caught_picture


@pytest.fixture(scope="module")
def panel():
    return one_write_four_ways()


def test_every_combination_is_carried_in_little_room_and_agrees_with_a_live_answer(panel):
    assert len(panel.states) == len(panel.combinations()) == 16
    assert len(json.dumps(panel.states)) < 400_000
    for combination in panel.combinations():
        assert panel._state(combination) == panel.states[" | ".join(combination)]


def test_what_the_panel_says_first_and_for_each_way(panel):
    assert "600 pages: 600 exits. Before GET 600" in panel.readout
    assert panel.choose(caught_by="D and PML") == (
        "6,000 writes to 600 pages: 1 exit. Before GET 512 are in the bitmap, 88 in the buffer; the report names 600."
    )
    assert "512 pages: no exit. Before GET 0 are in the bitmap, 512 in the buffer" in panel.choose(pages_written="512")
    assert "600 pages: 6,000 exits." in panel.choose(caught_by="emulation", pages_written="600")
    assert panel.choose(caught_by="nobody").endswith("the report names no page: KVM's log cannot know of them.")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("narrow", [False, True])
def test_nothing_overlaps_or_leaves_the_picture(way, narrow):
    picture = caught_picture(caught(way, 600))
    assert overlapping(picture, narrow, letter=0.52) == []
    assert all(float(one.get("font-size", 14)) >= 15 for one, _, _ in parts(picture.svg)[0] if one.tag.endswith("text"))


def test_each_moment_has_its_counts(panel):
    seen = caught("D and PML", 600)
    picture = caught_picture(seen)
    assert len(picture.moments) == 6 and {"buffer", "bitmap", "exits"} <= set(texts_of(picture))
    for number, now in enumerate(seen.counts):
        new, same = moment(picture.svg, number)
        assert {f"{now.buffer} of 512", f"{now.bitmap} of 600", f"{now.exits:,}"} <= set(new + same)
        assert re.search(rf" {now.buffer} in the buffer, {now.bitmap} in the bitmap", picture.moments[number])
    assert "no buffer" in texts_of(caught_picture(caught("W", 1)))
