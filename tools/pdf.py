"""Print the built pages as one PDF file.

Usage: pdf.py PAGES OUT.pdf   PAGES is the folder that book.py has built. The chapters are put into one page, in the order of
the table of contents, so that links lead inside the file and page numbers run through. The solutions come after the
chapters, so that no exercise has its answer below it; of the function map, which is to be searched, paper has one half.
"""

from __future__ import annotations

import pathlib
import posixpath
import re
import sys
from typing import Any
from urllib.parse import urlsplit

from bs4 import BeautifulSoup
from playwright.sync_api import Browser

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.book import contents  # noqa: E402
from tools.browser import chromium, open_drawn  # noqa: E402
from tools.checks import WIDGET_STATE  # noqa: E402

FOOTER = '<div style="font-size: 8px; width: 100%; text-align: center"><span class="pageNumber"></span></div>'
BACK_IS_ON_THE_PAGES = "This part is on the book's pages only: the same, room by room. So are the model's docstrings."
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
    assert whole.head is not None and whole.body is not None and whole.title is not None
    for tag in whole.head.find_all(True):
        relocate(tag, front, {})
    for script in whole.head.find_all("script", type=WIDGET_STATE):
        script.extract()
    articles: dict[str, Any] = {}
    solutions, last = article_of(whole, "solutions", "Solutions"), ""  # after the last chapter that has any
    for file, name in names.items():
        page = BeautifulSoup((pages / f"{file}.html").read_text(), "html.parser")
        article = page.find("article")
        assert article is not None and article.find("h1") is not None, file
        article["id"] = name
        for tag in article.find_all(True):
            relocate(tag, file, names)
        for state in page.find_all("script", type=WIDGET_STATE):
            whole.head.append(state.extract())
        for details in article.find_all("details"):
            details["open"] = ""
        if solved := article.select(".cell.tag_solution"):
            solutions.append(heading_of(whole, title_of(article), "h2"))
            for number, cell in enumerate(solved, 1):
                solutions.append(moved(whole, name, number, cell))
            last = name
        articles[name] = article.extract()
    make_compact(whole, articles["function-map"])
    articles["cheat-sheet"]["class"] = "kvmbook-sheet"
    parts = list(articles.items())
    parts.insert(list(articles).index(last) + 1, ("solutions", solutions))
    whole.body.clear()
    whole.body["class"] = "kvmbook-print"
    first, *others = [article for _, article in parts]
    listed = whole.new_tag("ol", attrs={"class": "kvmbook-contents"})
    for name, article in parts:
        item = whole.new_tag("li")
        item.append(whole.new_tag("a", href=f"#{name}", string=title_of(article)))
        listed.append(item)
    table = whole.new_tag("article")
    table.extend([heading_of(whole, "Contents", "h2"), listed])
    whole.body.extend([first, table, *others])
    whole.title.string = "kvmbook"
    return str(whole)


def title_of(article: Any) -> str:
    """The heading of an article."""
    return str(article.find("h1").get_text()).removesuffix("#")


def article_of(whole: BeautifulSoup, name: str, title: str) -> Any:
    """A new article with a heading."""
    article = whole.new_tag("article", id=name)
    article.append(heading_of(whole, title, "h1"))
    return article


def heading_of(whole: BeautifulSoup, title: str, level: str, name: str = "") -> Any:
    """A heading."""
    return whole.new_tag(level, string=title, attrs={"id": name} if name else {})


# ---- what paper has in another place, or shorter ---------------------------------------------------------------------


def moved(whole: BeautifulSoup, chapter: str, number: int, cell: Any) -> Any:
    """A solution, taken from its chapter, with a heading; the line above it in the chapter says where it is now."""
    exercise = cell.find_previous("strong", string=re.compile(rf"^{number}\. "))
    line = cell.find_previous_sibling("p")
    assert exercise is not None and line is not None and f"Solution of {number}" in line.get_text(), (chapter, number)
    name = f"{chapter}-solution-{number}"
    line.clear()
    line.extend([f"Solution of {number}: ", whole.new_tag("a", href=f"#{name}", string="after the chapters"), "."])
    exercise["id"] = f"{chapter}-exercise-{number}"
    solution = whole.new_tag("section")
    heading = heading_of(whole, "", "h3", name)
    heading.append(whole.new_tag("a", href=f"#{exercise['id']}", string=exercise.get_text().rstrip(".")))
    solution.extend([heading, cell.extract()])
    return solution


def make_compact(whole: BeautifulSoup, article: Any) -> None:
    """The function map for paper: a line for each of the kernel's names, in two columns, and not the way back."""
    article["class"] = "kvmbook-compact"
    back = article.find(id=re.compile("from-kvmbook-to-the-kernel$"))
    for room in back.find_all("section"):
        room.decompose()
    back.append(whole.new_tag("p", string=BACK_IS_ON_THE_PAGES))
    for folded in article.find_all("details"):
        folded.insert_before(folded.find("h3"))
        folded.find("summary").decompose()
        folded.unwrap()
    for table in article.find_all("table"):
        table.find_previous("h2").parent["class"] = "kvmbook-columns"
        for row in table.select("tbody tr"):
            line = whole.new_tag("p", attrs={key: row[key] for key in ("id",) if key in row.attrs})
            line["class"] = "kvmbook-line"
            for place, cell in enumerate(row.find_all("td")):
                line.extend([", " if place > 1 else ": " if place else "", *list(cell.find("p").children)])
            table.insert_before(line)
        table.decompose()


# ---- one page --------------------------------------------------------------------------------------------------------


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
    try:
        print_page(page_file, out, browser)
    finally:
        page_file.unlink()


def print_page(page_file: pathlib.Path, out: pathlib.Path, browser: Browser) -> None:
    """Print one page, when its widgets are drawn."""
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


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    with chromium() as started:
        print_book(pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]).resolve(), started)
    print(sys.argv[2])
