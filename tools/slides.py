"""Each chapter as a deck of slides: the words are in slides/NN.md, everything that runs is taken from the chapter's notebook.

Usage: slides.py FOLDER   Writes FOLDER/NN-name.html for each deck and FOLDER/index.html; the folder needs no network.

A deck is Markdown. Slides are parted by a line ``---``; what follows a line ``Note:`` is the speaker's. A line in double
braces is replaced by a part of the notebook, so that a deck cannot say what its chapter does not:

    {{title}}  {{promise}}             the chapter's heading; its first sentence in bold, what the reader will be able to do
    {{"lose_a_write()"}}               the output of the one code cell whose source has these words
    {{"lose_a_write()" code}}          its code; ``code output`` for both
    {{ch01-02 "lose_a_write()"}}       a cell by its id, if the words alone would not do

A word of the glossary that a deck sets in *italics* or **bold** shows its definition under the pointer and at the focus.
Stops, naming deck, slide and cell, at a cell that is not there, or that has not what is asked of it.
"""

from __future__ import annotations

import pathlib
import re
import sys
from collections.abc import Iterator
from html import escape
from statistics import median
from typing import Any, NamedTuple

import nbformat
from nbconvert.exporters import SlidesExporter
from traitlets.config import Config

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import glossary, vendor  # noqa: E402
from tools.chapters import promise_of, title_of  # noqa: E402
from tools.checks import WIDGET_STATE, WIDGET_VIEW, has_title, models_of  # noqa: E402

DECKS = ROOT / "slides"
TEMPLATE = ROOT / "tools/slides_template"
Room = tuple[int, int]  # pixels across and down, of a slide's 1280 x 720
PICTURE = (1240, 520), (954, 656)  # what is left for one below a heading, and beside the words
PANEL = (1240, 460), (944, 640)  # and for the picture of a panel
LONGEST_LINE = 96  # characters of code, at 20 pixels
EMPHASIS = re.compile(r"(\*\*|\*)(?! )([^*\n]+)\1")
LINK = re.compile(r"\[([^\]]+)\]\(\.\./book/glossary\.md#([^)]+)\)")
PLACE = re.compile(
    r'\{\{\s*(?:(?P<id>ch\d\d-\d\d[a-z]?)\b\s*)?(?:"(?P<words>.+)"\s*)?(?P<what>(?:(?:code|output)\s*)*)\}\}'
)


class Slide(NamedTuple):
    """One slide of a deck, as it is written. ``number`` counts from 1."""

    number: int
    body: str
    notes: str


class Wrong(ValueError):
    """What is wrong with a deck, and where."""


# ---- a deck ----------------------------------------------------------------------------------------------------------


def slides_of(deck: pathlib.Path) -> list[Slide]:
    """The slides that are written in a deck."""
    slides = []
    for number, written in enumerate(re.split(r"^---\s*$", deck.read_text(), flags=re.M), 1):
        body, _, notes = re.sub(r"^Note:\s*$", "\0", written, count=1, flags=re.M | re.I).partition("\0")
        slides.append(Slide(number, body.strip(), notes.strip()))
    return slides


def notebook_of(deck: pathlib.Path) -> pathlib.Path:
    """The notebook of a deck's chapter. Wrong if there is not exactly one."""
    found = sorted((ROOT / "notebooks").glob(f"{deck.stem}-*.ipynb"))
    if len(found) != 1:
        raise Wrong(f"{deck.name}: {len(found)} notebooks are named {deck.stem}-*.ipynb; a deck needs one")
    return found[0]


def assemble(deck: pathlib.Path, chapter: Any) -> Any:
    """The notebook of which the slides are made: a chapter's cells in a deck's order, and the panels that they show."""
    slides = slides_of(deck)
    cells = [cell for slide in slides for cell in cells_of(f"{deck.name}, slide {slide.number}", slide, chapter)]
    deck_notebook = nbformat.v4.new_notebook(cells=cells)
    deck_notebook.metadata.title = title_of(chapter)
    deck_notebook.metadata.meanings = glossary.boxes(
        re.findall(r'data-word="([^"]+)"', "".join(cell.source for cell in cells if cell.cell_type == "markdown"))
    )
    deck_notebook.metadata.language_info = {"name": "python"}
    stored = chapter.metadata.get("widgets", {}).get(WIDGET_STATE, {})
    shown = [cell.metadata.shows for cell in cells if "shows" in cell.metadata]
    if shown:
        used = {model: stored["state"][model] for model in models_of(shown, stored["state"])}
        deck_notebook.metadata.widgets = {WIDGET_STATE: {**stored, "state": used}}
    return deck_notebook


