"""A run as a C program: what user space can play of it, the verdict's places, and that a C compiler takes it without a word.
What the programs say on a real KVM is for tests/real."""

import os
import pathlib
import re
import subprocess

import numpy as np
import pytest
from made_programs import NO_AD, programs

from kvmbook import Hardware, Kernel, Vm
from kvmbook.search import Recorder, c_program, explore, left_to_chance
from kvmbook.search.selftest import FORMS

STUBS = pathlib.Path(__file__).with_name("kselftest")
MADE = programs()
WARNINGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread"]


def play(text):
    """The calls of the program's run, without comments."""
    body = re.search(r"static void play\(void\)\n\{\n(.*?)\n\}", text, re.S)[1]
    return re.findall(r"\S.*", re.sub(r"/\*.*?\*/", "", body, flags=re.S))


# ---- what is played --------------------------------------------------------------------------------------------------


def test_the_seeds_run_becomes_four_calls_and_says_what_lies_inside_them():
    text = explore(NO_AD, Kernel.v5_19).to_selftest()
    assert play(text) == [
        "does(VCPU0, READ, 0);", "does(HOST, AGE, 0);", "enable_logging();", "does(VCPU0, WRITE, 0);"
    ]  # fmt: skip
    assert "12 write_protect_tdp, 13 flush_if_owed" in text and "loses what is written to page 0" in text
    assert "page_idle" in text and "Left to chance" not in text


def test_what_is_mixed_is_begun_together_and_left_to_chance():
    script = MADE["fast_path_marks_first"].script
    assert play(c_program(script)) == [
        "does(VCPU0, READ, 0);",
        "begin(VCPU0, WRITE, 0);",
        "dawdle();",
        "enable_logging();",
        "dawdle();",
        "get_dirty_log();",
        "finish(VCPU0);",
    ]
    assert len(left_to_chance(script)) == 2 and "Left to chance" in c_program(script)
    assert play(c_program(MADE["aged_amid_enabling"].script))[-5:] == [
        "begin(HOST, AGE, 0);", "dawdle();", "enable_logging();", "finish(HOST);", "does(VCPU0, WRITE, 0);"
    ]  # fmt: skip


def test_what_nobody_can_cause_is_a_comment_and_a_chance():
    script = MADE["two_vcpus_by_hand"].script
    text = c_program(script)
    assert "Step 9: vCPU1 forgets page 1. Not played" in text and "Step 25: vCPU0 exits. Not played" in text
    assert left_to_chance(script) == ["no program makes a TLB forget one entry: those steps are not played."]
    assert play(text)[8:12] == [
        "enable_logging();",
        "does(VCPU1, WRITE, 1);",
        "get_dirty_log();",
        "does(VCPU0, WRITE, 1);",
    ]
    assert not left_to_chance(MADE["seed"].script)


def test_a_run_of_calls_is_recorded_as_it_is_done():
    assert play(c_program(MADE["cleared_by_hand"].script))[3:7] == [
        "enable_logging();",
        "does(VCPU1, WRITE, 16);",
        "get_dirty_log();",
        "clear_dirty_log(64, 66, (uint64_t[]){ 0xfffffffffffffffc, 0x3 });",
    ]
    ring = play(c_program(MADE["ring_harvested_twice"].script))
    assert ring[2:7] == [
        "does(VCPU0, WRITE, 0);", "does(VCPU1, WRITE, 1);", "harvest_ring(VCPU0);", "harvest_ring(VCPU1);",
        "reset_dirty_rings();",
    ]  # fmt: skip
    assert MADE["ring_lost"].script.lost == (0,) and MADE["clear_lost"].script.lost == (1,)


def test_the_recorder_answers_as_the_model_does():
    plain, recorder = (Vm(Hardware.npt(), Kernel.v6_0) for _ in range(2))
    answers = []
    for vm in (plain, Recorder(recorder)):
        vm.set_user_memory_region(base_gfn=0x100, npages=3)
        young = [vm.vcpu[0].read(0x100), vm.clear_young(0x100, 0x102)]
        vm.set_user_memory_region(base_gfn=0x100, npages=3, log_dirty_pages=True)
        answers.append([*young, vm.vcpu[0].write(0x102), vm.vcpu[0].dirty_ring, *vm.get_dirty_log(0)])
    assert answers[0] == answers[1]


