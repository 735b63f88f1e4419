"""The panels of the built pages: each carries what the live one does, works without a kernel, says what the model says."""

import html
import json
import random
import re
import xml.etree.ElementTree as ET

import nbformat
import pytest
from built_pages import CHAPTERS, open_page, runs_in, widgets_in
from live_panels import by_title, guess_the_most, guesses, quizzes

from kvmbook.views import Picture, SpteInspector, step_through
from tools import checks
from tools.book import ROOT

# ---- frozen and live -------------------------------------------------------------------------------------------------


ONE_MOMENT = Picture("<svg><title>nothing</title></svg>", "nothing", ["Nothing."])


def same_view(state, live):
    """Whether a page carries the script and the style that the package has now; if not, `make run` stores them."""
    return state["_esm"] == str(live._esm) and state["_css"] == str(live._css)


@pytest.mark.parametrize("file", CHAPTERS, ids=lambda file: file.split("/")[1])
def test_every_frozen_panel_equals_a_live_one_for_all_combinations(pages, file):
    frozen = widgets_in(pages, file)
    inspectors = [state for state in frozen if "tables" in state]
    for state in inspectors:
        live = SpteInspector(state["word"], state["format"])
        assert same_view(state, live)
        for trait in ("tables", "leaves", "words"):
            assert state[trait] == json.loads(json.dumps(getattr(live, trait))), trait
    panels = [state for state in frozen if state.get("settings")]
    assert panels or inspectors
    for state in runs_in(pages, file):
        assert same_view(state, step_through(ONE_MOMENT))
    for state in panels:
        live = by_title()[state["title"]]
        assert same_view(state, live)
        assert set(state["states"]) == {" | ".join(combination) for combination in live.combinations()}
        assert state["states"] == live.states
        for carried in state["states"].values():
            if "svg" in carried:
                picture = ET.fromstring(carried["svg"])
                assert picture.get("role") == "img" and picture[0].tag.endswith("title") and len(picture[0].text) > 20
                assert carried["readout"].endswith(".")
    asked = [state for state in frozen if "because" in state]
    assert len(asked) >= 3 or file.endswith("index")
    for state in asked:
        live = quizzes()[state["asked"]]
        assert same_view(state, live)
        assert [state[trait] for trait in ("options", "answer", "because")] == [live.options, live.answer, live.because]
    for state in (state for state in frozen if "guessed" in state):
        live = guesses()[state["title"]]
        assert same_view(state, live)
        assert not state["told"] and set(state["guessed"]) == {-1}
        for trait in ("truth", "top", "why", "charts", *(("names", "counted") if "names" in state else ())):
            assert state[trait] == getattr(live, trait), trait


