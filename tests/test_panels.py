"""Panels carry what the model says, for every combination; pictures are deterministic and say what they show."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from kvmbook import FlushPolicy, Hardware, Kernel, exercises, figures, scenes
from kvmbook.explore import explore
from kvmbook.flush_rules import BitRule, leaves_met
from kvmbook.panels import Panel, View, lose_a_write, search_progress, who_flushes_where, write_the_rule
from kvmbook.schedule import Grain

NO_AD = Hardware.ept(ad_bits=False)


@pytest.mark.parametrize("make", [lose_a_write, who_flushes_where, write_the_rule])
def test_every_combination_is_carried_and_agrees_with_a_live_answer(make):
    panel, live = make(), make()
    live.states = {}
    names = list(panel.chosen)
    for combination in panel.combinations():
        live.states = {}
        live.chosen = {**dict(zip(names, combination, strict=True)), "": ""}
        live.chosen = dict(zip(names, combination, strict=True))
        key = " | ".join(combination)
        assert live.states[key] == panel.states[key]
        picture = ET.fromstring(panel.states[key]["svg"])
        assert picture.get("role") == "img" and picture[0].tag.endswith("title") and len(picture[0].text) > 20
        assert panel.states[key]["readout"].endswith(".")


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
    monkeypatch.setattr("kvmbook.panels.display", shown.append)
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
    with pytest.raises(ValueError, match="needs options"):
        Panel("empty", {"number": []}, show)


def test_the_cliff():
    for policy, expected in (("IF_CHANGED", [0, 0, 0, 64]), ("ALWAYS", [0] * 4), ("NEVER", [64] * 4)):
        assert [scenes.missed_against_aged(FlushPolicy[policy], aged) for aged in (0, 32, 63, 64)] == expected


def test_pictures_escape_what_they_say():
    assert figures.text(0, 0, "a < b & c") == '<text x="0" y="0">a &lt; b &amp; c</text>'


# ---- check cells: wrong answers get a hint, and no answer is never right ---------------------------------------------


class ChangedOrTracked:
    """The tempting rule: flush if an access-tracked SPTE is met."""

    unconditional = False

    def after_write_protect(self, fmt, old, new, answer):
        return answer | fmt.is_access_track_spte(old)

    after_clear_dirty = after_write_protect


class AllOfThem:
    """Flush only if every page is MMU-writable: wrong as soon as there is another page."""

    unconditional = False

    def after_write_protect(self, fmt, old, new, answer):
        return np.all(fmt.is_mmu_writable_spte(old))

    after_clear_dirty = after_write_protect


def enable(vm):
    vm.set_user_memory_region(slot=0, base_gfn=0x200, npages=16, log_dirty_pages=True)


def five_by_another_slot(vm):
    """Right, and quite different from the book's solution: a second slot's flush saves the other eleven."""
    for gfn in range(0x200, 0x210):
        vm.vcpu[0].read(gfn)
    vm.clear_young(0x200, 0x210)
    enable(vm)
    for gfn in range(0x200, 0x205):
        vm.vcpu[0].write(gfn)
    vm.set_user_memory_region(slot=1, base_gfn=0x1000, npages=1)
    vm.vcpu[1].write(0x1000)
    vm.set_user_memory_region(slot=1, base_gfn=0x1000, npages=1, log_dirty_pages=True)
    for gfn in range(0x205, 0x210):
        vm.vcpu[0].write(gfn)


class Always:
    unconditional = True

    def after_write_protect(self, fmt, old, new, answer):
        return answer & False

    after_clear_dirty = after_write_protect


AGED = [f"{step} page {page}" for step in ("vCPU0 reads", "host ages") for page in (0, 1)]
ENABLING = [f"user space {name}" for name in (
    "enables", "kvm_swap_active_memslots", "synchronize_srcu", "kvm_arch_commit_memory_region", "write_protect_tdp",
    "flush_if_owed", "return_to_user_space",
)]  # fmt: skip
WRITES = ["vCPU0 writes page 0", "vCPU0 writes page 1"]


def search(hardware=NO_AD, kernel=Kernel.v5_19, flush_young=False, without=("ages",), policy=None):
    kernel = kernel.with_(flush=policy) if policy else kernel
    kernel = kernel.with_(clear_flush_young_flushes=flush_young)
    return explore(hardware, kernel, grain=Grain.ACCESS, without=without)


def rule(chooses):
    return BitRule(frozenset(kind for kind in leaves_met(Hardware.npt()) if chooses(kind)))


def nested_loss(vm):
    vm.vcpu[0].read(0x200, l2=True)
    vm.clear_young(0x200, 0x201)
    enable(vm)
    vm.vcpu[0].write(0x200, l2=True)


def unlucky(vm):
    vm.vcpu[0].read(0x200)
    vm.clear_young(0x200, 0x201)
    vm.vcpu[1].read(0x200)
    enable(vm)
    vm.vcpu[0].write(0x200)


@pytest.mark.parametrize(
    ("check", "answer", "said"),
    [
        ("check_01_1", lambda vm: vm.vcpu[1].read(0x200), "No: 16 writes are still missed"),
        ("check_01_1", lambda vm: [vm.vcpu[1].write(0x200), vm.vcpu[1].write(0x201)], "No: exactly one vCPU"),
        ("check_01_1", lambda vm: [cpu.write(0x200) for cpu in vm.vcpu], "No: exactly one vCPU"),
        ("check_01_1", lambda vm: [vm.vcpu[1].read(0x200), vm.kvm_flush_remote_tlbs()], "No: exactly one vCPU"),
        ("check_01_1", lambda vm: vm.vcpu[0].write(0x200), "No: your access never reached KVM"),
        ("check_01_1", lambda vm: vm.vcpu[0].write(0x999), "No: that page is in no slot"),
        ("check_01_1", lambda vm: vm.nonsense, "No: your answer raised AttributeError"),
        ("check_01_1", lambda vm: [vm.vcpu[0].evict(0x205), vm.vcpu[0].write(0x205)], "Yes."),
        ("check_01_2", lambda vm: vm.vcpu[0].write(0x200), "No: your run must leave dirty logging enabled"),
        ("check_01_2", lambda vm: enable(vm), "No: 0 pages of the slot are written"),
        ("check_01_2", lambda vm: vm.set_user_memory_region(slot=0), "No: your run must leave"),
        ("check_01_2", five_by_another_slot, "Yes."),
        ("check_01_3", lambda vm: vm.vcpu[0].evict(0x200), "No: your rescue touches slot 0"),
        ("check_01_3", lambda vm: vm.set_user_memory_region(slot=0), "No: your rescue touches slot 0"),
        ("check_01_3", lambda vm: vm.vcpu[1].write(0x1001), "No: the write is missed"),
        ("check_01_3", lambda vm: vm.invalidate_range(0, 0x300), "No: your rescue touches slot 0"),
        ("check_01_3", lambda vm: vm.invalidate_range(0x1000, 0x1001), "Yes."),
        ("check_01_3", lambda vm: vm.set_user_memory_region(slot=1), "Yes."),
        ("check_08_1", ["split_huge_tdp_sptes"], "No: step 1 is not 'split_huge_tdp_sptes'"),
        ("check_08_1", [], "No: this function takes 4 steps here, you name 0"),
        ("check_08_2", ChangedOrTracked, "No: pass an object"),
        ("check_08_2", ChangedOrTracked(), "No: a write is missed if the page is read again by vCPU 1"),
        ("check_08_2", AllOfThem(), "No: a write is missed if the page is untouched since ageing, beside one"),
        ("check_08_2", Always(), "No: it flushes although the only mapped page is read-only"),
        ("check_08_3", lambda vm: vm.vcpu[0].attempt("read", 0x200), "No: KVM for vCPU0: kvm_faultin_pfn is still"),
        ("check_08_3", lambda vm: vm.vcpu[0].read(0x200), "No: your run must leave dirty logging enabled"),
        ("check_08_3", lambda vm: [vm.vcpu[0].read(0x200), enable(vm)], "No: nobody writes"),
        ("check_08_3", lambda vm: [enable(vm), vm.vcpu[0].write(0x200)], "No: no write is missed; look at D"),
        ("check_10_1", "ages", "No: give one step in a list"),
        ("check_10_1", ("ages page 0",), "No: 'ages page 0' is none of the steps that somebody chooses; give the name"),
        ("check_10_2", "vCPU0 reads page 0", "No: give a list"),
        ("check_10_3", search(), "No: give two results"),
        ("check_10_3", (search(policy=FlushPolicy.NEVER), search(kernel=Kernel.v6_0)), "No: change that one switch"),
        ("check_10_1", ("ages", "gets"), "No: give one step in a list"),
        ("check_10_1", ("writes",), "No: that one must stay"),
        ("check_10_1", ("flushes",), "No: 'flushes' is none of the steps"),
        ("check_10_1", ("reads",), "No: a write is still lost"),
        ("check_10_1", ("ages",), "Yes."),
        (
            "check_10_2",
            ["vCPU0 reads page 2"],
            "No: step 1, 'vCPU0 reads page 2', is not possible there; possible: vCPU0",
        ),
        ("check_10_2", [*AGED, *ENABLING, "vCPU0 writes page 0"], "No: 1 of 2 writes are lost"),
        ("check_10_2", [*AGED, "vCPU0 forgets page 0", *ENABLING, *WRITES], "No: 1 of 2 writes are lost"),
        ("check_10_2", [*AGED, *ENABLING, "vCPU0 reads page 0", *WRITES], "No: both are lost, in 14 steps"),
        ("check_10_2", [*AGED, *ENABLING, *WRITES], "Yes."),
        ("check_10_3", (search(Hardware.npt()), search(Hardware.npt())), "No: the bug is about CPUs without A/D bits"),
        ("check_10_3", (search(flush_young=True), search()), "No: both kernels need clear_flush_young_flushes=False"),
        ("check_10_3", (search(without=()), search()), 'No: leave out "ages"'),
        ("check_10_3", (search(kernel=Kernel.v6_0), search()), "No: the first result should lose a write"),
        ("check_10_3", (search(), search(kernel=Kernel.v6_0)), "Yes."),
        ("check_11_1", FlushPolicy.ALWAYS, "No: give a BitRule"),
        ("check_11_1", rule(lambda kind: False), "No: a write can be lost"),
        ("check_11_1", rule(lambda kind: True), "No: it is sound, but 4 of its 8 kinds could be left out"),
        ("check_11_1", rule(lambda kind: kind.before & 1), "Yes."),
        ("check_11_2", lambda vm: unlucky(vm), "No: no write is missed; the nested guest's leaves"),
        ("check_11_2", lambda vm: vm.vcpu[0].read(0x200, l2=True), "No: your run must leave"),
        ("check_11_2", nested_loss, "Yes."),
        ("check_11_3", lambda vm: enable(vm), "No: no write is missed"),
        ("check_11_3", lambda vm: setattr(vm, "kernel", Kernel.v6_0), "No: that is another kernel"),
        ("check_11_3", unlucky, "Yes."),
    ],
)
def test_check_cells_answer_wrong_answers_with_a_hint(check, answer, said, capsys):
    getattr(exercises, check)(answer)
    assert capsys.readouterr().out.startswith(said)
    getattr(exercises, check)(None)
    assert capsys.readouterr().out == "Not yet: there is no answer to check.\n"
