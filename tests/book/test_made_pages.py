"""The pages that nobody writes: synopses as the chapters have them, and a cheat sheet that the model fills."""

import json
import re

import pytest

from kvmbook import Kernel
from tools import cheat_sheet, made_pages, synopses
from tools.chapters import promise_of, synopsis_of

ROOT = made_pages.ROOT


def rows_of(markdown, heading):
    """The cells of a table, by its first column."""
    part = markdown.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line[2:-2].split(" | ") for line in part.splitlines() if line.startswith("| ")]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


@pytest.fixture(scope="module")
def sheet():
    return cheat_sheet.markdown()


def test_each_chapter_has_a_promise_and_a_synopsis_on_the_page():
    page = synopses.markdown()
    for path in ROOT.glob("notebooks/[0-9]*.ipynb"):
        chapter = json.loads(path.read_text())
        assert f"](../notebooks/{path.name})" in page
        for said in (promise_of(chapter), *synopsis_of(chapter)):
            assert re.sub(r"\]\([^)]*\)", "", said) in re.sub(r"\]\([^)]*\)", "", page)
    for link in re.findall(r"\]\(([^)#]+)", page):
        assert link.startswith("https:") or (ROOT / "book" / link).exists(), link


@pytest.mark.parametrize("left_out", ["**You can.**", "- A point"])
def test_a_chapter_without_promise_or_synopsis_is_named(tmp_path, left_out):
    words = "# 1. One\n\n**You can.**\n", "## Synopsis\n\n- A point\n"
    cells = [{"cell_type": "markdown", "source": text.replace(left_out, "")} for text in words]
    (tmp_path / "01-one.ipynb").write_text(json.dumps({"cells": cells}))
    with pytest.raises(ValueError, match=r"^01-one\.ipynb: the chapter has no (promise|synopsis)"):
        synopses.markdown(tmp_path)


def test_the_sheet_has_the_bits_of_each_format(sheet):
    bits = rows_of(sheet, "Bits")
    assert [bits["**MW**"][name] for name in cheat_sheet.FORMATS] == ["58", "58", "10", "10"]
    assert [bits["**A**"][name] for name in cheat_sheet.FORMATS] == ["8", "–", "5", "5"]


def test_the_sheet_tells_words_apart_that_are_not_writable(sheet):
    asked = rows_of(sheet, "Who says yes")
    assert set(asked["`is_writable_pte()`"].values()) == {"yes", "no"}
    assert asked["the word"]["write-protected for logging"] == asked["the word"]["aged, then read"]
    writable = asked["`is_mmu_writable_spte()`"]
    assert [name for name, said in writable.items() if said == "no"] == [
        "protected for shadow paging",
        "host read-only",
    ]


def test_the_seeds_cell_is_the_one_where_releases_differ(sheet):
    calls = rows_of(sheet, "Who flushes when")
    before, since = calls["enable logging, up to v5.19"], calls["enable logging, since v6.0"]
    assert [name for name in cheat_sheet.MACHINES if before[name] != since[name]] == ["no A/D, aged"]
    assert calls["shadow a guest page table"]["where"] == "under the lock" and since["where"] == "after the lock"


def test_a_sheet_of_another_model_says_something_else(monkeypatch):
    monkeypatch.setitem(cheat_sheet.CALLS, "clear_young", (Kernel.v6_0, cheat_sheet.CALLS["invalidate_range"][1]))
    assert set(rows_of(cheat_sheet.markdown(), "Who flushes when")["clear_young"].values()) == {"1", "under the lock"}


def test_each_refusal_of_the_sheet_is_one(sheet):
    refused = rows_of(sheet, "Other calls")
    assert len(refused) == len(cheat_sheet.REFUSED)
    assert {row["with"] for row in refused.values()} == {"EINVAL", "ENOENT", "ENXIO", "EFAULT", "E2BIG"}


def test_what_cannot_be_made_stops_with_its_reason(monkeypatch):
    def refuse():
        raise ValueError("01-one.ipynb: no synopsis")

    monkeypatch.setitem(made_pages.MADE, "book/synopses.md", refuse)
    with pytest.raises(SystemExit, match="no synopsis"):
        list(made_pages.made())
