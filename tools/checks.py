"""What a page must not be: broken. Asked of a notebook before its page is built, and of the pages when they are."""

from __future__ import annotations

import functools
import json
import pathlib
import re
from collections.abc import Iterator
from itertools import product
from typing import Any
from urllib.parse import unquote, urlsplit

import nbformat
from bs4 import BeautifulSoup

WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def models_of(shown: list[str], states: dict[str, Any]) -> list[str]:
    """These widgets and all that they refer to, in the order in which they are met."""
    met = dict.fromkeys(shown)
    for model in (queue := list(met)):  # grows while we go
        inner = [one for one in re.findall(r"IPY_MODEL_([0-9a-f]{32})", json.dumps(states[model])) if one not in met]
        met.update(dict.fromkeys(inner))
        queue += dict.fromkeys(inner)
    return list(met)


# ---- a notebook ------------------------------------------------------------------------------------------------------


def problems(notebook: Any) -> Iterator[str]:
    """What would be broken in the page of an executed notebook, each with the number of its cell, from 1."""
    states = notebook.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    for number, cell in enumerate(notebook.cells, 1):
        for output in cell.get("outputs", []):
            for said in (*_failed(output), *_without_alt_text(cell, output), *_not_frozen(output, states)):
                yield f"cell {number} ({cell.id}): {said}"


def _failed(output: Any) -> Iterator[str]:
    if output.output_type == "error":
        yield f"it raises {output.ename}"
    if output.get("name") == "stderr":
        yield f"it prints to stderr: {output.text.strip()[:80]}"


def _without_alt_text(cell: Any, output: Any) -> Iterator[str]:
    shown = output.get("data", {})
    if "image/svg+xml" in shown and not has_title(shown["image/svg+xml"]):
        yield "a picture without a <title>, its alt text"
    if {"image/png", "image/jpeg"} & set(shown) and not cell.metadata.get("mystnb", {}).get("image", {}).get("alt"):
        yield 'a plot without alt text; give it in the cell\'s metadata: {"mystnb": {"image": {"alt": "..."}}}'


def has_title(drawn: str) -> bool:
    """Whether an SVG picture says in words what it shows."""
    return re.search(r"<title[^>]*>\s*[^<\s]", drawn) is not None


def _not_frozen(output: Any, states: dict[str, Any]) -> Iterator[str]:
    """A panel is frozen if it brings its own view and a state for each combination of its settings."""
    if WIDGET_VIEW not in output.get("data", {}):
        return
    model = states.get(output["data"][WIDGET_VIEW]["model_id"], {}).get("state", {})
    if "_esm" not in model:
        yield f"a widget that needs a kernel: {model.get('_model_name', 'its state is not stored')}"
    elif settings := model.get("settings", []):
        combinations = [" | ".join(c) for c in product(*(setting["options"] for setting in settings))]
        if missing := [key for key in combinations if key not in model["states"]]:
            yield f"panel {model.get('title')!r} does not carry {len(missing)} of its combinations, such as {missing[0]}"
        untitled = [key for key, state in model["states"].items() if "svg" in state and not has_title(state["svg"])]
        if untitled:
            yield f"panel {model.get('title')!r} has {len(untitled)} pictures without a <title>, such as of {untitled[0]}"


# ---- the built pages -------------------------------------------------------------------------------------------------


def broken(pages: pathlib.Path, files: list[str], root: pathlib.Path) -> list[str]:
    """What is broken in the built pages ``files`` (without suffix): dead addresses, images without alt text, references
    that nobody resolved, and what comes from another host. Each with the notebook and the cell, if it stands there."""
    found = []
    for file in files:
        for said, written in _broken_in(pages, file):
            found.append(f"{_place(root, file, written)}: {said}")
    return found


@functools.cache
def _page(path: pathlib.Path, changed: int) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(), "html.parser")


def _read(path: pathlib.Path) -> BeautifulSoup:
    return _page(path, path.stat().st_mtime_ns)


def _broken_in(pages: pathlib.Path, file: str) -> Iterator[tuple[str, str]]:
    """What is wrong in a page, and what to look for in its source."""
    path = pages / f"{file}.html"
    for tag in _read(path).find_all(["a", "img", "script", "link", "iframe", "source", "svg"]):
        written = str(tag.get("href") or tag.get("src") or "")
        address = urlsplit(written)
        if address.netloc and tag.name != "a" and tag.get("rel") != ["canonical"]:
            yield f"<{tag.name}> asks another host: {written}", written
        elif not address.scheme and not address.netloc and written and not _there(path, address.path, address.fragment):
            yield f"a dead link: {written}", written
        if tag.name == "img" and not str(tag.get("alt") or "").strip():
            yield f"an image without alt text: {written}", pathlib.PurePosixPath(address.path).name
        if tag.name == "svg" and tag.get("role") == "img" and not has_title(str(tag)):
            yield "a picture without a <title>, its alt text", "<svg"
    article = _read(path).find("article")
    for text in article.find_all(string=re.compile(r"\[\^[^\]]+\]|\]\[[^\]]*\]")) if article else []:
        if not text.find_parent(["code", "pre", "script", "svg", "style"]):
            yield f"a reference that leads nowhere: {text.strip()[:80]}", text.strip()


def _there(page: pathlib.Path, path: str, fragment: str) -> bool:
    target = (page.parent / unquote(path)).resolve() if path else page
    if target.is_dir() or not target.exists():
        return False
    if not fragment or target.suffix != ".html":
        return True
    return _read(target).find(id=unquote(fragment)) is not None


def _place(root: pathlib.Path, file: str, written: str) -> str:
    """The notebook and the cell in whose text something is written; the page's source if that cannot be said."""
    source = root / f"{file}.ipynb"
    if not source.exists():
        return f"{file}.md"
    cells = nbformat.read(source, as_version=4).cells
    number = next((n for n, cell in enumerate(cells, 1) if written and written in cell.source), None)
    return f"{file}.ipynb" + (f", cell {number} ({cells[number - 1].id})" if number else "")
