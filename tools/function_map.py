"""The map between the kernel's functions and the model's, read from the docstrings of ``kvmbook``.

Usage: function_map.py OUT.md   Writes a page of two tables.

A docstring says where its rules come from in one sentence, which ends in a full stop::

    Source: FILE[: NAME, NAME...][, FILE: NAME...], RELEASE[ (remark)].

FILE is a path in the kernel tree; ``mmu/`` stands for ``arch/x86/kvm/mmu/``. NAME is ``function()``, ``struct name``, ``union
name``, ``enum name`` or the bare name of a variable, a field or a macro; a remark in brackets may follow it. A FILE without a
NAME means that the kernel's function there has the name of the function whose docstring it is. A sentence of another form
stops the program, which names its place: so the map cannot drift away from the code.
"""

from __future__ import annotations

import ast
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "kvmbook"
REMARK = r"(?P<remark> \([^()]*\))?"
FILE = re.compile(r"(?P<file>[\w/]+\.[ch])(: (?P<rest>.+))?")
NAME = re.compile(r"(?P<name>(?:(?:struct|union|enum) )?[A-Za-z_]\w*(?:\(\))?)" + REMARK)
OWN_NAME = re.compile(r"(?P<file>[\w/]+\.[ch])" + REMARK)
RELEASE = re.compile(r"(?P<release>v\d+\.\d+( and v\d+\.\d+)?)" + REMARK)

# What the patch b64d740ea7dd names, in its diff or its context, and the model has no need of.
NOT_IN_THE_MODEL = [
    ("is_rsvd_spte()", "arch/x86/kvm/mmu/spte.h", "checks the reserved bits of an SPTE; the model makes no such SPTE"),
    ("kvm_mmu_zap_all()", "arch/x86/kvm/mmu/mmu.c", "drops everything when the VM ends; no VM of the model ends"),
    ("struct rsvd_bits_validate", "arch/x86/include/asm/kvm_host.h", "the reserved bits that `is_rsvd_spte()` checks"),
]


class Row(NamedTuple):
    """One line of the map: something of the kernel, and what stands for it in the model.

    ``remark`` is what the docstring says beside the name, or nothing.
    """

    file: str
    name: str
    release: str
    remark: str
    module: str
    model: str

    @property
    def room(self) -> str:
        """The module without ``kvmbook.``"""
        return self.module.removeprefix("kvmbook.")

    @property
    def kernel_word(self) -> str:
        """The kernel's name without ``struct``, brackets and leading underscores: what the table is sorted by."""
        return self.name.split()[-1].removesuffix("()").lstrip("_").lower()


class Unparsable(ValueError):
    """A Source sentence that has another form than the one above."""


# ---- reading docstrings ----------------------------------------------------------------------------------------------


def documented(tree: ast.Module) -> Iterator[tuple[str, ast.AST, str]]:
    """Yield (dotted name, node, docstring) of each class, function and method of a module that has a docstring."""

    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.AST, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                if docstring := ast.get_docstring(child):
                    yield prefix + child.name, child, docstring
                if isinstance(child, ast.ClassDef):
                    yield from visit(child, f"{prefix}{child.name}.")

    return visit(tree, "")


def sources(docstring: str, own_name: str) -> list[tuple[str, str, str, str]]:
    """The (file, name, release, remark)s of a docstring's Source sentence; none if it has no such sentence.

    ``own_name``: the name of the documented function, for a FILE without a NAME; "" if it is a class.
    Raises `Unparsable`.
    """
    words = " ".join(docstring.split())
    if "Source:" not in words:
        return []
    sentence = re.search(r"Source: (.+?)\.(?= |$)", words)
    if sentence is None or words.count("Source:") > 1:
        raise Unparsable("a docstring has one sentence 'Source: ...', and it ends in a full stop")
    *parts, last = re.split(r", (?![^()]*\))", sentence[1])
    released = RELEASE.fullmatch(last)
    if released is None:
        raise Unparsable(f"{sentence[1]!r} does not end in a release such as v5.19")
    found, file = [], ""
    for part in parts:
        begins = FILE.fullmatch(part)
        if own := OWN_NAME.fullmatch(part):
            if not own_name:
                raise Unparsable(f"{part!r} names no function; a class cannot mean its own name")
            file = own["file"]
            found.append((full_path(file), f"{own_name}()", own["remark"]))
            continue
        if begins:
            file = begins["file"]
        named = NAME.fullmatch(begins["rest"] if begins else part)
        if named is None:
            raise Unparsable(f"{part!r} is neither 'file: name', nor a name, nor a file")
        if not file:
            raise Unparsable(f"{part!r} does not say which file it is in")
        found.append((full_path(file), named["name"], named["remark"]))
    if not found:
        raise Unparsable(f"{sentence[1]!r} names no file")
    tail = released["remark"] or ""
    return [(path, name, released["release"], f"{remark or ''}{tail}".strip()) for path, name, remark in found]


def full_path(file: str) -> str:
    """A file's path in the kernel tree."""
    return f"arch/x86/kvm/{file}" if file.startswith("mmu/") else file


