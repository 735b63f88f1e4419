"""README's tables are those that the benchmarks print: each has its place there, and its heads are those of today."""

import re

import pytest

from benchmarks import explore, report
from benchmarks.__main__ import PARTS


@pytest.mark.parametrize("part", PARTS)
def test_each_part_has_its_table_in_readme(part):
    (text,) = report.in_readme(part).findall(report.README.read_text())
    lines = text.strip().splitlines()
    assert re.fullmatch(r"\|( -+ \|)+", lines[1]) and len(lines) > 2
    assert {line.count("|") for line in lines[: lines.index("") if "" in lines else None]} == {lines[0].count("|")}


def test_the_searches_are_told_with_the_heads_of_today():
    (text,) = report.in_readme("search").findall(report.README.read_text())
    assert [cell.strip() for cell in text.strip().splitlines()[0].strip("|").split("|")] == list(explore.HEAD)
    for name, _, _, _ in explore.INSTANCES:
        assert name in text


@pytest.mark.parametrize("old", ["", "\nold\n\n"])
def test_a_table_is_stored_in_its_place_and_nothing_else_changes(tmp_path, monkeypatch, old):
    readme = tmp_path / "README.md"
    text = f"a\n<!-- make benchmark slots -->\n{old}<!-- end -->\nb\n<!-- make benchmark sweep -->\n<!-- end -->\n"
    readme.write_text(text)
    monkeypatch.setattr(report, "README", readme)
    made = report.table(["pass", "x"], [["protect", 1.5], ["age", r"\1"]])
    assert made.splitlines() == ["| pass    | x   |", "| ------- | --- |", "| protect | 1.5 |", "| age     | \\1  |"]
    report.store("slots", made)
    assert readme.read_text() == text.replace(f"{old}<!-- end -->\nb", f"\n{made}\n\n<!-- end -->\nb")
    with pytest.raises(ValueError, match=r"README.md has no place for panels"):
        report.store("panels", made)
