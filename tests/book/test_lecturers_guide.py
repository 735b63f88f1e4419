"""What the lecturer's guide says that a panel shows, and what it says of seeds, is so."""

import pathlib
import re

import pytest

from kvmbook import Hardware, Kernel, Vm
from kvmbook.exercises import aged
from kvmbook.exercises.ch02 import calls_02_1
from kvmbook.exercises.ch03 import check_03_1, found_word, history
from kvmbook.exercises.ch05 import writes_05_3
from kvmbook.exercises.ch09 import words_09_1
from kvmbook.exercises.ch16 import words_16_1
from kvmbook.model import FlushPolicy, Outcome
from kvmbook.scenes import BASE_GFN, measure, missed_against_aged, missed_per_harvest
from kvmbook.views import (
    age_touch_and_ask,
    curator,
    follow_one_access,
    lose_a_write,
    may_w_come_back,
    model_beside_machine,
    one_write_four_ways,
    spte_inspector,
    take_the_flush_away,
    which_errno,
    which_word_loses,
    who_flushes_where,
    who_remembers_what,
    word_by_word,
    write_the_rule,
    you_are_the_scheduler,
)

PAGE = pathlib.Path(__file__).parent.parent.parent / "book/lecturers-guide.md"
WORDS = " ".join(PAGE.read_text().split())
LEAF = "flush_for_a_leaf_that_is_"
AGAIN = "page_1_is_written_again_"

