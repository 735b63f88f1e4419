"""Every page, opened once at a desk and once on a phone: legible and accessible there, light and dark, and quiet."""

import pytest
from built_pages import CHAPTERS, FILES, PHONE, open_page
from colours import contrast, luminance
from conftest import Visit

from tools import pages as finishing
from tools import vendor
from tools.book import ROOT

# The theme's own: its search button has no name, and its side bar lies in no landmark.
THEME_FINDINGS = {"button-name": "search-button", "region": "sidebar-primary-item"}
# Pictures are looked at in tests/views and, as high as they are in a deck, in test_slides.
AXE = """how => axe.run({ exclude: [["svg *"]] }, { resultTypes: ["violations"], ...how }).then((done) => done.violations)"""
BUT_COLOURS = {"rules": {"color-contrast": {"enabled": False}}}
# Of all text that has the same ink, size and ground only one: where it stands makes no difference to its contrast.
EACH_KIND_OF_TEXT = """() => {
  const kinds = new Map(), ours = (e) => !e.closest("svg, script, style, noscript") && e.getClientRects().length;
  const says = (e) => [...e.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
  const grounds = (e) => {
    if (!e) return [];
    const { backgroundColor, backgroundImage, opacity } = getComputedStyle(e);
    return [backgroundColor, backgroundImage, opacity, ...grounds(e.parentElement)];
  };
  for (const e of [...document.querySelectorAll("body *")].filter((e) => ours(e) && says(e))) {
    const { color, fontSize, fontWeight } = getComputedStyle(e);
    kinds.set([color, fontSize, fontWeight, ...new Set(grounds(e))].join(), e);
  }
  return axe.run({ include: [...kinds.values()] }, { runOnly: ["color-contrast"] }).then((done) =>
    [done.violations, kinds.size]);
}"""
ON_A_PHONE = [
    "scrollable-region-focusable",
    "landmark-unique",
    "link-in-text-block",
    "nested-interactive",
]  # the rest is wide, too


@pytest.fixture(scope="module", params=FILES)
def at_desk(browser, pages, request):
    """A page at a desk, in the light: (file, visit)."""
    yield from opened(browser, pages, request.param, color_scheme="light")


@pytest.fixture(scope="module", params=FILES)
def on_phone(browser, pages, request):
    """A page on a phone: (file, visit)."""
    yield from opened(browser, pages, request.param, **PHONE)


def opened(browser, pages, file, **options):
    seen = open_page(lambda home: Visit(browser, home, **options), f"{pages.as_uri()}/", file)
    yield file, seen
    seen.context.close()


def switch_to(scheme, page):
    """What a reader's system asks for, and the theme's own switch. Colours that fade are brought to their end: a page that
    is not in front might let them fade for ever."""
    page.emulate_media(color_scheme=scheme)
    page.evaluate("scheme => { document.documentElement.dataset.theme = scheme; }", scheme)
    page.evaluate(
        "document.getAnimations().forEach((one) => one.effect.getTiming().iterations < Infinity && one.finish())"
    )


def found_by_axe(page, **how):
    """What axe-core objects to on a page as it is now, but what is the theme's own."""
    if not page.evaluate("'axe' in window"):
        vendor.fetch(ROOT / "build/vendor")
        page.evaluate((ROOT / "build/vendor/axe-core/axe.min.js").read_text())
    return not_the_themes(page.evaluate(AXE, how))


def not_the_themes(violations):
    found = [(each["id"], node["html"][:200]) for each in violations for node in each["nodes"]]
    return [(rule, said) for rule, said in found if THEME_FINDINGS.get(rule, "nothing") not in said]


# ---- at a desk -------------------------------------------------------------------------------------------------------


def test_a_page_from_a_disk_asks_no_host_and_says_no_error(at_desk):
    at_desk[1].page.wait_for_load_state("networkidle")
    at_desk[1].clean()


def test_a_page_is_accessible_and_legible_in_the_light_and_in_the_dark(at_desk):
    page = at_desk[1].page
    found, kinds = found_by_axe(page, **BUT_COLOURS), {}
    for scheme in ("dark", "light"):  # only the colours are others
        switch_to(scheme, page)
        violations, kinds[scheme] = page.evaluate(EACH_KIND_OF_TEXT)
        found += not_the_themes(violations)
    assert not found and min(kinds.values()) >= 10


