"""The index names every chapter, and how long it takes; each chapter leads on, and says what else to read."""

import json
import pathlib
import re

import pytest

from tools import book, minutes

ROOT = pathlib.Path(__file__).parent.parent.parent
CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
ROW = re.compile(
    r"^\| (?P<number>\d+) \| \[(?P<title>[^\]]+)\]\((?P<file>[^)]+)\) \| (?P<minutes>\d+) \| (?P<able>[^|]+) \|$",
    re.M,
)


def prose(path):
    """The Markdown cells of a notebook."""
    cells = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]


def rows():
    return [match.groupdict() for match in ROW.finditer("\n".join(prose(minutes.INDEX)))]


def test_the_index_lists_all_sixteen_chapters():
    there = rows()
    assert [int(row["number"]) for row in there] == list(range(1, 17))
    assert [row["file"] for row in there] == [path.name for path in CHAPTERS]
    assert [f"notebooks/{pathlib.Path(row['file']).stem}" for row in there] == [
        file for file in book.contents(ROOT) if re.match(r"notebooks/\d", file)
    ]
    for row in there:
        assert prose(ROOT / "notebooks" / row["file"])[0].startswith(f"# {row['number']}. {row['title']}\n"), row
        assert row["file"].startswith(f"{int(row['number']):02}-")


def test_the_minutes_are_those_of_the_chapters():
    """If this fails, `python tools/minutes.py --store` writes them anew."""
    assert {row["file"]: int(row["minutes"]) for row in rows()} == minutes.chapters()


def test_a_path_takes_what_its_chapters_take_and_a_lecture_takes_fifty():
    paths, taken = list(minutes.PATH.finditer("\n".join(prose(minutes.INDEX)))), minutes.chapters()
    assert [path["kind"] for path in paths].count("Lectures") == 1 and len(paths) >= 4
    for path in paths:
        files = re.findall(r"\((\d\d-[^)]+)\)", path["before"])
        assert len(files) > 2 and files == sorted(files)
        assert int(path["minutes"]) == sum(50 if path["kind"] == "Lectures" else taken[file] for file in files)
    assert any(re.findall(r"\((\d\d-[^)]+)\)", path["before"]) == list(taken) for path in paths)  # the whole book


def test_minutes_are_stored_in_the_table_and_the_paths_and_nothing_else_is_changed(tmp_path):
    copy, written = tmp_path / "index.ipynb", minutes.INDEX.read_text()
    copy.write_text(re.sub(r"(\.ipynb\) \| |\), )\d+", r"\g<1>1", written))
    assert copy.read_text() != written
    minutes.store(copy)
    assert copy.read_text() == written


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_ends_with_a_link_that_leads_on(path):
    following = book.contents(ROOT)[book.contents(ROOT).index(f"notebooks/{path.stem}") + 1]
    heading, *paragraphs = prose(path)[-1].split("\n\n")
    assert heading == "## Synopsis" and paragraphs[-1].startswith("*Next:* ")
    targets = [(path.parent / target).resolve() for target in re.findall(r"\]\(([^)#]+)\)", paragraphs[-1])]
    assert (ROOT / following) in [target.with_suffix("") for target in targets]


# Who, [title](address) or *title*, where, year. What it brings.
READING = re.compile(
    r"- [A-Z][^\[*]+, (?:\[[^\]]+\]\(https://[^)\s]+\)|\*[^*]+\*), [^.]*(?:\.\w[^.]*)*\b(?:19|20)\d\d\. [A-Z`].+\."
)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_has_three_to_five_items_of_further_reading_in_one_form(path):
    (cell,) = [text for text in prose(path) if text.startswith("## Further reading\n")]
    _, empty, *items = cell.splitlines()
    assert empty == "" and 3 <= len(items) <= 5
    for item in items:
        assert READING.fullmatch(item), item
    assert prose(path).index(cell) == len(prose(path)) - 2
