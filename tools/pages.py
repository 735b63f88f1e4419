"""What a built page gets that its chapter does not say and Sphinx does not do.

Words of the glossary carry their meaning, words that a picture colours its colour, long names places to break, printed
output a name for who hears the page; the function map folds by file. A chapter can have a link that runs it on Binder.
"""

from __future__ import annotations

import pathlib
import re
from html import escape
from urllib.parse import quote

from bs4 import BeautifulSoup, Tag
from docutils.nodes import make_id

from kvmbook.views import INK, LOOK
from tools import glossary

STATES = {state: fill for state, (fill, _) in LOOK.items() if fill != "none"}
IN_PROSE = re.compile(r"(?<![\w-])(writable|clean|write-protected|access-tracked)(?![\w-])")
OF_ENTRIES = re.compile(r"\b(SPTEs?|TLBs?|entry|entries|copy|copies|leaf|leaves)\b")
PROSE, NOT_PROSE = ["p", "li", "td"], ["a", "code", "pre", "script", "noscript", "svg", "h1", "h2", "h3"]
NOT_OURS = ["cell", "kvmbook-state", "kvmbook-meaning"]  # results, words that have a ground already, boxes
LONG = 12  # letters; a name with no more is never broken
FUNCTION_MAP, GLOSSARY = "book/function-map", "book/glossary"


def finish(pages: pathlib.Path, files: list[str]) -> None:
    """Finish the built pages ``files`` (without suffix)."""
    for file in files:
        path = pages / f"{file}.html"
        before, article, after = re.split(r"(<article\b.*</article>)", path.read_text(), flags=re.S)
        soup = BeautifulSoup(article, "html.parser")
        if file != GLOSSARY:
            explain_words(soup)
        if is_chapter(file):
            colour_states(soup)
        if file == FUNCTION_MAP:
            name_rows(soup)
            fold(soup)
        break_names(soup)
        name_outputs(soup)
        path.write_text(before + str(soup) + after)


def is_chapter(file: str) -> bool:
    """Whether a page is a chapter of the book, and not its front page or an appendix."""
    return re.match(r"notebooks/\d", file) is not None


def parsed(written: str) -> Tag:
    """One element, from HTML."""
    element = BeautifulSoup(written, "html.parser").find(True)
    assert isinstance(element, Tag), written
    return element


# ---- words -----------------------------------------------------------------------------------------------------------


def explain_words(soup: BeautifulSoup) -> None:
    """Links to the glossary carry the meaning of their word, in a box that glossary.js shows."""
    anchors = {make_id(term): anchor for anchor, (term, _) in glossary.definitions().items()}
    found = []
    for link in soup.find_all("a", href=re.compile(r"(^|/)glossary\.html#")):
        if anchor := anchors.get(str(link["href"]).partition("#")[2]):
            link["data-word"] = anchor
            found.append(anchor)
    if found:
        words = parsed(f"<div>{glossary.boxes(found)}</div>")
        article = soup.find("article")
        assert isinstance(article, Tag)
        article.append(words)


def colour_states(soup: BeautifulSoup) -> None:
    """A word in italics or bold that is a state of the pictures has the ground that the state has there. In prose that
    speaks of SPTEs or TLB entries such a word is underlined in that colour."""
    for word in soup.find_all(["em", "strong"]):
        state = word.get_text()
        if state in STATES:
            word["class"] = ["kvmbook-state", f"kvmbook-state-{state}"]
    for written in soup.find_all(string=IN_PROSE):
        around = written.find_parent(PROSE)
        ours = around is not None and not written.find_parent(NOT_PROSE) and not written.find_parent(class_=NOT_OURS)
        if ours and OF_ENTRIES.search(around.get_text()):
            for number, part in enumerate(IN_PROSE.split(str(written))):
                named = soup.new_tag("span", attrs={"class": f"kvmbook-named kvmbook-named-{part}"})
                named.string = part
                written.insert_before(named if number % 2 else part)
            written.extract()