# The clicks of the guide, in its order; what it quotes of the readout, or None where it quotes nothing.
CLICKS = {
    lose_a_write: [
        ({}, "16 of 16 writes are missed"),
        ({"flush_rule": "always"}, "All 16 writes are reported, after one flush while enabling."),
        ({"flush_rule": "if changed", "A_D_bits": "on"}, "All 16 writes are reported"),
        (
            {"A_D_bits": "off", "touched_again_before_enabling": "vCPU 1 writes page 0"},
            "All 16 writes are reported",
        ),
        ({"touched_again_before_enabling": "vCPU 1 reads page 0"}, "16 of 16 writes are missed"),
    ],
    which_errno: [
        ({}, "EEXIST"),
        ({"slot": "0 (exists)", "flags": "READONLY"}, "EINVAL: slot 0: READONLY cannot be switched."),
        ({"size": "0"}, None),
        ({"first_gfn": "0x300 and 16 bytes"}, "EINVAL: guest_phys_addr 0x300010 is not a multiple of 4096."),
    ],
    word_by_word: [
        ({AGAIN: "bits read"}, None),
        ({AGAIN: "W taken"}, None),
        ({AGAIN: "flushed"}, "This report: page 1. The next one: page 1."),
        ({"written_before": "no page", AGAIN: "never"}, "No flushes in this harvest."),
    ],
    age_touch_and_ask: [
        ({}, "The page was used, but the host is told that it is idle."),
        ({"the_host_ages_by": "clear_flush_young"}, "One flush, one fault."),
        ({"the_host_ages_by": "clear_young", "then": "vCPU 1 reads"}, "vCPU 0 can still write through its TLB."),
        (
            {"the_host_ages_by": "test_young", "then": "nobody"},
            "Nobody used the page, but the host is told that it is in use.",
        ),
        (
            {"hardware": "EPT with A/D bits", "the_host_ages_by": "clear_young", "then": "vCPU 0 reads"},
            "The page was used, but the host is told that it is idle.",
        ),
    ],
    who_remembers_what: [
        ({}, "vCPU 0's entry is stale, and it matters"),
        ({"and_before_it_writes": "vCPU 0 faults elsewhere"}, "vCPU 0's entry is stale, and it matters"),
        (
            {"and_before_it_writes": "vCPU 1 writes it"},
            "vCPU 0's write passes its TLB; the SPTE would have let it pass, too.",
        ),
        ({"and_before_it_writes": "KVM flushes"}, "vCPU 0 remembers nothing: its write faults, and KVM sees it."),
        ({"and_before_it_writes": "nothing", "vCPU_0_has": "read it"}, "vCPU 0 remembers no right to write"),
        (
            {"A_D_bits": "on, with PML", "then": "logging is enabled"},
            "vCPU 0 remembers a clean entry: its write has to walk to the SPTE, which notes it in D.",
        ),
        ({"vCPU_0_has": "written it"}, "vCPU 0's entry is stale, and it matters"),
    ],
    follow_one_access: [
        ({}, "Fast, without mmu_lock. The page is marked dirty."),
        ({"vCPU_0": "reads an aged page"}, "Fast, without mmu_lock. R and X come back, W does not: no mark."),
        ({"vCPU_0": "writes a page not mapped"}, None),
        ({"hardware": "shadow paging"}, "Slow at once, with mmu_lock held for write. The page is marked dirty."),
        ({"in_between": "the host takes the page"}, "One try came to nothing: the guest faults again."),
    ],
    one_write_four_ways: [
        ({}, "6,000 writes to 600 pages: 600 exits."),
        (
            {"caught_by": "D and PML"},
            "6,000 writes to 600 pages: 1 exit. Before GET 512 are in the bitmap, 88 in the buffer; the report names 600.",
        ),
        ({"caught_by": "emulation"}, "6,000 writes to 600 pages: 6,000 exits."),
        ({"caught_by": "nobody"}, "KVM's log cannot know of them."),
        ({"caught_by": "D and PML", "pages_written": "512"}, "5,120 writes to 512 pages: no exit."),
        ({"pages_written": "513"}, None),
    ],
    who_flushes_where: [
        ({}, "Before: at most one flush, if a pass asked. After: always one flush."),
        ({"A_D_bits": "on, with PML"}, "Before: at most two flushes, if a pass asked. After: always one flush."),
        ({"INITIALLY_SET": "on"}, "No SPTE is visited and no TLB is flushed, before the patch or after it."),
    ],
    may_w_come_back: [
        ({}, "MMU-writable is 1, so W comes back without mmu_lock; no harm is done."),
        (
            {"W_is_0_because_of": "3 read-only in the host"},
            "W comes back under mmu_lock, in a frame that is the guest's own.",
        ),
        (
            {"W_is_0_because_of": "2 and 4: a page table, then aged", "KVM_acts": "carelessly"},
            "The fast path has not asked for MMU-writable",
        ),
        (
            {"W_is_0_because_of": "4 access tracking", "then": "KVM guards it as a page table"},
            "The lock is dropped before the flush",
        ),
        ({"KVM_acts": "by its rules"}, None),
        ({"then": "logging is enabled"}, "early enough for a log."),
    ],
    write_the_rule: [
        (
            {LEAF + "writable": "yes"},
            "Unsound: a write can be lost, in 12 steps. 60 migrations of the workload: 35 flushes, 35 writes missed.",
        ),
        (
            {LEAF + "access_tracked": "yes"},
            "Unsound: a write can be lost, in 14 steps. 60 migrations of the workload: 55 flushes, 0 writes missed.",
        ),
        ({LEAF + "neither_but_MMU_writable": "yes"}, "Sound"),
    ],
    take_the_flush_away: [
        ({}, "A write is lost, in 11 steps: no run loses one sooner."),
        ({"the_flush": "kept"}, "No run loses a write: all 274 states were visited."),
        (
            {
                "the_flush": "taken away",
                "v6_12_but": "clear_flush_young",
                "hardware": "EPT without A/D",
            },
            "A write is lost, in 12 steps: no run loses one sooner.",
        ),
        ({"v6_12_but": "no mmu_lock"}, "A write is lost, in 10 steps: no run loses one sooner."),
        ({"v6_12_but": "A is cleared"}, "No run loses a write"),
    ],
    model_beside_machine: [
        ({}, "Both say the same, 8 times: memory has changed, and no report names it."),
        ({"run": "a ring, not initially set"}, "In the model no write is lost."),
        ({"run": "CLEAR of two pages"}, "In the model you see why."),
        ({"run": "enabling twice", "the_model_is_of": "v5.19 on this CPU"}, "the model says +0, the machine +1."),
        (
            {"run": "chapter 1's run", "the_model_is_of": "v5.19, no A/D bits"},
            "The machine cannot run this to its end.",
        ),
    ],
    curator: [
        ({}, "On shadow paging, in 13 steps: a table write goes unseen."),
        ({"kernel": "repaired"}, "On shadow paging no run does harm: 462 states"),
        ({"exhibit": "12 One question for all roots", "kernel": "bad"}, None),
        (
            {
                "exhibit": "7 The last page of the range",
                "kernel": "repaired",
                "hardware": "other hardware",
            },
            "On shadow paging, in 4 steps: the write is lost.",
        ),
    ],
    which_word_loses: [
        ({}, "the model loses the write to page 1 of the word."),
        (
            {"a_2M_page_begins_at_bit": "63", "CLEAR_names": "all 64 pages"},
            "Overlooked by: rounded up (since v5.14).",
        ),
        ({"CLEAR_names": "its first page alone"}, "No rule overlooks a huge page."),
        ({"a_2M_page_begins_at_bit": "0, as the word does"}, None),
    ],
}