def cells_of(where: str, slide: Slide, chapter: Any) -> Iterator[Any]:
    """The cells of one slide, its notes last. Wrong, saying ``where``, if a part is not in the chapter."""
    begins, anchors = {"slide_type": "slide"}, anchors_in(chapter)
    for number, part in enumerate(parts_of(slide.body), 1):
        if part in ("{{title}}", "{{promise}}"):
            cell = nbformat.v4.new_markdown_cell(
                f"# {title_of(chapter)}" if part == "{{title}}" else promised(where, chapter)
            )
        elif "{{" in part:
            cell = taken(where, part, chapter)
        else:
            cell = nbformat.v4.new_markdown_cell(explained(part, anchors))
        cell.id = f"slide{slide.number}-{number}"
        cell.metadata.slideshow, begins = begins, {"slide_type": "-"}
        yield cell
    if begins["slide_type"] == "slide" or not slide.notes:
        raise Wrong(f"{where}: a slide needs words or pictures, and notes after a line 'Note:'")
    yield nbformat.v4.new_markdown_cell(
        slide.notes, id=f"slide{slide.number}-notes", metadata={"slideshow": {"slide_type": "notes"}}
    )


def parts_of(body: str) -> Iterator[str]:
    """Words, and lines in double braces, in turn."""
    for part in re.split(r"^(.*\{\{.*)$", body, flags=re.M):
        if part.strip():
            yield part.strip()


# ---- words of the glossary ------------------------------------------------------------------------------------------


def anchors_in(chapter: Any) -> dict[str, str]:
    """The glossary's anchor of each word that it explains: of its terms, and of the words that the chapter links to it."""
    text = "\n".join(cell.source for cell in chapter.cells if cell.cell_type == "markdown")
    linked = {" ".join(word.strip("*`.").split()).lower(): anchor for word, anchor in LINK.findall(text)}
    return {term.lower(): anchor for anchor, (term, _) in glossary.definitions().items()} | linked


def explained(text: str, anchors: dict[str, str]) -> str:
    """The words of a slide with those marked that are set in italics or bold and that the glossary explains."""

    def marked(match: re.Match[str]) -> str:
        word = match[2].lower()
        anchor = next((anchors[form] for form in (word, word.removesuffix("s")) if form in anchors), None)
        return f'<span tabindex="0" data-word="{anchor}">{match[0]}</span>' if anchor else match[0]

    return EMPHASIS.sub(marked, text)


# ---- what a chapter gives --------------------------------------------------------------------------------------------


def promised(where: str, chapter: Any) -> str:
    """The chapter's promise, or `Wrong`."""
    try:
        return promise_of(chapter)
    except ValueError as problem:
        raise Wrong(f"{where}: {problem}") from None


def taken(where: str, part: str, chapter: Any) -> Any:
    """A copy of the chapter's cell that ``part`` names, with what it asks for: code, output, or both."""
    match = PLACE.fullmatch(part)
    if not match or not (match["id"] or match["words"]):
        raise Wrong(
            f'{where}: {part} is not understood; it is {{{{"words of a cell" code output}}}}, alone on its line'
        )
    cell = named(where, part, match["id"], match["words"], chapter)
    wanted = match["what"].split() or ["output"]
    if "output" not in wanted:
        cell.outputs = []
    elif not cell.outputs:
        raise Wrong(f"{where}: {part}: cell {cell.id} has no output")
    if "code" not in wanted:
        cell.metadata.transient = {"remove_source": True}
    cell.metadata.pop("tags", None)
    prepare(f"{where}: {part}: cell {cell.id}", cell, chapter, "code" in wanted)
    return cell


def named(where: str, part: str, cell_id: str | None, words: str | None, chapter: Any) -> Any:
    """A copy of the one code cell with this id and these words. Wrong if there is none, or more than one."""
    code = [cell for cell in chapter.cells if cell.cell_type == "code"]
    found = [cell for cell in code if cell_id in (None, cell.id) and (words or "") in cell.source]
    if len(found) != 1:
        which = ", ".join(cell.id for cell in found) or "none"
        raise Wrong(f"{where}: {part} must name one code cell of the chapter, but names: {which}")
    return nbformat.from_dict(found[0])


