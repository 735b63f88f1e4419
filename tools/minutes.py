"""How long a chapter takes, for the index of the book.

Usage: minutes.py [--store]   Prints the minutes of each chapter; with --store writes them, and those of the paths through the
book, into notebooks/index.ipynb.

A reader reads 200 words a minute, takes half a minute for a cell of code with what it prints, one for a question, three
for a panel and ten for an exercise. Rounded to five minutes, for it is a guess.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys
from typing import Any

import nbformat

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.checks import WIDGET_VIEW  # noqa: E402

INDEX = ROOT / "notebooks/index.ipynb"
LECTURE = 50
# The row of a chapter that is there; and a path, or a series of lectures: a line that links to its chapters.
ROW = re.compile(r"(?P<before>^\| \d+ \| \[[^\]]+\]\((?P<file>[^)]+)\) \| )(?P<minutes>\d*)", re.M)
PATH = re.compile(r"(?P<before>^\*(?P<kind>Path|Lectures):\* .*, )(?P<minutes>\d+)(?= minutes)", re.M)


def minutes(chapter: Any) -> int:
    """The minutes of a chapter, a notebook with its outputs."""
    taken = 0.0
    for cell in chapter.cells:
        if cell.cell_type == "markdown":
            taken += len(cell.source.split()) / 200
        elif any(WIDGET_VIEW in output.get("data", {}) for output in cell.outputs):
            taken += 1 if re.search(r"\b(quiz|guess)_\d", cell.source) else 3
        elif "solution" in cell.metadata.get("tags", []):
            taken += 10
        else:
            taken += 0.5
    return 5 * max(1, round(taken / 5))


def chapters() -> dict[str, int]:
    """The minutes of each chapter that is there, by the name of its file."""
    return {
        path.name: minutes(nbformat.read(path, as_version=4))
        for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    }


def along(path: re.Match[str], found: dict[str, int]) -> int:
    """The minutes of a path, or of the lectures."""
    files = re.findall(r"\]\((\d\d-[^)]+\.ipynb)\)", path["before"])
    return LECTURE * len(files) if path["kind"] == "Lectures" else sum(found[file] for file in files)


def store(index: pathlib.Path = INDEX) -> None:
    """Write the minutes into the table and the paths of the index, and change nothing else there."""
    found, notebook = chapters(), json.loads(index.read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            text = "".join(cell["source"])
            text = ROW.sub(lambda row: f"{row['before']}{found[row['file']]}", text)
            text = PATH.sub(lambda path: f"{path['before']}{along(path, found)}", text)
            cell["source"] = text.splitlines(keepends=True)
    index.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


if __name__ == "__main__":
    for name, taken in chapters().items():
        print(f"{taken:4} {name}")
    if "--store" in sys.argv[1:]:
        store()