def test_what_no_program_could_play_is_refused():
    recorder = Recorder(Vm(NO_AD, Kernel.v6_0))
    with pytest.raises(ValueError, match="no slot yet"):
        recorder.to_selftest()
    with pytest.raises(ValueError, match="begins without logging"):
        recorder.set_user_memory_region(base_gfn=0, npages=1, log_dirty_pages=True)
    recorder.set_user_memory_region(base_gfn=0, npages=2)
    for slot, base_gfn, npages in ((1, 0, 2), (0, 1, 2), (0, 0, 0)):
        with pytest.raises(ValueError, match="one slot"):
            recorder.set_user_memory_region(slot, base_gfn, npages)
    with pytest.raises(ValueError, match="not in the slot"):
        recorder.vcpu[0].read(2)
    with pytest.raises(OSError):
        recorder.get_dirty_log(0)
    with pytest.raises(OSError):
        recorder.clear_dirty_log(0, 0, 2, np.ones(2, bool))
    assert recorder.script.calls == ()
    with pytest.raises(ValueError, match="a form is one of"):
        recorder.to_selftest("pytest")
    with pytest.raises(ValueError, match="none to play"):
        explore(NO_AD, Kernel.v6_0).to_selftest()


# ---- how it is built -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("made", MADE)
def test_a_program_is_readable_and_has_what_it_needs_only(made, form):
    text = c_program(MADE[made].script, form)
    lines = text.splitlines()
    assert max(len(line.expandtabs(8)) for line in lines) <= 126 and not re.search(r"@|//\[|\n\n\n", text)
    assert len(lines) < 500
    assert ("pthread" in re.sub(r"-pthread", "", text)) == any(
        MADE[made].script.met(c) for c in MADE[made].script.calls
    )
    assert ("page_idle" in text) == any(call.what.startswith("ages") for call in MADE[made].script.calls)
    assert ("KVM_DIRTY_GFN_F_DIRTY" in text) == bool(MADE[made].script.ring_bytes)


def test_the_kselftest_form_speaks_the_librarys_language():
    text = c_program(MADE["seed"].script, "kselftest")
    for name in (
        "vm_create_with_one_vcpu(&vcpus[0], guest_code)", "vm_userspace_mem_region_add(", "vm_mem_region_set_flags(",
        "kvm_vm_get_dirty_log(", "vcpu_run(", "TEST_ASSERT(", "GUEST_SYNC(", "UCALL_SYNC", "kvm_vm_free(", '"kvm_util.h"',
    ):  # fmt: skip
        assert name in text, name
    assert "ioctl(" not in text and "KVM_RUN" not in text
    assert "vm_create_with_vcpus(VCPUS," in c_program(MADE["two_vcpus_by_hand"].script, "kselftest")
    assert "vm_enable_dirty_ring(vm, RING_BYTES)" in c_program(MADE["ring_lost"].script, "kselftest")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("made", MADE)
def test_gcc_has_nothing_to_say(made, form, gcc, tmp_path):
    (tmp_path / "run.c").write_text(c_program(MADE[made].script, form))
    with_stubs = ["-I", str(STUBS), "-Wno-unused-value", "-fsyntax-only"] if form == "kselftest" else ["-o", "run"]
    command = [gcc, "-O1", *WARNINGS, "run.c", *with_stubs]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize("form", FORMS)
def test_a_title_may_say_anything_and_the_comment_ends_where_it_ends(form, gcc, tmp_path):
    recorder = Recorder(Vm(NO_AD, Kernel.v5_19), title="half */ a /* comment\nand #error a second line")
    recorder.set_user_memory_region(slot=0, base_gfn=0x200, npages=4)
    recorder.set_user_memory_region(slot=0, base_gfn=0x200, npages=4, log_dirty_pages=True)
    recorder.vcpu[0].write(0x200)
    (tmp_path / "run.c").write_text(recorder.to_selftest(form))
    with_stubs = [f"-I{STUBS}"] if form == "kselftest" else []
    subprocess.run([gcc, "-O1", *WARNINGS, "run.c", *with_stubs, "-c", "-o", "run.o"], cwd=tmp_path, check=True)


def test_those_who_are_to_meet_are_on_cpus_of_their_own(gcc, tmp_path):
    text = c_program(MADE["fault_across_enabling"].script)
    says = 'stay_on_cpu(who);\n\tprintf("on CPU %d\\n", sched_getcpu());\n'
    text = text.replace("stay_on_cpu(who);\n", says).replace(
        "\topen_kvm();\n", "\tstart_crew();\n\tstop_crew();\n\treturn 0;\n"
    )
    (tmp_path / "run.c").write_text(text)
    subprocess.run([gcc, "-w", "-pthread", "run.c", "-o", "run"], cwd=tmp_path, check=True)
    said = subprocess.run(["./run"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    on = re.findall(r"on CPU \d+", said)
    assert len(on) == 2 and len(set(on)) == min(2, len(os.sched_getaffinity(0)))


def test_without_kvm_a_program_says_so_and_skips(gcc, tmp_path):
    text = c_program(MADE["never_flushed"].script).replace('"/dev/kvm"', '"/dev/no-kvm"')
    (tmp_path / "run.c").write_text(text)
    subprocess.run([gcc, *WARNINGS, "run.c", "-o", "run"], cwd=tmp_path, check=True)
    done = subprocess.run(["./run"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (4, "SKIP: /dev/kvm cannot be opened: No such file or directory.\n")
