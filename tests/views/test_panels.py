"""Panels carry what the model says, for every combination; pictures are deterministic and say what they show."""

import pathlib
import re

import pytest
from colours import contrast
from drawn import moment, overlapping

from kvmbook import FlushPolicy, Hardware, Kernel, Vm, scenes
from kvmbook.model import Outcome
from kvmbook.search import Grain, explore
from kvmbook.views import (
    Panel,
    View,
    drawing,
    lose_a_write,
    search_progress,
    step_through,
    who_flushes_where,
    word_figures,
)

ROOT = pathlib.Path(__file__).parents[2]

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
    assert panel.choose(A_D_bits="off", flush_rule="always").startswith("All 16 writes are reported")
    assert "flush rule: always" in repr(panel)


def test_each_moment_of_a_scene_is_the_models():
    """Each column of the timeline is what a VM is like that has done only the steps up to there."""
    panel = lose_a_write()
    for flush, ad_bits, touched in panel.combinations():
        state = panel.states[" | ".join((flush, ad_bits, touched))]
        vm = Vm(scenes.HARDWARE[ad_bits], Kernel.v5_19.with_(flush=FlushPolicy(flush)), vcpus=2)
        vm.set_user_memory_region(slot=0, base_gfn=0x200, npages=16)
        kind = scenes.TOUCHES[touched]
        steps = {
            "vCPU 0 reads": lambda vm=vm: [vm.vcpu[0].read(gfn) for gfn in range(0x200, 0x210)],
            "host ages": lambda vm=vm: vm.clear_young(0x200, 0x210),
            f"vCPU 1 {kind}s page 0": lambda vm=vm, kind=kind: [vm.vcpu[1].complete(kind, 0x200)],
            "user space enables logging": lambda vm=vm: vm.set_user_memory_region(0, 0x200, 16, log_dirty_pages=True),
            "vCPU 0 writes": lambda vm=vm: [vm.vcpu[0].write(gfn) for gfn in range(0x200, 0x210)],
            "user space harvests": lambda vm=vm: vm.get_dirty_log(0),
        }
        if not kind:
            del steps["vCPU 1 Nones page 0"]
        assert len(state["moments"]) == len(steps)
        for number, (said, do) in enumerate(steps.items()):
            outcome = do()
            spte = scenes.spte_state(vm.fmt, vm.spte(0x201))
            entry = vm.vcpu[0].tlb.lookup("L1", 0x201)
            tlb = "empty" if entry is None else "write-protected" if not entry.write else "writable"
            tlb = "clean" if tlb == "writable" and not entry.dirty else tlb
            sentence = state["moments"][number]
            assert said.lower() in sentence.lower() and sentence.endswith(f"SPTE: {spte}.")
            assert f"TLB: {tlb}." in sentence or f"TLB: stale, {tlb}." in sentence
            texts = [text for group in moment(state["svg"], number) for text in group]
            assert spte in texts and {tlb, f"stale, {tlb}"} & set(texts)
            if said.startswith("vCPU 0"):
                answers = {Outcome.HIT: "The TLB lets it pass", Outcome.WALK: "The CPU walks"}
                assert answers.get(outcome[1], "The SPTE refuses") in sentence


def test_ageing_changes_the_picture_also_with_ad_bits():
    state = lose_a_write().states["if changed | on | nobody"]
    assert "RWX A D MW" in moment(state["svg"], 0)[0]
    assert "RWX - D MW" in moment(state["svg"], 1)[0]


@pytest.mark.parametrize("make", [lose_a_write, who_flushes_where])
def test_no_text_runs_into_another_in_either_form(make):
    for state in make().states.values():
        picture = drawing.Picture(state["svg"], "")
        assert not overlapping(picture) and not overlapping(picture, narrow=True)


def test_a_panel_is_stepped_through():
    panel = lose_a_write()
    whole = panel.readout
    for number, sentence in enumerate(panel.moments):
        assert panel.step(number) == panel.readout == sentence
    assert panel.choose(flush_rule="always").startswith("All 16") and panel.moment == -1  # the whole, again
    assert panel.choose(flush_rule="if changed") == whole
    panel.step(4)
    panel.chosen = {**panel.chosen, "touched again before enabling": "vCPU 1 reads page 0"}
    panel.step(5)
    panel.chosen = {**panel.chosen, "touched again before enabling": "nobody"}  # has no such moment
    assert panel.readout == whole and panel.step(-1) == whole
    for wrong in (5, -2):
        with pytest.raises(ValueError, match="the run has moments 0 to 4"):
            panel.step(wrong)
    with pytest.raises(ValueError, match="there is no run to step through"):
        who_flushes_where().step(0)
    with pytest.raises(ValueError, match="no moments"):
        step_through(drawing.Picture("<svg/>", "nothing"))


def test_the_text_unlocks_a_setting():
    panel = lose_a_write()
    assert panel.locked == ["A/D bits", "touched again before enabling"]
    again = panel.unlock("A/D bits")
    assert again.panel is panel and again.opens == ["A/D bits"] and repr(again) == repr(panel)
    for wrong in (lambda: panel.unlock("A/D"), lambda: Panel("p", {"n": ["1"]}, None, carry=False, unlock=["m"])):
        with pytest.raises(ValueError, match="the settings are"):
            wrong()


def test_a_widgets_output_carries_a_picture_of_how_it_begins():
    panel = lose_a_write()
    panel.choose(flush_rule="always")
    data, _ = panel._repr_mimebundle_()
    first = panel.states["if changed | off | nobody"]
    assert data["image/svg+xml"] == panel.still().svg and first["readout"] in panel.still().svg
    assert "Lose a write" in data["image/svg+xml"] and first["svg"].split("<title>")[1] in data["image/svg+xml"]


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
        return View(drawing.Picture("<svg/>", "nothing"), f"{number}.")

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
    broken.chosen = {"number": "2"}  # as the page does
    assert broken.readout == "This could not be computed: ZeroDivisionError: division by zero."
    with pytest.raises(ValueError, match="a setting needs options"):
        Panel("empty", {"number": []}, show)


def test_the_cliff():
    for policy, expected in (("IF_CHANGED", [0, 0, 0, 64]), ("ALWAYS", [0] * 4), ("NEVER", [64] * 4)):
        assert [scenes.missed_against_aged(FlushPolicy[policy], aged) for aged in (0, 32, 63, 64)] == expected


def test_all_text_stands_out():
    fills = [fill for fill, _ in drawing.LOOK.values()] + list(word_figures.KINDS.values())
    for fill in fills:
        assert fill == "none" or contrast(drawing.INK, fill) >= 4.5, fill
    light, dark = re.search(r"#\w{6}", drawing.LOST)[0], re.search(r"--kvmbook-lost: (#\w{6})", drawing.ALONE)[1]
    assert contrast(light, "#ffffff") >= 4.5 and contrast(dark, "#1b1b1b") >= 4.5
    assert dark in (ROOT / "kvmbook/views/panel.css").read_text()


def test_pictures_escape_what_they_say():
    assert drawing.text(0, 0, "a < b & c") == '<text x="0" y="0">a &lt; b &amp; c</text>'
