"""The reader's copy: it follows the book, keeps what a reader writes, and leaves the clone alone."""

import json
import os
import re
import subprocess
import sys

import nbformat
import pytest
from nbformat.sign import NotebookNotary
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools import reading
from tools.lab import stop

ROOT = reading.ROOT
CHAPTER = "notebooks/01-first.ipynb"


class Book:
    """A small book and a reader's copy of it."""

    def __init__(self, folder):
        self.root, self.copy = folder / "book", folder / "reading"
        self.publish("1 + 1")
        (self.root / "book").mkdir()
        (self.root / "book/glossary.md").write_text("# Glossary")

    def publish(self, source, printed="2"):
        """A new edition of the chapter."""
        (self.root / "notebooks").mkdir(parents=True, exist_ok=True)
        output = new_output("execute_result", {"text/plain": printed}, execution_count=1)
        cells = [new_markdown_cell("# First"), new_code_cell(source, outputs=[output], execution_count=1)]
        nbformat.write(new_notebook(cells=cells), self.root / CHAPTER)

    def start(self):
        """The reader starts; what is said."""
        return reading.deliver(self.copy, self.root)

    def change(self, act):
        """The reader does something to the chapter, and it is saved."""
        notebook = nbformat.read(self.copy / CHAPTER, as_version=4)
        act(notebook)
        nbformat.write(notebook, self.copy / CHAPTER)

    @property
    def read(self):
        """The chapter as the reader has it: the code and what it printed."""
        cell = nbformat.read(self.copy / CHAPTER, as_version=4).cells[1]
        return cell.source, cell.outputs[0].data["text/plain"] if cell.outputs else None


def run_and_save(notebook):
    """What JupyterLab rewrites without a reader writing anything: also the cell that it adds after the last."""
    notebook.cells[1].execution_count, notebook.cells[1].outputs = 7, []
    notebook.metadata["language_info"] = {"name": "python", "version": "3.99"}
    notebook.cells.append(new_code_cell(""))


def answer(notebook):
    notebook.cells[1].source = "my answer"


@pytest.fixture
def book(tmp_path):
    started = Book(tmp_path)
    assert started.start() == [] and started.read == ("1 + 1", "2")
    return started


def test_a_run_chapter_stays_as_it_is_until_the_book_has_a_newer_one(book):
    book.change(run_and_save)
    assert book.start() == [] and book.read == ("1 + 1", None)
    book.publish("1 + 1", "two")  # the cells are the same, what is shown is newer
    assert book.start() == [] and book.read == ("1 + 1", "two")
    book.change(run_and_save)
    book.publish("1 + 2")
    assert book.start() == [] and book.read == ("1 + 2", "2")


def test_an_answer_is_kept_and_said_to_be_if_the_book_is_newer(book):
    book.change(answer)
    assert book.start() == [] and book.read[0] == "my answer"
    book.publish("1 + 2")
    for _ in range(2):
        (said,) = book.start()
        assert said.startswith(f"reading/{CHAPTER}: the book has a newer one; yours was kept") and "rename" in said
        assert book.read[0] == "my answer"
    mine = book.copy / "notebooks/mine.ipynb"
    (book.copy / CHAPTER).rename(mine)
    assert book.start() == [] and book.read[0] == "1 + 2" and "my answer" in mine.read_text()


def test_a_reader_who_wrote_what_the_book_says_now_has_changed_nothing(book):
    book.change(lambda notebook: notebook.cells[1].update(source="1 + 2"))
    book.publish("1 + 2", "3")
    assert book.start() == [] and book.read == ("1 + 2", "3")


def test_a_page_that_is_no_notebook_is_kept_too_if_it_was_changed(book):
    (book.root / "book/glossary.md").write_text("# A longer glossary")
    assert book.start() == [] and "longer" in (book.copy / "book/glossary.md").read_text()
    (book.copy / "book/glossary.md").write_text("# Mine")
    (book.root / "book/glossary.md").write_text("# The longest glossary")
    assert len(book.start()) == 1 and "Mine" in (book.copy / "book/glossary.md").read_text()


@pytest.mark.parametrize("changed", [False, True])
def test_what_the_book_no_longer_has_goes_unless_it_was_changed(book, changed):
    if changed:
        book.change(answer)
    (book.root / CHAPTER).unlink()
    assert len(book.start()) == changed and (book.copy / CHAPTER).exists() == changed
    assert book.start() == [] and (book.copy / CHAPTER).exists() == changed


