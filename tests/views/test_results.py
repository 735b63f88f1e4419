"""A table of results: aligned text where text is shown, and HTML that a screen reader, a phone and a strict check take."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from kvmbook.views import Table

COSTS = Table(
    ["flush rule", "`busy`", "flushes / missed", "states"],
    [["if changed", "reported", "1 / 0", 1100], ["a <rule>", "missed", "0 / 1", np.int64(7)]],
    caption="Costs & losses",
)


def test_text_is_aligned_and_numbers_stand_on_the_right():
    assert repr(COSTS).splitlines() == [
        "Costs & losses",
        "flush rule  busy      flushes / missed  states",
        "if changed  reported             1 / 0   1,100",
        "a <rule>    missed               0 / 1       7",
    ]


def test_html_is_a_table_with_headings_that_say_what_they_head():
    scrolls = ET.fromstring(COSTS._repr_html_())
    assert (scrolls.get("class"), scrolls.get("tabindex"), scrolls.get("role")) == ("kvmbook-results", "0", "region")
    assert scrolls.get("aria-label") == "Costs & losses" == scrolls.findtext("table/caption")
    assert [(cell.tag, cell.get("scope")) for cell in scrolls.iterfind("table/thead/tr/*")] == [("th", "col")] * 4
    for row in scrolls.iterfind("table/tbody/tr"):
        assert [(cell.tag, cell.get("scope")) for cell in row] == [("th", "row")] + [("td", None)] * 3
        assert ["right" in cell.get("style") for cell in row] == [False, False, True, True]
    assert scrolls.findtext("table/tbody/tr[2]/th") == "a <rule>"  # escaped
    assert scrolls.findtext("table/thead/tr/th[2]/code") == "busy"


def test_html_is_the_same_each_time_and_leaves_colours_to_the_page():
    assert COSTS._repr_html_() == Table(COSTS.headings, COSTS.rows, COSTS.caption)._repr_html_()
    assert not any(word in COSTS._repr_html_() for word in ("color", "background", "<style", "#"))


def test_without_a_caption_the_headings_name_the_region():
    scrolls = ET.fromstring(Table(["`call`", "", 'a "b"'], [])._repr_html_())
    assert scrolls.get("aria-label") == 'call, a "b"' and scrolls.find("table/caption") is None


def test_rows_may_come_one_by_one_and_truth_is_not_a_number():
    table = Table(("type", "has A/D"), ((number, number != 1) for number in (0, 1)))
    assert repr(table) == "type  has A/D\n   0  True\n   1  False"


@pytest.mark.parametrize(
    ("headings", "rows", "said"),
    [
        (["a", "b"], [[1, 2], [1]], r"row 2 has 1 cell\(s\), the table 2 heading\(s\): \['1'\]"),
        (["a"], [[1, 2]], r"row 1 has 2 cell\(s\), the table 1 heading"),
        ([], [], "a table needs headings"),
    ],
)
def test_a_row_that_does_not_fit_is_named(headings, rows, said):
    with pytest.raises(ValueError, match=said):
        Table(headings, rows)