STATES = """all => all.map((word) => [word.textContent, getComputedStyle(word)]).map(([state, style]) =>
  [state, style.color, style.backgroundColor])"""


def test_a_state_in_prose_has_the_colour_of_the_pictures(at_desk):
    for scheme in ("light", "dark"):
        switch_to(scheme, at_desk[1].page)
        for state, ink, ground in at_desk[1].page.locator(".kvmbook-state").evaluate_all(STATES):
            assert luminance(ground) == luminance(finishing.STATES[state]) and contrast(ink, ground) >= 4.5, (
                scheme,
                state,
            )


def test_in_the_dark_no_result_stands_on_a_pale_ground_but_plots(at_desk):
    file, seen = at_desk
    switch_to("dark", seen.page)
    results = seen.page.locator("div.cell_output :is(.output, .text_html, .widget-subarea, .kvmbook-panel)")
    grounds = results.evaluate_all("all => all.map(one => getComputedStyle(one).backgroundColor)")
    assert grounds or file not in CHAPTERS
    for ground in set(grounds) - {"rgba(0, 0, 0, 0)"}:
        assert luminance(ground) < 0.1, ground


# ---- on a phone ------------------------------------------------------------------------------------------------------


LETTERS = """figure => [figure.scrollWidth, figure.clientWidth,
  [...figure.querySelectorAll("text")].filter((text) => text.getClientRects().length).map((text) =>
  Number(getComputedStyle(text).fontSize.slice(0, -2)) * text.getScreenCTM().a)]"""


def test_on_a_phone_pictures_of_panels_are_stacked_and_not_scrolled(on_phone):
    for figure in on_phone[1].page.locator(".kvmbook-figure").all():
        inside, outside, letters = figure.evaluate(LETTERS)
        assert inside <= outside and min(letters) >= 9, (inside, outside, min(letters))


SCROLLING = (
    """() => [...document.querySelectorAll("div.cell_output pre")].filter((e) => e.scrollWidth > e.clientWidth)"""
)


def test_on_a_phone_printed_text_keeps_its_columns_and_scrolls_by_itself(on_phone):
    page = on_phone[1].page
    for printed in page.locator("div.cell_output pre").all():
        assert printed.get_attribute("role") == "group" and printed.get_attribute("aria-label") == "printed output"
        assert printed.evaluate("e => [getComputedStyle(e).whiteSpace, getComputedStyle(e).overflowX]") == [
            "pre",
            "auto",
        ]
    page.wait_for_function(f"({SCROLLING})().every((e) => e.tabIndex === 0)")  # the keyboard enters it
    if on_phone[0].endswith("saw"):
        assert page.evaluate(f"({SCROLLING})().length"), "nothing is wide enough to show it"


IN_THE_MIDDLE = """() => [...document.querySelectorAll('article code.literal, article h3')].flatMap(name => {
  const broken = [];
  const walker = document.createTreeWalker(name, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    for (const word of node.data.matchAll(/[A-Za-z0-9]+/g)) {
      const range = document.createRange();
      range.setStart(node, word.index);
      range.setEnd(node, word.index + word[0].length);
      const lines = [...range.getClientRects()].filter(line => line.width).map(line => Math.round(line.top));
      if (new Set(lines).size > 1) broken.push(word[0]);
    }
  }
  return broken;
})"""


def test_on_a_phone_no_name_breaks_in_the_middle_of_a_word_and_no_page_scrolls_sideways(on_phone):
    page = on_phone[1].page
    for unfolded in ("nothing", "details"):
        page.evaluate("unfolded => document.querySelectorAll(unfolded).forEach(one => one.open = true)", unfolded)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not page.evaluate(IN_THE_MIDDLE)


def test_on_a_phone_what_is_wide_is_accessible_too_and_nothing_else_is_asked_for(on_phone):
    on_phone[1].clean()
    assert not found_by_axe(on_phone[1].page, runOnly=ON_A_PHONE)
