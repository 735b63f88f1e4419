"""The decks: made of the chapters, complete for a lecturer, alive without a kernel and without a network, legible."""

import base64
import functools
import http.server
import json
import pathlib
import re
import struct
import threading
from itertools import product

import nbformat
import pytest

from kvmbook.views import lose_a_write, spte_inspector
from tools import slides

ROOT = pathlib.Path(__file__).parent.parent.parent
CHAPTERS = sorted(path for path in (ROOT / "notebooks").glob("[0-9][0-9]-*.ipynb"))
DECKS = [slides.DECKS / f"{path.stem[:2]}.md" for path in CHAPTERS]
by_deck = pytest.mark.parametrize("deck", DECKS, ids=lambda deck: deck.stem)


@functools.cache
def chapter_of(deck):
    return nbformat.read(slides.notebook_of(deck), as_version=4)


@functools.cache
def assembled(deck):
    return slides.assemble(deck, chapter_of(deck))


def models(deck, name):
    """The states of the panels of a deck whose class has this name."""
    states = assembled(deck).metadata.widgets[slides.WIDGET_STATE]["state"].values()
    return [model["state"] for model in states if model["state"].get("_anywidget_id", "").endswith(name)]


# ---- the words -------------------------------------------------------------------------------------------------------


def test_every_chapter_has_a_deck_and_every_deck_a_chapter():
    assert sorted(slides.DECKS.glob("*.md")) == DECKS


@by_deck
def test_a_deck_is_a_lecture_of_50_minutes(deck):
    written = slides.slides_of(deck)
    assert 12 <= len(written) <= 18
    minutes = [int(re.match(r"(\d+) min\. ?", slide.notes)[1]) for slide in written]
    assert 45 <= sum(minutes) <= 50, sum(minutes)
    assert written[0].body == "{{title}}\n\n{{promise}}"
    assert "## To take home" in written[-1].body and "**Exercises**" in written[-1].body
    for slide in written[1:]:
        headings = re.findall(r"^#+ .*$", slide.body, flags=re.M)
        assert headings[0].startswith("## ") and slide.body.startswith(headings[0]), slide.number


@by_deck
def test_the_notes_ask_the_room_and_expect_wrong_answers(deck):
    asked = 0
    for slide in slides.slides_of(deck):
        parts = re.split(r"^\*\*Ask the room:\*\* ", slide.notes, flags=re.M)[1:]
        asked += len(parts)
        for part in parts:
            question, expected = part.split("\n\n*Expected wrong answers:* ")
            assert "?" in question or "vote" in question or "Swap" in question, (slide.number, question)
            assert re.match(r'"[^"]{3,}"', expected) and len(expected) > 80, (slide.number, expected)
    assert asked >= 4


@by_deck
def test_a_deck_shows_a_panel_and_two_questions(deck):
    shown = [cell.metadata.shows for cell in assembled(deck).cells if "shows" in cell.metadata]
    quizzes = models(deck, "Quiz")
    assert len(quizzes) >= 2 and len(set(shown)) > len(quizzes)


@by_deck
def test_no_slide_is_bare_print_output_and_what_stands_in_columns_is_a_table(deck):
    number, more = 0, []
    for cell in assembled(deck).cells:
        kind = cell.metadata.slideshow.slide_type
        if kind == "slide":
            number, more = number + 1, []
        if cell.cell_type == "code":
            printed = [output.text for output in cell.outputs if output.output_type == "stream"]
            more += [cell] if "transient" not in cell.metadata or len(printed) < len(cell.outputs) else []
            for lines in map(str.splitlines, printed if "transient" in cell.metadata else []):
                columns = [line for line in lines if re.search(r"\S {2,}\S", line)]
                assert len(columns) < len(lines) or len(lines) < 3, (number, lines)
        elif kind == "notes":
            assert more or number == 1, f"slide {number} has a heading and what was printed"
        else:
            more += [line for line in cell.source.splitlines() if line and not line.startswith("## ")]


@by_deck
def test_only_the_models_that_are_shown_are_kept(deck):
    shown = {cell.metadata.shows for cell in assembled(deck).cells if "shows" in cell.metadata}
    states = assembled(deck).metadata.widgets[slides.WIDGET_STATE]["state"]
    layouts = {states[view]["state"]["layout"].removeprefix("IPY_MODEL_") for view in shown}
    assert set(states) == shown | layouts


@by_deck
def test_what_the_notes_say_that_the_model_says_the_model_says(deck):
    """A whole sentence in quotes after a colon is the model's."""
    said = json.dumps(chapter_of(deck), ensure_ascii=False)
    for slide in slides.slides_of(deck):
        for sentence in re.findall(r'(?<!answers): "([^"]+\.)"', slide.notes):
            assert sentence in said, (slide.number, sentence)


