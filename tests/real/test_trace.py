"""Traces of KVM's events: recorded on this machine (Linux 6.18, shadow paging, by ftrace and perf), and written by hand in
the forms of other releases and of hardware that it does not have."""

import pathlib
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmbook import Hardware, SpteFormat
from kvmbook.model import REMOVED_SPTE, SPTE_TDP_AD_DISABLED_MASK
from kvmbook.real import HEADINGS, replay
from kvmbook.real.__main__ import main
from kvmbook.real.tracepoints import FORMATS, Traced, Unread, read_trace
from kvmbook.views import Table

TRACES = pathlib.Path(__file__).parent / "traces"
FILES = sorted(TRACES.glob("*.txt"))
EPT = SpteFormat.ept()
NO_AD = SpteFormat.ept(ad_bits=False)
GFN, PFN = 0x100, 0x4567
FRESH = EPT.make_spte(PFN).spte
PROTECTED = EPT.spte_write_protect(FRESH).spte
GUARDED = EPT.spte_write_protect(FRESH, pt_protect=True).spte
MADE = NO_AD.make_spte(PFN, ad_type=SPTE_TDP_AD_DISABLED_MASK).spte
AGED = NO_AD.mmu_spte_age(MADE).spte


def trace(*events, head="       CPU 0/KVM-4711    [003] d..2.   12.{:06d}: "):
    """Lines in ftrace's form; each event as "name: text"."""
    return [head.format(number) + event for number, event in enumerate(events)]


def changed(old, new, gfn=GFN, level=1):
    return f"kvm_tdp_mmu_spte_changed: as id 0 gfn {gfn:x} level {level} old_spte {old:x} new_spte {new:x}"


def fast(old, new, flags="P|W", fixed=1, spurious=0):
    return (
        f"fast_page_fault: vcpu 0 gva {GFN << 12:x} error_code {flags} sptep 00000000c0ffee00 old {old:#x} new {new:x}"
        f" spurious {spurious} fixed {fixed}"
    )


FLUSH = "kvm_flush_remote_tlbs: (kvm_flush_remote_tlbs+0x0/0x50 [kvm])"


def disagreements(*events, **options):
    return [found.says for found in replay(trace(*events), **options).disagreements]


def tells(told, gfn=GFN):
    return [step.says for step in told.pages[gfn]]


# ---- recorded --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recorded_trace_is_read_to_its_last_line_and_the_model_agrees(path):
    told = replay(path)
    assert not told.unread and not told.disagreements and not told.lost and told.steps
    assert told.hardware == Hardware.shadow() or "ring_full" in path.name
    assert path.stat().st_size < 40_000


@pytest.mark.parametrize("tool", ["ftrace", "perf"])
def test_write_protection_of_a_real_kernel_is_seen_by_the_fault_that_undoes_it(tool):
    told = replay(TRACES / f"write_protection.{tool}.txt")
    made = [step for step in told.pages[GFN] if step.event == "kvm_mmu_set_spte"]
    assert [step.says for step in made] == [
        "writable (write fault)",
        "writable (write fault; it was write-protected unseen)",
        "writable (write fault; it was write-protected unseen)",
        "writable (write fault; it was zapped unseen)",
    ]
    assert [step.old for step in made] == [None, made[0].new, made[0].new, made[0].new]
    assert told.hardware.format.spte_to_pfn(made[3].new) != told.hardware.format.spte_to_pfn(made[0].new)
    assert tells(told, 0x101) == ["writable, old"]  # a neighbour: the write to it needed no fault
    assert any(step.event == "kvm_unmap_hva_range" for step in told.steps)


def test_a_clear_protects_one_page_of_two():
    told = replay(TRACES / "harvest.ftrace.txt")
    assert tells(told, 0x101)[-1] == "writable (write fault; it was write-protected unseen)"
    assert not any("unseen" in said for said in tells(told, 0x100))


@pytest.mark.parametrize("tool", ["ftrace", "perf"])
def test_a_real_ring_marks_before_the_page_becomes_writable(tool):
    told = replay(TRACES / f"ring.{tool}.txt", slots={0: 0x100})
    pushes = [step for step in told.steps if step.event == "kvm_dirty_ring_push"]
    assert [step.gfn for step in pushes] == [0x100, 0x101, 0x108, 0x100]
    for push in pushes:
        assert next(step for step in told.pages[push.gfn] if step.line > push.line).event == "kvm_mmu_set_spte"
    assert "ring 0 is reset up to 0x3, 0 left" in [step.says for step in told.steps]
    assert {step.gfn for step in replay(TRACES / f"ring.{tool}.txt").steps if "push" in step.event} == {None}


