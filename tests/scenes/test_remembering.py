"""Chapter 04's scenes: what TLBs remember, and which of it matters."""

from itertools import product

import pytest

from kvmbook.model import Hardware, Kernel, Outcome
from kvmbook.scenes import (
    CUT_OFF,
    ENTRIES,
    FIRST,
    LOWERED,
    NEXT,
    REMEMBERING,
    escapes,
    met_beside,
    pairs_met,
    reach,
    read_below,
    who_answers,
    who_remembers,
)
from kvmbook.scenes.remembering import verdict

NO_AD, PML = REMEMBERING.values()
CASES = list(product(REMEMBERING, FIRST, LOWERED, NEXT))


def test_an_entry_is_one_of_three_and_a_write_through_each_ends_elsewhere():
    fresh = 0x0600000004567B77
    ends = [reach(Hardware.ept(), "write", entry, fresh).answered for entry in ENTRIES.values()]
    assert ends == ["KVM", "SPTE", "TLB"] and [str(entry) for entry in ENTRIES.values()] == list(ENTRIES)
    assert reach(NO_AD, "read", None, 0x0750000004567870).answered == "KVM"


def test_a_walk_through_a_clean_entry_sets_d_and_a_stale_clean_entry_meets_the_spte_of_now():
    clean = ENTRIES["RWX, clean"]
    assert reach(PML, "write", clean, 0x0600000004567977) == ("SPTE", 0x0600000004567B77)
    assert reach(PML, "write", clean, 0x0600000004567975) == ("KVM", 0x0600000004567975)


@pytest.mark.parametrize(
    ("hardware", "entry", "spte", "said"),
    [
        (NO_AD, "RWX", 0x0610000004567877, ""),
        (NO_AD, "RWX", 0x0750000004567870, "stale, matters"),
        (NO_AD, "R-X", 0x0750000004567870, "stale, harmless"),
        (NO_AD, "R-X", 0x0610000004567877, "allows less"),
        (PML, "RWX", 0x0600000004567977, "stale, matters"),
        (PML, "RWX", 0x0600000004567A77, ""),  # aged: A is not in an entry
        (PML, "RWX, clean", 0x0600000004567975, "stale, harmless"),
        (PML, "RWX, clean", 0x0600000004567B77, "allows less"),
    ],
)
def test_the_verdict_on_an_entry_beside_an_spte(hardware, entry, spte, said):
    assert verdict(hardware, ENTRIES[entry], spte) == said
    assert verdict(hardware, None, spte) == ""


@pytest.mark.parametrize("hardware", [NO_AD, PML, Hardware.npt()], ids=lambda hardware: hardware.name)
def test_of_all_pairs_that_runs_bring_about_those_matter_that_say_w_and_dirty_where_the_spte_does_not(hardware):
    fmt = Kernel.v6_0.spte_format(hardware.format)
    for entry, spte in pairs_met(hardware):
        seen = not (fmt.is_writable_pte(spte) and fmt.is_dirty_spte(spte))
        assert escapes(hardware, entry, spte) == (entry.write and entry.dirty and seen)
    assert {str(entry) for entry, _ in pairs_met(hardware)} <= set(ENTRIES)


def test_beside_a_dirty_entry_alone_stand_sptes_that_matter():
    for hardware in (NO_AD, PML):
        beside = met_beside(hardware)
        assert all(("✕" in " ".join(states)) == (entry == "RWX") for entry, states in beside.items())
    assert beside == {"RWX, clean": ["clean", "writable"], "RWX": ["clean ✕", "writable"]}


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_a_write_passes_unseen_exactly_through_an_entry_that_matters(case):
    *_, before, last = who_remembers(*case)
    assert (before.tlbs[0].verdict == "stale, matters") == (last.tlbs[0].verdict == "stale, matters")
    if before.tlbs[0].verdict == "stale, matters":
        assert last.answered == "TLB" and (last.spte, last.rights) == (before.spte, before.rights)
    if case[3] == "KVM flushes":
        assert [tlb.state for tlb in before.tlbs] == ["empty", "empty"] and last.answered != "TLB"
    if case[3] == "vCPU 0 faults elsewhere":
        assert before.tlbs == who_remembers(*case[:3])[2].tlbs


def test_no_entry_matters_if_the_page_was_only_read():
    for ad_bits, lowered, then in product(REMEMBERING, LOWERED, NEXT):
        moments = who_remembers(ad_bits, "read it", lowered, then)
        assert all(moment.tlbs[0].verdict != "stale, matters" for moment in moments)


def test_who_answers_is_a_table_and_crosses_stand_with_the_dirty_entry_alone():
    for ad_bits in ("with A/D bits", "without"):
        headings, rows = who_answers(ad_bits)
        assert all(len(row) == len(headings) for row in rows)
        assert {row[0] for row in rows if any("✕" in cell for cell in row)} == {"RWX"}


def test_a_remembered_table_is_walked_until_it_is_frozen_or_flushed():
    walk, fault = Outcome.WALK, Outcome.FAULT
    assert [read_below(how) for how in CUT_OFF] == [(walk, fault), (fault, fault), (fault, fault)]