@pytest.mark.parametrize("make", CLICKS, ids=lambda make: make.__name__)
def test_a_panel_says_what_the_guide_quotes(make):
    panel = make()
    for chosen, quoted in CLICKS[make]:
        readout = panel.choose(**chosen)
        assert quoted is None or (quoted in readout and quoted in WORDS), (readout, quoted)


def test_the_two_early_writes_are_in_this_report_only_and_deleting_asks_nobody():
    for when in ("bits read", "W taken"):
        assert word_by_word().choose(**{AGAIN: when}).startswith("This report: page 1. The next one: no page.")
    assert which_errno().choose(slot="0 (exists)", flags="READONLY", size="0").startswith("Done: delete.")


def test_the_scheduler_shows_twelve_steps_and_then_that_there_are_none():
    panel = you_are_the_scheduler()
    panel.play()
    assert len(panel.path) == 12
    panel.choose(flush_rule="always")
    quoted = "no run loses a write: all 422 states were visited."
    assert panel.play().endswith(quoted) and quoted in WORDS


def test_the_inspector_says_what_the_guide_quotes():
    inspector = spte_inspector(0x0610000004567877)
    assert inspector.press("age") and int(inspector.word, 16) == 0x0750000004567870
    for key, quoted in (
        ("protect", "changes nothing; asks for no flush"),
        ("restore", "Not writable: reason 1, dirty logging; or it was aged, then read: the word does not tell."),
    ):
        assert quoted in inspector.press(key) and quoted in WORDS
    assert "KVM never makes this word" in inspector.choose(format="NPT")


def test_the_busiest_page_looks_idle():
    for hardware in (Hardware.ept(ad_bits=False), Hardware.ept()):
        assert measure("clear_young", hardware, read=[0], written=[]).found == 0


def test_the_misconceptions_are_wrong():
    no_ad = Hardware.ept(ad_bits=False)
    vm = aged(no_ad, Kernel.v5_19)
    vm.vcpu[0].exit()
    assert vm.vcpu[0].write(BASE_GFN) is Outcome.HIT
    counts = ", ".join(map(str, missed_per_harvest(FlushPolicy.IF_CHANGED)))
    assert f"missed after each of eight harvests {counts}," in WORDS
    assert [missed_against_aged(FlushPolicy.IF_CHANGED, aged) for aged in (63, 64)] == [0, 64]
    vm = Vm(no_ad, Kernel.v6_0)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=16, log_dirty_pages=True)
    vm.vcpu[0].read(BASE_GFN)
    assert vm.get_dirty_log(0)[0]
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=16)
    assert vm.vcpu[0].write(BASE_GFN) is Outcome.FAST_FAULT
    vm = Vm(no_ad, Kernel.v6_0)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=16)
    vm.vcpu[0].read(BASE_GFN)
    assert not vm.host.dirty
    vm.clear_young(BASE_GFN, BASE_GFN + 16)
    assert vm.host.dirty
    assert len(re.findall(r'^\| "', PAGE.read_text(), re.M)) == 22


def test_seeds_1_to_300_give_different_tasks_and_a_check_can_mark():
    for variant in (calls_02_1, found_word, history, writes_05_3, words_09_1, words_16_1):
        assert len({str(variant(seed=seed)) for seed in range(1, 301)}) == 300
    right = {"pfn": 0xC2C954, "type": 1, "W": 0, "MW": 1, "young": True, "state": "write-protected"}
    assert check_03_1.__wrapped__(right, seed=1) == "" and check_03_1.__wrapped__({**right, "W": 1}, seed=1)


def test_the_guide_is_short():
    assert len(PAGE.read_text().splitlines()) <= 250