@by_deck
def test_a_decks_numbers_are_the_chapters(deck):
    """Numbers of two digits or more stand in the chapter too, in its words, its code or what that printed."""
    chapter = chapter_of(deck)
    text = "\n".join(cell.source + json.dumps(cell.get("outputs", [])) for cell in chapter.cells)
    known = set(re.findall(r"0x[0-9a-f]+|\d[\d,]*\d", text)) | {"50"}
    for slide in slides.slides_of(deck):
        words = re.sub(r"^\{\{.*\}\}$|^\d+ min\.", "", slide.body + "\n" + slide.notes, flags=re.M)
        words = words.replace(f"chapter {int(deck.stem)}", "")
        for number in re.findall(r"0x[0-9a-f]+|\b\d[\d,]*\d\b", words):
            assert number in known, (slide.number, number)


@by_deck
def test_every_word_that_is_explained_has_its_meaning_in_the_deck(deck):
    cells = assembled(deck).cells
    words = {word for cell in cells for word in re.findall(r'data-word="([^"]+)"', cell.source)}
    meant = re.findall(r'id="word-([^"]+)"', assembled(deck).metadata.meanings)
    assert words and set(meant) == words and len(meant) == len(words)
    assert not [cell for cell in cells if "data-word" in cell.source and cell.metadata.slideshow.slide_type == "notes"]


def test_words_are_explained_in_the_plural_and_by_the_names_that_the_chapter_gives_them():
    anchors = slides.anchors_in(chapter_of(DECKS[0]))
    marked = '<span tabindex="0" data-word="{}">{}</span>'.format
    assert (
        slides.explained("**TLBs** and *slots*", anchors)
        == f"{marked('tlb', '**TLBs**')} and {marked('memslot', '*slots*')}"
    )
    assert slides.explained("2 * 3 * TLB, *no such word*, TLB", anchors) == "2 * 3 * TLB, *no such word*, TLB"


# ---- refusals --------------------------------------------------------------------------------------------------------


def spoiled(change):
    """Chapter 1 with one thing wrong."""
    chapter = nbformat.from_dict(json.loads(json.dumps(chapter_of(DECKS[0]))))
    change(chapter)
    return chapter


def cell_with(chapter, words):
    (cell,) = (cell for cell in chapter.cells if cell.cell_type == "code" and words in cell.source)
    return cell


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ('{{ch01-99 "lose_a_write()"}}', "must name one code cell of the chapter, but names: none"),
        ('{{"no such words"}}', "must name one code cell of the chapter, but names: none"),
        ('{{"quiz_01_"}}', "but names: ch01-27, ch01-28, ch01-29"),
        ('{{"vm = Vm(Hardware.ept(ad_bits=False), Kernel.v5_19)"}}', "cell ch01-05 has no output"),
        ("{{lose_a_write()}}", "is not understood"),
        ('{{"lose_a_write()" source}}', "is not understood"),
        ('see {{"lose_a_write()"}}', "is not understood"),
        ("{{}}", "is not understood"),
        ("", "needs words or pictures"),
    ],
)
def test_a_part_that_is_not_there_is_refused_by_name(tmp_path, written, said):
    deck = tmp_path / "01.md"
    deck.write_text(f"# One\n\nNote:\n1 min.\n---\n{written}\n\nNote:\n1 min.\n")
    with pytest.raises(slides.Wrong, match=re.escape(said)) as refused:
        slides.assemble(deck, chapter_of(DECKS[0]))
    assert str(refused.value).startswith("01.md, slide 2: ")


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        (lambda c: c.metadata.pop("widgets"), "lose_a_write()", "the state of its panel is not stored"),
        (lambda c: cell_with(c, "plot_missed").metadata.clear(), "plot_missed", "its plot has no text alternative"),
        (
            lambda c: (
                cell_with(c, "print(vm.vcpu[0].read")
                .outputs[0]
                .update(output_type="display_data", data={"image/svg+xml": "<svg/>"})
            ),
            "print(vm.vcpu[0].read",
            "its picture has no <title>",
        ),
        (
            lambda c: cell_with(c, "for harvest").update(source="for harvest" + " " * 90),
            '"for harvest" code',
            "a line of 101 characters; a slide takes 96",
        ),
    ],
)
def test_what_a_slide_cannot_show_is_refused_by_name(tmp_path, change, words, said):
    deck = tmp_path / "01.md"
    deck.write_text("# One\n{{" + (words if '"' in words else f'"{words}"') + "}}\n\nNote:\n1 min.\n")
    with pytest.raises(slides.Wrong, match=said) as refused:
        slides.assemble(deck, spoiled(change))
    assert re.match(r"01\.md, slide 1: .*: cell ch01-\d\d: ", str(refused.value))


