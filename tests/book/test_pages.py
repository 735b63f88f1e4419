"""What a page gets beside what its chapter says: meanings of words, colours, places to break, folds, a link to Binder."""

import argparse
import functools
import re
import shutil

import nbformat
import pytest
from bs4 import BeautifulSoup
from built_pages import PHONE
from colours import contrast
from nbformat.v4 import new_code_cell, new_notebook, new_output

from tools import book, checks, glossary, pages, vendor
from tools.browser import open_drawn

ROOT = book.ROOT
FIRST = "notebooks/01-a-write-that-nobody-saw"
SHOWN = ".kvmbook-meaning:not([hidden])"


@pytest.fixture
def built(pages):  # another thing than the tool that finishes them
    return pages


@pytest.fixture
def home(built):
    return f"{built.as_uri()}/"


@functools.cache
def article(built, file):
    """What a page says, parsed once; nobody may change it."""
    return BeautifulSoup((built / f"{file}.html").read_text(), "html.parser").article


# ---- words of the glossary -------------------------------------------------------------------------------------------


def test_every_link_to_the_glossary_carries_the_meaning_of_its_word(built):
    for file in book.contents(ROOT):
        links = article(built, file).find_all("a", href=re.compile(r"glossary\.html#"))
        boxes = {box["id"]: box.get_text() for box in article(built, file).select(".kvmbook-meaning")}
        assert {f"word-{link['data-word']}" for link in links} == set(boxes), file
        for link in links:
            term, meaning = glossary.definitions()[link["data-word"]]
            said = BeautifulSoup(f"{term} {meaning}", "html.parser").get_text()
            assert boxes[f"word-{link['data-word']}"] == said


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_pointer_shows_a_meaning_which_stays_while_it_is_there(visit, home, scheme):
    seen = visit(home, color_scheme=scheme, viewport={"width": 1366, "height": 768})
    open_drawn(seen.page, f"{home}{FIRST}.html")
    word, box = seen.page.locator("[data-word=spte]").first, seen.page.locator(SHOWN)
    assert box.count() == 0
    word.hover()
    assert box.get_attribute("role") == "tooltip" and "64-bit word" in box.inner_text()
    assert word.get_attribute("aria-describedby") == box.get_attribute("id")
    place = box.bounding_box()
    seen.page.mouse.move(place["x"] + 30, place["y"] + place["height"] / 2, steps=5)
    seen.page.wait_for_timeout(700)
    assert box.count() == 1
    colours = box.evaluate("box => [getComputedStyle(box).color, getComputedStyle(box).backgroundColor]")
    assert contrast(*colours) >= 4.5
    seen.clean()
    vendor.fetch(ROOT / "build/vendor")
    seen.page.evaluate((ROOT / "build/vendor/axe-core/axe.min.js").read_text())
    assert not seen.page.evaluate("axe.run('.kvmbook-meaning:not([hidden])').then(done => done.violations)")
    seen.page.mouse.move(5, 5)
    seen.page.wait_for_timeout(700)
    assert box.count() == 0


def test_the_keyboard_shows_a_meaning_and_escape_closes_it(visit, home):
    seen = visit(home)
    open_drawn(seen.page, f"{home}{FIRST}.html")
    box = seen.page.locator(SHOWN)
    seen.page.locator("[data-word=tlb]").first.focus()
    assert "Translation lookaside buffer" in box.inner_text()
    seen.page.keyboard.press("Escape")
    assert box.count() == 0
    assert seen.page.evaluate("document.activeElement.dataset.word") == "tlb"
    seen.page.keyboard.press("Tab")
    assert seen.page.evaluate("document.activeElement.dataset.word !== 'tlb'")
    seen.page.keyboard.press("Shift+Tab")
    assert box.count() == 1
    seen.page.keyboard.press("Enter")
    seen.page.wait_for_url("**/book/glossary.html#tlb")
    seen.clean()


def test_the_first_tap_shows_a_meaning_and_the_second_follows_the_link(visit, home):
    seen = visit(home, **PHONE)
    open_drawn(seen.page, f"{home}{FIRST}.html")
    word, other, box = (seen.page.locator(s).first for s in ("[data-word=spte]", "[data-word=tlb]", SHOWN))
    word.tap()
    place = box.bounding_box()
    assert place["x"] >= 0 and place["x"] + place["width"] <= 390
    assert seen.page.url.endswith("saw.html")
    other.tap()
    assert "Translation lookaside buffer" in box.inner_text()
    seen.page.locator("article h1").tap()
    seen.page.wait_for_timeout(500)
    assert seen.page.locator(SHOWN).count() == 0
    word.tap()
    word.tap()
    seen.page.wait_for_url("**/book/glossary.html#spte")
    seen.clean()


