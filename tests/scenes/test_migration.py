"""A migration brings the guest as it was, or names each write that it has lost."""

import json
import os
import pathlib
import subprocess
import sys
from dataclasses import replace

import pytest

from kvmbook import Hardware, Kernel
from kvmbook.scenes import (
    AGEINGS,
    DELETED,
    FLUSHED,
    IDLE,
    INDEX,
    LIVES,
    LOG,
    LUCKY,
    MODES,
    SEEDS,
    WRONG,
    Chance,
    Life,
    Request,
    Script,
    Setting,
    Workload,
    chance,
    copied,
    kept,
    migrate,
    move,
)

ROOT = pathlib.Path(__file__).parent.parent.parent
THREE = [Request("put", key, value) for key, value in (("alice", "12"), ("bob", "7"), ("carol", "3"))]
SHOP = Script({0: THREE, 48: [Request("delete", "bob")]})
OLD, NEW = Setting(kernel=Kernel.v5_19, ageing=16), Setting(kernel=Kernel.v6_0, ageing=16)
KINDS = {
    "EPT without A/D": Hardware.ept(ad_bits=False),
    "EPT": Hardware.ept(),
    "PML": Hardware.ept(pml=True),
    "NPT": Hardware.npt(),
    "shadow": Hardware.shadow(),
}


def test_the_deleted_record_is_back_on_v5_19_and_not_on_v6_0():
    old, new = migrate(OLD, SHOP), migrate(NEW, SHOP)
    assert (old.differing, old.store.get("bob"), old.store.disagreements()) == ([LOG, INDEX], "7", [])
    assert (new.differing, new.store.get("bob"), new.store.page(LOG)["bob"]) == ([], None, DELETED)
    assert (old.writable, old.enabling_flushed, new.writable, new.enabling_flushed) == (0, False, 0, True)


def test_the_cause_names_the_write_its_entry_and_since_when():
    (_, index) = migrate(OLD, SHOP).wrong
    assert index.lost.tick == 48 and index.lost.wrote == 0
    assert "the SPTE was access-tracked since tick 16" in index.cause
    assert "the TLB entry writable since tick 0" in index.cause


def test_a_page_that_nobody_armed_has_another_cause():
    """A ring with INITIALLY_SET, which QEMU does not use: enabling protects nothing, and there are no bits."""
    from kvmbook.scenes.migration import _Migration

    migration = _Migration(replace(OLD, mode="dirty ring", ageing=0), SHOP, [LOG])
    migration.vm.initially_set = migration.vm.manual_protect = True
    moved = migration.run()
    assert moved.differing == [LOG, INDEX]
    told = migration.told[LOG]
    assert told[-1].version > told[-1].arrived and {instant.spte for instant in told[1:]} == {"writable"}


def test_the_second_run_is_the_first():
    setting, clients = replace(OLD, vcpus=2, tlb=18), Workload(3, 0.5)
    again, first = migrate(setting, clients), copied(setting, clients)
    assert first.differing and replace(again, wrong=()) == first
    assert [wrong.page for wrong in again.wrong] == first.differing
    for wrong in again.wrong:
        assert (wrong.source, wrong.destination) == (first.source[wrong.page], first.destination[wrong.page])
        assert wrong.instants[-1].version > wrong.instants[-1].arrived


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost_where_enabling_flushes(kind, mode):
    """Every chore at once, huge pages and small ones, one vCPU and two."""
    for seed in range(4):
        setting = Setting(KINDS[kind], Kernel.v6_0, mode, ageing=8, reclaim=5, ksm=7 * (seed % 2), vcpus=1 + seed % 2)
        if seed == 2:
            setting = replace(setting, page_size="2M", pages=512)
        moved = copied(setting, Workload(seed, 0.3))
        assert moved.finished and not moved.differing
        assert moved.store.disagreements() == []


@pytest.mark.parametrize("mode", MODES)
def test_on_v5_19_all_ways_but_one_lose(mode):
    moved = [copied(replace(OLD, mode=mode, ageing=8), Workload(seed, 0.5)) for seed in range(10)]
    assert any(m.differing for m in moved) is (mode != "INITIALLY_SET")
    assert not any(m.differing for m in moved if m.enabling_flushed)


def test_without_a_kick_a_ring_misses_what_is_in_the_pml_buffer(monkeypatch):
    setting = Setting(KINDS["PML"], Kernel.v6_0, "dirty ring")
    assert not copied(setting, Workload(1)).differing
    monkeypatch.setattr("kvmbook.scenes.migration._Migration._kick", lambda self: None)
    assert copied(setting, Workload(1)).differing