@pytest.mark.parametrize("file", CHAPTERS, ids=lambda file: file.split("/")[1])
def test_what_stands_beside_a_widget_is_its_first_state(file):
    """nbval compares these pictures with those of a run; so the states of the runs that have no settings are live, too."""
    notebook = nbformat.read(ROOT / f"{file}.ipynb", as_version=4)
    models = notebook.metadata.widgets[checks.WIDGET_STATE]["state"]
    shown = [output.data for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    shown = [data for data in shown if checks.WIDGET_VIEW in data]
    assert shown
    for data in shown:
        still, state = data["image/svg+xml"], models[data[checks.WIDGET_VIEW]["model_id"]]["state"]
        root = ET.fromstring(still)
        assert root.get("role") == "img" and len(root[0].text) > 20
        if "panel" in state:
            state = models[state["panel"].removeprefix("IPY_MODEL_")]["state"]
        if "settings" in state and "graph" not in next(iter(state["states"].values())):
            first = state["states"][" | ".join(setting["options"][0] for setting in state["settings"])]
            assert first["svg"].removeprefix("<svg ") in still
            assert "".join(first["readout"].split()) in re.sub(r"\s", "", html.unescape(re.sub("<.*?>", "", still)))


# ---- played with -------------------------------------------------------------------------------------------------------

CLICK_THEM_ALL = """panel => {
  const settings = [...panel.querySelectorAll('.kvmbook-controls fieldset')].map(f => [...f.querySelectorAll('input')]);
  const said = {};
  const choose = (chosen, left) => {
    if (!left.length) {
      const key = chosen.map(input => input.value).join(' | ');
      const figure = panel.querySelector('.kvmbook-figure');
      const title = figure?.querySelector('svg title')?.textContent;
      const slider = panel.querySelector('.kvmbook-stepper input');
      const moments = [];
      for (let at = 0; !slider.closest('[hidden]') && at < Number(slider.max); at += 1) {
        slider.value = at;
        slider.dispatchEvent(new Event('input'));
        const lit = [...panel.querySelectorAll('[data-moment]:not(.kvmbook-past, .kvmbook-coming)')];
        const [hidden, past] = ['coming', 'past'].map((look) => [...panel.querySelectorAll(`.kvmbook-${look}`)]);
        const all = (parts, holds) => parts.every((part) => holds(Number(part.dataset.moment)));
        moments.push([panel.querySelector('.kvmbook-readout').textContent, panel.offsetHeight,
          lit.length > 0 && all(lit, (moment) => moment === at),
          all(hidden, (moment) => moment > at), all(past, (moment) => moment < at)]);
      }
      slider.value = slider.max;
      slider.dispatchEvent(new Event('input'));
      said[key] = [panel.querySelector('.kvmbook-readout').textContent, title, moments, panel.offsetHeight];
      return;
    }
    for (const input of left[0]) { input.click(); choose([...chosen, input], left.slice(1)); }
  };
  choose([], settings);
  return said;
}"""


@pytest.mark.parametrize("file", CHAPTERS, ids=lambda file: file.split("/")[1])
def test_every_combination_is_clicked_in_the_page_and_says_what_the_model_says(visit, pages, file):
    seen = open_page(visit, f"{pages.as_uri()}/", file)
    clicked, runs = 0, iter(runs_in(pages, file))
    for panel in seen.page.locator(".kvmbook-panel:has(.kvmbook-figure)").all():
        live = by_title().get(panel.locator(".kvmbook-title").inner_text())
        states = live.states if live else next(runs)["states"]
        for button in panel.get_by_role("button", name="Show all controls").all():
            button.click()
        said = panel.evaluate(CLICK_THEM_ALL)
        assert set(said) == set(states)
        heights = {height for *_, height in said.values()} | {
            m[1] for _, _, moments, _ in said.values() for m in moments
        }
        assert len(heights) == 1  # nothing jumps
        for key, (readout, title, moments, _) in said.items():
            assert readout == states[key]["readout"]
            assert title == ET.fromstring(states[key]["svg"])[0].text
            assert [moment[0] for moment in moments] == states[key].get("moments", [])
            assert all(moment[2:] == [True, True, True] for moment in moments)
            clicked += 1
    assert next(runs, None) is None
    assert clicked or seen.page.locator(".kvmbook-scheduler, .kvmbook-inspector").count()
    for quiz in seen.page.locator(".kvmbook-quiz").all():
        assert quiz.locator(".kvmbook-readout").inner_text() == ""
        quiz.locator("input").first.click()
        quiz.get_by_role("button", name="Reveal").click()
        predicted = quiz.locator("input").first.get_attribute("value")
        asked = quiz.locator("legend").inner_text()
        assert quiz.locator(".kvmbook-readout").inner_text() == quizzes()[asked].predict(predicted)
    for guess in seen.page.locator(".kvmbook-guess").all():
        said = guess_the_most(guess, guesses()[guess.locator(".kvmbook-asked").inner_text()])
        assert guess.locator(".kvmbook-readout").inner_text() == said
    seen.clean()


def test_the_scheduler_is_played_to_a_loss_without_a_kernel(visit, pages):
    seen = open_page(visit, f"{pages.as_uri()}/", "notebooks/10-every-interleaving")
    panel = seen.page.locator(".kvmbook-scheduler").first
    live = by_title()["You are the scheduler"]
    live.start_again()
    for _ in range(4):
        step = live.possible()[0]
        panel.locator(f'button[data-step="{step}"]').click()
        assert panel.locator(".kvmbook-readout").inner_text() == live.do(step)
    seen.clean()


@pytest.mark.parametrize("width", [1366, 390])
def test_the_scheduler_does_not_jump_and_buttons_stay_under_the_finger(visit, pages, width):
    seen = open_page(
        visit, f"{pages.as_uri()}/", "notebooks/10-every-interleaving", viewport={"width": width, "height": 900}
    )
    panel, chance = seen.page.locator(".kvmbook-scheduler").first, random.Random(7)
    places, heights = {}, set()
    for _ in range(60):
        for step, place in panel.evaluate(PLACES):
            assert places.setdefault(step, place) == place, step
        heights.add(panel.evaluate("panel => panel.offsetHeight"))
        buttons = panel.locator("[data-step]")
        buttons.nth(chance.randrange(buttons.count())).click()
    assert len(heights) == 1 and len(places) > 10
    seen.clean()


PLACES = """panel => [...panel.querySelectorAll("[data-step]")].map((button) => {
  const [at, origin] = [button, panel].map((one) => one.getBoundingClientRect());
  return [button.dataset.step, [at.x - origin.x, at.y - origin.y, at.width, at.height].map(Math.round).join()];
})"""


HEAR = """said => {
  window.heard = [];
  const hear = new MutationObserver(() => heard.push(said.textContent));
  hear.observe(said, { childList: true, characterData: true, subtree: true });
}"""


def test_a_run_is_played_until_somebody_goes_elsewhere(visit, pages):
    seen = open_page(visit, f"{pages.as_uri()}/", "notebooks/01-a-write-that-nobody-saw")
    page, panels = seen.page, seen.page.locator(".kvmbook-panel:has(.kvmbook-figure)")
    page.evaluate("window.patient = setInterval; window.setInterval = (act, ms) => patient(act, ms / 6); null")
    play, said = panels.first.locator(".kvmbook-stepper button").first, panels.first.locator(".kvmbook-moment")
    said.evaluate(HEAR)
    play.click()
    page.wait_for_function("heard.includes('the whole run')")
    assert page.evaluate("heard.filter((words, at) => words !== heard[at - 1])") == [
        *(f"moment {number} of 5" for number in range(1, 6)),
        "the whole run",
    ]
    assert play.inner_text() == "Play"
    page.evaluate("window.setInterval = (act, ms) => patient(act, ms / 2); null")  # slow enough to be met on its way
    play.click()
    assert play.inner_text() == "Stop"
    panels.nth(1).get_by_role("slider").fill("4")  # the same panel, elsewhere
    assert play.inner_text() == "Play" and said.inner_text() == "moment 5 of 5"
    page.wait_for_timeout(500)
    assert said.inner_text() == "moment 5 of 5"
    seen.clean()


def test_a_control_that_goes_away_does_not_drop_the_keyboard(visit, pages):
    seen = open_page(visit, f"{pages.as_uri()}/", "notebooks/01-a-write-that-nobody-saw")
    page, panel = seen.page, seen.page.locator(".kvmbook-panel:has(.kvmbook-figure)").first
    held = "panel => panel.contains(document.activeElement) && document.activeElement.tagName"
    panel.get_by_role("button", name="Show all controls").focus()
    page.keyboard.press("Enter")
    assert panel.evaluate(held) == "INPUT"
    back = panel.get_by_role("button", name="one moment back")
    back.focus()
    for _ in range(8):
        page.keyboard.press("Space")
    assert panel.evaluate(held) == "BUTTON" and back.get_attribute("aria-disabled") == "true"
    seen.clean()


def test_a_panel_that_was_out_of_the_page_comes_back_as_it_was(visit, pages):
    seen = open_page(visit, f"{pages.as_uri()}/", "notebooks/01-a-write-that-nobody-saw")
    panel = seen.page.locator(".kvmbook-panel:has(.kvmbook-figure)").first
    heights = panel.evaluate(
        """async panel => {
        const heights = [], place = panel.parentElement, wait = () => new Promise(requestAnimationFrame);
        const look = async () => { for (let n = 0; n < 4; n += 1) { heights.push(panel.offsetHeight); await wait(); } };
        await look();
        for (const [leave, back] of [[() => panel.remove(), () => place.append(panel)],
          [() => { place.style.display = "none"; }, () => { place.style.display = ""; }]]) {
          leave(); await wait(); await wait(); back(); await look();
        }
        return heights; }"""
    )
    assert len(set(heights)) == 1, heights
    seen.clean()


def test_paper_shows_the_whole_run_whatever_is_lit(visit, pages):
    seen = open_page(visit, f"{pages.as_uri()}/", "notebooks/01-a-write-that-nobody-saw")
    panel = seen.page.locator(".kvmbook-panel:has(.kvmbook-figure)").first
    panel.get_by_role("slider").fill("0")
    seen.page.emulate_media(media="print")
    looks = panel.locator("[data-moment]").evaluate_all("all => all.map((one) => getComputedStyle(one).visibility)")
    assert set(looks) == {"visible"} and not panel.locator(".kvmbook-stepper").is_visible()
    seen.clean()


def test_the_text_unlocks_controls_and_a_reader_may_skip_it(visit, pages):
    seen = open_page(visit, f"{pages.as_uri()}/", "notebooks/01-a-write-that-nobody-saw")
    panels = seen.page.locator(".kvmbook-panel:has(.kvmbook-figure)")
    shown = [panel.locator("fieldset:visible").count() for panel in panels.all()]
    assert shown == [1, 2, 3]
    panels.nth(1).get_by_label("on", exact=True).check()  # one panel, seen in three places
    for panel in panels.all():
        assert panel.get_by_label("on", exact=True).is_checked() and panel.get_by_label("on", exact=True).is_visible()
    assert [panel.locator("fieldset:visible").count() for panel in panels.all()] == [2, 2, 3]
    panels.first.get_by_role("button", name="Show all controls").click()
    assert [panel.locator("fieldset:visible").count() for panel in panels.all()] == [3, 3, 3]
    assert seen.page.get_by_role("button", name="Show all controls").count() == 0
    panels.first.get_by_label("off", exact=True).check()
    assert panels.first.get_by_label("off", exact=True).is_visible()
    assert panels.first.locator("fieldset:visible").count() == 3  # remembered while the page is open
    seen.clean()


def test_the_inspector_says_of_any_word_what_the_model_says_without_a_kernel(visit, pages):
    seen = open_page(visit, f"{pages.as_uri()}/", "notebooks/03-the-spte-bit-by-bit")
    panel, live, chance = seen.page.locator(".kvmbook-inspector").first, SpteInspector(), random.Random(5)
    for format in live.leaves:
        panel.get_by_role("radio", name=format, exact=True).check()
        live.choose(format)
        for _ in range(12):
            word = f"{chance.getrandbits(64) | chance.getrandbits(1) << 11:016x}"
            panel.get_by_role("textbox").fill(word)
            panel.get_by_role("textbox").press("Enter")
            bit = chance.randrange(64)
            panel.get_by_role("button", name=f"bit {bit},").click()
            live.show(word)
            assert panel.locator(".kvmbook-readout").inner_text() == live.toggle(bit)
            answers = panel.locator(".kvmbook-helpers li").evaluate_all("rows => rows.map(r => r.ariaLabel)")
            for (helper, answer), row in zip(live.answers.items(), answers, strict=True):
                assert row.startswith(f"{helper}: {answer};"), row
    panel.get_by_role("textbox").fill("no word")
    panel.get_by_role("textbox").press("Enter")
    assert "nothing is changed" in panel.get_by_role("alert").inner_text()
    assert panel.locator(".kvmbook-readout").inner_text() == live.readout
    seen.clean()


def test_the_keyboard_alone_drives_a_panel(visit, pages):
    seen = open_page(visit, f"{pages.as_uri()}/", "notebooks/index")
    page, live = seen.page, by_title()["Lose a write"]
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('.kvmbook-panel') !== null"):
            break
    page.keyboard.press("ArrowRight")
    readout, first = page.locator(".kvmbook-readout").first, live.states["if changed | off | nobody"]
    assert readout.inner_text() == live.states["always | off | nobody"]["readout"]
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # show all controls; the first of those that come has the focus
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert readout.inner_text() == live.states["if changed | off | vCPU 1 reads page 0"]["readout"]
    page.keyboard.press("ArrowLeft")
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.type") == "range":
            break
    for sentence in reversed(first["moments"]):
        page.keyboard.press("ArrowLeft")
        assert readout.inner_text() == sentence
