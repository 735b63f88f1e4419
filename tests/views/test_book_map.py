"""The map of the book is that of the chapters: what they ask for, how long they take, and nothing that comes later."""

import json
import pathlib
import re

import pytest

from kvmbook.views import book_map
from kvmbook.views.book_map import WHOLE, chapters_in, way_to
from tools import minutes

NOTEBOOKS = pathlib.Path(__file__).parent.parent.parent / "notebooks"


def chapter(*paragraphs):
    return {"cells": [{"cell_type": "markdown", "source": "\n\n".join(paragraphs)}]}


def book(folder, **asks_for):
    """A book of chapters a, b, ... of ten minutes each; ``asks_for``: its line, or None for none."""
    rows = []
    for number, (title, line) in enumerate(asks_for.items(), 1):
        file = f"{number:02}-{title}.ipynb"
        rows.append(f"| {number} | [{title}]({file}) | 10 | read |")
        said = [] if line is None else [f"*Before you read:* {line}"]
        (folder / file).write_text(json.dumps(chapter(f"# {number}. {title}", *said)))
    (folder / "index.ipynb").write_text(json.dumps(chapter("\n".join(rows))))
    return str(folder)


def test_the_map_has_the_chapters_and_the_minutes_of_the_book():
    chapters = chapters_in(NOTEBOOKS)
    files = {path.name: path for path in NOTEBOOKS.glob("[0-9]*.ipynb")}
    assert {f"{number:02}" for number in chapters} == {name[:2] for name in files}
    assert [chapter.minutes for chapter in chapters.values()] == list(minutes.chapters().values())
    for number, found in chapters.items():
        (path,) = [path for name, path in files.items() if name.startswith(f"{number:02}-")]
        line = re.search(r"\*Before you read:\*[^\"]*", path.read_text())[0]
        assert {int(other) for other in re.findall(r"\((\d\d)-", line)} == found.asks_for


def test_a_way_has_what_is_asked_for_and_what_that_asks_for(tmp_path):
    panel = book_map(book(tmp_path, a="nothing", b="[a](01-a.ipynb)", c="you can count", d="[b](02-b.ipynb)"))
    assert panel.readout == "All 4 chapters, in the order of their numbers: 40 minutes."
    assert panel.choose(you_want_to_read="4") == "For chapter 4 read 1 and 2 before: 30 minutes with it."
    assert panel.choose(you_want_to_read="3") == "Chapter 3 asks for no other: 10 minutes."
    assert way_to(chapters_in(tmp_path), 2) == [1, 2]


def test_the_way_is_what_is_drawn_bold(tmp_path):
    panel = book_map(book(tmp_path, a="nothing", b="[a](01-a.ipynb)", c="[a](01-a.ipynb)"))
    for wanted, bold in ((WHOLE, {"1. a", "2. b", "3. c"}), ("2", {"1. a", "2. b"})):
        svg = panel.states[wanted]["svg"]
        assert {"1. a", "2. b", "3. c", "10 min"} <= set(re.findall(r">([^<]+)</text>", svg))
        assert set(re.findall(r'bold"[^>]*>(\d\. \w)<', svg)) == bold
    assert svg.count('stroke-width="3" ') + svg.count('stroke-width="3"/>') == 3  # two boxes and the arc between


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (None, "01-a.ipynb does not say what to read"),
        ("[b](02-b.ipynb)", "asks for chapter 2, which does not come before"),
    ],
)
def test_a_chapter_says_what_to_read_and_names_no_later_one(tmp_path, line, said):
    with pytest.raises(ValueError, match=said):
        book_map(book(tmp_path, a=line, b="nothing"))
