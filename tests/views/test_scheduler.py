"""The scheduler panel carries the model's own graph, and the pictures of runs say what the model does."""

import json
import random
import re
import xml.etree.ElementTree as ET

import pytest

from kvmbook.model import FlushPolicy, Kernel
from kvmbook.scenes import HARDWARE, graph_of, label, now_of, retell, run_of, what_of
from kvmbook.search import Grain, act, explore, possible, smallest_vm
from kvmbook.views import LOSS, page_graph_picture, rows_of, trace_picture, you_are_the_scheduler

KERNELS = {policy.value: Kernel.v5_19.with_(flush=policy) for policy in (FlushPolicy.IF_CHANGED, FlushPolicy.ALWAYS)}
EACH = [(ad_bits, flush) for ad_bits in HARDWARE for flush in KERNELS]


@pytest.fixture(scope="module")
def panel():
    return you_are_the_scheduler()


@pytest.mark.parametrize("ad_bits, flush", EACH)
def test_the_panel_and_a_real_vm_go_the_same_way(panel, ad_bits, flush):
    hardware, chance = HARDWARE[ad_bits], random.Random(200)
    panel.choose(A_D_bits=ad_bits, flush_when_enabling=flush)
    vm = smallest_vm(hardware, KERNELS[flush], grain=Grain.FAULT)
    for _ in range(200):
        actions = {label(action): action for action in possible(vm, Grain.FAULT)}
        assert sorted(panel.possible()) == sorted(actions)
        assert panel.rows == [(name, said) for name, _, said, _ in rows_of(now_of(vm), hardware.pml_entries > 0)]
        assert panel.lost == bool(vm.missed_dirty(0).size)
        step = chance.choice(sorted(actions))
        panel.do(step)
        act(vm, actions[step], Grain.FAULT)


@pytest.mark.parametrize("ad_bits, flush", EACH)
@pytest.mark.parametrize("grain", Grain)
def test_the_graph_is_the_one_that_explore_counts(ad_bits, flush, grain):
    graph = graph_of(HARDWARE[ad_bits], KERNELS[flush], grain=grain)
    found = explore(HARDWARE[ad_bits], KERNELS[flush], grain=grain)
    assert (len(graph.states), sum(map(len, graph.edges))) == (found.states, found.transitions)
    assert graph.shortest_loss() == found.trace


def test_two_vcpus_are_worded_as_a_real_vm_is():
    hardware, kernel = HARDWARE["on, with PML"], Kernel.v5_19
    graph, vm, here, chance = (
        graph_of(hardware, kernel, vcpus=2),
        smallest_vm(hardware, kernel, 1, 2, Grain.FAULT),
        0,
        0,
    )
    chance = random.Random(2)
    for _ in range(200):
        assert graph.states[here] == now_of(vm)
        action, here = chance.choice(graph.edges[here])
        act(vm, action, Grain.FAULT)


def test_show_me_is_the_shortest_run_and_undo_takes_it_back(panel):
    panel.choose(A_D_bits="off", flush_when_enabling="if changed")
    trace = explore(HARDWARE["off"], Kernel.v5_19, grain=Grain.FAULT).trace
    assert panel.play().startswith(
        "The write to page 0 is lost: no report will name it, unless the page is written again. Steps so far: 12,"
    )
    assert panel.path == [label(action) for action in trace] and panel.lost
    assert not panel.undo().startswith("The write") and not panel.lost and len(panel.path) == 11
    assert panel.hint() == "Nothing is lost. Steps so far: 11. From here the soonest loss takes 1 more step(s)."
    panel.do("vCPU0 writes page 0")
    assert panel.lost and "step 12" in panel.readout
    assert panel.start_again() == panel.undo() == "Nothing is lost. Choose a step." and panel.path == []
    assert repr(panel) == repr(you_are_the_scheduler())


def test_where_no_run_loses_a_write_the_panel_says_so(panel):
    panel.choose(A_D_bits="off", flush_when_enabling="if changed")
    panel.play()
    assert panel.choose(flush_when_enabling="always") == "Nothing is lost. Choose a step." and panel.path == []
    states = explore(HARDWARE["off"], KERNELS["always"], grain=Grain.FAULT).states
    assert (
        panel.play()
        == f"With one page and one vCPU, cut by fault, no run loses a write: all {states} states were visited."
    )
    assert panel.hint().endswith("From here no run of this small VM loses a write.")


def test_a_step_that_is_not_possible_is_refused_by_name(panel):
    panel.start_again()
    for wrong in ("vCPU0 forgets page 0", "nobody does nothing", ""):
        with pytest.raises(ValueError, match="possible: vCPU0 reads page 0, vCPU0 writes page 0, host ages page 0"):
            panel.do(wrong)
    assert panel.path == []