def test_a_small_ring_is_reaped_when_it_is_full():
    """A ring of 256 entries, 192 of which may be used, and 300 pages that are written once."""
    busy = Script({41: [Request("put", f"k{n}", "1") for n in range(300)]})
    setting = Setting(mode="dirty ring", pages=512, bandwidth=64, kernel=Kernel.v6_0)
    moved = copied(setting, busy)
    resets = [call for call in moved.calls if call.name == "KVM_RESET_DIRTY_RINGS" and call.tick == 41]
    assert resets and not moved.differing


def test_clear_goes_chunk_by_chunk_before_their_pages_are_sent():
    moved = copied(Setting(mode="INITIALLY_SET", pages=200, bandwidth=50, kernel=Kernel.v6_0), Workload(1))
    first = [call.note for call in moved.calls if call.name == "KVM_CLEAR_DIRTY_LOG"][:4]
    assert first == ["64 of chunk 0", "64 of chunk 1", "64 of chunk 2", "8 of chunk 3"]


def test_rounds_follow_each_other_and_the_guest_stands_still_as_said():
    moved = copied(replace(NEW, downtime=2, bandwidth=2), Workload(1, rate=4))
    assert moved.rounds[0][:3] == (40, 72, 64)
    for before, after in zip(moved.rounds, moved.rounds[1:-1], strict=False):
        assert after.begin == before.end
    assert moved.rounds[-1].begin == moved.rounds[-2].end + 1, "a tick until the vCPUs stand still"
    assert moved.downtime == moved.end - moved.rounds[-1].begin == -(-moved.rounds[-1].pages // 2)


def test_a_guest_that_writes_too_fast_stays_unless_it_is_slowed_down():
    rush = Workload(2, rate=4)
    setting = Setting(bandwidth=2, downtime=1)
    stays, slowed = copied(setting, rush), copied(replace(setting, auto_converge=True), rush)
    assert not stays.finished and len(stays.rounds) == setting.max_rounds and stays.differing == []
    assert slowed.finished and max(one.throttle for one in slowed.rounds) >= 20
    steps = [one.throttle for one in slowed.rounds]
    assert steps == sorted(steps) and set(steps) <= {0, *range(20, 100, 10)}


@pytest.mark.parametrize(
    "wrong", [{"mode": "bitmap"}, {"pages": 0}, {"bandwidth": 0}, {"tlb": 0}, {"ageing": -1}, {"downtime": -1}]
)
def test_a_setting_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Setting(**wrong)


# ---- chances ---------------------------------------------------------------------------------------------------------


def test_the_kept_results_are_those_of_the_model():
    for number, life in enumerate(LIVES):
        for seed in {number * 37 % len(SEEDS), len(SEEDS) - 1 - number}:
            assert str(move(life, seed)) == kept()[life][seed], f"{life}, seed {seed}"


def test_the_sweeps_command_compares_with_what_is_kept(tmp_path):
    command = [sys.executable, "-m", "tools.chances", "--on", "here", "--seeds", "1"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("50 migrations on here: ") and done.stdout.endswith(
        "\nthe same as those that are kept\n"
    )
    assert not list((tmp_path / "build").iterdir())


def test_every_life_is_kept_whole():
    assert set(kept()) == set(LIVES) and len(LIVES) == 2 * len(IDLE) * len(AGEINGS)
    assert all(len(digits) == len(SEEDS) and set(digits) <= set("012") for digits in kept().values())


def test_with_the_patch_all_flush_and_none_is_wrong():
    for life in LIVES:
        if life.kernel == "v6.0":
            assert chance(life, FLUSHED).share == 1 and chance(life, WRONG).hits == chance(life, LUCKY).hits == 0


def test_a_band_holds_what_it_says():
    """Wilson's 95 % band for 0 of 100, and for 5 of 10: known figures."""
    assert Chance(0, 100).band == pytest.approx((0.0, 0.03699), abs=1e-4)
    assert Chance(5, 10).band == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert Chance(100, 100).band == pytest.approx((0.96301, 1.0), abs=1e-4)


def test_a_life_that_is_not_kept_is_no_life():
    with pytest.raises(KeyError):
        chance(Life("v5.19", 0.123, 16), WRONG)
    assert json.dumps(move(LIVES[0], 0))
