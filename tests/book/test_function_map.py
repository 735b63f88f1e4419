"""The function map: what it names exists, the seed patch is in it, and a docstring that it cannot read is refused."""

import importlib
import re
import subprocess
import sys
from functools import reduce

import pytest

from tools import function_map
from tools.function_map import NOT_IN_THE_MODEL, Unparsable, markdown, rows, sources

PATCH_FUNCTIONS = re.findall(
    r"\w+",
    """
    kvm_mmu_slot_remove_write_access kvm_mmu_slot_leaf_clear_dirty kvm_mmu_slot_apply_flags
    kvm_arch_flush_remote_tlbs_memslot kvm_memslots_have_rmaps is_tdp_mmu_enabled slot_handle_level slot_handle_level_4k
    slot_rmap_write_protect __rmap_clear_dirty kvm_tdp_mmu_wrprot_slot kvm_tdp_mmu_clear_dirty_slot is_rsvd_spte
    kvm_mmu_zap_all is_writable_pte clear_young
    """,
)
PATCH_OTHERS = [
    "KVM_MAX_HUGEPAGE_LEVEL", "PG_LEVEL_4K", "mmu_lock", "struct kvm_memory_slot", "struct kvm_rmap_head",
    "struct rsvd_bits_validate", "shadow_mmu_writable_mask", "shadow_host_writable_mask",
]  # fmt: skip


@pytest.fixture(scope="module")
def found():
    return rows()


def test_every_row_points_at_something_that_imports(found):
    assert len(found) > 100
    for row in found:
        assert reduce(getattr, row.model.split("."), importlib.import_module(row.module)) is not None


def test_a_function_without_another_name_is_named_as_its_source(found):
    """`SpteFormat.is_writable_pte` says only "mmu/spte.h": the kernel's function has the same name, and a full path."""
    (row,) = [row for row in found if row.name == "is_writable_pte()"]
    assert (row.file, row.model, row.release) == ("arch/x86/kvm/mmu/spte.h", "SpteFormat.is_writable_pte", "v5.19")


def test_every_name_of_the_patch_is_in_the_map(found):
    names = {row.name for row in found} | {name for name, _, _ in NOT_IN_THE_MODEL}
    assert {f"{name}()" for name in PATCH_FUNCTIONS} | set(PATCH_OTHERS) <= names
    assert not {name for name, _, _ in NOT_IN_THE_MODEL} & {row.name for row in found}


def test_the_flush_is_found_where_the_patch_put_it_and_where_it_was(found):
    here = {(row.name, row.release): row.model for row in found if row.module == "kvmbook.model.memory_regions"}
    assert here["kvm_mmu_slot_apply_flags()", "v6.0"] == "SetUserMemoryRegion.flush_always"
    assert here["kvm_mmu_slot_leaf_clear_dirty()", "v5.19"] == "SetUserMemoryRegion.flush_if_owed"


@pytest.mark.parametrize(
    "docstring",
    [
        "Source: kvm_age_gfn(), v5.19.",  # in which file?
        "Source: mmu/mmu.c: kvm_age_gfn().",  # of which release?
        "Source: mmu/mmu.c: kvm_age_gfn() and age_gfn_range(), v5.19.",
        "Source: the CPU manuals, v5.19.",
        "Source: mmu/mmu.c: kvm_age_gfn(), v5.19",  # no full stop
        "Source: mmu/mmu.c, v5.19. Source: mmu/spte.h, v5.19.",
        "Source: v5.19.",
    ],
)
def test_an_unparsable_source_is_refused(docstring):
    with pytest.raises(Unparsable):
        sources(docstring, "kvm_age_gfn")


def test_a_class_cannot_mean_its_own_name():
    assert sources("Source: mmu/mmu.c, v5.19.", "age")[0][1] == "age()"
    with pytest.raises(Unparsable, match="names no function"):
        sources("Source: mmu/mmu.c, v5.19.", "")


def test_several_files_names_and_remarks_are_told_apart():
    said = (
        "Age.\n  Source: mmu/mmu.c: f() (twice, as it were), g(), mmu/tdp_mmu.c, x.h: struct s, v6.0 (to v6.12). More."
    )
    assert sources(said, "h") == [
        ("arch/x86/kvm/mmu/mmu.c", "f()", "v6.0", "(twice, as it were) (to v6.12)"),
        ("arch/x86/kvm/mmu/mmu.c", "g()", "v6.0", "(to v6.12)"),
        ("arch/x86/kvm/mmu/tdp_mmu.c", "h()", "v6.0", "(to v6.12)"),
        ("x.h", "struct s", "v6.0", "(to v6.12)"),
    ]


def test_a_refusal_names_file_line_and_function(tmp_path):
    package = tmp_path / "kvmbook"
    package.mkdir()
    (package / "room.py").write_text('class Door:\n    def open(self):\n        """Open it. Source: somewhere."""\n')
    with pytest.raises(Unparsable, match=r"kvmbook/room\.py, line 2, Door\.open: 'somewhere'"):
        markdown(package)


def test_no_table_has_an_empty_cell_or_what_would_break_it():
    tables = [line for line in markdown().splitlines() if line.startswith("|")]
    assert len(tables) > 150
    for line in tables:
        cells = re.split(r"(?<!\\)\|", line)[1:-1]
        assert len(cells) in (2, 3) and all(cell.strip() for cell in cells), line
        assert "<" not in line.replace("\\<", "")


def test_the_program_writes_the_page(tmp_path):
    page = tmp_path / "map.md"
    done = subprocess.run([sys.executable, function_map.__file__, page], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and page.read_text() == markdown()
    assert page.read_text().startswith("# Function map\n")


def test_a_source_that_would_not_be_read_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/a.py").write_text('"""A room. Source: rubbish."""\n')
    with pytest.raises(Unparsable, match=r"model/a.py: a 'Source:' stands where it is not read"):
        rows(tmp_path / "model")
