"""The glossary: in alphabetical order, and each link to it leads to a term."""

import json
import pathlib
import re

import pytest

from tools import glossary
from tools.glossary import slug

ROOT = pathlib.Path(__file__).parent.parent.parent
GLOSSARY = ROOT / "book/glossary.md"
PAGES = [path for path in sorted((ROOT / "book").glob("*.md")) if path != GLOSSARY]
CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
LINK = re.compile(r"\]\(([^)#\s]*glossary\.md)?#([^)\s]*)\)")


def prose(path):
    """The Markdown of a page or of a notebook."""
    if path.suffix == ".md":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def linked(path):
    """The anchors of the glossary to which a page links, with repetitions."""
    return [anchor for file, anchor in LINK.findall(prose(path)) if file]


def terms():
    return re.findall(r"^## (.+)$", GLOSSARY.read_text(), re.M)


def test_terms_are_in_alphabetical_order_and_unique():
    found = terms()
    assert len(found) > 45
    assert found == sorted(found, key=str.lower)
    assert len(set(map(slug, found))) == len(found)


def test_each_term_is_explained_in_one_to_three_sentences_and_says_where_it_is_explained_at_length():
    _, *entries = re.split(r"^## ", GLOSSARY.read_text().partition("\n[chapter 1]:")[0], flags=re.M)
    for entry in entries:
        heading, _, text = entry.partition("\n")
        where = re.search(r"See\s+\[chapter \d+\]|\[Chapter \d+\]", text)
        assert where and len(text.split()) < 75, heading


@pytest.mark.parametrize("path", [*CHAPTERS, *PAGES, GLOSSARY], ids=lambda path: path.stem)
def test_every_link_to_the_glossary_leads_to_a_term(path):
    anchors = [anchor for file, anchor in LINK.findall(prose(path)) if file or path == GLOSSARY]
    assert set(anchors) <= set(map(slug, terms()))
    for file in re.findall(r"\]\(([^)#\s]*glossary\.md)", prose(path)):
        assert (path.parent / file).resolve() == GLOSSARY


def test_every_term_is_linked_from_a_chapter_or_another_page():
    assert set(map(slug, terms())) <= {anchor for path in [*CHAPTERS, *PAGES] for anchor in linked(path)}


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_links_a_term_once_at_most_and_in_prose(path):
    anchors = linked(path)
    assert 8 <= len(anchors) <= 16
    assert len(set(anchors)) == len(anchors)
    assert not re.findall(r"^#.*glossary\.md", prose(path), re.M)


@pytest.mark.parametrize("path", [*PAGES, GLOSSARY], ids=lambda path: path.stem)
def test_every_chapter_that_a_page_links_to_exists(path):
    for file in re.findall(r"[(\s](\.\./notebooks/[^)#\s]+\.ipynb)", prose(path)):
        assert (path.parent / file).exists(), file


def test_every_term_has_a_definition_without_links_and_without_references():
    assert list(glossary.definitions()) == [slug(term) for term in terms()]
    for term, meaning in glossary.definitions().values():
        assert 5 < len(meaning.split()) < 75 and not re.search(r"[\[\]]|<a |See chapter", meaning), term
    term, meaning = glossary.definitions()["mmu_lock"]
    assert term == "mmu_lock" and meaning.startswith("KVM’s lock" if "’" in meaning else "KVM's lock")
    assert "<code>KVM_GET_DIRTY_LOG</code>" in glossary.definitions()["get"][1]


def test_boxes_are_made_once_for_each_word_and_refuse_a_word_that_is_not_there():
    made = glossary.boxes(["stale", "tlb", "stale"])
    assert re.findall(r'id="([^"]+)" role="tooltip" hidden', made) == ["word-stale", "word-tlb"]
    with pytest.raises(KeyError):
        glossary.boxes(["no-such-word"])
