"""`make real-bug`, as far as it goes without a kernel and an emulator: its edit, its programs, what it reads."""

import re
import subprocess

import pytest

from kvmbook.real import EMULATED, Turn
from tools.real_bug import linux, packages, programs

# As much of the files as the edit looks at.
MMU = """
void kvm_arch_mmu_enable_log_dirty_pt_masked(struct kvm *kvm)
{
\t\tif (ALIGN(start << PAGE_SHIFT, PMD_SIZE) != ALIGN(end << PAGE_SHIFT, PMD_SIZE))
}
void kvm_mmu_slot_remove_write_access(struct kvm *kvm)
{
\t\tslot_handle_level(kvm, memslot, slot_rmap_write_protect,
\t\tkvm_tdp_mmu_wrprot_slot(kvm, memslot, start_level);
}
"""
X86 = """
static void kvm_mmu_slot_apply_flags(struct kvm *kvm)
{
\t\tif (kvm_dirty_log_manual_protect_and_init_set(kvm))
\t\t\treturn;
\t\tif (kvm_x86_ops.cpu_dirty_log_size) {
\t\t\tkvm_mmu_slot_leaf_clear_dirty(kvm, new);
\t\t}
\t\tkvm_arch_flush_remote_tlbs_memslot(kvm, new);
}
"""
RING = """
int kvm_dirty_ring_reset(struct kvm *kvm)
{
\t\tif (signal_pending(current))
\t\t\treturn -EINTR;
}
"""


@pytest.fixture
def tree(tmp_path):
    for path, text in ((linux.MMU, MMU), (linux.X86, X86), (linux.RING, RING)):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


@pytest.mark.parametrize("release", linux.SOURCES)
def test_the_edit_adds_and_takes_nothing_away(tree, release):
    linux.make_edits(tree, release)
    edited, mmu, ring = ((tree / path).read_text() for path in (linux.X86, linux.MMU, linux.RING))
    assert "dirty_pass_changed))\n\t\t\tkvm_arch_flush_remote_tlbs_memslot(kvm, new);" in edited
    assert edited.index("dirty_pass_changed = false;") < edited.index("kvm_mmu_slot_leaf_clear_dirty")
    assert edited.index("if (!repairs") < edited.index("if (kvm_dirty_log_manual")
    assert mmu.count("dirty_pass_changed |= ") == 2 and "else if (ALIGN(" in mmu
    assert ("repairs && signal_pending" in ring) == (release == "7.2")
    for path, before in ((linux.MMU, MMU), (linux.X86, X86), (linux.RING, RING)):
        after = iter((tree / path).read_text())
        assert all(letter in after for letter in before), "each letter is there still, in its order"


def test_another_source_is_refused_and_left_alone(tree):
    (tree / linux.X86).write_text(X86 * 2)
    with pytest.raises(packages.NotAsExpected, match="matches 2 times, not once"):
        linux.make_edits(tree, "6.1")
    assert (tree / linux.X86).read_text() == X86 * 2


def test_a_command_that_fails_says_what_it_said():
    with pytest.raises(packages.NotAsExpected, match=r"ls /there-is-no-such-file failed:\n.*No such file"):
        packages.run("ls", "/there-is-no-such-file")


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(packages.shutil, "which", lambda name: None if name == "bochs" else "/bin/" + name)
    with pytest.raises(packages.NotAsExpected, match="apt-get install bochs bochsbios"):
        packages.see_programs()


def test_the_programs_compile(tmp_path, gcc):
    wanted = programs.programs("7.2", EMULATED["EPT with A/D bits"])
    made = programs.compiled(tmp_path, wanted)
    assert {path.name for path in made} == {programs.CELLS, *(program.name for program in wanted)}
    strict = [gcc, "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    for name in (programs.CELLS, "reset-at-a-signal"):
        subprocess.run([*strict, str(tmp_path / f"{name}.c")], check=True)


def test_each_loss_has_its_control():
    for release, lost in (("6.1", [1, 0, 1, 0, 1, 0]), ("7.2", [1, 0, 0, 0, 1, 0, 1])):
        wanted = programs.programs(release, EMULATED["EPT with A/D bits"])
        assert [program.repaired for program in wanted] == [False] * 7 + [True] * 7
        for half in wanted[:7], wanted[7:]:
            assert [bool(program.litmus.lost) for program in half if program.litmus] == list(map(bool, lost))


def test_what_a_boot_printed_is_read():
    wanted = programs.programs("7.2", EMULATED["EPT with A/D bits"])
    said = "kvm_intel ept=Y\n"
    for number, program in enumerate(wanted):
        lost = "FAIL: a write was lost in 20 of 20 rounds." if number % 2 == 0 else "PASS: each write, in 20 rounds."
        said += f"{programs.begins(program)}\n{lost}\n{programs.ENDS}{1 - number % 2}\n"
    said += "cell flush=if changed aged=1 written=16 reported=0 flushes=0 idle=16 stays=0\n" * 2
    assert [(loss.name, loss.repaired, loss.lost, loss.rounds) for loss in programs.losses_in(said, wanted)] == [
        (program.shows, number > 6, 20 * (number % 2 == 0), 20) for number, program in enumerate(wanted)
    ]
    (cell,) = programs.cells_in(said)
    assert (cell.flush, cell.aged, cell.rounds) == ("if changed", True, (Turn(16, 0, 0),) * 2)
    with pytest.raises(ValueError, match="15 pages were idle"):
        programs.cells_in(said.replace("idle=16", "idle=15"))
    with pytest.raises(ValueError, match="exit code 4"):
        programs.losses_in(said.replace(f"{programs.ENDS}0", f"{programs.ENDS}4"), wanted)
    with pytest.raises(ValueError, match=re.escape(programs.begins(wanted[-1]))):
        programs.losses_in(said.partition(programs.begins(wanted[-1]))[0], wanted)


def test_the_script_sets_what_a_program_needs_before_it():
    wanted = programs.programs("6.1", EMULATED["EPT with A/D bits"])
    script = programs.commands(wanted)
    assert script[:3] == [
        "echo N >/sys/module/kvm/parameters/eager_page_split",
        "echo 0 >/sys/module/kvm/parameters/repairs",
        'echo "-- CLEAR of 0, 1, eager_page_split=N, repairs=0"',
    ]
    assert script[-1] == "/twelve_cells" and "/reset-at-a-signal 5" in script