@pytest.mark.parametrize("lost", ["", "not JSON"])
def test_without_its_list_a_copy_loses_nothing(book, lost):
    book.change(answer)
    (book.copy / reading.DELIVERED).write_text(lost)
    assert len(book.start()) == 1 and book.read[0] == "my answer"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"cells": [1]}'])
def test_a_chapter_that_is_no_notebook_any_more_is_kept_and_stops_nothing(book, content, tmp_path):
    (book.copy / CHAPTER).write_text(content)
    book.publish("1 + 2")
    assert len(book.start()) == 1 and (book.copy / CHAPTER).read_text() == content
    reading.trust([book.copy / CHAPTER], str(tmp_path / "data"))


def test_a_copy_of_this_book_has_all_that_its_pages_link_to(tmp_path):
    reading.deliver(tmp_path)
    pages = [*tmp_path.rglob("*.ipynb"), *tmp_path.rglob("*.md")]
    assert {f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")} < {
        str(path.relative_to(tmp_path)) for path in pages
    }
    linked = 0
    for path in pages:
        text = path.read_text()
        if path.suffix == ".ipynb":
            cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
            text = "\n".join("".join(cell["source"]) for cell in cells)
        for address in re.findall(r'(?:\]\(|^\[[^\]]+\]: |src="|href=")([^)\s"#]+)', text, re.M):
            if not address.startswith("http"):
                linked += 1
                assert (path.parent / address).exists(), (path.name, address)
    assert linked > 100


def test_the_copy_is_no_part_of_the_book():
    assert "reading/" in (ROOT / ".gitignore").read_text().splitlines() and ROOT / "reading" == reading.COPY


def test_a_delivered_chapter_is_trusted(book, tmp_path):
    reading.trust([book.copy / CHAPTER], str(tmp_path / "data"))
    notary = NotebookNotary(data_dir=str(tmp_path / "data"))
    assert notary.check_signature(nbformat.read(book.copy / CHAPTER, as_version=4))
    notary.store.close()


# ---- JupyterLab ------------------------------------------------------------------------------------------------------

NOWHERE = "/dev/null/home"  # nobody can write there, root neither
OURS = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "MPLCONFIGDIR")


def at_home(monkeypatch, home):
    for name in OURS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))


def test_a_users_own_settings_are_used(monkeypatch, tmp_path):
    at_home(monkeypatch, tmp_path)
    variables = reading.environment(tmp_path / "own")
    assert {name for name in OURS if name in variables} == {"JUPYTER_DATA_DIR"}
    assert variables["JUPYTER_DATA_DIR"].startswith(f"{tmp_path}/") and not (tmp_path / "own").exists()
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path / "elsewhere"))
    assert reading.environment(tmp_path / "own")["JUPYTER_CONFIG_DIR"] == str(tmp_path / "elsewhere")


def test_where_home_cannot_be_written_there_are_other_folders(monkeypatch, tmp_path):
    at_home(monkeypatch, NOWHERE)
    variables = reading.environment(tmp_path / "own")
    assert {name: variables[name] for name in OURS} == reading.folders(tmp_path / "own")


@pytest.mark.parametrize(("screen", "opened"), [({}, False), ({"DISPLAY": ":0"}, True), ({"BROWSER": "lynx"}, True)])
def test_a_browser_is_opened_where_there_is_a_screen_or_one_is_named(monkeypatch, screen, opened):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    for name, value in screen.items():
        monkeypatch.setenv(name, value)
    assert reading.has_screen() == opened


def test_without_home_and_screen_the_address_is_printed_and_leads_to_the_first_chapter(tmp_path):
    copy = tmp_path / "a copy"
    code = (
        f"import pathlib; from tools import reading; reading.COPY = pathlib.Path({str(copy)!r}); reading.start(False)"
    )
    variables = {name: value for name, value in os.environ.items() if name not in (*OURS, "DISPLAY", "BROWSER")}
    variables |= {"HOME": NOWHERE, "PYTHONUNBUFFERED": "1"}
    started = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        said = ""
        for line in started.stdout:
            said += line
            if found := re.search(r"http://127\.0\.0\.1:\d+/lab/tree/(\S+)\?token=(\w+)", line):
                break
        else:
            pytest.fail(said)
    finally:
        stop(started)
    assert found[1] == reading.FIRST and (copy / found[1]).exists() and "Traceback" not in said
