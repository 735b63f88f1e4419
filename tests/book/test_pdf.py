"""The printed book: solutions after the chapters, a function map of a few pages, no link that leads nowhere."""

import copy
import os
import re
import shutil

import pytest
from bs4 import BeautifulSoup

from tools import book, pdf

CHAPTERS = [pdf.name_of(file) for file in book.contents(book.ROOT) if re.match(r"notebooks/\d", file)]


@pytest.fixture(scope="module")
def pages(pages, tmp_path_factory):
    """The pages, beside which the one page may be written."""
    return shutil.copytree(pages, tmp_path_factory.mktemp("pdf") / "pages", copy_function=os.link)


@pytest.fixture(scope="module")
def whole(pages):
    return BeautifulSoup(pdf.one_page(pages), "html.parser")


def number_of_pages(path):
    return len(re.findall(rb"/Type\s*/Page\b", path.read_bytes()))


def test_solutions_come_after_the_chapters_and_before_the_appendices(whole):
    order = [article["id"] for article in whole.find_all("article") if "id" in article.attrs]
    appendices = [pdf.name_of(file) for file in book.contents(book.ROOT) if file.startswith("book/")]
    assert order == ["index", *CHAPTERS, "solutions", *appendices] and "cheat-sheet" in appendices
    listed = [link["href"] for link in whole.select(".kvmbook-contents a")]
    assert listed == [f"#{name}" for name in order]


def test_no_chapter_has_a_solution_and_each_says_where_it_is(whole):
    for name in CHAPTERS:
        chapter = whole.find("article", id=name)
        assert not chapter.select(".tag_solution")
        lines = [line for line in chapter.find_all("p") if line.get_text().startswith("Solution of ")]
        assert len(lines) >= 3
        for number, line in enumerate(lines, 1):
            assert line.get_text() == f"Solution of {number}: after the chapters."
            heading = whole.find(id=line.find("a")["href"].removeprefix("#"))
            assert heading.name == "h3" and heading.find_parent("article")["id"] == "solutions"
            exercise = chapter.find(id=heading.find("a")["href"].removeprefix("#"))
            assert exercise.get_text().rstrip(".") == heading.get_text()
            solution = heading.find_next_sibling("div")
            assert "tag_solution" in solution["class"] and f"check_{name}_{number}" in solution.get_text()


def test_the_function_map_names_all_of_the_kernels_names_once(whole, pages):
    lines = [" ".join(line.get_text().split()) for line in whole.select("#function-map .kvmbook-line")]
    page = BeautifulSoup((pages / "book/function-map.html").read_text(), "html.parser")
    there = page.select("#from-the-kernel-to-kvmbook tbody tr, #in-the-patch-not-in-the-model tbody tr")
    assert len(lines) == len(there) > 150
    for line, row in zip(lines, there, strict=True):
        assert line.startswith(row.find("td").get_text().strip() + ": ")
    assert pdf.BACK_IS_ON_THE_PAGES in whole.find(id="function-map").get_text()


def test_the_pdf_is_one_book_without_links_that_lead_nowhere(pages, whole, browser, tmp_path):
    pdf.print_book(pages, tmp_path / "book.pdf", browser)
    assert (tmp_path / "book.pdf").read_bytes().startswith(b"%PDF-") and number_of_pages(tmp_path / "book.pdf") > 50
    named = [tag["id"] for tag in whole.find_all(id=True)]
    assert {link["href"][1:] for link in whole.find_all(href=re.compile("^#."))} <= set(named)
    assert not list(pages.glob("print.html"))


@pytest.mark.parametrize(("name", "most"), [("function-map", 6), ("cheat-sheet", 1)])
def test_an_appendix_to_look_things_up_in_is_printed_on_few_pages(pages, whole, browser, tmp_path, name, most):
    alone = copy.copy(whole)
    for article in alone.find_all("article"):
        if article.get("id") != name:
            article.extract()
    try:
        (pages / pdf.PRINT_NAME).write_text(str(alone))
        pdf.print_page(pages / pdf.PRINT_NAME, tmp_path / "one.pdf", browser)
    finally:
        (pages / pdf.PRINT_NAME).unlink()
    assert 1 <= number_of_pages(tmp_path / "one.pdf") <= most


def test_what_needs_a_click_is_not_printed(pages, browser):
    (pages / pdf.PRINT_NAME).write_text(pdf.one_page(pages))
    page = browser.new_page(color_scheme="light")
    try:
        pdf.open_drawn(page, (pages / pdf.PRINT_NAME).as_uri())
        page.emulate_media(media="print")
        pressed = "button, .kvmbook-stepper, .kvmbook-history, textarea, .kvmbook-meaning, summary"
        found = page.locator(f"article :is({pressed})").evaluate_all(
            "all => all.filter((e) => e.getClientRects().length && !e.closest('.kvmbook-inspector'))"
            ".map((e) => e.outerHTML.slice(0, 90))"
        )
        assert not found
        assert page.locator("#\\31 0 .kvmbook-scheduler .kvmbook-paper svg").first.is_visible()
    finally:
        page.close()
        (pages / pdf.PRINT_NAME).unlink()
