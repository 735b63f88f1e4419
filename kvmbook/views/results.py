"""Results in rows and columns: a table that a page, a deck and a screen reader know as one, and aligned text elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from numbers import Integral

SCROLLS = 'tabindex="0" role="region" style="overflow-x: auto; max-width: 100%"'


class Table:
    """Cases compared by rows: the first cell of a row names its case. Shown by being the last line of a notebook's cell.

    Cells are numbers or text: a whole number gets commas (1,100), text in backticks (`` `spte` ``) is set as code. A
    column that holds only numbers, such as 7 or "0 / 1", is aligned to the right. ValueError for a row with another
    number of cells than there are headings, and if there are none.
    """

    def __init__(self, headings: Iterable[object], rows: Iterable[Iterable[object]], caption: str = "") -> None:
        self.headings = [_said(heading) for heading in headings]
        self.rows = [[_said(cell) for cell in row] for row in rows]
        self.caption = caption
        if not self.headings:
            raise ValueError("a table needs headings")
        for number, row in enumerate(self.rows, 1):
            if len(row) != len(self.headings):
                raise ValueError(
                    f"row {number} has {len(row)} cell(s), the table {len(self.headings)} heading(s): {row}"
                )
        columns = list(zip(*self.rows, strict=True)) or [()] * len(self.headings)
        self.numbers = [all(map(_is_number, column)) for column in columns]

    def __repr__(self) -> str:
        lines = [[cell.strip("`") for cell in row] for row in (self.headings, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        sides = [">" if number else "<" for number in self.numbers]
        aligned = (
            "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True))
            for line in lines
        )
        return "\n".join([self.caption] * bool(self.caption) + [line.rstrip() for line in aligned])

    def _repr_html_(self) -> str:
        label = self.caption or ", ".join(filter(None, self.headings))
        body = "\n".join(self._row(row, "row") for row in self.rows)
        caption = f"<caption>{escape(self.caption)}</caption>\n" if self.caption else ""
        return (
            f'<div class="kvmbook-results" {SCROLLS} aria-label="{escape(label.replace("`", ""))}">\n'
            f'<table style="font-variant-numeric: tabular-nums">\n{caption}'
            f"<thead>{self._row(self.headings, 'col')}</thead>\n"
            f"<tbody>{body}</tbody>\n</table>\n</div>"
        )

    def _row(self, cells: list[str], scope: str) -> str:
        """A row, whose first cell is a heading; all are in the row of headings."""
        written = []
        for place, (cell, number) in enumerate(zip(cells, self.numbers, strict=True)):
            heading = scope == "col" or place == 0
            begin, end = (f'th scope="{scope}"', "th") if heading else ("td", "td")
            side = "right" if number else "left"
            written.append(f'<{begin} style="text-align: {side}">{_html(cell)}</{end}>')
        return f"<tr>{''.join(written)}</tr>"


def _said(cell: object) -> str:
    return f"{cell:,}" if isinstance(cell, Integral) and not isinstance(cell, bool) else str(cell)


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"-?\d[\d,.]*( / \d[\d,.]*)?", cell) is not None


def _html(cell: str) -> str:
    code = len(cell) > 2 and cell[0] == cell[-1] == "`"
    return f"<code>{escape(cell[1:-1])}</code>" if code else escape(cell)