def states_style() -> str:
    """The style of these words: the colours of the pictures."""
    rules = [f".kvmbook-state-{state} {{ background: {fill}; }}" for state, fill in STATES.items()]
    rules += [
        f".kvmbook-named-{state} {{ text-decoration-color: {fill}; }}"
        for state, fill in STATES.items()
        if IN_PROSE.match(state)
    ]
    return "\n".join([f".kvmbook-state {{ color: {INK}; }}", *rules, ""])


def break_names(soup: BeautifulSoup) -> None:
    """A long name or path can break after "/" and "_", and nowhere else."""
    for place in soup.select("code.literal, .kvmbook-results code, h2, h3"):
        for written in place.find_all(string=re.compile(r"[/_]")):
            first, *others = breakable(str(written))
            for part in others:
                written.insert_before(first)
                written.insert_before(soup.new_tag("wbr"))
                first = part
            written.replace_with(first)


def breakable(written: str) -> list[str]:
    """Text, cut where it can break: inside of its long names."""
    parts = [""]
    for word in re.split(r"(\s+)", written):
        first, *others = re.split(r"(?<=[^\W_][/_])(?=[^/_])", word) if len(word) > LONG else [word]
        parts[-1] += first
        parts += others
    return parts


def name_outputs(soup: BeautifulSoup) -> None:
    """What a cell printed scrolls in its own box, which the keyboard can reach and a screen reader names."""
    for printed in soup.select("div.cell_output pre"):
        printed.attrs |= {"tabindex": "0", "role": "group", "aria-label": "printed output"}


def link_to_binder(pages: pathlib.Path, files: list[str], repository: str) -> None:
    """Give each chapter, below its title, a link that opens it on Binder: from OWNER/REPO[@ref]. A plain link: nothing is
    loaded."""
    for file in filter(is_chapter, files):
        before, title, after = re.split(
            r"(<article\b.*?</h1>)", (pages / f"{file}.html").read_text(), maxsplit=1, flags=re.S
        )
        link = f'<a href="{escape(binder_address(repository, file))}">Run this chapter on Binder</a>'
        (pages / f"{file}.html").write_text(f'{before}{title}<p class="kvmbook-binder">{link}</p>{after}')


def binder_address(repository: str, file: str) -> str:
    """Where Binder runs a chapter of OWNER/REPO[@ref]."""
    name, _, ref = repository.partition("@")
    return f"https://mybinder.org/v2/gh/{name}/{quote(ref or 'HEAD', safe='')}?urlpath=lab/tree/{quote(file)}.ipynb"


# ---- the function map ------------------------------------------------------------------------------------------------


def name_rows(soup: BeautifulSoup) -> None:
    """The rows of the kernel's names can be linked to: ``function-map.html#kvm_age_gfn``; a second of a name ends in "-2"."""
    taken = {str(tag["id"]) for tag in soup.find_all(id=True)}
    for row in soup.select("#from-the-kernel-to-kvmbook tbody tr"):
        cell = row.find("td")
        assert isinstance(cell, Tag)
        name = cell.get_text().split()[-1].removesuffix("()")
        numbered = (name if number == 1 else f"{name}-{number}" for number in range(1, len(taken) + 2))
        row["id"] = next(one for one in numbered if one not in taken)
        taken.add(row["id"])


def fold(soup: BeautifulSoup) -> None:
    """Each file, and each room, is folded below its heading; kvmbook.js opens it for whoever looks for something in it."""
    for section in soup.select("section section > section"):
        heading = section.find("h3")
        assert isinstance(heading, Tag)
        rows = len(section.select("tbody tr"))
        below = [part for part in heading.next_siblings]
        details = parsed('<details class="kvmbook-fold"><summary></summary></details>')
        heading.insert_before(details)
        summary = details.find("summary")
        assert isinstance(summary, Tag)
        summary.extend([heading, parsed(f'<span class="kvmbook-count">{rows} name{"s" * (rows != 1)}</span>')])
        details.extend(below)
