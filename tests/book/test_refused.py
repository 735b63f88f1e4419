"""What stops the build of the book: it says what is wrong, names notebook and cell, and leaves no pages."""

import json
import re
import shutil

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools import book, checks, store_outputs, vendor

ROOT = book.ROOT


def small_book(tmp_path, *cells):
    """A book of one chapter."""
    shutil.copytree(ROOT / "book/static", tmp_path / "book/static")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "_config.yml").write_text((ROOT / "_config.yml").read_text())
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: notebooks/01-small\n")
    notebook = new_notebook(cells=[new_markdown_cell("# Small", id="small-1"), *cells])
    nbformat.write(notebook, tmp_path / "notebooks/01-small.ipynb")
    return tmp_path


def refused(tmp_path, *cells, stored=True):
    """What the build of a book with these cells says, the second time as the first; it leaves no pages."""
    root = small_book(tmp_path, *cells)
    said = []
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            book.build(tmp_path / "out", stored, root)
        said.append(str(stopped.value))
        assert not (tmp_path / "out/_build/html").exists()
    assert said[0] == said[1] or not stored
    return said[0]


def test_a_book_that_is_right_is_built_with_links_to_binder_if_they_are_asked_for(tmp_path):
    built = book.build(tmp_path / "out", True, small_book(tmp_path), binder="owner/repo")
    assert "https://mybinder.org/v2/gh/owner/repo/HEAD?" in (built / "notebooks/01-small.html").read_text()


@pytest.mark.parametrize(
    ("source", "reason"),
    [("1 / 0", "ZeroDivisionError"), ("while True: pass", "timed out"), ("import os; os._exit(1)", "Kernel died")],
)
def test_a_chapter_that_fails_to_run_stops_the_build(tmp_path, monkeypatch, source, reason):
    monkeypatch.setattr(store_outputs, "TIMEOUT", 2)
    small_book(tmp_path, new_code_cell("1", id="small-2"), new_code_cell(source, id="small-3"))
    with pytest.raises(SystemExit) as stopped:
        book.build(tmp_path / "out", False, tmp_path)
    assert "01-small.ipynb, cell 3 (small-3)" in str(stopped.value) and reason in str(stopped.value)


BROKEN = {
    "See [there](02-nothing.ipynb).": r"cell 2, line 1: .*'02-nothing.ipynb'",
    "See [here](01-small.ipynb#nowhere).": r"cell 3, line 1: .*nowhere",
}
BROKEN_IN_THE_PAGE = {
    'See <a href="nopage.html">there</a>.': "a dead link: nopage.html",
    "A note[^gone].": "a reference that leads nowhere: A note",
    "As [said][before].": "a reference that leads nowhere: As",
    '<img src="https://example.org/a.png" alt="a picture">': "<img> asks another host: https://example.org/a.png",
    "![](../book/static/kvmbook.css)": "an image without alt text",
    '<img src="../book/static/favicon.svg">': "an image without alt text",
}


def test_what_sphinx_finds_stops_the_build(tmp_path):
    said = refused(tmp_path, *[new_markdown_cell(text) for text in BROKEN])
    for pattern in BROKEN.values():
        assert re.search(f"notebooks/01-small.ipynb, {pattern}", said), said


def test_what_is_broken_in_the_pages_stops_the_build(tmp_path):
    said = refused(tmp_path, *[new_markdown_cell(text) for text in BROKEN_IN_THE_PAGE])
    for number, reason in enumerate(BROKEN_IN_THE_PAGE.values(), 2):
        assert re.search(rf"notebooks/01-small.ipynb, cell {number} \(\w+\): {re.escape(reason)}", said), (reason, said)


def test_a_chapter_must_be_in_the_table_of_contents(tmp_path):
    (small_book(tmp_path) / "notebooks/02-more.ipynb").write_text("{}")
    with pytest.raises(SystemExit, match=r"not in both: 02-more.ipynb"):
        book.build(tmp_path / "out", True, tmp_path)


PLOT = new_output("display_data", {"image/png": "iVBORw0KGgo="})
DRAWING = new_output("display_data", {"image/svg+xml": "<svg></svg>"})
WARNED = new_output("stream", name="stderr", text="careful")
WIDGET = new_output("display_data", {checks.WIDGET_VIEW: {"model_id": "1", "version_major": 2, "version_minor": 0}})


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        (new_code_cell("", id="small-2", outputs=[WARNED]), "it prints to stderr: careful"),
        (new_code_cell("", id="small-2", outputs=[PLOT]), "a plot without alt text"),
        (new_code_cell("", id="small-2", outputs=[DRAWING]), "a picture without a <title>"),
        (new_code_cell("", id="small-2", outputs=[WIDGET]), "a widget that needs a kernel: its state is not stored"),
    ],
)
def test_a_page_that_would_be_broken_stops_the_build(tmp_path, cell, said):
    assert f"notebooks/01-small.ipynb: cell 2 (small-2): {said}" in refused(tmp_path, cell)


def test_a_panel_that_does_not_carry_its_states_cannot_be_frozen():
    notebook = new_notebook(cells=[new_code_cell("panel", id="a", outputs=[WIDGET])])
    settings = [{"name": "n", "options": ["1", "2"]}, {"name": "m", "options": ["3"]}]
    panel = {"_esm": "...", "title": "Half", "settings": settings, "states": {"1 | 3": {}}}
    notebook.metadata["widgets"] = {checks.WIDGET_STATE: {"state": {"1": {"state": panel}}}}
    assert list(checks.problems(notebook)) == [
        "cell 1 (a): panel 'Half' does not carry 1 of its combinations, such as 2 | 3"
    ]
    notebook.metadata["widgets"][checks.WIDGET_STATE]["state"]["1"]["state"] = {"_model_name": "IntSliderModel"}
    assert list(checks.problems(notebook)) == ["cell 1 (a): a widget that needs a kernel: IntSliderModel"]


def test_what_npm_brings_is_checked(tmp_path, monkeypatch):
    right = json.loads(vendor.LOCK.read_text())["requirejs"]
    monkeypatch.setattr(vendor, "LOCK", tmp_path / "vendor.json")
    wrong = {"its checksum is sha512-": {"integrity": "sha512-another"}, "no file no.js": {"files": ["no.js"]}}
    for reason, change in wrong.items():
        vendor.LOCK.write_text(json.dumps({"requirejs": {**right, **change}}))
        with pytest.raises(SystemExit, match=reason):
            vendor.fetch(tmp_path)
        assert not (tmp_path / "requirejs/.fetched").exists()
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    with pytest.raises(SystemExit, match=r"127.0.0.1:9/requirejs/-/requirejs-2.3.8.tgz cannot be fetched"):
        vendor.fetch(tmp_path)