# ---- colours ---------------------------------------------------------------------------------------------------------


def test_words_in_chapters_are_marked_as_states(built):
    """What colour they have there: test_every_page."""
    found = set()
    for file in book.contents(ROOT):
        for word in article(built, file).select(".kvmbook-state"):
            assert word.name in ("em", "strong") and pages.is_chapter(file)
            found.add(word.get_text())
    assert {"writable", "clean", "write-protected", "access-tracked", "read-only"} <= found <= set(pages.STATES)


def test_the_ink_is_legible_on_the_colour_of_every_state():
    (ink,) = re.findall(r"\.kvmbook-state { color: (#\w+); }", pages.states_style())
    for state, fill in pages.STATES.items():
        assert contrast(ink, fill) >= 4.5, state
        assert f".kvmbook-state-{state} {{ background: {fill}; }}" in pages.states_style()


def test_only_a_word_that_is_a_state_as_a_whole_is_coloured():
    told = "<p><em>read-only</em> <em>read-only slot</em> an SPTE writable, MMU-writable, "
    told += "<code>clean</code> &lt; <a>clean</a></p>"
    told += "<h2>clean TLB</h2><div class='cell'><p>clean TLB</p></div><p>a writable page</p>"
    soup = BeautifulSoup(told, "html.parser")
    said = soup.get_text()
    pages.colour_states(soup)
    assert [word.get_text() for word in soup.select(".kvmbook-state")] == ["read-only"]
    assert [word.get_text() for word in soup.select(".kvmbook-named")] == ["writable"]
    assert soup.get_text() == said


