"""What a signal during KVM_RESET_DIRTY_RINGS loses: the rounds that were recorded, held against the model's rule."""

import json

from kvmbook import Hardware, Kernel, Vm
from kvmbook.model import ResetDirtyRings
from kvmbook.real import Rounds, forgotten

KEPT = Rounds.kept()


def test_what_was_recorded_obeys_the_rule():
    stopped = [one for one in KEPT.with_signal if 0 < one.freed < KEPT.pages]
    assert len(stopped) >= 90 and {one.signals for one in stopped} == {1}
    assert all(one.lost == forgotten(one.freed, KEPT.pages) for one in KEPT.with_signal)
    assert KEPT.losing == (len(stopped), 0)


def test_no_signal_no_loss():
    assert {(one.signals, one.freed, one.lost) for one in KEPT.without} == {(0, KEPT.pages, ())}


def test_the_rule_is_the_models():
    """The model's signal comes when a whole word has been gathered."""
    for words in (1, 2):
        vm = Vm(Hardware.shadow(), Kernel.v6_18)
        vm.enable_dirty_ring(1 << 14)
        vm.set_user_memory_region(slot=0, base_gfn=0x100, npages=192)
        vm.set_user_memory_region(slot=0, base_gfn=0x100, npages=192, log_dirty_pages=True)
        for _ in range(2):
            reset = ResetDirtyRings()
            for page in range(150):
                vm.vcpu[0].write(0x100 + page)
            named = {page for _, page in vm.vcpu[0].dirty_ring.harvest()}
            vm.start(reset)
            while len(reset.taken) < 64 * words and reset.todo:
                vm.step(reset)
            reset.signal_pending = True
            vm.run(reset)
            vm.reset_dirty_rings()
        assert sorted(set(range(150)) - named) == list(forgotten(64 * words, 150))


def test_rounds_are_kept_and_read_back(tmp_path):
    KEPT.keep(tmp_path / "rounds.json")
    assert Rounds.kept(tmp_path / "rounds.json") == KEPT
    assert set(json.loads((tmp_path / "rounds.json").read_text())) == {
        "machine",
        "pages",
        "after",
        "with_signal",
        "without",
    }
