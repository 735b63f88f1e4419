"""The compiled loops against numpy's: every level, every count, every trace."""

import sys

import numba
import numpy as np
import pytest
from conftest import HARDWARE

from kvmbook import FlushPolicy, Kernel
from kvmbook.search import Grain, Search, explore, space_of
from kvmbook.search import levels as room

CASES = {
    "one page by step": ("ept_no_ad", "IF_CHANGED", 1, 1, Grain.STEP),
    "two pages by step, exits": ("pml", "NEVER", 2, 1, Grain.STEP),
    "two of both": ("ept_no_ad_legacy", "IF_CHANGED", 2, 2, Grain.FAULT),
    "two of both, exits": ("pml_legacy", "ALWAYS", 2, 2, Grain.ACCESS),
    "three vCPUs": ("npt", "NEVER", 1, 3, Grain.ACCESS),
    "three pages": ("shadow", "IF_CHANGED", 3, 1, Grain.ACCESS),
}


@pytest.fixture
def compiled(monkeypatch):
    """Compiled loops for small spaces too."""
    assert room.numba_is_there(), "numba is missing; the extra `test` has it"
    monkeypatch.setattr(room, "LARGE", 0)
    monkeypatch.setattr(room, "SMALL", 0)
    monkeypatch.setattr(room, "CHUNK", 100)  # so that there are several


def instance(case):
    name, policy, *size = CASES[case]
    return HARDWARE[name], Kernel.v5_19.with_(flush=FlushPolicy[policy]), *size


@pytest.mark.parametrize("case", CASES)
def test_compiled_loops_visit_the_same_levels_as_numpys(case, compiled, monkeypatch):
    space = space_of(*instance(case))
    fast = Search(space)
    monkeypatch.setattr(room, "numba_is_there", lambda: False)
    slow = Search(space)
    assert fast.levels is not None and slow.levels is None
    for search in (fast, slow):
        search.run()
    assert np.array_equal(fast.level, slow.level)
    assert (fast.states, fast.transitions, fast.depth) == (slow.states, slow.transitions, slow.depth)
    assert fast.shortest_loss() == slow.shortest_loss()


@pytest.mark.parametrize("case", CASES)
def test_compiled_loops_stop_at_the_same_loss(case, compiled, monkeypatch):
    monkeypatch.setattr(sys.modules["kvmbook.search.explore"], "FEW_STATES", 0)
    fast = explore(*instance(case), whole=False)
    monkeypatch.setattr(room, "numba_is_there", lambda: False)
    assert fast == explore(*instance(case), whole=False)


def test_small_spaces_are_not_worth_the_compiler_but_what_is_there_serves(monkeypatch):
    space = space_of(*instance("two of both"))
    assert room.SMALL < space.bound < room.LARGE
    monkeypatch.setattr(room, "_loaded", set())
    assert Search(space).levels is None
    Search(space).load()
    assert Search(space).levels is not None


def test_states_without_a_way_on_are_no_trouble(compiled):
    choices = ("reads", "writes", "enables", "ages", "ages and flushes")
    result = explore(HARDWARE["npt"], Kernel.v6_0, grain=Grain.ACCESS, without=choices)
    assert (result.states, result.transitions, result.depth) == (1, 0, 0)


def test_compiled_loops_serve_where_nothing_can_be_kept_on_disk(monkeypatch):
    """Neither beside the package nor in the user's cache: numba refuses when it is asked to."""
    njit, asked = numba.njit, []

    def nowhere(*function, cache=False):
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*function)

    monkeypatch.setattr(numba, "njit", nowhere)
    level, met = np.array([0, 255, 255], np.uint8), np.empty(3, np.int64)
    assert room._sift.__wrapped__()(np.array([2, 0, 2], np.uint32), level, np.uint8(1), met) == 1
    assert asked == [True, False] and met[0] == 2 and level.tolist() == [0, 255, 1]