COLOURS = """() => {
  const probe = document.createElement('span');
  probe.style.color = 'var(--kvmbook-lost)';
  document.querySelector('article').append(probe);
  return [getComputedStyle(probe).color, getComputedStyle(document.body).backgroundColor];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_lost_is_legible_on_the_ground_of_the_page_and_so_is_a_link_under_the_pointer(visit, home, scheme):
    seen = visit(home, color_scheme=scheme)
    seen.page.goto(f"{home}{FIRST}.html")
    assert seen.page.evaluate("document.documentElement.dataset.theme") == scheme
    lost, ground = seen.page.evaluate(COLOURS)
    assert contrast(lost, ground) >= 4.5
    link = seen.page.locator("article p a").first
    link.hover()
    assert contrast(link.evaluate("link => getComputedStyle(link).color"), ground) >= 4.5


# ---- names and results on a phone ------------------------------------------------------------------------------------


def test_a_long_name_breaks_after_a_slash_or_an_underscore_only():
    soup = BeautifulSoup(
        '<h3>arch/x86/kvm/mmu/mmu.c</h3><code class="literal"><span class="pre">_kvm_mmu_slot_flush()</span></code>'
        '<code class="literal">mmu_lock</code><code>kvm_mmu_slot_flush()</code><h2>Two ways without A/D bits</h2>',
        "html.parser",
    )
    pages.break_names(soup)
    assert str(soup) == (
        '<h3>arch/<wbr/>x86/<wbr/>kvm/<wbr/>mmu/<wbr/>mmu.c</h3><code class="literal"><span class="pre">'
        "_kvm_<wbr/>mmu_<wbr/>slot_<wbr/>flush()</span></code>"
        '<code class="literal">mmu_lock</code><code>kvm_mmu_slot_flush()</code><h2>Two ways without A/D bits</h2>'
    )


# ---- the function map ------------------------------------------------------------------------------------------------

MAP = "book/function-map.html"


def test_each_file_of_the_function_map_is_folded_below_its_heading(built):
    folds = article(built, "book/function-map").select("section > details.kvmbook-fold")
    assert len(folds) > 20 and not any("open" in fold.attrs for fold in folds)
    for fold in folds:
        assert fold.summary.h3 and fold.select("tbody tr") and fold.parent["id"]


def test_a_link_to_a_file_or_a_row_of_the_function_map_opens_it(visit, home):
    seen = visit(home)
    seen.page.goto(f"{home}{MAP}#kvm_age_gfn")
    row = seen.page.locator("tr#kvm_age_gfn")
    row.wait_for(state="visible")
    assert row.evaluate("row => row.getBoundingClientRect().top") < 700
    assert seen.page.locator(".kvmbook-fold[open]").count() == 1
    seen.page.evaluate("location.hash = '#arch-x86-kvm-mmu-spte-h'")
    seen.page.locator("tr#is_writable_pte").wait_for(state="visible")
    heading = seen.page.locator("#arch-x86-kvm-mmu-spte-h summary")
    heading.focus()
    seen.page.keyboard.press("Enter")
    assert not seen.page.locator("tr#is_writable_pte").is_visible()
    seen.clean()


def test_a_search_of_the_book_opens_what_it_found_in_the_function_map(visit, home):
    seen = visit(home)
    seen.page.goto(f"{home}search.html?q=kvm_age_gfn")
    seen.page.locator("#search-results a[href*='function-map']").first.click()
    seen.page.locator("tr#kvm_age_gfn").wait_for(state="visible")
    assert "highlighted" in seen.page.locator("tr#kvm_age_gfn code").first.get_attribute("class")
    seen.clean()


def test_the_whole_function_map_is_printed(visit, home):
    seen = visit(home)
    seen.page.goto(f"{home}{MAP}")
    seen.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert seen.page.locator(".kvmbook-fold:not([open])").count() == 0


# ---- without scripts -------------------------------------------------------------------------------------------------


def with_a_still_picture():
    """A notebook whose one output is a widget and the picture of how it begins."""
    shown = {
        checks.WIDGET_VIEW: {"model_id": "1", "version_major": 2, "version_minor": 1},
        "image/svg+xml": '<svg role="img">\n<title>How it begins.</title></svg>',
    }
    notebook = new_notebook(cells=[new_code_cell("panel", outputs=[new_output("display_data", shown)])])
    state = {"_esm": "...", "title": "A panel", "settings": [], "states": {}}
    notebook.metadata["widgets"] = {checks.WIDGET_STATE: {"state": {"1": {"state": state}}}}
    return notebook


def test_a_widget_has_its_still_picture_for_pages_without_scripts():
    widget, beside = book.for_the_page(with_a_still_picture()).cells[0].outputs
    assert set(widget.data) == {checks.WIDGET_VIEW}
    assert beside.data["text/html"].endswith(
        '<noscript><div class="kvmbook-picture"><svg role="img"><title>How it begins.</title></svg></div></noscript>'
    )
    assert '<div class="kvmbook-words" hidden>A panel' in beside.data["text/html"]


def test_without_scripts_the_still_picture_is_shown_and_with_them_it_is_not(visit, home, built):
    stored = nbformat.read(ROOT / f"{FIRST}.ipynb", as_version=4)
    carried = [
        output
        for cell in stored.cells
        for output in cell.get("outputs", [])
        if {checks.WIDGET_VIEW, "image/svg+xml"} <= set(output.get("data", {}))
    ]
    assert len(article(built, FIRST).find_all("noscript")) == len(carried)
    bare = visit(home, java_script_enabled=False)
    bare.page.goto(f"{home}{FIRST}.html")
    pictures = bare.page.locator("noscript > .kvmbook-picture")
    assert pictures.count() == len(carried)
    assert all(picture.is_visible() for picture in pictures.all())
    seen = visit(home)
    open_drawn(seen.page, f"{home}{FIRST}.html")
    assert seen.page.locator("noscript svg").count() == 0


# ---- Binder ----------------------------------------------------------------------------------------------------------


def test_each_chapter_can_be_run_on_binder_by_a_plain_link_and_no_other_page(built, tmp_path):
    for file in book.contents(ROOT):
        assert not article(built, file).find_all("a", href=re.compile("mybinder")), "it was not asked for"
    there = shutil.copytree(built, tmp_path / "pages")
    pages.link_to_binder(there, book.contents(ROOT), "owner/repo@v1/x")
    for file in book.contents(ROOT):
        links = article(there, file).find_all("a", href=re.compile("mybinder"))
        assert len(links) == pages.is_chapter(file)
        if links:
            address = f"https://mybinder.org/v2/gh/owner/repo/v1%2Fx?urlpath=lab/tree/{file}.ipynb"
            assert links[0]["href"] == address and links[0].get_text() == "Run this chapter on Binder"
            assert links[0].parent.find_previous_sibling().name == "h1"
    assert pages.binder_address("a/b", FIRST) == f"https://mybinder.org/v2/gh/a/b/HEAD?urlpath=lab/tree/{FIRST}.ipynb"


def test_a_repository_of_another_form_is_refused():
    assert book.repository("owner/repo@v1.0") == "owner/repo@v1.0"
    for wrong in ("repo", "https://github.com/owner/repo", "owner/repo@", "a/b@c d"):
        with pytest.raises(argparse.ArgumentTypeError, match="OWNER/REPO"):
            book.repository(wrong)
