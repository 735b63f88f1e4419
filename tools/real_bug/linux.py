"""The kernels that the emulator boots: Debian's sources of Linux, with one line of the patch made a choice, built small.

Nothing of them is kept in this repository. The edit is described here, as what is to be found and what is put before it; a
source in which something is not found exactly once is refused.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from tools.real_bug.packages import NotAsExpected, run, unpacked

CONFIG = Path(__file__).with_name("kernel.config")
MMU, X86, RING = "arch/x86/kvm/mmu/mmu.c", "arch/x86/kvm/x86.c", "virt/kvm/dirty_ring.c"


class Source(NamedTuple):
    """A package of Debian's, and the suite that it is in."""

    package: str
    suite: str


SOURCES = {"6.1": Source("linux-source-6.1", "bookworm-security"), "7.2": Source("linux-source-7.2", "sid")}

# The flush becomes a parameter, dirty_flush: never, if the pass changed an SPTE (as before b64d740ea7dd), or always.
# So that it can be known what the pass changed, both its loops say so. (Those of a CPU with PML do not: none is booted.)
# A second parameter, repairs, mends what later kernels lose.
PARAMETERS = """int dirty_flush = 2, repairs;
bool dirty_pass_changed;
module_param(dirty_flush, int, 0644);
module_param(repairs, int, 0644);

"""
KNOWN = """extern int dirty_flush, repairs;
extern bool dirty_pass_changed;

"""


class Edit(NamedTuple):
    """A text that is put where a pattern matches, in a file of the kernel's, in ``releases`` (None: in all)."""

    path: str
    pattern: str
    text: str
    releases: tuple[str, ...] | None = None


EDITS = (
    Edit(MMU, r"^(?=void kvm_arch_mmu_enable_log_dirty_pt_masked\()", PARAMETERS),
    Edit(X86, r"^(?=static void kvm_mmu_slot_apply_flags\()", KNOWN),
    # What the pass changed, and the flush.
    Edit(
        MMU,
        r"(?<=\t)(?=(slot_handle_level|walk_slot_rmaps)\(kvm, memslot, slot_rmap_write_protect,)",
        "dirty_pass_changed |= ",
    ),
    Edit(MMU, r"(?<=\t)(?=kvm_tdp_mmu_wrprot_slot\(kvm, memslot, start_level\);)", "dirty_pass_changed |= "),
    Edit(
        X86,
        r"(?<=\t)(?=if \(kvm\S+cpu_dirty_log_size\) \{\n\s+kvm_mmu_slot_leaf_clear_dirty)",
        "dirty_pass_changed = false;\n\t\t",
    ),
    Edit(
        X86,
        r"(?<=\t)(?=kvm_(arch_)?flush_remote_tlbs_memslot\(kvm, new\);)",
        "if (dirty_flush == 2 || (dirty_flush == 1 && dirty_pass_changed))\n\t\t\t",
    ),
    # The repairs: look at the last gfn's huge page if it is another, protect where a ring has no bits, arm what is freed.
    Edit(
        MMU,
        r"(?<=\t)(?=if \(ALIGN\(start << PAGE_SHIFT, PMD_SIZE\))",
        "if (repairs && (start ^ end) >> 9)\n\t\t\tkvm_mmu_slot_gfn_write_protect(kvm, slot, end, PG_LEVEL_2M);\n\t\telse ",
    ),
    Edit(
        X86,
        r"(?<=\t)(?=if \(kvm_dirty_log_manual_protect_and_init_set\(kvm\)\)\n\s+return;)",
        "if (!repairs || !kvm->dirty_ring_size)\n\t\t",
    ),
    Edit(RING, r"^(?=int kvm_dirty_ring_reset\()", "extern int repairs;\n\n", ("7.2",)),
    Edit(
        RING,
        r"(?<=\t)(?=if \(signal_pending\(current\)\))",
        "if (repairs && signal_pending(current))\n\t\t\tbreak;\n\t\t",
        ("7.2",),
    ),
)


def build(where: Path, name: str) -> tuple[Path, str]:
    """Fetch, edit, configure and build one of `SOURCES`; what is there already is not done again. The image, and its
    release."""
    source = SOURCES[name]
    tree = where / source.package
    image = tree / "arch/x86/boot/bzImage"
    if not image.exists():
        archive = unpacked(where, source.package, source.suite) / f"usr/src/{source.package}.tar.xz"
        run("tar", "-xf", str(archive), "-C", str(where))
        make_edits(tree, name)
        _configure(tree)
        run("make", "-C", str(tree), f"-j{os.cpu_count()}", "bzImage")
    release = subprocess.run(
        ["make", "-s", "-C", str(tree), "kernelversion"], capture_output=True, text=True, check=True
    )
    return image, release.stdout.strip()


def make_edits(tree: Path, name: str) -> None:
    """Put each text where its pattern matches, which must be once. NotAsExpected if it is not; no file is changed then."""
    changed: dict[Path, str] = {}
    for each in EDITS:
        if each.releases is None or name in each.releases:
            path = tree / each.path
            text, count = re.subn(each.pattern, each.text, changed.get(path) or path.read_text(), flags=re.MULTILINE)
            if count != 1:
                raise NotAsExpected(
                    f"{path} is not as the edit expects it: {each.pattern!r} matches {count} times, not once"
                )
            changed[path] = text
    for path, text in changed.items():
        path.write_text(text)


def _configure(tree: Path) -> None:
    run("make", "-C", str(tree), "tinyconfig")
    wanted = [line for line in CONFIG.read_text().splitlines() if line.startswith("CONFIG_")]
    with (tree / ".config").open("a") as config:
        config.write("\n".join(wanted) + "\n")
    run("make", "-C", str(tree), "olddefconfig")
    if missing := set(wanted).difference((tree / ".config").read_text().splitlines()):
        raise NotAsExpected(f"the kernel's configuration did not take {', '.join(sorted(missing))}")