def prepare(where: str, cell: Any, chapter: Any, with_code: bool) -> None:
    """Note in the cell what the template asks for: columns and rows of its text, the form of its picture, which panel it
    shows. Wrong if a line is too long for a slide, a picture has no text alternative, or a panel would need a kernel."""
    states = chapter.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    printed = []
    for output in cell.outputs:
        shown = output.get("data", {})
        if output.output_type == "stream":
            printed += output.text.splitlines()
        elif WIDGET_VIEW in shown:
            cell.metadata.shows = shown[WIDGET_VIEW]["model_id"]
            if "_esm" not in states.get(cell.metadata.shows, {}).get("state", {}):
                raise Wrong(f"{where}: the state of its panel is not stored in the notebook")
            shown_panel = states[cell.metadata.shows].state
            if "panel" in shown_panel:  # the same panel again, further down in the chapter
                shown_panel = states[shown_panel.panel.removeprefix("IPY_MODEL_")].state
            carried = shown_panel.get("states", {}).values()
            cell.metadata.ratio, cell.metadata.tall = layout([state.svg for state in carried if "svg" in state], PANEL)
        elif "text/html" in shown:
            shown["text/html"] = shown["text/html"].replace('tabindex="0" ', "")  # nothing scrolls on a slide
            printed += shown["text/plain"].splitlines()
        elif "image/svg+xml" in shown:
            if not has_title(shown["image/svg+xml"]):
                raise Wrong(f"{where}: its picture has no <title>, its text alternative")
            cell.metadata.ratio, cell.metadata.tall = layout([shown["image/svg+xml"]], PICTURE)
        elif "image/png" in shown:
            cell.metadata.alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt")
            if not cell.metadata.alt:
                raise Wrong(f"{where}: its plot has no text alternative in the cell's metadata, mystnb.image.alt")
        elif "text/plain" in shown:
            printed += shown["text/plain"].splitlines()
    code = cell.source.splitlines() if with_code else []
    written = max(map(len, code), default=0)
    if written > LONGEST_LINE:
        raise Wrong(f"{where}: a line of {written} characters; a slide takes {LONGEST_LINE}")
    cell.metadata.rows = len(code) + len(printed)
    cell.metadata.columns = max([written, *(min(len(line), LONGEST_LINE) for line in printed)])


def layout(pictures: list[str], room: tuple[Room, Room]) -> tuple[float, bool]:
    """Width over height of these pictures, half of them at least; and whether they come out larger beside the words."""
    found = [re.search(r'viewBox="0 0 (\S+) (\S+)"', picture) for picture in pictures]
    sizes = [(float(match[1]), float(match[2])) for match in found if match]
    if not sizes:
        return 1.0, False
    width, height = median(width for width, _ in sizes), median(height for _, height in sizes)
    above, beside = (min(across / width, down / height) for across, down in room)
    return width / height, beside > above


# ---- pages -----------------------------------------------------------------------------------------------------------


def page_of(deck: pathlib.Path) -> tuple[str, str]:
    """A deck's title, and its page. Wrong says what is wrong with the deck."""
    chapter = nbformat.read(notebook_of(deck), as_version=4)
    exporter = SlidesExporter(
        template_name=TEMPLATE.name,
        extra_template_basedirs=[str(TEMPLATE.parent)],
        config=Config({"HTMLExporter": {"exclude_input_prompt": True, "exclude_output_prompt": True}}),
    )
    words = {"style": glossary.STYLE.read_text(), "script": glossary.SCRIPT.read_text()}
    page, _ = exporter.from_notebook_node(assemble(deck, chapter), {"metadata": {"name": deck.stem}, "glossary": words})
    return title_of(chapter), page


def index_of(titles: dict[str, str]) -> str:
    """A page that leads to the decks."""
    links = "\n".join(f'<li><a href="{address}">{escape(title)}</a></li>' for address, title in titles.items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><link rel="icon" href="data:,"><title>kvmbook: slides</title>
<style>body {{ font: 24px/1.6 system-ui, sans-serif; max-width: 36em; margin: 2em auto; padding: 0 1em }}
ul {{ list-style: none; padding: 0 }}</style></head>
<body><main><h1>kvmbook: slides</h1><ul>
{links}
</ul><p>Keys: arrows go on and back, S opens the speaker's notes, F fills the screen, Esc shows all slides.
Tab enters a panel; there the arrow keys are the panel's, and Esc gives them back. To print a deck, with the answers,
add <code>?print-pdf</code> to its address.</p></main></body></html>
"""


def build(folder: pathlib.Path) -> list[pathlib.Path]:
    """Write all decks and return their paths. Wrong if something is not right with one; then nothing is written."""
    decks = sorted(DECKS.glob("[0-9][0-9].md"))
    if not decks:
        raise Wrong(f"{DECKS} has no deck NN.md")
    pages = {f"{notebook_of(deck).stem}.html": page_of(deck) for deck in decks}
    for old in folder.glob("*.html"):
        old.unlink()
    vendor.lay_out(folder / "vendor", "reveal.js")
    for name, (_, page) in pages.items():
        (folder / name).write_text(page)
    (folder / "index.html").write_text(index_of({name: title for name, (title, _) in pages.items()}))
    return [folder / name for name in pages]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    try:
        for path in build(pathlib.Path(sys.argv[1]).resolve()):
            print(path)
    except Wrong as wrong:
        raise SystemExit(str(wrong)) from None