def test_a_slide_without_notes_and_a_deck_without_a_chapter_are_refused(tmp_path):
    deck = tmp_path / "99.md"
    deck.write_text("# One\n")
    with pytest.raises(slides.Wrong, match=r"99\.md, slide 1: .* notes"):
        slides.assemble(deck, chapter_of(DECKS[0]))
    with pytest.raises(slides.Wrong, match=r"99\.md: 0 notebooks are named 99-\*\.ipynb"):
        slides.notebook_of(deck)


# ---- in a browser ----------------------------------------------------------------------------------------------------

SO_THAT_AXE_SEES_CONTRAST = (
    ".reveal * { pointer-events: auto !important } .pause-overlay, .backgrounds { display: none !important }"
)
VIEWPORT = {"width": 1280, "height": 720}
# What lies outside the slide, is cut off or scrolls, and text that is too small, of the slide that is shown.
MEASURE = """() => {
  const found = [], slide = document.querySelector("section.present");
  const name = (e) => `${e.tagName}.${e.getAttribute("class") ?? ""} "${e.textContent.trim().slice(0, 40)}"`;
  for (const e of slide.querySelectorAll("*")) {
    if (e.closest("aside, script, style, title") || !e.getClientRects().length) continue;
    const style = getComputedStyle(e), { left, top, right, bottom, width, height } = e.getBoundingClientRect();
    const inside = left >= 0 && top >= 0 && right <= 1280 && bottom <= 681;
    if (width && height && !inside) found.push(`outside: ${name(e)} ${[left, top, right, bottom]}`);
    if (!(e instanceof SVGElement) && style.display !== "inline" && style.overflow !== "visible"
        && (e.scrollWidth > e.clientWidth + 1 || e.scrollHeight > e.clientHeight + 1)) found.push(`scrolls: ${name(e)}`);
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || e.ownerSVGElement) continue;
    const size = parseFloat(style.fontSize);
    const least = e.closest(".kvmbook-panel") ? 18 : e.closest("pre, .kvmbook-results") ? 20
      : e.matches("code, code *, sub, sup") ? 24 : 28;
    if (size < least) found.push(`small, ${size}: ${name(e)}`);
  }
  for (const img of slide.querySelectorAll("img")) if (img.alt.length < 20) found.push("a plot without alt text");
  for (const svg of slide.querySelectorAll("svg")) if (!svg.querySelector("title")) found.push("a picture without title");
  return found;
}"""
# How high the smallest text is that is drawn on the slide that is shown, in pixels: of its SVG pictures as [height, text],
# and of its plots by the points of type: [pixels a point, ""].
DRAWN = """() => {
  const slide = document.querySelector("section.present"), seen = (e) => e.getClientRects().length;
  const words = [...slide.querySelectorAll("svg text, svg tspan")].filter((e) => seen(e)
    && [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()));
  const scale = (img) => Math.min(img.clientWidth / img.naturalWidth, img.clientHeight / img.naturalHeight);
  return {
    svg: words.map((e) => [parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a, e.textContent.trim()]),
    plots: [...slide.querySelectorAll("img")].map((img) => [img.src.split(",")[1], scale(img)]),
  };
}"""
LEAST = 18  # pixels, from the last row of a lecture room
POINTS = 12  # the smallest type in a plot


