"""From a click to the new picture in JupyterLab: a panel that carries its states, and the same one asking its kernel.

Measured in the page: from the click on an option until the new picture stands in the panel and two more animation frames
have passed, so that it has been drawn. Each click chooses a combination that was not chosen before, one setting at a time.
"""

from __future__ import annotations

import itertools
import pathlib
import statistics
import tempfile
from collections.abc import Iterator, Sequence

from playwright.sync_api import Page

from benchmarks import report
from kvmbook.views import Panel, lose_a_write
from tools.browser import chromium, chromium_path
from tools.lab import Lab, errors_in, jupyter_lab

CLICKS, WARM_UP = 20, 3
STATES = "carried by the panel", "computed by the kernel"
COMPUTED = """from kvmbook.views import Panel, lose_a_write
panel = lose_a_write()
settings = {setting["name"]: setting["options"] for setting in panel.settings}
Panel(panel.title, settings, panel._show, carry=False)"""
CLICK = """([setting, option]) => new Promise((drawn) => {
  const panel = document.querySelector(".kvmbook-panel"), figure = panel.querySelector(".kvmbook-figure");
  const input = panel.querySelectorAll("fieldset")[setting].querySelectorAll("input")[option];
  const before = figure.querySelector("svg"), start = performance.now();
  const observer = new MutationObserver(() => {
    if ([null, before].includes(figure.querySelector("svg"))) return;
    observer.disconnect();
    requestAnimationFrame(() => requestAnimationFrame(() => drawn(performance.now() - start)));
  });
  observer.observe(figure, { childList: true, subtree: true });
  input.click();
})"""


def walk(panel: Panel) -> Iterator[tuple[int, int]]:
    """Clicks, each as (setting, option), by number, that pass all combinations once, starting at the first."""
    at = [0] * len(panel.settings)
    for combination in boustrophedon([len(setting["options"]) for setting in panel.settings]):
        for setting, (was, option) in enumerate(zip(at, combination, strict=True)):
            if was != option:
                yield setting, option
        at = list(combination)


def boustrophedon(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All combinations of numbers below ``sizes``, neighbours differing in one place: as the ox ploughs."""
    if not sizes:
        yield ()
        return
    for number, rest in enumerate(boustrophedon(sizes[:-1])):
        there = range(sizes[-1])
        yield from ((*rest, last) for last in (reversed(there) if number % 2 else there))


def repaints(lab: Lab, page: Page, notebook: str) -> list[float]:
    """Milliseconds from click to picture, after a few clicks that are not counted."""
    lab.open(page, notebook)
    lab.start_running(page, notebook)
    lab.wait_until_run(page)
    if said := errors_in(page):
        raise RuntimeError(f"{notebook}: {said[0]}")
    page.locator(".kvmbook-panel svg").first.wait_for()
    clicks = list(itertools.islice(walk(lose_a_write()), WARM_UP + CLICKS))
    times = [float(page.evaluate(CLICK, list(click))) for click in clicks]
    lab.shut_down(notebook)
    return times[WARM_UP:]


def measure() -> str:
    """A table of milliseconds, in Markdown; or a sentence, where no browser is."""
    if chromium_path() is None:
        return "Not measured: chromium is missing."
    rows = []
    with tempfile.TemporaryDirectory() as folder, jupyter_lab(pathlib.Path(folder)) as lab, chromium() as browser:
        notebooks = ["notebooks/01-a-write-that-nobody-saw.ipynb", lab.write("computed.ipynb", COMPUTED)]
        for states, notebook in zip(STATES, notebooks, strict=True):
            report.progress(f"clicks in JupyterLab, states {states}")
            times = repaints(lab, browser.new_page(), notebook)
            rows.append([f"states are {states}", f"{statistics.median(times):.0f}", f"{max(times):.0f}"])
    return report.table([f"{CLICKS} clicks in JupyterLab, ms until the picture is drawn", "median", "most"], rows)


if __name__ == "__main__":
    print(measure())
