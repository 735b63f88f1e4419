"""Slots as large as they are: what passes and harvests do there is what they do page by page."""

from unittest.mock import patch

import numpy as np
import pytest

from kvmbook import Hardware, Kernel, Vm
from kvmbook.model import numba_is_there, to_words

BASE, LARGE, SMALL = 1 << 18, 1 << 17, 1 << 9
WAYS = ["compiled", "by kind"]


@pytest.fixture(params=WAYS)
def way(request):
    assert numba_is_there(), "numba is missing; the extra `test` has it"
    with patch("kvmbook.model.compiled.numba_is_there", lambda: request.param == "compiled"):
        yield request.param


def leaf_words(vm):
    """All SPTEs of 4K pages, in the order of their gfns, as offsets from the first page's frame."""
    return np.concatenate([table.sptes for table in vm.page_tables.tables.values() if table.level == 1])


def mapped(hardware, kernel, npages, words_per_step=None):
    vm = Vm(hardware, kernel, page_size="2M")
    vm.words_per_step = words_per_step
    vm.set_user_memory_region(0, BASE, npages)
    for gfn in range(BASE, BASE + npages, 512):
        vm.vcpu[0].write(gfn)
    return vm


def through_all_passes(vm, npages, dirty):
    """Enable, age a part, enable nothing twice, harvest, clear in chunks; what was said on the way."""
    said = []
    vm.set_user_memory_region(0, BASE, npages, log_dirty_pages=True)
    said.append(leaf_words(vm))
    said.append(vm.clear_young(BASE, BASE + npages // 2))
    said.append(leaf_words(vm))
    for gfn in BASE + dirty:
        vm.vcpu[0].write(int(gfn))
    said.append(vm.test_young(BASE, BASE + npages // 2))
    said.append(vm.get_dirty_log(0))
    said.append(leaf_words(vm))
    for gfn in BASE + dirty[::2]:
        vm.vcpu[0].write(int(gfn))
    for first in range(0, npages, npages // 4):
        vm.clear_dirty_log(0, first, npages // 4, np.ones(npages // 4, bool))
    said += [leaf_words(vm), vm.missed_dirty(0), sorted(vm.host.dirty), str(vm.counters)]
    return said


MACHINES = [
    (Hardware.ept(ad_bits=False), Kernel.v5_19),
    (Hardware.ept(ad_bits=True, pml=True), Kernel.v6_0),
    (Hardware.ept(ad_bits=False), Kernel.v6_15),
    (Hardware.npt(), Kernel.v5_19.with_(ages_by_plain_store=True)),
]


@pytest.mark.parametrize(("hardware", "kernel"), MACHINES, ids=lambda value: value.name)
def test_a_large_slot_goes_through_all_passes_as_a_small_one_does_page_by_page(way, hardware, kernel):
    dirty = np.arange(0, SMALL, 7)
    small, large = mapped(hardware, kernel, SMALL, words_per_step=1), mapped(hardware, kernel, LARGE)
    small.pages_per_step = 1
    of_small, of_large = through_all_passes(small, SMALL, dirty), through_all_passes(large, LARGE, dirty)
    for there, here in zip(of_small[:-2], of_large[:-2], strict=True):
        if isinstance(there, np.ndarray) and there.size == SMALL:
            # the second half of the small slot was not aged; the large slot's half is further on
            assert (here[: SMALL // 2] == there[: SMALL // 2]).all()
        else:
            assert np.array_equal(here, there)
    rest = of_large[0][SMALL:]
    assert len({int(word) & ~(0xFFFF_FFFF_FF << 12) for word in rest}) == 1  # all alike
    assert set(of_small[-2]) & set(range(0x40000 + BASE, 0x40000 + BASE + SMALL // 2)) <= set(of_large[-2])


@pytest.mark.parametrize(("hardware", "kernel"), MACHINES, ids=lambda value: value.name)
def test_all_words_in_one_step_make_what_they_make_one_by_one(way, hardware, kernel):
    dirty = np.unique(np.random.default_rng(3).integers(0, 1 << 12, 300))
    at_once, one_by_one = (mapped(hardware, kernel, 1 << 12, count) for count in (None, 1))
    ends = [through_all_passes(vm, 1 << 12, dirty) for vm in (at_once, one_by_one)]
    assert all(np.array_equal(there, here) for there, here in zip(*ends, strict=True))
    assert len(at_once.log) < len(one_by_one.log)


@pytest.mark.parametrize("count", [3, 100, 20_000, 100_000, LARGE])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_harvest_changes_the_dirty_pages_and_no_others(way, count, mixed):
    vm = mapped(Hardware.ept(ad_bits=False), Kernel.v6_0, LARGE)
    operation = vm.start(vm.user_memory_region(0, BASE, LARGE, log_dirty_pages=True))
    while operation.todo[0] != "write_protect_tdp":
        vm.step(operation)
    fresh, fmt = leaf_words(vm), vm.fmt
    vm.run(operation)
    (rows,) = (table.rows for table in vm.page_tables.runs.values() if table.level == 1)
    before, chance = fresh.copy(), np.random.default_rng(4)
    if mixed:
        before[chance.random(LARGE) < 0.3] ^= np.uint64(2)
    rows.reshape(-1)[:] = before
    vm.host.dirty.clear()
    dirty = np.zeros(LARGE, bool)
    dirty[chance.permutation(LARGE)[:count]] = True
    vm.memslots.slots[0, 0].dirty_bitmap[0] = to_words(dirty)
    assert (vm.get_dirty_log(0) == dirty).all()
    changed = leaf_words(vm) != before
    assert (changed == (dirty & (before & np.uint64(2) != 0))).all()
    assert (leaf_words(vm)[dirty] & np.uint64(2) == 0).all()
    told = {fmt.spte_to_pfn(word) for word in before[changed].tolist()}
    assert vm.host.dirty == told and len(vm.host.dirty) == len(told)


def test_more_kinds_than_are_looked_up_one_by_one_become_what_the_helper_says(way):
    vm = mapped(Hardware.ept(ad_bits=False), Kernel.v6_0, LARGE)
    vm.set_user_memory_region(0, BASE, LARGE, log_dirty_pages=True)
    (rows,) = (table.rows for table in vm.page_tables.runs.values() if table.level == 1)
    noise = np.random.default_rng(5).integers(0, 32, LARGE, dtype=np.uint64) << np.uint64(59)
    rows.reshape(-1)[:] |= noise
    rows.reshape(-1)[::5] |= np.uint64(2)
    before = leaf_words(vm)
    vm.clear_young(BASE, BASE + LARGE)
    after = leaf_words(vm)
    for at in range(0, LARGE, 97):
        assert int(after[at]) == vm.fmt.mmu_spte_age(int(before[at])).spte


def test_tables_that_lie_together_are_given_back_together():
    vm = mapped(Hardware.ept(ad_bits=False), Kernel.v6_0, 1 << 12)
    vm.set_user_memory_region(0, BASE, 1 << 12, log_dirty_pages=True)
    (run,) = (table for table in vm.page_tables.runs.values() if table.level == 1)
    assert run.rows.shape == (8, 512) and len({id(vm.page_tables.tables[run.pfn + row].rows) for row in range(8)}) == 1
    other = vm.copy()
    assert other.state() == vm.state()
    other.clear_young(BASE, BASE + 1)
    assert other.spte(BASE) != vm.spte(BASE)
    vm.set_user_memory_region(0, BASE, 1 << 12)  # logging ends: huge pages come back
    assert [table.level for table in vm.page_tables.runs.values() if table.level == 1] == []
    vm.vcpu[0].write(BASE)
    assert vm.level(BASE) == 2
