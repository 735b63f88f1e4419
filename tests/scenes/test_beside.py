"""Chapter 15: one run, asked of the model and of the recorded machine, call by call; and what a reproducer can show."""

import numpy as np
import pytest

from kvmbook import Kernel
from kvmbook.real import recorded
from kvmbook.scenes import ASKED, CPUS, MODELS, reproduces, side_by_side

MACHINE = recorded()
LOST = {"a ring, initially set", "CLEAR of two pages"}


@pytest.mark.parametrize("asked", ASKED)
def test_the_model_of_the_machine_gives_its_answers_and_knows_what_is_lost(asked):
    seen = side_by_side(asked, "this machine", MACHINE)
    assert seen.missed == (asked in LOST)
    assert [row.lost for row in seen.rows].count(True) == seen.missed
    if asked == "chapter 1's run":
        assert [row.agree for row in seen.rows] == [True, True, False, None, None, None]
    else:
        assert all(row.agree for row in seen.rows)


@pytest.mark.parametrize("model", MODELS)
def test_both_losses_are_older_than_the_patch_and_need_no_cpu_without_ad_bits(model):
    assert all(side_by_side(asked, model, MACHINE).missed for asked in LOST)


def test_the_patch_is_where_v5_19_and_the_machine_differ():
    differ = {}
    for asked in ASKED:
        rows = side_by_side(asked, "v5.19 on this CPU", MACHINE).rows
        differ[asked] = [(row.call, row.model, row.machine) for row in rows if row.agree is False]
    assert differ.pop("enabling twice") == [("flushes asked for", "+0", "+1")]
    assert differ.pop("chapter 1's run") == [("the host ages", "young", "ENOSYS")]
    assert not any(differ.values())


def test_chapter_1s_loss_is_in_the_model_without_ad_bits_alone():
    seen = side_by_side("chapter 1's run", "v5.19, no A/D bits", MACHINE)
    assert seen.missed and seen.rows[4].lost and seen.rows[4].stale and seen.rows[4].spte == "access-tracked"
    found = {(cpu, kernel.name) for cpu in CPUS for kernel in (Kernel.v5_19, Kernel.v6_0) if reproduces(cpu, kernel)}
    assert found == {("EPT without A/D bits", Kernel.v5_19.name)}
    assert not reproduces("EPT without A/D bits", Kernel.v5_19, aged=False)


@pytest.mark.parametrize(("last", "reported"), [(0x400, False), (0x401, True)])
def test_a_clear_is_judged_word_by_word(last, reported):
    """The CLEAR is of all pages from 0x1ff on; its last word names 0x3ff and 0x400, and no more."""
    slot = {"slot": 0, "base_gfn": 0x1FF, "npages": 0x401}
    with MACHINE.model().vm(page_size="2M") as vm:
        vm.enable_cap_manual_dirty_log_protect2(3)
        vm.set_user_memory_region(**slot)
        vm.vcpu[0].write(0x400)
        vm.set_user_memory_region(**slot, log_dirty_pages=True)
        vm.get_dirty_log(0)
        vm.clear_dirty_log(0, 0, 0x401, np.arange(0x401) <= last - 0x1FF)
        vm.vcpu[0].write(0x400)
        assert vm.get_dirty_log(0)[0x400 - 0x1FF] == reported


def test_calls_and_answers_in_words():
    rows = side_by_side("CLEAR of two pages", "this machine", MACHINE).rows
    assert [(row.call, row.machine) for row in rows[-5:]] == [
        ("GET", "all 513 pages"),
        ("CLEAR pages 0, 1", "done"),
        ("write 0x400", "done"),
        ("GET", "all but pages 0, 1"),
        ("memory of 0x400", "4"),
    ]
    assert "read 0x200 to 0x23f" in [
        row.call for row in side_by_side("a read beside a page", "this machine", MACHINE).rows
    ]