def too_small(page):
    """The smallest text that is drawn on this slide, if it is too small."""
    drawn = page.evaluate(DRAWN)
    heights = [(height, said) for height, said in drawn["svg"]]
    for png, scale in drawn["plots"]:
        packed = base64.b64decode(png)
        (across,) = struct.unpack(">I", packed[(chunk := packed.index(b"pHYs") + 4) : chunk + 4])  # pixels a metre
        heights.append((scale * POINTS * across * 0.0254 / 72, "a plot"))
    return min([each for each in heights if each[0] < LEAST], default=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    built = tmp_path_factory.mktemp("slides")
    pages = slides.build(built)
    assert [page.stem for page in pages] == [path.stem for path in CHAPTERS]
    return built


@pytest.fixture
def show(visit, folder):
    """Open a deck and wait until its panels are there."""

    def opened(deck, address=None):
        seen = visit("file:" if address is None else address, viewport=VIEWPORT)
        name = f"{slides.notebook_of(deck).stem}.html"
        seen.page.goto((folder / name).as_uri() if address is None else f"{address}/{name}")
        panels = sum("shows" in cell.metadata for cell in assembled(deck).cells)
        seen.page.wait_for_function("n => document.querySelectorAll('.kvmbook-panel').length === n", arg=panels)
        return seen

    return opened


def here(page):
    return page.evaluate("Reveal.getIndices().h")


def go_to(page, panel):
    """Show the slide of the first panel of a class."""
    page.evaluate(
        "c => Reveal.slide([...document.querySelectorAll('section')].findIndex((s) => s.querySelector(c)))", panel
    )


def readout(page):
    return page.locator("section.present .kvmbook-readout").inner_text()


@by_deck
def test_nothing_is_cut_off_and_all_is_legible_and_accessible_on_every_slide(deck, show):
    seen = show(deck)
    seen.page.add_script_tag(path=ROOT / "build/vendor/axe-core/axe.min.js")
    seen.page.add_style_tag(content=SO_THAT_AXE_SEES_CONTRAST)
    wrong = {}
    for number in range(len(slides.slides_of(deck))):
        seen.page.evaluate("n => Reveal.slide(n)", number)
        found = seen.page.evaluate(MEASURE)
        for settings in every_setting(seen.page):  # some have a picture that is higher
            found += [f"{settings}: {what}" for what in seen.page.evaluate(MEASURE)]
        if number == 0 or (number < 6 and seen.page.locator("section.present .kvmbook-panel").count()):
            violations = seen.page.evaluate(
                "async () => (await axe.run({preload: false, resultTypes: ['violations']})).violations"
            )
            found += [f"{each['id']}: {each['nodes'][0]['html'][:200]}" for each in violations]
        if found:
            wrong[number + 1] = found[:4]
    assert not wrong
    assert seen.page.title() == slides.title_of(chapter_of(deck))
    assert seen.page.locator("html").get_attribute("lang") == "en"
    seen.clean()


@by_deck
def test_the_text_of_every_picture_is_18_pixels_high(deck, show):
    page, small = show(deck).page, {}
    for number in range(len(slides.slides_of(deck))):
        page.evaluate("n => Reveal.slide(n)", number)
        found = {"as it opens": too_small(page)} | {settings: too_small(page) for settings in every_setting(page)}
        if found := {settings: said for settings, said in found.items() if said}:
            small[number + 1] = min((said, str(settings)) for settings, said in found.items())
    assert not small


def test_what_a_word_means_is_shown_under_the_pointer_and_at_the_focus_and_the_keys_steer_on(show):
    seen = show(DECKS[0])
    page = seen.page
    go_to(page, "[data-word=access-tracking]")
    number, meaning = here(page), page.locator("#word-access-tracking")
    page.locator("section.present [data-word=access-tracking]").hover()
    assert meaning.inner_text().startswith("access tracking How KVM notices")
    assert meaning.evaluate("e => parseFloat(getComputedStyle(e).fontSize)") >= 20
    page.keyboard.press("ArrowRight")
    meaning.wait_for(state="hidden")
    assert here(page) == number + 1
    page.keyboard.press("ArrowLeft")
    page.mouse.move(0, 0)
    page.locator("section.present [data-word=access-tracking]").focus()
    meaning.wait_for()
    page.keyboard.press("Escape")  # closes it, and does not open the overview
    meaning.wait_for(state="hidden")
    assert not page.evaluate("Reveal.isOverview()")
    page.keyboard.press("Space")
    assert here(page) == number + 1
    seen.clean()


def every_setting(page):
    """Click through all combinations of the panel on this slide, or answer its question; say which is shown."""
    groups = page.evaluate(
        "() => [...document.querySelectorAll('section.present .kvmbook-panel fieldset')]"
        ".map((f) => [...f.querySelectorAll('input')].map((i) => i.value))"
    )
    if page.locator("section.present .kvmbook-quiz").count():
        page.locator("section.present .kvmbook-quiz input").first.check()
        page.get_by_role("button", name="Reveal").click()
        yield "answered"
        return
    for combination in product(*groups) if groups else ():
        page.evaluate(
            "chosen => document.querySelectorAll('section.present .kvmbook-panel fieldset').forEach((f, n) => "
            "[...f.querySelectorAll('input')].find((i) => i.value === chosen[n] && !i.checked)?.click())",
            combination,
        )
        yield combination


def test_a_panel_says_what_the_live_one_says_by_mouse_and_by_keyboard(show):
    seen, live = show(DECKS[0]), lose_a_write()
    page = seen.page
    go_to(page, ".kvmbook-panel")
    number = here(page)
    assert readout(page) == live.readout
    page.locator("section.present label", has_text="always").click()
    assert readout(page) == live.choose(flush_rule="always")
    page.keyboard.press("ArrowRight")  # after a click the arrows steer the deck
    assert here(page) == number + 1
    page.keyboard.press("ArrowLeft")
    go_to(page, ".kvmbook-panel")
    page.locator("section.present input[value='always']").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert readout(page) == live.choose(flush_rule="never")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")  # Show all controls
    page.locator("section.present input[value='off']").focus()
    page.keyboard.press("ArrowRight")
    assert readout(page) == live.choose(A_D_bits="on")
    assert here(page) == number
    page.keyboard.press("Escape")  # gives the arrows back, and does not open the overview
    page.keyboard.press("ArrowRight")
    assert here(page) == number + 1 and not page.evaluate("Reveal.isOverview()")
    seen.clean()


def test_a_question_is_answered_by_keyboard_and_a_remote_control_goes_on(show):
    page = show(DECKS[0]).page
    go_to(page, ".kvmbook-quiz")
    number = here(page)
    page.locator("section.present input").first.focus()
    page.keyboard.press("Space")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")  # Reveal; not the next slide
    quiz = models(DECKS[0], "Quiz")[0]
    assert here(page) == number and quiz["because"] in readout(page)
    page.keyboard.press("PageDown")
    assert here(page) == number + 1


def test_a_run_is_stepped_through_with_the_mouse_and_the_keys_steer_the_deck_again(show):
    page = show(slides.DECKS / "11.md").page
    go_to(page, ".kvmbook-stepper")
    number, whole = here(page), readout(page)
    page.locator("section.present").get_by_role("button", name="one moment on").click()
    assert readout(page) != whole
    slider = page.locator("section.present .kvmbook-stepper input")
    slider.click(position={"x": 30, "y": 8})
    moment = slider.input_value()
    page.keyboard.press("ArrowRight")
    assert here(page) == number + 1
    page.keyboard.press("ArrowLeft")
    assert slider.input_value() == moment
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert here(page) == number and slider.input_value() == str(int(moment) + 1)


def test_the_scheduler_is_played_to_the_loss_by_mouse(show):
    from kvmbook.views import you_are_the_scheduler

    live = you_are_the_scheduler()
    live.play()
    page = show(slides.DECKS / "10.md").page
    go_to(page, ".kvmbook-scheduler")
    for step in live.path:
        (who,) = (who for who in live.words["actors"] if step.startswith(who + " "))
        steps = page.get_by_role("group", name=f"steps of {who}", exact=True)
        steps.get_by_role("button", name=step.removeprefix(who + " "), exact=True).click()
    live.asked = ""
    assert readout(page) == live.readout and page.evaluate(MEASURE) == []


def test_the_inspector_answers_as_python_does(show):
    page, live = show(slides.DECKS / "03.md").page, spte_inspector(0x0610000004567875)
    go_to(page, ".kvmbook-inspector")
    assert readout(page) == live.readout
    page.locator("section.present").get_by_role("button", name="fresh, writable", exact=True).click()
    live.word = "0610000004567877"
    assert readout(page) == live.readout


def test_a_deck_prints_one_slide_a_page_with_the_answers(visit, folder):
    page = visit("file:", viewport=VIEWPORT).page
    page.goto((folder / f"{slides.notebook_of(DECKS[0]).stem}.html").as_uri() + "?print-pdf")
    page.wait_for_selector(".pdf-page .kvmbook-quiz", state="attached")
    page.emulate_media(media="print")
    heights = page.locator(".pdf-page").evaluate_all("pages => pages.map((page) => page.offsetHeight)")
    assert heights == [719] * len(slides.slides_of(DECKS[0]))
    assert page.locator(".kvmbook-paper").first.inner_text().startswith('The answer is "')


@pytest.fixture(scope="module")
def served(folder):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *said):
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_decks_ask_no_other_host_over_http_either(visit, folder, served):
    seen = visit(served, viewport=VIEWPORT)
    for deck in DECKS:
        seen.page.goto(f"{served}/index.html")
        seen.page.get_by_role("link", name=slides.title_of(chapter_of(deck)), exact=True).click()
        seen.page.wait_for_selector(".kvmbook-panel", state="attached")
    seen.clean()


@pytest.mark.parametrize("over", ["file", "http"])
def test_the_speakers_notes_follow_the_slides(show, served, over):
    seen = show(DECKS[0], served if over == "http" else None)
    with seen.context.expect_page() as opened:
        seen.page.keyboard.press("s")
    notes = opened.value.locator(".speaker-controls-notes")
    seen.page.keyboard.press("ArrowRight")
    notes.get_by_text("Which part is broken").wait_for()
    seen.clean()
