"""The built pages, as the tests look at them: which there are, what their widgets carry, and a page with them drawn."""

import json
import re

from tools import book
from tools.browser import open_drawn

FILES = book.contents(book.ROOT)
CHAPTERS = [file for file in FILES if file.startswith("notebooks/")]
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
STATE = re.compile(r'<script type="application/vnd.jupyter.widget-state\+json">(.*?)</script>', re.S)


def widgets_in(pages, file):
    """The states of a page's widgets, as the page carries them."""
    found = STATE.search((pages / f"{file}.html").read_text())
    return [model["state"] for model in json.loads(found[1])["state"].values()] if found else []


def runs_in(pages, file):
    """The panels of a page that have no settings, and are stepped through."""
    return [state for state in widgets_in(pages, file) if state.get("settings") == []]


def open_page(visit, home, file, **options):
    """A page with all its widgets drawn."""
    seen = visit(home, **options)
    open_drawn(seen.page, f"{home}{file}.html")
    return seen
