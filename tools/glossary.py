"""The words of the glossary and what they mean: for the boxes that pages and decks show beside a word.

A page shows boxes if it marks each word with ``data-word="stale"`` (a link, or ``<span tabindex="0">``), carries the
`boxes` of its words, outside of whatever is scaled or clipped, and takes STYLE and SCRIPT. Without them the words are
plain words.
"""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Iterable

from markdown_it import MarkdownIt

ROOT = pathlib.Path(__file__).resolve().parent.parent
GLOSSARY = ROOT / "book/glossary.md"
STYLE, SCRIPT = ROOT / "book/static/glossary.css", ROOT / "book/static/glossary.js"


def slug(heading: str) -> str:
    """The anchor of a heading, as it is written in links: lower case, "-" for a space, no punctuation."""
    return re.sub(r"[^\w\- ]", "", heading.lower().strip()).replace(" ", "-")


@functools.cache
def definitions() -> dict[str, tuple[str, str]]:
    """The term and its definition, as HTML without links, by the term's anchor. Where the book says more is left out."""
    written = re.sub(r"^\[[^\]]+\]: .*$", "", GLOSSARY.read_text(), flags=re.M)
    _, *entries = re.split(r"^## ", written, flags=re.M)
    found = {}
    for entry in entries:
        term, _, text = entry.partition("\n")
        text = re.sub(r"\s*See\s+\[chapter .*", "", text, flags=re.S)
        text = re.sub(r"\[([^\]]+)\](\([^)]*\))?", r"\1", text)
        found[slug(term)] = (term, MarkdownIt().renderInline(" ".join(text.split())))
    return found


def boxes(anchors: Iterable[str]) -> str:
    """The hidden boxes of these words, each once. KeyError for one that the glossary does not have."""
    explained = definitions()
    return "\n".join(
        f'<div class="kvmbook-meaning" id="word-{anchor}" role="tooltip" hidden>'
        f"<strong>{explained[anchor][0]}</strong> {explained[anchor][1]}</div>"
        for anchor in dict.fromkeys(anchors)
    )
