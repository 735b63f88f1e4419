"""Chapter 05's runs: what each way of catching a write costs, and where the note is meanwhile."""

import pytest

from kvmbook import Kernel
from kvmbook.model import Outcome
from kvmbook.scenes import writes
from kvmbook.scenes.writes import PML_PLACES, WAYS, WRITE_TIMES, WRITERS, caught

V6_2 = Kernel.v6_0.with_(marks_without_vcpu=True)


@pytest.mark.parametrize(
    ("way", "pages", "exits", "bitmap", "buffer"),
    [
        ("W", 600, 600, 600, None),
        ("D and PML", 512, 0, 0, 512),
        ("D and PML", 513, 1, 512, 1),
        ("D and PML", 600, 1, 512, 88),
        ("emulation", 600, 600 * WRITE_TIMES, 600, None),
        ("nobody", 600, 0, 0, 0),
    ],
)
def test_what_it_costs_and_where_it_is_noted(way, pages, exits, bitmap, buffer):
    assert caught(way, pages).noted == (buffer, bitmap, exits)


@pytest.mark.parametrize("way", WAYS)
def test_all_is_reported_or_nothing(way):
    seen = caught(way, 513)
    expected = (0, 513) if way == "nobody" else (513, 0)
    assert (seen.reported, seen.missed) == expected
    assert len(seen.moments) == len(seen.counts) == 6
    assert not any(moment.stale for moment in seen.moments)


def test_the_kick_empties_the_buffer_and_the_next_write_is_noted_again():
    full, kicked, reported, again = caught("D and PML", 600).counts[2:]
    assert full.buffer == 600 - PML_PLACES and kicked[:2] == (0, 600) and reported[:2] == (0, 0) and again.buffer == 1
    assert caught("W", 1).moments[-1].answered == "KVM" and caught("D and PML", 1).moments[-1].answered == "SPTE"
    with pytest.raises(ValueError, match="'X'"):
        caught("X")


def test_only_writers_that_kvm_knows_are_reported():
    before, since = ([writes.is_reported(who, kernel) for who in WRITERS] for kernel in (Kernel.v6_0, V6_2))
    assert before == [True, True, False, False] and since == [True, True, True, False]


def test_the_ring_has_the_newest_first_until_v6_14():
    assert writes.ring_order(Kernel.v6_0) == [2, 1, 3]
    assert writes.ring_order(Kernel.v6_0.with_(pml_drains_oldest_first=True)) == [3, 1, 2]


@pytest.mark.parametrize(
    ("split", "how", "faults", "reported"),
    [
        ("when enabled", Outcome.FAST_FAULT, "none", 1),
        ("never", Outcome.SLOW_FAULT, "511 slow faults", 512),
        ("by the fault (v6.2)", Outcome.SLOW_FAULT, "none", 1),
    ],
)
def test_an_unsplit_huge_page_is_dropped_by_one_write_and_then_reads_are_reported(split, how, faults, reported):
    first, seen = writes.one_write_then_reads(split)
    assert (first, seen.faults, seen.reported, seen.level) == (how, faults, reported, 1)


def test_huge_pages_come_back_when_logging_goes_off():
    found = {(split, log): (seen.level, seen.entries) for split, log, seen in writes.with_and_without_split()}
    assert set(found.values()) == {(2, 1), (1, 512)}
    assert all((log == "on") == (level == 1) for (_, log), (level, _) in found.items())


def test_the_sides_differ_in_the_lock_but_not_when_pages_are_armed_again():
    assert list(writes.locks_of(True).values()) == ["read", "read", "write"]
    assert list(writes.locks_of(False).values()) == ["write", "write", "write"]
