"""`make real-bug`, as far as it goes without a kernel and an emulator: its edit, its programs, what it reads."""

import re
import subprocess

import pytest

from kvmbook.real.emulated import HARDWARE, Round
from tools.real_bug import linux, packages, programs

# As much of the two files as the edit looks at, in words of our own.
MMU = """
void kvm_mmu_slot_remove_write_access(struct kvm *kvm)
{
\t\tslot_handle_level(kvm, memslot, slot_rmap_write_protect,
\t\tkvm_tdp_mmu_wrprot_slot(kvm, memslot, start_level);
}
"""
X86 = """
static void kvm_mmu_slot_apply_flags(struct kvm *kvm)
{
\t\tif (kvm_x86_ops.cpu_dirty_log_size) {
\t\t\tkvm_mmu_slot_leaf_clear_dirty(kvm, new);
\t\t}
\t\tkvm_arch_flush_remote_tlbs_memslot(kvm, new);
}
"""


@pytest.fixture
def tree(tmp_path):
    for path, text in ((linux.MMU, MMU), (linux.X86, X86)):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def test_the_edit_adds_and_takes_nothing_away(tree):
    for path, pattern, text in linux.EDITS:
        linux.edit(tree / path, pattern, text)
    edited = (tree / linux.X86).read_text()
    assert "dirty_pass_changed))\n\t\t\tkvm_arch_flush_remote_tlbs_memslot(kvm, new);" in edited
    assert edited.index("dirty_pass_changed = false;") < edited.index("kvm_mmu_slot_leaf_clear_dirty")
    assert (tree / linux.MMU).read_text().count("dirty_pass_changed |= ") == 2
    for path, before in ((linux.MMU, MMU), (linux.X86, X86)):
        after = iter((tree / path).read_text())
        assert all(letter in after for letter in before), "each letter is there still, in its order"


def test_another_source_is_refused_and_left_alone(tree):
    path, pattern, text = linux.EDITS[-1]
    (tree / path).write_text(X86 * 2)
    with pytest.raises(packages.NotAsExpected, match="matches 2 times, not once"):
        linux.edit(tree / path, pattern, text)
    assert (tree / path).read_text() == X86 * 2


def test_a_command_that_fails_says_what_it_said():
    with pytest.raises(packages.NotAsExpected, match=r"ls /there-is-no-such-file failed:\n.*No such file"):
        packages.run("ls", "/there-is-no-such-file")


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(packages.shutil, "which", lambda name: None if name == "bochs" else "/bin/" + name)
    with pytest.raises(packages.NotAsExpected, match="apt-get install bochs bochs-term"):
        packages.see_programs()


def test_the_programs_compile(tmp_path, gcc):
    wanted = programs.programs("7.2", HARDWARE["EPT with A/D bits"])
    made = programs.compiled(tmp_path, wanted)
    assert {path.name for path in made} == {programs.CELLS, *(program.name for program in wanted)}
    strict = [gcc, "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    for name in (programs.CELLS, "reset-at-a-signal"):
        subprocess.run([*strict, str(tmp_path / f"{name}.c")], check=True)


def test_each_loss_has_its_control():
    for release, splits in (("6.1", [True, False, True, False]), ("7.2", [True, False, False, False])):
        wanted = programs.programs(release, HARDWARE["EPT with A/D bits"])
        assert [bool(program.litmus.lost) for program in wanted if program.litmus] == [*splits, True, False]


def test_what_a_boot_printed_is_read():
    wanted = programs.programs("7.2", HARDWARE["EPT with A/D bits"])
    said = "kvm_intel ept=Y\n"
    for number, program in enumerate(wanted):
        lost = "FAIL: a write was lost in 100 of 100 rounds." if number % 2 == 0 else "PASS: each write, in 100 rounds."
        said += f"{programs.BEGINS}{program.shows}\n{lost}\n{programs.ENDS}{1 - number % 2}\n"
    said += "cell flush=if changed aged=1 written=16 reported=0 flushes=0 idle=16 stays=0\n" * 2
    assert [(loss.name, loss.lost) for loss in programs.losses_in(said, wanted)] == [
        (program.shows, 100 * (number % 2 == 0)) for number, program in enumerate(wanted)
    ]
    (cell,) = programs.cells_in(said)
    assert (cell.flush, cell.aged, cell.rounds) == ("if changed", True, (Round(16, 0, 0),) * 2)
    with pytest.raises(ValueError, match="exit code 4"):
        programs.losses_in(said.replace(f"{programs.ENDS}0", f"{programs.ENDS}4"), wanted)
    with pytest.raises(ValueError, match=re.escape(wanted[-1].shows)):
        programs.losses_in(said.partition(f"{programs.BEGINS}{wanted[-1].shows}")[0], wanted)
