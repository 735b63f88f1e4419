"""Debian's chromium, driven by Playwright: for the PDF, the tests and the benchmark of the pages.

Usage: browser.py   Says nothing if there is one, and otherwise what to do.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.debian import Missing, program  # noqa: E402

# It asks nobody for updates, so that every request it makes is a page's own.
QUIET = [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
]


def chromium_path() -> str | None:
    """Where chromium is; None if it is missing. In CI it is installed."""
    return program("chromium", "chromium-browser", "google-chrome", packages=("chromium",))


def launch_options() -> dict[str, Any]:
    """What Playwright's ``launch`` needs for it. Missing, a sentence, if there is none."""
    path = chromium_path()
    if path is None:
        raise Missing("chromium is missing; on Debian: apt-get install chromium")
    return {"executable_path": path, "args": ["--no-sandbox", "--disable-gpu", *QUIET]}


def open_drawn(page: Page, address: str) -> None:
    """Open a page of the book and wait until all its widgets are drawn."""
    page.goto(address)
    views = page.locator('script[type="application/vnd.jupyter.widget-view+json"]').count()
    page.wait_for_function("wanted => document.querySelectorAll('.kvmbook-panel').length === wanted", arg=views)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser. Missing, a sentence, if there is none."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**launch_options())
        try:
            yield browser
        finally:
            browser.close()


if __name__ == "__main__":
    launch_options()