def rows(package: pathlib.Path = PACKAGE) -> list[Row]:
    """Every line of the map, in the order of the model's files and lines.

    Raises `Unparsable`, with file, line and name, for a Source sentence that it cannot read.
    """
    found = []
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package.parent)
        module = ".".join(place.with_suffix("").parts).removesuffix(".__init__")
        text = path.read_text()
        read = list(documented(ast.parse(text)))
        if text.count("Source:") != sum(docstring.count("Source:") for _, _, docstring in read):
            raise Unparsable(
                f"{place}: a 'Source:' stands where it is not read, outside the docstrings of functions and classes"
            )
        for name, node, docstring in read:
            own_name = name.rpartition(".")[2] if isinstance(node, ast.FunctionDef) else ""
            try:
                said = sources(docstring, own_name)
            except Unparsable as problem:
                raise Unparsable(f"{place}, line {getattr(node, 'lineno', 0)}, {name}: {problem}") from None
            found += [Row(file, kernel, release, remark, module, name) for file, kernel, release, remark in said]
    return found


# ---- the page --------------------------------------------------------------------------------------------------------

SAME = "the same"  # long names twice on a line do not fit on the page

INTRODUCTION = """\
Lay the model beside the kernel: the first part goes through the kernel's files and says where each function is to be found
in `kvmbook`, the second goes through the rooms of `kvmbook` and says where each function comes from. The release is the
one whose text the model follows.

Nobody writes these tables. They are made when the book is built, from the sentence "Source: ..." in the docstrings of
the model; a sentence that cannot be read stops the build. One function of the kernel can be several here, because the
model gives a name to each step that other CPUs can interrupt; and two of the kernel's can be one here, because its two
MMUs do the same job in two places."""


def markdown(package: pathlib.Path = PACKAGE) -> str:
    """The page: how it is made, kernel to model, model to kernel, and what of the patch the model leaves out."""
    found = rows(package)
    left_out = ((f"{code(name)} in {code(file)}", why) for name, file, why in NOT_IN_THE_MODEL)
    return "\n".join(
        [
            "# Function map",
            "",
            INTRODUCTION,
            "",
            "## From the kernel to kvmbook",
            "",
            *kernel_to_model(found),
            "## From kvmbook to the kernel",
            "",
            *model_to_kernel(found),
            "## In the patch, not in the model",
            "",
            "b64d740ea7dd has more names in its context:",
            "",
            *table(("kernel", "what it is"), left_out),
            "",
        ]
    )


def kernel_to_model(found: Iterable[Row]) -> Iterator[str]:
    """A table for each of the kernel's files, a line for each name in it, alphabetically, with all that stands for it."""

    def place(row: Row) -> tuple[str, ...]:
        return row.file, row.kernel_word, row.name, row.release

    for file, in_file in groupby(sorted(found, key=place), lambda row: row.file):
        yield f"### {file}"
        yield ""
        lines = []
        for (_, _, name, release), group in groupby(in_file, place):
            here = dict.fromkeys(f"{model_name(row, name)} in {code(row.room)}{said(row)}" for row in group)
            lines.append((code(name), ", ".join(here), release))
        yield from table(("kernel", "in kvmbook", "release"), lines)
        yield ""


def model_to_kernel(found: Iterable[Row]) -> Iterator[str]:
    """A table for each room, in the order of its code."""
    for module, in_module in groupby(found, lambda row: row.module):
        yield f"### {module}"
        yield ""
        lines = []
        for _, group in groupby(in_module, lambda row: row.model):
            kernel = list(group)
            there = ", ".join(f"{kernel_name(row)} in {code(row.file)}{said(row)}" for row in kernel)
            lines.append((model_name(kernel[0]), there, kernel[0].release))
        yield from table(("in kvmbook", "kernel", "release"), lines)
        yield ""


def model_name(row: Row, beside: str = "") -> str:
    """What stands for it in the model: a name, or a name of a class. ``beside``: the kernel's name on the same line."""
    owner, _, name = row.model.rpartition(".")
    shown = SAME if f"{name}()" == beside else code(name)
    return f"{shown} of {code(owner)}" if owner else shown


def kernel_name(row: Row) -> str:
    """The kernel's name, if the line does not have it already."""
    return SAME if row.name == f"{row.model.rpartition('.')[2]}()" else code(row.name)


def said(row: Row) -> str:
    """The remark of a line, to stand behind a name."""
    return f" {row.remark}" if row.remark else ""


def code(word: str) -> str:
    """A name as code, so that no underscore becomes emphasis."""
    return f"`{word}`"


def table(head: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """A table in Markdown; what would end a cell or begin a tag is escaped. AssertionError for an empty cell."""
    yield row_of(head)
    yield "|" + " --- |" * len(head)
    for line in lines:
        assert len(line) == len(head) and all(cell.strip() for cell in line), f"an empty cell in {line}"
        yield row_of(line)


def row_of(cells: Iterable[str]) -> str:
    """One line of a table."""
    escaped = (re.sub(r"[|<]", lambda match: "\\" + match[0], cell) for cell in cells)
    return "| " + " | ".join(escaped) + " |"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    try:
        pathlib.Path(sys.argv[1]).write_text(markdown())
    except Unparsable as problem:
        raise SystemExit(str(problem)) from None
