"""What a chapter, a notebook with its outputs or without, says of itself."""

from __future__ import annotations

import re
from typing import Any

SYNOPSIS = "## Synopsis\n"


def prose_of(chapter: Any) -> list[str]:
    """Its cells of words."""
    return ["".join(cell["source"]) for cell in chapter["cells"] if cell["cell_type"] == "markdown"]


def title_of(chapter: Any) -> str:
    """Its heading, with its number."""
    return prose_of(chapter)[0].splitlines()[0].removeprefix("# ")


def promise_of(chapter: Any) -> str:
    """What the reader will be able to do: the first paragraph that is bold as a whole. ValueError if there is none."""
    found = re.search(r"^\*\*(.+)\*\*$", "\n".join(prose_of(chapter)), flags=re.M)
    if not found:
        raise ValueError("the chapter has no promise, a paragraph that is bold as a whole")
    return found[1]


def synopsis_of(chapter: Any) -> list[str]:
    """The points of its synopsis. ValueError if there are none."""
    (synopsis,) = [text for text in prose_of(chapter) if text.startswith(SYNOPSIS)] or [""]
    if not (points := re.findall(r"^- (.+)$", synopsis, flags=re.M)):
        raise ValueError("the chapter has no synopsis with points")
    return points