def test_what_the_panel_carries_is_small(panel):
    assert sum(len(state["graph"]) for state in panel.states.values()) < 400_000
    assert all(json.loads(state["graph"])["states"] for state in panel.states.values())


@pytest.mark.parametrize(
    "ad_bits, pages, vcpus, grain",
    [("off", 1, 1, Grain.STEP), ("off", 2, 1, Grain.ACCESS), ("on, with PML", 1, 2, Grain.FAULT)],
)
def test_the_picture_of_a_run(ad_bits, pages, vcpus, grain):
    result = explore(HARDWARE[ad_bits], Kernel.v5_19, pages, vcpus, grain)
    picture = trace_picture(result)
    assert picture.svg == trace_picture(result).svg
    said = texts_of(picture)
    assert picture.svg.count(LOSS) == picture.svg.count("✕") == 1 and "lets it pass" in said
    for number, action in enumerate(result.trace, 1):
        assert any(line.startswith(what_of(action)) for line in said) and str(number) in said
        assert f"{number}. {label(action)}" in repr(picture)
    assert "stale: writable" in said and "flush_if_owed: no flush" in said
    assert not overlapping(picture)


def test_the_picture_of_a_run_shows_flushes():
    hardware, kernel = HARDWARE["off"], Kernel.v5_19
    result = explore(hardware, kernel, grain=Grain.STEP)
    run = run_of(result)
    assert not any(moment.flushed for moment in run.moments) and run.moments[-1].hit and run.moments[-1].now.lost
    trace = [action._replace(what="ages and flushes") if action.who == "host" else action for action in result.trace]
    safe = retell(smallest_vm(hardware, kernel), trace[:7])
    last = safe.moments[-1]
    assert last.flushed and last.now.pages[0].tlb == ("empty",) and last.note == "young"
    picture = trace_picture(safe)
    assert "✕" not in picture.svg and picture.svg.count("⟳") == 1 and not overlapping(picture)
    assert "all TLBs flushed" in repr(picture)


def test_no_picture_of_a_run_that_does_not_exist():
    with pytest.raises(ValueError, match="no run loses a write here"):
        trace_picture(explore(HARDWARE["off"], Kernel.v6_0, grain=Grain.ACCESS))


@pytest.mark.parametrize("ad_bits, flush", EACH)
def test_the_picture_of_the_graph(ad_bits, flush):
    hardware, kernel = HARDWARE[ad_bits], KERNELS[flush]
    picture, found = page_graph_picture(hardware, kernel), explore(hardware, kernel, grain=Grain.ACCESS)
    assert picture.svg == page_graph_picture(hardware, kernel).svg
    said = texts_of(picture)
    assert picture.svg.count("✕") == (found.trace is not None)
    assert (LOSS in said) != ("no run loses a write" in said)
    assert f"{found.states} states" in repr(picture)
    for action in found.trace or ():
        assert any(line.startswith(label(action)) for line in said) and label(action) in repr(picture)
    assert not overlapping(picture)


def test_a_run_to_light_must_be_possible():
    hardware, kernel = HARDWARE["off"], Kernel.v5_19
    trace = explore(hardware, kernel, grain=Grain.ACCESS).trace
    assert page_graph_picture(hardware, kernel, trace).svg == page_graph_picture(hardware, kernel).svg
    assert "lit" not in page_graph_picture(hardware, kernel, ()).svg
    with pytest.raises(ValueError, match="'user space kvm_swap_active_memslots' is not possible now"):
        page_graph_picture(hardware, kernel, trace[3:])
    for more in ("reads", "writes"):  # a run may go on after the loss
        page_graph_picture(hardware, kernel, (*trace, trace[0]._replace(what=more)))


def texts_of(picture):
    root = ET.fromstring(picture.svg)
    assert root.get("role") == "img" and root[0].tag.endswith("title") and len(root[0].text) > 20
    return [element.text or "" for element in root.iter() if element.tag.endswith("text")]


def overlapping(picture):
    """Texts that overlap if a letter is 0.56 of its size wide; and such as leave the picture."""
    found, root = [], ET.fromstring(picture.svg)
    right = float(re.search(r"viewBox=\"0 0 ([\d.]+)", picture.svg)[1])
    boxes = []
    for element in root.iter():
        if element.tag.endswith("text") and element.text:
            size, x, y = (float(element.get(key, 14)) for key in ("font-size", "x", "y"))
            width = len(element.text) * size * 0.56
            left = {"start": x, "end": x - width}.get(element.get("text-anchor"), x - width / 2)
            boxes.append((left, left + width, y - size, y, element.text))
            found += [element.text] * (left < 0 or left + width > right)
    for number, (left, end, top, bottom, said) in enumerate(boxes):
        for other_left, other_end, other_top, other_bottom, other in boxes[:number]:
            if left < other_end and other_left < end and top < other_bottom and other_top < bottom:
                found.append((said, other))
    return found
