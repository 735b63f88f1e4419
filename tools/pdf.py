"""Print the built pages as one PDF file.

Usage: pdf.py PAGES OUT.pdf   PAGES is the folder that book.py has built. The chapters are put into one page, in the order of
the table of contents, so that links lead inside the file and page numbers run through.
"""

from __future__ import annotations

import pathlib
import posixpath
import sys
from typing import Any
from urllib.parse import urlsplit

from bs4 import BeautifulSoup
from playwright.sync_api import Browser

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.book import contents  # noqa: E402
from tools.browser import chromium, open_drawn  # noqa: E402

FOOTER = '<div style="font-size: 8px; width: 100%; text-align: center"><span class="pageNumber"></span></div>'
PRINT_NAME = "print.html"  # beside the pages while it is printed, so that styles and scripts are found


def name_of(file: str) -> str:
    """A page's name in the one page: "01", "glossary", ..."""
    stem = pathlib.PurePath(file).name
    return stem.split("-")[0] if stem[0].isdigit() else stem


def one_page(pages: pathlib.Path) -> str:
    """All chapters as one HTML page with a table of contents; its addresses are relative to ``pages``."""
    names = {file: name_of(file) for file in contents(ROOT)}
    if missing := [file for file in names if not (pages / f"{file}.html").exists()]:
        raise SystemExit(f"there are no pages {', '.join(missing)} in {pages}; build the book first")
    front = contents(ROOT)[0]
    whole = BeautifulSoup((pages / f"{front}.html").read_text(), "html.parser")
    assert whole.head is not None and whole.body is not None
    for tag in whole.head.find_all(True):
        relocate(tag, front, {})
    for script in whole.head.find_all("script", type="application/vnd.jupyter.widget-state+json"):
        script.extract()
    whole.body.clear()
    whole.body["class"] = "kvmbook-print"
    listed = whole.new_tag("ol", attrs={"class": "kvmbook-contents"})
    for file, name in names.items():
        page = BeautifulSoup((pages / f"{file}.html").read_text(), "html.parser")
        article = page.find("article")
        assert article is not None, file
        article["id"] = name
        for tag in article.find_all(True):
            relocate(tag, file, names)
        for state in page.find_all("script", type="application/vnd.jupyter.widget-state+json"):
            whole.head.append(state.extract())
        for details in article.find_all("details"):
            details["open"] = ""
        whole.body.append(article.extract())
        heading = article.find("h1")
        assert heading is not None, file
        item, link = whole.new_tag("li"), whole.new_tag("a", href=f"#{name}")
        link.string = heading.get_text().removesuffix("#")
        item.append(link)
        listed.append(item)
    first = whole.body.find("article")
    assert first is not None and whole.title is not None
    heading = whole.new_tag("h2")
    heading.string = "Contents"
    first.insert_after(section := whole.new_tag("article"))
    section.extend([heading, listed])
    whole.title.string = "kvmbook"
    return str(whole)


def relocate(tag: Any, file: str, names: dict[str, str]) -> None:
    """Make a tag's id unique in the one page and let its links lead there, or to the same file as before."""
    own = names.get(file, "")
    if "id" in tag.attrs and own:
        tag["id"] = f"{own}-{tag['id']}"
    for attribute in ("href", "src"):
        address = urlsplit(tag.attrs.get(attribute, ""))
        if address.scheme or not (address.path or address.fragment):
            continue
        here = f"{file}.html"
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), address.path)) if address.path else here
        if path.endswith(".html") and path.removesuffix(".html") in names:
            name = names[path.removesuffix(".html")]
            tag[attribute] = f"#{name}-{address.fragment}" if address.fragment else f"#{name}"
        else:
            tag[attribute] = path + (f"?{address.query}" if address.query else "")


def print_book(pages: pathlib.Path, out: pathlib.Path, browser: Browser) -> None:
    """Write the PDF."""
    page_file = pages / PRINT_NAME
    page_file.write_text(one_page(pages))
    page = browser.new_page(color_scheme="light")
    try:
        open_drawn(page, page_file.as_uri())
        page.pdf(
            path=str(out), format="A4", print_background=True, outline=True, tagged=True, display_header_footer=True,
            header_template="<span></span>", footer_template=FOOTER,
            margin={"top": "18mm", "bottom": "18mm", "left": "16mm", "right": "16mm"},
        )  # fmt: skip
    finally:
        page.close()
        page_file.unlink()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    with chromium() as started:
        print_book(pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]).resolve(), started)
    print(sys.argv[2])
