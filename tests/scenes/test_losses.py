"""Chapter 16: what is said of words and borders is what the model does; a hunted run is retold as it was made."""

from itertools import combinations

import pytest

from kvmbook import Hardware, Kernel
from kvmbook.model import pages_per_level
from kvmbook.scenes import (
    BORDER,
    COMPARISONS,
    CONDITIONS,
    HUGE,
    NAMED,
    TESTS,
    WORD,
    each_set_of_conditions,
    loses_under,
    losing_pairs,
    lost_by_model,
    named_bits,
    overlooked,
    retell_litmus,
    up,
)
from kvmbook.search import Litmus, loses, read_litmus, repaired

TODAY, DOWN = "rounded up (since v5.14)", "rounded down"
REPAIRED = repaired(Kernel.v6_18)
CLEAR = """
kernel: Linux v6.18
hardware: shadow paging
nested: none
eager_page_split: Y
manual: CLEAR clears, initially set
ring: bitmap
vcpus: 1
slot: 513 pages from gfn 0x3ff, the host's of 2M; runs are about 0, 1
run:
  vCPU0 writes page 1
  user space enables logging
  user space clears 0, 1 of the dirty log
  vCPU0 writes page 1
"""
RING = """
kernel: Linux v6.18
hardware: NPT
nested: none
eager_page_split: Y
manual: CLEAR clears, initially set
ring: dirty rings
vcpus: 1
slot: 2 pages from gfn 0x400, the host's of 4K; runs are about 0, 1
run:
  vCPU0 writes page 0
  user space enables logging
  vCPU0 writes page 0
"""


# ---- which word loses? -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("border", [0, 1, 4, 31, 32, 62, 63])
def test_a_word_loses_where_its_last_page_begins_a_huge_page_and_a_lower_one_is_named(border):
    assert losing_pairs(border) == [(first, border) for first in range(border)]


@pytest.mark.parametrize("border", [0, 1, 32, 63])
def test_the_model_loses_what_the_comparison_overlooks_and_with_the_repair_nothing(border):
    """All pairs around the border, and all of the first and last bits."""
    for pair in combinations(sorted({0, 1, 2, 62, 63} | {border + n for n in range(-2, 3)} & set(range(WORD))), 2):
        gfns = [BORDER - border + bit for bit in pair]
        missed = {gfn - BORDER + border for gfn in gfns if gfn // HUGE in overlooked(TODAY, gfns)}
        assert lost_by_model(border, pair) == sorted(missed), pair
        assert not lost_by_model(border, pair, REPAIRED) and not overlooked(DOWN, gfns), pair


def test_only_the_comparison_of_today_overlooks_a_huge_page():
    for border in range(WORD):
        assert [bool(losing_pairs(border, rule)) for rule in COMPARISONS] == [
            rule == TODAY and border > 0 for rule in COMPARISONS
        ]


def test_what_lies_between_first_and_last_does_not_matter():
    masks = [[bit for bit in range(7) if mask >> bit & 1] for mask in range(1, 128)]
    assert [mask for mask in masks if lost_by_model(4, mask)] == [m for m in masks if m[-1] == 4 and len(m) > 1]


def test_numbers():
    assert pages_per_level(2) == HUGE == 512 and BORDER % HUGE == 0
    assert [up(gfn) for gfn in (0x3FF, 0x400, 0x401)] == [2, 2, 3]
    assert {len(named_bits(63, named)) for named in NAMED} == {1, 2, 64} and named_bits(0, next(iter(NAMED))) == [0]


# ---- what a test must have -------------------------------------------------------------------------------------------


def test_all_six_conditions_are_needed_and_enough():
    losing = [conditions for conditions in each_set_of_conditions() if loses_under(conditions)]
    assert losing == [frozenset(CONDITIONS)] and len(each_set_of_conditions()) == 64
    assert not loses_under(losing[0], REPAIRED)


def test_no_test_of_the_kernel_has_them_and_each_has_some():
    for test, has in TESTS.items():
        assert set() < has < set(CONDITIONS) and not loses_under(frozenset(has)), test
    assert not any("sparse" in has for has in TESTS.values())


def test_before_v6_8_a_split_does_not_save_the_last_page():
    unsplit = frozenset(CONDITIONS) - {"unsplit"}
    assert [loses_under(unsplit, kernel) for kernel in (Kernel.v6_4, Kernel.v6_8)] == [True, False]


# ---- a run of whole calls, retold ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "page"), [(CLEAR, 1), (RING, 0)])
def test_a_run_is_retold_as_it_was_made(text, page):
    litmus = read_litmus(text)
    told = retell_litmus(litmus)
    assert told.numbers == (0, 1) and len(told.moments) == len(litmus.run)
    assert [one.lost for one in told.moments[-1].now.pages] == [number in litmus.lost for number in told.numbers]
    assert not told.moments[-2].now.lost
    one = retell_litmus(litmus, numbers=[page])
    assert one.moments[-1].now.pages == told.moments[-1].now.pages[page : page + 1]
    assert not retell_litmus(litmus, REPAIRED).moments[-1].now.lost


def test_what_the_steps_say():
    assert retell_litmus(read_litmus(CLEAR), numbers=[1]).steps()[2:] == [
        "3. user space clears pages 0, 1 (all TLBs flushed, TLB of vCPU0 empty, bit 0)",
        "4. vCPU0 writes page 1 (a walk, TLB of vCPU0 writable, the write is lost)",
    ]
    assert retell_litmus(read_litmus(RING), REPAIRED, [0]).steps()[-1].endswith("bit 1)")  # it has an entry
    assert (retell_litmus(read_litmus(RING)).log, retell_litmus(read_litmus(CLEAR)).log) == ("ring", "bit")


def test_a_call_that_pictures_have_no_place_for_is_refused():
    text = RING.split("run:")[0].replace("v6.18", "v6.0").replace("dirty rings", "bitmap")
    run = "run:\n  user space enables logging\n  KVM writes for nobody page 0"
    litmus = read_litmus(text.replace("CLEAR clears, initially set", "GET clears") + run)
    assert isinstance(litmus, Litmus) and litmus.lost == (0,)
    with pytest.raises(ValueError, match="KVM writes for nobody page 0"):
        retell_litmus(litmus)


def test_the_default_lost_up_to_v6_7():
    clear = read_litmus(CLEAR)
    for kernel in Kernel.releases:
        ept = clear.configuration.with_(kernel=kernel, hardware=Hardware.ept())
        assert bool(loses(ept, clear.run)) == kernel.clear_split_forgets_last, kernel.name
        assert loses(ept.with_(eager_page_split=False), clear.run), kernel.name