def test_a_real_ring_of_256_entries_is_full_at_192():
    told = replay(TRACES / "ring_full.ftrace.txt")
    assert told.events == {"kvm_dirty_ring_push": 192, "kvm_dirty_ring_exit": 1}
    assert told.steps[-1].says == "vCPU 0 leaves: its ring is soft-full"


# ---- forms -----------------------------------------------------------------------------------------------------------

HEADS = {
    "ftrace": "           <...>-4711    [003] d..2.   12.000001: ",
    "ftrace before v5.18": " CPU 0/KVM-4711  [003] d..2    12.000001: ",
    "ftrace with tgids": " CPU 0/KVM-4711  ( 4700) [003] d..2.    12.000001: ",
    "ftrace without irq-info": " CPU 0/KVM-4711  [003]    12.000001: ",
    "trace-cmd": "       CPU 0/KVM-4711  [003]    12.000001:    ",
    "perf": "CPU 0/KVM  4711 [003]    12.000001:   kvmmmu:",
    "perf with pids": "CPU 0/KVM  4700/4711  [003]    12.000001: kvmmmu:",
    "a counting clock": " CPU 0/KVM-4711    [003] d..2. 12: ",
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_each_tools_line_is_read(head):
    (event,) = read_trace([head + changed(0, FRESH) + "\n"])
    assert isinstance(event, Traced) and (event.cpu, int(event.time)) == (3, 12)
    assert event.task in ("CPU 0/KVM-4711", "<...>-4711")
    assert event.fields == {"as_id": 0, "gfn": GFN, "level": 1, "old": 0, "new": FRESH}


def test_older_releases_are_read_in_their_own_words():
    """v5.19 prints a fault's address and code alone; kvm_age_page is gone since v5.13, before, it has a level or not."""
    told = replay(
        trace(
            f"kvm_page_fault: address {GFN << 12:x} error_code 182",  # EPT: a write
            f"kvm_tdp_mmu_spte_changed: as id 0 gfn {GFN:x} level 1 old_spte 0 new_spte {FRESH:x}",
            f"kvm_age_page: hva 7f0000000000 gfn {GFN:x} level 1 YOUNG",
            f"kvm_age_page: hva 7f0000000000 gfn {GFN:x} OLD",
            "kvm_set_spte_hva: mmu notifier set pte hva: 0x007f0000000000",
        )
    )
    assert not told.unread and told.hardware.format == EPT
    assert tells(told) == [
        "write fault, where nothing was allowed",
        "writable",
        "aged: it was young",
        "aged: it was old",
    ]
    today = f"kvm_page_fault: vcpu 0 rip 0xfff0 address 0x{GFN << 12:016x} error_code 0x18a"
    assert tells(replay(trace(changed(0, FRESH), today)))[1] == "write fault, where something was allowed"


def test_ept_without_ad_bits_is_known_by_its_type_also_since_v6_13():
    """From then on bits 8 and 9 are A and D by software there, and bit 63 is set."""
    fresh, aged, protected = 0x8610000004567B77, 0x8750000004567A70, 0x8610000004567B75
    told = replay(trace(*(changed(old, new) for old, new in ((1 << 63, fresh), (fresh, aged), (aged, fresh)))))
    assert told.hardware.format == NO_AD and not told.disagreements
    assert tells(told) == ["writable", "access-tracked: aged", "writable: restored, and W given back"]
    told = replay(trace(changed(1 << 63, fresh), changed(fresh, protected)))
    assert told.hardware.format == NO_AD and tells(told)[1] == "write-protected: write-protected for logging"


def test_what_perf_cannot_print_is_read_too():
    (ours, perfs) = read_trace(
        trace(
            "kvm_mmu_prepare_zap_page: sp gen 0 gfn f0000 l1 8-byte q0 direct wux nxe ad root 0 sync",
            "kvm_mmu_prepare_zap_page: [FAILED TO PARSE] mmu_valid_gen=0 gfn=983040 role=14209 root_count=0 unsync=0",
        )
    )
    assert (
        ours.fields["gfn"] == perfs.fields["gfn"] == 0xF0000 and ours.fields["level"] == perfs.fields["role"] & 15 == 1
    )


def test_flushes_come_from_a_probe_or_the_function_tracer():
    for event in (
        FLUSH,
        "kvm_flush_remote_tlbs_range <-kvm_mmu_slot_gfn_write_protect",
        "probe:kvm_flush_remote_tlbs: (c0a)",
    ):
        assert [step.says for step in replay(trace(event)).steps] == ["all TLBs are flushed"]


def test_torn_lines_have_their_number_and_a_reason_and_the_rest_is_read():
    lines = trace(changed(0, FRESH), changed(FRESH, PROTECTED), changed(PROTECTED, FRESH), "kvm_entry: vcpu 0")
    lines[1] = lines[1][: lines[1].index(" new_spte")]
    lines[2:2] = ["", "# a comment", "CPU:1 [LOST 12 EVENTS]", "no line of a trace", lines[0][:40], lines[0][:30]]
    lines.append(trace("kvm_mmu_set_spte: gfn 100 spte 602 (r-xu) level 1 at 5")[0])
    told = replay(lines)
    assert told.unread == [
        Unread(2, "kvm_tdp_mmu_spte_changed: no new: the line ends"),
        Unread(6, "no trace's line: 'no line of a trace'"),
        Unread(7, "the line ends, or goes wrong, before its time"),
        Unread(8, "the line ends, or goes wrong, before its time"),
        Unread(11, "kvm_mmu_set_spte: says (r-xu) of spte 0x602"),
    ]
    assert told.lost == 12 and told.others == {"kvm_entry": 1} and len(told.steps) == 2
    assert "no new: the line ends" in str(told)


def test_a_hundred_thousand_lines_are_all_read():
    words = [0, FRESH, PROTECTED, FRESH]
    lines = trace(*(changed(words[n % 4 - 1] if n % 4 else 0, words[n % 4], gfn=n // 4) for n in range(100_000)))
    told = replay(lines)
    assert len(told.steps) == 100_000 and not told.unread


# ---- what the model says ---------------------------------------------------------------------------------------------


def test_the_seed_bugs_page_is_told_in_the_models_words():
    told = replay(
        trace(
            changed(0, MADE),
            changed(MADE, AGED),
            fast(AGED, NO_AD.restore_acc_track_spte(AGED), flags="U"),
            fast(NO_AD.restore_acc_track_spte(AGED), MADE),
            changed(MADE, NO_AD.spte_write_protect(MADE).spte),
            changed(NO_AD.spte_write_protect(MADE).spte, REMOVED_SPTE),
            changed(0, MADE),
        )
    )
    assert told.hardware.format == NO_AD and not told.disagreements
    assert tells(told) == [
        "writable",
        "access-tracked: aged",
        "fast read fault, fixed: write-protected: restored",
        "fast write fault, fixed: writable: W given back",
        "write-protected: write-protected for logging",
        "zapped and frozen, was write-protected",
        "writable",
    ]
    shown = repr(Table(HEADINGS, told.rows(GFN), "gfn 0x100")).splitlines()
    assert len(shown) == 9 and "access-tracked: aged" in shown[3]


@pytest.mark.parametrize("fmt", [EPT, NO_AD, SpteFormat.npt()], ids=lambda fmt: fmt.name)
def test_the_format_is_guessed(fmt):
    made = fmt.make_spte(PFN, ad_type=0 if fmt.kvm_ad_enabled else SPTE_TDP_AD_DISABLED_MASK).spte
    for word in (made, fmt.mmu_spte_age(made).spte, fmt.spte_write_protect(made).spte):
        assert replay(trace(changed(0, word))).hardware.format == fmt


def test_a_word_that_no_kvm_makes_is_told():
    broken = FRESH & ~EPT.shadow_mmu_writable_mask
    (said,) = disagreements(changed(0, broken), changed(broken, 0), hardware=Hardware.ept())
    assert said.startswith(f"no KVM makes {broken:#x}") and "W needs MMU-writable" in said
    (said,) = disagreements(changed(0, FRESH), changed(FRESH, 7), hardware=Hardware.ept())
    assert "not MMU-present, but hardware would use it" in said
    (said,) = disagreements(changed(FRESH | 3 << 52, 0), hardware=Hardware.ept())
    assert "type 3 does not exist" in said


def test_a_fast_fault_that_makes_a_page_writable_needs_mmu_writable():
    given = GUARDED | 2 | EPT.shadow_mmu_writable_mask
    (said,) = disagreements(changed(0, GUARDED), fast(GUARDED, given), hardware=Hardware.ept())
    assert said.endswith("writable, which is not MMU-writable")
    assert not disagreements(changed(0, GUARDED), fast(GUARDED, GUARDED, fixed=0), hardware=Hardware.ept())


def test_what_the_models_fast_path_would_not_do_is_told():
    restored = NO_AD.restore_acc_track_spte(AGED)
    hardware = Hardware.ept(ad_bits=False)
    assert not disagreements(changed(0, AGED), fast(AGED, restored, "U"), hardware=hardware)
    assert not disagreements(changed(0, AGED), fast(AGED, 0, "U"), hardware=hardware)  # zapped since
    assert not disagreements(changed(0, AGED), fast(AGED, restored | 1 << 8, "U"), hardware=hardware)  # v6.13's A
    (said,) = disagreements(changed(0, AGED), fast(AGED, MADE, "U"), hardware=hardware)  # a read gives W back
    assert "differs" in said
    (said,) = disagreements(changed(0, MADE), fast(MADE, MADE), hardware=hardware)  # spurious, not fixed
    assert "the model has no fast write fault" in said
    (said,) = disagreements(changed(0, PROTECTED), fast(PROTECTED, PROTECTED, "U|F"), hardware=Hardware.ept())
    assert "no fast fetch fault" in said
    (said,) = disagreements(fast(0, MADE, "W"), hardware=hardware)
    assert "maps nothing" in said


def test_another_frame_in_place_is_told():
    moved = FRESH + (1 << 12)
    (said,) = disagreements(changed(0, FRESH), changed(FRESH, moved), hardware=Hardware.ept())
    assert said == "another frame in place, 0x4567 -> 0x4568: the leaf must be zapped first"


def test_a_missing_flush_is_told_only_by_a_trace_that_tells_of_flushes():
    dropped = (changed(0, FRESH), changed(FRESH, GUARDED))
    assert disagreements(FLUSH, *dropped) == ["it is not MMU-writable any more, and no flush follows"]
    assert disagreements(*dropped, FLUSH) == []
    told = replay(trace(*dropped))
    assert told.disagreements == [] and told.unjudged == 1 and "probe kvm_flush_remote_tlbs" in str(told)

    moved = (changed(FRESH, REMOVED_SPTE), changed(0, FRESH + (1 << 12)))
    assert disagreements(FLUSH, changed(0, FRESH), *moved) == [
        "another frame than the one that line 3 zapped, and no flush in between"
    ]
    assert disagreements(changed(0, FRESH), moved[0], FLUSH, moved[1]) == []
    assert disagreements(FLUSH, changed(0, FRESH), moved[0]) == []  # a VM's end
    assert disagreements(FLUSH, changed(0, FRESH), changed(FRESH, PROTECTED)) == []  # dirty logging keeps MMU-writable


def test_what_no_event_told_is_marked_and_what_hardware_sets_is_not():
    old = EPT.mmu_spte_age(FRESH).spte
    assert tells(replay(trace(changed(0, old), changed(FRESH, PROTECTED)))) == [
        "writable, old",
        "write-protected: write-protected for logging",
    ]
    told = replay(trace(changed(0, FRESH), changed(PROTECTED, FRESH)))
    assert tells(told)[1] == ("writable: W given back (was writable when last seen: changed unseen, or another root's)")
    assert (
        "unseen" not in tells(replay([*trace(changed(0, FRESH)), "[LOST 3 EVENTS]", *trace(changed(PROTECTED, 0))]))[1]
    )


def test_tables_and_empty_entries_of_v6_10_are_no_leaves():
    table = EPT.make_nonleaf_spte(0x99, ad_disabled=False)
    empty, frozen = 1 << 63, 1 << 63 | REMOVED_SPTE
    huge = EPT.make_spte(0x40000, level=2).spte
    told = replay(
        trace(changed(empty, table, level=2), changed(empty, FRESH), changed(FRESH, frozen), changed(empty, FRESH),
              changed(table, huge, level=2), "kvm_mmu_split_huge_page: gfn 100 spte "f"{huge:x} level 2 errno 0"),
        hardware=Hardware.ept(),
    )  # fmt: skip
    assert tells(told) == [
        "table",
        "writable",
        "zapped and frozen, was writable",
        "writable",
        "table, now writable, 2M",
        "writable, 2M: split into 512",
    ]
    assert told.disagreements == []


def test_a_rings_arithmetic_is_checked():
    push = "kvm_dirty_ring_push: ring 0: dirty 0x{:x} reset 0x0 slot 0 offset 0x5 (used {})"
    told = replay(trace(push.format(1, 1), push.format(2, 2), push.format(4, 4), push.format(5, 9)))
    assert ["missing" in step.says for step in told.steps] == [False, False, True, False]
    assert [found.says for found in told.disagreements] == ["ring 0 from 0x0 to 0x5 does not hold 9 entries"]
    wrapped = "kvm_dirty_ring_push: ring 0: dirty 0x0 reset 0xfffffffe slot 65537 offset 0x5 (used 2)"
    told = replay(trace(wrapped), slots={65537: 0x100})
    assert told.disagreements == [] and tells(told, 0x105) == ["dirty: page 0x5 of slot 1 goes to ring 0, 2 used"]


# ---- garbage ---------------------------------------------------------------------------------------------------------

LINES = [line for path in FILES for line in path.read_text().splitlines()[:60]]
LINES += trace(
    changed(0, FRESH), fast(AGED, MADE), FLUSH, changed(FRESH, GUARDED), f"kvm_age_page: hva 1 gfn {GFN:x} OLD"
)
VALUES = st.one_of(
    st.integers(-(1 << 70), 1 << 70).map(str), st.integers(0, (1 << 64) - 1).map("{:x}".format), st.text(max_size=8)
)
KNOWN = st.builds(
    lambda form, values: (
        form[0] + ": " + "".join(f"{text}{value}" for text, value in zip(form[1], values, strict=False))
    ),
    st.sampled_from(
        [(name, [part.split("}")[-1] for part in form.split("{")]) for name in FORMATS for form in FORMATS[name]]
    ),
    st.lists(VALUES, min_size=9, max_size=9),
)
TORN = st.builds(
    lambda line, cut, put: line[:cut] + put, st.sampled_from(LINES), st.integers(0, 150), st.text(max_size=6)
)


@given(st.lists(st.one_of(TORN, KNOWN.map(lambda event: trace(event)[0]), st.text(max_size=60)), max_size=25))
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_nothing_that_a_line_may_say_raises(lines):
    told = replay(lines)
    assert sum(told.events.values()) + sum(told.others.values()) + len(told.unread) <= len(lines)
    assert str(told) and replay("\n".join(lines)).hardware


@given(st.sampled_from([path for path in FILES if path.stat().st_size < 15_000]), st.integers(0, 15_000))
@settings(max_examples=25, deadline=None)
def test_a_trace_cut_anywhere_is_read_but_for_its_last_line(path, size):
    whole, cut = replay(path), replay(path.read_text()[:size])
    assert cut.steps[:-1] == whole.steps[: max(0, len(cut.steps) - 1)] and len(cut.unread) <= 1


@given(st.binary(max_size=400))
def test_binary_files_are_read_as_lines_too(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "binary"
    path.write_bytes(content)
    assert replay(path).steps == []


@pytest.mark.parametrize(
    "piece", [" ", "[1] ", "[0] 1: ", "[0] 1: kvm_mmu_set_spte: ", "abcdef (", "LOST ", "0", "=> "]
)
def test_long_lines_are_read_in_no_time(piece):
    begun = time.process_time()
    lines = [piece * (length // len(piece)) for length in (900, 1_000_000)] * 10
    lines += ["a-1 [000] 1.0: kvm_mmu_set_spte: gfn " + line for line in lines]
    replay(lines)
    assert time.process_time() - begun < 2


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_the_report(capsys, tmp_path):
    ring = str(TRACES / "ring.perf.txt")
    assert main(["trace", ring, "--slot", "0=0x100"]) == 0
    printed = capsys.readouterr().out
    assert "The model disagrees with nothing." in printed and "shadow paging" in printed
    assert main(["trace", ring, "--gfn", "0x101"]) == 0
    assert "writable (write fault)" in capsys.readouterr().out
    torn = tmp_path / "torn.txt"
    torn.write_text("\n".join(trace(changed(0, FRESH), changed(FRESH, FRESH + (1 << 12)))))
    assert main(["trace", str(torn)]) == 1
    assert "another frame in place" in capsys.readouterr().out
    assert main(["trace", str(tmp_path / "none")]) == 2
    assert "No such file" in capsys.readouterr().err
