"""Chapter 02's scenes: the checks stand in the kernel's order, no moment of a harvest loses a write."""

import itertools

import pytest

from kvmbook.model import MemoryRegion, Outcome
from kvmbook.scenes import PROTOCOLS, RULES, WHEN, WRITTEN, ask, harvest, refusals, slots
from kvmbook.views import which_errno

# ---- which errno? -----------------------------------------------------------------------------------------------------


def test_every_check_is_reached_by_the_call_that_breaks_it():
    assert [(asked.checks, rule) for rule, asked in refusals()] == list(enumerate(RULES, 1))
    assert all(asked.before == asked.after for _, asked in refusals())


@pytest.mark.parametrize(("earlier", "later"), list(itertools.combinations(range(len(RULES)), 2)))
def test_of_two_broken_rules_the_earlier_one_answers(earlier, later):
    """The later rule's call, changed in the field that breaks the earlier one as well."""
    broken = RULES[later].breaks_it
    fields = {
        0: {"slot": 32764},
        1: {"flags": 4},
        2: {"guest_phys_addr": broken.guest_phys_addr + 16},
        3: {"userspace_addr": 1 << 48},
        4: {"slot": broken.slot | 2 << 16},
        5: {"guest_phys_addr": 2**64 - 4096, "memory_size": max(broken.memory_size, 8192)},
        6: {"memory_size": 2**31 * 4096, "userspace_addr": 0},
        8: {"userspace_addr": broken.userspace_addr + 4096, "slot": 0},
        9: {"memory_size": 64 * 4096, "slot": 0, "userspace_addr": 0x7F0000100000},
        10: {"flags": 2, "slot": 0, "userspace_addr": 0x7F0000100000, "memory_size": 128 * 4096},
        11: {"guest_phys_addr": 0x200 * 4096, "memory_size": 2**33 * 4096},
    }
    if earlier in (7, 11) or (later == 7 and earlier in (5, 6)):
        return  # a deletion breaks no later rule; a range above the host's width overlaps nothing, size 0 never wraps
    call = broken._replace(**fields[earlier])
    assert ask(call).checks == earlier + 1


def test_every_other_check_is_passed_in_what_the_panel_accepts():
    changes = set()
    for words in which_errno().combinations():
        asked = slots.ask_panel(*words)
        changes.add(asked.says if not asked.error else asked.error)
        assert (asked.before == asked.after) == bool(asked.error or asked.says == "nothing to do")
    assert changes == {"create", "delete", "move", "flags only", "nothing to do", "EINVAL", "EEXIST"}


def test_what_does_not_fit_into_the_ioctl_is_misuse():
    with pytest.raises(ValueError, match="does not fit"):
        ask(MemoryRegion(-1, 0, 0, 4096, 0))
    with pytest.raises(KeyError):
        slots.ask_panel("3", "0", "0x300", "0")


# ---- a harvest --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("protocol", "written", "when"), list(itertools.product(PROTOCOLS, WRITTEN, WHEN)))
def test_no_moment_of_a_harvest_loses_a_write(protocol, written, when):
    seen = harvest(protocol, written, when)
    assert seen.missed == ()
    wrote = {*WRITTEN[written], *([1] if when != "never" else [])}
    assert wrote <= {*seen.now, *seen.next}
    assert set(WRITTEN[written]) <= set(seen.now)
    assert (1 in seen.next) >= (when == "after the harvest")
    assert seen.flushes == bool(seen.now), "a harvest flushes if it took a bit, and only then"
    flushed = [row.what for row in seen.rows if row.flushed]
    assert flushed == ["flushes the TLBs"] * seen.flushes


def test_manual_protect_changes_nothing_before_clear():
    rows = harvest("manual protect", "page 1", "never").rows
    get = next(number for number, row in enumerate(rows) if row.who == "GET")
    assert rows[get][2:6] == rows[get - 1][2:6]


def test_initially_set_protects_nothing_when_logging_is_enabled():
    first = harvest("manual, initially set").rows[0]
    assert first.live == (2**64 - 1, 2**64 - 1, 0b11) and all(first.spte) and all(first.tlb)
    assert not any(harvest("GET clears").rows[0].spte)


def test_a_row_changes_only_by_its_step():
    """A guest's write never touches the buffer; each word is taken before its pages are protected."""
    for row, after in itertools.pairwise(harvest("GET clears", "pages 5 and 70", "W taken").rows):
        if after.who == "vCPU 0":
            assert row.buffer == after.buffer
        if after.what == "takes W from their pages":
            assert row.what == "takes the bits of a word"


def test_bad_settings_of_a_harvest():
    with pytest.raises(ValueError, match="when is one of never, "):
        harvest(when="later")
    with pytest.raises(KeyError):
        harvest("GET")
    with pytest.raises(KeyError):
        harvest(written="page 2")


def test_what_changes_says_each_kind_of_change_and_a_refusal_changes_nothing():
    vm = slots.two_slots()
    calls = ({"base_gfn": 0x300, "npages": 8}, {"base_gfn": 0x300, "npages": 8, "log_dirty_pages": True}, {})
    said = [slots.what_changes(vm, slot=2, **call).split("  ")[0] for call in calls]
    assert said == ["create", "flags only", "delete"]
    with pytest.raises(OSError, match="overlap"):
        slots.what_changes(vm, slot=2, base_gfn=0x1FF, npages=2)
    assert slots.what_changes(vm, slot=1, base_gfn=0x240, npages=64).split() == (
        ["move", "slot", "0", "at", "0x100,", "slot", "1", "at", "0x240"]
    )


def test_what_two_questions_in_a_row_are_answered():
    assert [slots.ask_twice(protocol) for protocol in PROTOCOLS] == [(3, 0), (3, 3), (64, 64)]


def test_a_move_keeps_the_bits_and_switching_off_or_deleting_does_not():
    assert {change: slots.after_change(change) for change in slots.SLOT_CHANGES} == {
        "switches the log off": ("ENOENT", Outcome.FAST_FAULT),
        "switches it off and on": ("[]", Outcome.FAST_FAULT),
        "moves the slot": ("[3]", Outcome.SLOW_FAULT),
        "deletes it, and makes it again": ("[]", Outcome.SLOW_FAULT),
    }
