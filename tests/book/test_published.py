"""The built pages: small, nothing asked of another host, found by their search, accessible."""

import http.server
import json
import re
import threading

import pytest
from bs4 import BeautifulSoup
from built_pages import CHAPTERS, FILES, widgets_in

from tools import book, checks

ROOT = book.ROOT


@pytest.fixture(scope="module")
def served(pages):
    """The address of a web server for the pages."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *arguments: Quiet(*arguments, directory=str(pages))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


# ---- what is published -----------------------------------------------------------------------------------------------


def test_the_front_page_promises_shows_and_has_three_paths(pages):
    front = (pages / "notebooks/index.html").read_text()
    (promise,) = re.findall(r"<p><strong>(.*?)</strong></p>", front, re.S)
    assert promise.count(".") == 1 and "widget-view+json" in front
    assert "CC BY 4.0" in front
    paths = re.search(r'<section id="three-paths">.*?</section>\s*</section>', front, re.S)[0]
    assert re.findall(r'<section id="([^"]+)">', paths)[1:] == ["learn-alone", "teach", "run-it-in-ci"]
    assert len(re.findall(r"<em>(?:Path|Lectures):</em>.*?\d+ minutes", paths, re.S)) == 4
    assert "notebooks/index.html" in (pages / "index.html").read_text()


def test_the_pages_are_small(pages):
    size = sum(path.stat().st_size for path in pages.rglob("*") if path.is_file())
    assert size < 25e6, f"{size / 1e6:.1f} MB"
    assert not list(pages.rglob("*.map")) and not (pages / "_static/locales").exists()  # no reader asks for these


def test_a_notebook_to_take_home_has_the_code_and_no_outputs(pages):
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        here, there = (json.loads(p.read_text()) for p in (path, pages / "_sources/notebooks" / path.name))
        code = [["".join(c["source"]) for c in each["cells"] if c["cell_type"] == "code"] for each in (here, there)]
        assert code[0] == code[1] != [], path.name
        assert "widgets" not in there["metadata"] and not any(cell.get("outputs") for cell in there["cells"])


def test_no_page_names_a_script_or_style_of_another_host(pages):
    for path in pages.rglob("*.html"):
        for address in re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="([^"]+)"', path.read_text()):
            assert not address.startswith(("http:", "https:", "//")), (path.name, address)


# ---- every page ------------------------------------------------------------------------------------------------------


def test_no_page_of_a_server_asks_another_host(visit, served):
    """Of those of a disk see test_every_page."""
    seen = visit(served)
    for file in [*FILES, "genindex", "search"]:
        seen.page.goto(f"{served}{file}.html", wait_until="networkidle")
    seen.clean()


@pytest.mark.parametrize("home", ["http", "file"])
def test_search_finds_a_word_of_a_chapter(visit, pages, served, home):
    home = served if home == "http" else f"{pages.as_uri()}/"
    seen = visit(home)
    seen.page.goto(f"{home}search.html?q=access-tracked")
    seen.page.wait_for_selector("#search-results li a")
    assert "A write that nobody saw" in seen.page.locator("#search-results").inner_text()
    seen.clean()


@pytest.mark.parametrize("kind", ["question", "panel"])
def test_search_finds_a_word_that_only_a_widget_says_and_it_is_not_shown_twice(visit, pages, kind):
    file, word = next(said_only_by(pages, kind))
    seen = visit(f"{pages.as_uri()}/")
    page = seen.page
    page.goto(f"{pages.as_uri()}/search.html?q={word}")
    page.wait_for_selector("#search-results li a")
    page.locator(f"#search-results a[href*='{file}']").first.click()
    page.wait_for_url(f"**/{file}.html*")
    hidden = page.locator(".kvmbook-words")
    assert hidden.count() == page.locator(WIDGET_VIEWS).count()
    assert hidden.evaluate_all("all => all.map((words) => words.parentElement.getBoundingClientRect().height)") == [
        0 for _ in range(hidden.count())
    ]
    seen.clean()


WIDGET_VIEWS = f'script[type="{checks.WIDGET_VIEW}"]'


def said_only_by(pages, kind):
    """(page, word): words of questions, or of panels, that begin like nothing in the text of their page."""
    for file in CHAPTERS:
        article = BeautifulSoup((pages / f"{file}.html").read_text(), "html.parser").article
        for hidden in article.select(".kvmbook-words, .kvmbook-meaning, noscript"):
            hidden.decompose()
        for state in widgets_in(pages, file):
            if "_esm" in state and ("because" in state) == (kind == "question"):
                words = re.findall(r"\b[a-z]{5,}\b", " ".join(book.words_of(state)).lower())
                yield from ((file, word) for word in words if word[:5] not in article.get_text().lower())
