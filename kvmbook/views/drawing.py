"""What pictures are drawn with: colours, text and boxes of SVG, and the picture itself.

One look for the whole book. A state has the same colour *and* the same mark everywhere, so that greyscale and the
colour-blind lose nothing. Text takes the page's own colour, so that light and dark pages both work. Some pictures have
*moments*, which a panel steps through, and a *narrow form*, which a panel gives them on a phone.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from html import escape

# state: (fill, mark of a page). Colours after Okabe and Ito, which all kinds of eyes tell apart; a state in a timeline
# is also named in words.
LOOK = {
    "writable": ("#56b4e9", ""),
    "clean": ("#a8d8f0", ""),
    "write-protected": ("#e69f00", ""),
    "access-tracked": ("#cc79a7", ""),
    "read-only": ("#bdbdbd", ""),
    "not mapped": ("none", ""),
    "empty": ("none", ""),
    "reported": ("#4dbb9a", "✓"),
    "missed": ("#e8772e", "✕"),
    "untouched": ("none", "·"),
}
INK = "#1a1a1a"  # on coloured cells
LOST = "var(--kvmbook-lost, #b34700)"  # text and lines; a dark page sets a lighter one
# Shown as a document of its own, a picture knows no page: it brings ground and ink, light or dark.
ALONE = (
    "<style>svg:root { color: #1a1a1a; background: #fff } @media (prefers-color-scheme: dark) "
    "{ svg:root { color: #ddd; background: #1b1b1b; --kvmbook-lost: #ff9d5c } }</style>"
)
FONT = 'font-family="system-ui, sans-serif" font-size="14" text-anchor="middle" fill="currentColor"'
LETTER = 0.6  # of its size: how wide a letter is, on average, in the widest of the usual fonts


def text(
    x: float,
    y: float,
    said: str,
    *,
    size: int = 14,
    anchor: str = "",
    bold: bool = False,
    fill: str = "",
    italic: bool = False,
) -> str:
    """One line of SVG text; centred at x unless ``anchor`` says otherwise, in the page's own text colour without ``fill``."""
    style = (f' font-size="{size}"' * (size != 14)) + (f' text-anchor="{anchor}"' * bool(anchor))
    style += ' font-weight="bold"' * bold + ' font-style="italic"' * italic + (f' fill="{fill}"' * bool(fill))
    return f'<text x="{x:g}" y="{y:g}"{style}>{escape(said)}</text>'


def box(
    x: float, y: float, width: float, height: float, fill: str, *, stroke: str = "currentColor", extra: str = ""
) -> str:
    """One rounded rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{fill}" stroke="{stroke}"{extra}/>'


def block(
    parts: Iterable[str],
    at: tuple[float, float] = (0, 0),
    narrow: tuple[float, float] | None = None,
    moment: int | None = None,
    look: str = "",
) -> str:
    """Parts that belong together. ``at``: where they stand, and ``narrow`` where in the narrow form. ``moment``: with which
    moment, from 0, they come. ``look``: "same" for what that moment leaves as it was; "narrow" and "wide" for what only
    one of the forms has."""
    said = f' transform="translate({at[0]:g} {at[1]:g})"' * (at != (0, 0) or narrow is not None)
    said += f' data-narrow="{narrow[0]:g} {narrow[1]:g}"' if narrow is not None else ""
    said += f' data-moment="{moment}"' if moment is not None else ""
    said += f' class="kvmbook-{look}"' * bool(look) + ' display="none"' * (look == "narrow")
    return "\n".join([f"<g{said}>", *parts, "</g>"])


def svg(width: float, height: float, alt: str, parts: Iterable[str], narrow: tuple[float, float] | None = None) -> str:
    """A whole picture with its text alternative; ``narrow``: the size of its narrow form."""
    size = f'viewBox="0 0 {width:g} {height:g}"' + (f' data-narrow="{narrow[0]:g} {narrow[1]:g}"' if narrow else "")
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" {FONT}>'
    return "\n".join([head, f"<title>{escape(alt)}</title>", ALONE, *parts, "</svg>"])


class Picture:
    """An SVG string that JupyterLab shows as a picture, and whose ``repr`` is its text alternative. ``moments``: for each
    moment of the run that it tells, if it tells one, a sentence."""

    def __init__(self, drawn: str, alt: str, moments: Sequence[str] = ()) -> None:
        self.svg, self.alt, self.moments = drawn, alt, tuple(moments)

    @property
    def size(self) -> tuple[float, float]:
        """Width and height, in the units of its viewBox; (0, 0) if there is none."""
        found = re.search(r'viewBox="0 0 (\S+) (\S+)"', self.svg)
        return (float(found[1]), float(found[2])) if found else (0.0, 0.0)

    def _repr_svg_(self) -> str:
        return self.svg

    def __repr__(self) -> str:
        return self.alt


def framed(alt: str, title: str, lines: Iterable[str], sentence: str, picture: Picture | None = None) -> Picture:
    """A title and lines, a picture, and a sentence under it, all drawn: what stands for a widget where no widgets are
    shown."""
    width, height = picture.size if picture else (0.0, 0.0)
    wide = max(width, 640.0)
    letters = int(wide / (14 * LETTER))
    parts, y = [box(1, 1, wide + 18, 0, "none")], 26.0
    for said, size, bold in ((title, 16, True), *((line, 14, False) for line in lines)):
        for row in textwrap.wrap(said, letters * 14 // size):
            parts.append(text(10, y, row, size=size, anchor="start", bold=bold))
            y += 22
    if picture:
        place = f'<svg x="10" y="{y - 8:g}" width="{width:g}" height="{height:g}" '
        parts.append(picture.svg.replace("<svg ", place, 1))
        y += height + 14
    for row in textwrap.wrap(sentence, letters * 9 // 10):
        parts.append(text(10, y, row, anchor="start", bold=True))
        y += 22
    parts[0] = box(1, 1, wide + 18, y - 8, "none")
    return Picture(svg(wide + 20, y - 6, alt, parts), alt)
