"""The scheduler panel carries the model's own graph, and the pictures of runs say what the model does."""

import json
import random
import re

import pytest
from drawn import moment, overlapping, texts_of

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
    panel.choose(A_D_bits=ad_bits, flush_rule=flush)
    panel.start_again()
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
    far = len(found.trace or ()) or 20
    chances = graph.chance_of_loss(far)
    assert len(chances) == far + 1 and not any(chances[:far]) and (chances[far] > 0) == (not found.safe)
    assert sum(graph.runs(1)) == len(graph.edges[0])


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
    panel.choose(A_D_bits="off", flush_rule="if changed")
    trace = explore(HARDWARE["off"], Kernel.v5_19, grain=Grain.FAULT).trace
    assert panel.play().startswith(
        "The write to page 0 is lost: no report will name it, unless the page is written again. Steps so far: 12,"
    )
    assert panel.path == [label(action) for action in trace] and panel.lost
    assert not panel.undo().startswith("The write") and not panel.lost and len(panel.path) == 11
    assert panel.hint() == "Nothing is lost. Steps so far: 11. From here the soonest loss takes 1 more step(s)."
    assert panel.step(4) == "Nothing is lost. Steps so far: 4. From here the soonest loss takes 8 more step(s)."
    assert panel.shown == panel.path[:4] and len(panel.path) == 11  # looked at, not undone
    assert panel.step(-1).startswith("Nothing is lost. Steps so far: 11.")
    panel.do("vCPU0 writes page 0")
    assert panel.lost and "step 12" in panel.readout
    assert panel.start_again() == panel.undo() == "Nothing is lost. Choose a step." and panel.path == []
    assert repr(panel) == repr(you_are_the_scheduler())


def test_where_no_run_loses_a_write_the_panel_says_so(panel):
    panel.choose(A_D_bits="off", flush_rule="if changed")
    panel.play()
    panel.start_again()
    assert panel.choose(flush_rule="always") == "Nothing is lost. Choose a step." and panel.path == []
    states = explore(HARDWARE["off"], KERNELS["always"], grain=Grain.FAULT).states
    assert (
        panel.play()
        == f"With one page and one vCPU, cut by fault, no run loses a write: all {states} states were visited."
    )
    assert panel.hint().endswith("From here no run of this small VM loses a write.")


def test_a_run_can_be_written(panel):
    panel.choose(A_D_bits="off", flush_rule="if changed")
    trace = explore(HARDWARE["off"], Kernel.v5_19, grain=Grain.FAULT).trace
    short = (
        "v r; kvm; vcpu0 reads\nhost ages  # not: ages and flushes\n5. user enables (logging)\n" + "user;" * 6 + "v w"
    )
    for written in (
        short,
        "\n".join(map(label, trace)),
        repr(trace_picture(explore(HARDWARE["off"], Kernel.v5_19, grain=Grain.FAULT))),
    ):
        assert panel.write(written).startswith("The write to page 0 is lost")
        assert panel.path == [label(action) for action in trace] and panel.moment == -1
    for wrong, said in {
        "v r; host sleeps; v r": 'Step 2, "host sleeps", is not the name of a step that is possible here. Possible: KVM',
        "vcpu0": 'Step 1, "vcpu0", may mean: vCPU0 reads page 0; vCPU0 writes page 0.',
    }.items():
        with pytest.raises(ValueError, match=re.escape(said)):
            panel.write(wrong)
        assert len(panel.path) == int(said[5]) - 1 and panel.moment == -1  # what stands before it is done
    assert panel.write(" ; \n# nothing") == "Nothing is lost. Choose a step." and panel.path == []


def test_other_settings_keep_the_run_as_far_as_it_is_possible(panel):
    panel.choose(A_D_bits="off", flush_rule="if changed")
    panel.play()
    run = list(panel.path)
    assert panel.choose(flush_rule="always") == "Nothing is lost. Steps so far: 12."
    assert panel.path == [step.replace("flush_if_owed", "flush_always") for step in run]
    assert panel.choose(flush_rule="if changed").startswith("The write to page 0 is lost") and panel.path == run
    panel.choose(A_D_bits="on, with PML")  # its ioctl has more steps: the last write comes in the midst of them
    steps = ["kvm_mmu_update_cpu_dirty_logging", "clear_dirty_tdp", "flush_if_owed"]
    assert panel.path[8:] == [*(f"user space {step}" for step in steps), "vCPU0 writes page 0"]
    panel.write("v r")
    panel.path = [*panel.path, "vCPU0 forgets page 0", "host ages page 0"]  # as no page would say
    assert panel._kept() == ["vCPU0 reads page 0"]
    panel.start_again()


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
    assert said.count(LOSS) == 1 and picture.svg.count("✕") == 2 and "lets it pass" in said  # one in each form
    for number, action in enumerate(result.trace, 1):
        assert any(line.startswith(what_of(action)) for line in said) and str(number) in said
        assert f"{number}. {label(action)}" in repr(picture)
    assert "stale: writable" in said and "flush_if_owed: no flush" in said
    assert not overlapping(picture) and not overlapping(picture, narrow=True)


