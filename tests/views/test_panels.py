"""Panels carry what the model says, for every combination; pictures are deterministic and say what they show."""

import pytest

from kvmbook import FlushPolicy, Hardware, Kernel, scenes
from kvmbook.search import Grain, explore
from kvmbook.views import Panel, View, figures, lose_a_write, search_progress, who_flushes_where

NO_AD = Hardware.ept(ad_bits=False)


@pytest.mark.parametrize("make", [lose_a_write, who_flushes_where])
def test_every_combination_is_carried_and_agrees_with_a_live_answer(make):
    panel, live = make(), make()
    names = list(panel.chosen)
    for combination in panel.combinations():
        live.states = {}
        live.chosen = {**dict(zip(names, combination, strict=True)), "": ""}
        live.chosen = dict(zip(names, combination, strict=True))
        key = " | ".join(combination)
        assert live.states[key] == panel.states[key]


def test_the_first_view_is_the_lost_write_and_either_toggle_saves_it():
    panel = lose_a_write()
    assert panel.readout.startswith("16 of 16 writes are missed")
    assert panel.choose(A_D_bits="on").startswith("All 16 writes are reported")
    assert panel.choose(A_D_bits="off", flush_when_enabling="always").startswith("All 16 writes are reported")
    assert "flush when enabling: always" in repr(panel)


def test_the_plotted_counts_are_the_models():
    for ad_bits in scenes.HARDWARE:
        for touched in scenes.TOUCHES:
            for policy in FlushPolicy:
                scene = scenes.write_after_enabling(ad_bits, policy, touched)
                lost = policy is FlushPolicy.NEVER or (
                    policy is FlushPolicy.IF_CHANGED and ad_bits == "off" and touched != "vCPU 1 writes page 0"
                )
                assert scene.missed == 16 * lost, (ad_bits, policy, touched)


def test_a_long_search_shows_its_progress_and_leaves_nothing_behind(monkeypatch):
    shown = []
    monkeypatch.setattr("kvmbook.views.panel.display", shown.append)
    with pytest.raises(KeyboardInterrupt), search_progress() as progress:
        explore(NO_AD, Kernel.v5_19, 2, 1, Grain.ACCESS, progress=progress)
        (line,) = shown
        bar, said = line.children
        assert said.value == "level 23, 6,972 states of at most 7,658" and bar.value == 6972
        raise KeyboardInterrupt
    assert line.comm is None


def test_a_panel_that_does_not_carry_its_states_computes_the_chosen_one():
    calls = []

    def show(number):
        calls.append(number)
        return View(figures.Picture("<svg/>", "nothing"), f"{number}.")

    panel = Panel("count", {"number": ["1", "2"]}, show, carry=False)
    assert calls == ["1"] and panel.readout == "1."
    assert panel.choose(number="2") == "2." and panel.choose(number="1") == "1."
    assert calls == ["1", "2"]
    with pytest.raises(ValueError, match="number is one of 1, 2; got '3'"):
        panel.choose(number="3")
    broken = Panel("broken", {"number": ["1", "2"]}, lambda n: show(n) if n == "1" else 1 / 0, carry=False)
    with pytest.raises(ZeroDivisionError):
        broken.choose(number="2")
    assert broken.readout == "1."
    with pytest.raises(ValueError, match="a setting needs options"):
        Panel("empty", {"number": []}, show)


def test_the_cliff():
    for policy, expected in (("IF_CHANGED", [0, 0, 0, 64]), ("ALWAYS", [0] * 4), ("NEVER", [64] * 4)):
        assert [scenes.missed_against_aged(FlushPolicy[policy], aged) for aged in (0, 32, 63, 64)] == expected


def test_pictures_escape_what_they_say():
    assert figures.text(0, 0, "a < b & c") == '<text x="0" y="0">a &lt; b &amp; c</text>'
