"""The kernel that the emulator boots: Debian's source of Linux 6.1, with one line of the patch made a choice, built small.

Nothing of it is kept in this repository. The edit is described here, as what is to be found and what is put in its place; a
source in which something is not found exactly once is refused.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

SOURCE = Path("/usr/src/linux-source-6.1.tar.xz")
CONFIG = Path(__file__).with_name("kernel.config")
MMU = "arch/x86/kvm/mmu/mmu.c"

# The flush becomes a parameter, dirty_flush: never, if the pass changed an SPTE (as before b64d740ea7dd), or always.
# So that it can be known what the pass changed, each of its four loops says so.
CHOICE = """int dirty_flush = 2;
bool dirty_pass_changed;
module_param(dirty_flush, int, 0644);

"""
EDITS = (
    (MMU, r"^(?=void kvm_mmu_slot_remove_write_access\()", CHOICE),
    *(
        (MMU, rf"^(\s+)(?={loop})", r"\1dirty_pass_changed |= ")
        for loop in (
            r"slot_handle_level\(kvm, memslot, slot_rmap_write_protect,",
            r"kvm_tdp_mmu_wrprot_slot\(kvm, memslot, start_level\);",
            r"slot_handle_level_4k\(kvm, memslot, __rmap_clear_dirty, false\);",
            r"kvm_tdp_mmu_clear_dirty_slot\(kvm, memslot\);",
        )
    ),
    (
        "arch/x86/kvm/x86.c",
        r"^(?=static void kvm_mmu_slot_apply_flags\()",
        "extern int dirty_flush;\nextern bool dirty_pass_changed;\n\n",
    ),
    (
        "arch/x86/kvm/x86.c",
        r"^(\s+)(?=if \(kvm_x86_ops\.cpu_dirty_log_size\) \{\n\s+kvm_mmu_slot_leaf_clear_dirty)",
        r"\1dirty_pass_changed = false;\n\1",
    ),
    (
        "arch/x86/kvm/x86.c",
        r"^(\s+)(?=kvm_arch_flush_remote_tlbs_memslot\(kvm, new\);)",
        r"\1if (dirty_flush == 2 || (dirty_flush == 1 && dirty_pass_changed))\n\1\t",
    ),
)


class NotAsExpected(SystemExit):
    """A source is not the one that the edit is made for, or a step failed. The sentence says which."""


def build(where: Path) -> tuple[Path, str]:
    """Unpack, edit, configure and build in ``where``; what is there already is not done again. The image, and its
    release."""
    tree = where / "linux-source-6.1"
    image = tree / "arch/x86/boot/bzImage"
    if not image.exists():
        if not SOURCE.exists():
            raise NotAsExpected(f"{SOURCE} is missing: apt-get install linux-source-6.1")
        run("tar", "-xf", str(SOURCE), "-C", str(where))
        for name, pattern, text in EDITS:
            edit(tree / name, pattern, text)
        run("make", "-C", str(tree), "tinyconfig")
        with (tree / ".config").open("a") as config:
            config.write(CONFIG.read_text())
        run("make", "-C", str(tree), "olddefconfig")
        missing = _wanted() - set((tree / ".config").read_text().splitlines())
        if missing:
            raise NotAsExpected(f"the kernel's configuration did not take {', '.join(sorted(missing))}")
        run("make", "-C", str(tree), f"-j{os.cpu_count()}", "bzImage")
    release = subprocess.run(["make", "-s", "-C", str(tree), "kernelversion"], capture_output=True, text=True, check=True)
    return image, release.stdout.strip()


def _wanted() -> set[str]:
    return {line for line in CONFIG.read_text().splitlines() if line.startswith("CONFIG_")}


def edit(path: Path, pattern: str, text: str) -> None:
    """Replace what the pattern finds, which must be there once. NotAsExpected if it is not; the file is left alone then."""
    changed, count = re.subn(pattern, text, path.read_text(), flags=re.MULTILINE)
    if count != 1:
        raise NotAsExpected(f"{path} is not as the edit expects it: {pattern!r} stands there {count} times, not once")
    path.write_text(changed)


def run(*command: str) -> None:
    """Run one command quietly. NotAsExpected, with the end of what it said, if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise NotAsExpected(f"{' '.join(command)} failed:\n{said}")