@pytest.mark.parametrize("ad_bits, grain", [("off", Grain.FAULT), ("on, with PML", Grain.STEP)])
def test_each_moment_of_a_run_is_the_models(ad_bits, grain):
    """What the picture lights at each moment is what a VM is like that has done only the steps up to there."""
    result = explore(HARDWARE[ad_bits], Kernel.v5_19, 1, 2, grain)
    picture = trace_picture(result)
    assert len(picture.moments) == len(result.trace) + 1
    for number in range(len(result.trace) + 1):
        vm = smallest_vm(HARDWARE[ad_bits], Kernel.v5_19, 1, 2, grain)
        for action in result.trace[:number]:
            before = now_of(vm).pages[0]
            act(vm, action, grain)
        page = now_of(vm).pages[0]
        new, _ = moment(picture.svg, number)
        tlbs = ["stale: " * stale + tlb for stale, tlb in zip(page.stale, page.tlb, strict=True)]
        if number == 0 or page.spte != before.spte:
            assert page.spte in new
        for v, tlb in enumerate(tlbs):
            if number == 0 or page.tlb[v] != before.tlb[v]:
                assert tlb in new
        if number:
            sentence = picture.moments[number]
            assert sentence.startswith(f"{number}. {label(result.trace[number - 1])}")
            assert (f"SPTE {page.spte}" in sentence) == (page.spte != before.spte)
            assert ("the write is lost" in sentence) == page.lost
    assert picture.moments[0] == "At the start."


def test_the_picture_of_a_run_shows_flushes():
    hardware, kernel = HARDWARE["off"], Kernel.v5_19
    result = explore(hardware, kernel, grain=Grain.STEP)
    run = run_of(result)
    assert (
        not any(moment.flushed for moment in run.moments)
        and run.moments[-1].answered == "TLB"
        and run.moments[-1].now.lost
    )
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
    assert said.count(LOSS) == (found.trace is not None)
    assert (LOSS in said) != ("no run loses a write" in said)
    assert f"{found.states} states" in repr(picture)
    for action in found.trace or ():
        assert any(line.startswith(label(action)) for line in said) and label(action) in repr(picture)
    assert not overlapping(picture) and not overlapping(picture, narrow=True)


def test_each_moment_of_the_graph_is_a_state_of_the_run():
    hardware, kernel = HARDWARE["off"], Kernel.v5_19
    picture, vm = page_graph_picture(hardware, kernel), smallest_vm(hardware, kernel, grain=Grain.ACCESS)
    trace = explore(hardware, kernel, grain=Grain.ACCESS).trace
    assert len(picture.moments) == len(trace) + 1
    for action, sentence in zip(trace, picture.moments[1:], strict=True):
        act(vm, action, Grain.ACCESS)
        page = now_of(vm).pages[0]
        assert label(action) in sentence
        assert ("the write is lost" in sentence) == page.lost != (f"SPTE {page.spte}, TLB {page.tlb[0]}" in sentence)


def test_a_run_to_light_must_be_possible():
    hardware, kernel = HARDWARE["off"], Kernel.v5_19
    trace = explore(hardware, kernel, grain=Grain.ACCESS).trace
    assert page_graph_picture(hardware, kernel, trace).svg == page_graph_picture(hardware, kernel).svg
    assert "lit:" not in page_graph_picture(hardware, kernel, ()).svg
    with pytest.raises(ValueError, match="'user space kvm_swap_active_memslots' is not possible now"):
        page_graph_picture(hardware, kernel, trace[3:])
    for more in ("reads", "writes"):  # a run may go on after the loss
        page_graph_picture(hardware, kernel, (*trace, trace[0]._replace(what=more)))
