"""Build the book: run the chapters, check what the pages need, and have Jupyter Book make HTML of them.

Usage: book.py [--stored] FOLDER   The pages are FOLDER/html. A chapter is run only if it or the package has changed since;
``--stored`` takes the outputs that are stored in the notebooks instead (tests compare those with a run).
Stops, naming notebook and cell, at whatever would be broken in the pages.
"""

from __future__ import annotations

import argparse
import hashlib
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import nbformat
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import function_map, store_outputs, vendor  # noqa: E402

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


# ---- what the pages need ---------------------------------------------------------------------------------------------


def problems(notebook: Any) -> Iterator[str]:
    """What would be broken in the page of an executed notebook, each with the number of its cell, from 1."""
    states = notebook.metadata.get("widgets", {}).get(store_outputs.WIDGET_STATE, {}).get("state", {})
    for number, cell in enumerate(notebook.cells, 1):
        for said in (*_without_alt_text(cell), *_not_frozen(cell, states)):
            yield f"cell {number} ({cell.id}): {said}"


def _without_alt_text(cell: Any) -> Iterator[str]:
    if cell.cell_type == "markdown":
        yield from (f"an image without alt text: {tag}" for tag in re.findall(r"!\[\s*\]\([^)]*\)", cell.source))
        yield from (
            f"an image without alt text: {t}" for t in re.findall(r"<img(?![^>]*\balt=\"[^\"])[^>]*>", cell.source)
        )
    for output in cell.get("outputs", []):
        shown = output.get("data", {})
        if "image/svg+xml" in shown and not re.search(r"<title>[^<]+</title>", shown["image/svg+xml"]):
            yield "a picture without a <title>, its alt text"
        if "image/png" in shown and not cell.metadata.get("mystnb", {}).get("image", {}).get("alt"):
            yield 'a plot without alt text; give it in the cell\'s metadata: {"mystnb": {"image": {"alt": "..."}}}'


def _not_frozen(cell: Any, states: dict[str, Any]) -> Iterator[str]:
    """A panel is frozen if it brings its own view and a state for each combination of its settings."""
    for output in cell.get("outputs", []):
        if WIDGET_VIEW not in output.get("data", {}):
            continue
        model = states.get(output["data"][WIDGET_VIEW]["model_id"], {}).get("state", {})
        if "_esm" not in model:
            yield f"a widget that needs a kernel: {model.get('_model_name', 'its state is not stored')}"
            continue
        combinations = product(*(setting["options"] for setting in model.get("settings", [])))
        missing = [c for c in combinations if model.get("settings") and " | ".join(c) not in model["states"]]
        if missing:
            such = " | ".join(missing[0])
            yield f"panel {model.get('title')!r} does not carry {len(missing)} of its combinations, such as {such}"


# ---- the sources of the pages ----------------------------------------------------------------------------------------


def stage(root: pathlib.Path, source: pathlib.Path, stored: bool) -> None:
    """Bring the folder that Jupyter Book builds from up to date; a file that would not change is not touched."""
    for path in [root / "_config.yml", root / "_toc.yml", *sorted((root / "book").rglob("*"))]:
        if path.is_file():
            write(source / path.relative_to(root), path.read_bytes())
    write(source / "book/function-map.md", function_map.markdown().encode())
    vendor.fetch(ROOT / "build/vendor")
    for package in ("requirejs", "html-manager", "mathjax"):
        shutil.copytree(ROOT / "build/vendor" / package, source / "static/vendor" / package, dirs_exist_ok=True)
    write(source / "static/vendor/anywidget.js", anywidget_js().read_bytes())
    write(source / "static/vendor/widgets.js", (ROOT / "tools/widgets.js").read_bytes())
    chapters = [root / f"{file}.ipynb" for file in contents(root) if file.startswith("notebooks/")]
    with ThreadPoolExecutor(2) as pool:
        executed = list(pool.map(lambda path: path if stored else run(path), chapters))
    for path, ran in zip(chapters, executed, strict=True):
        notebook = nbformat.read(ran, as_version=4)
        if found := list(problems(notebook)):
            raise SystemExit("\n".join(f"{path.relative_to(root)}: {problem}" for problem in found))
        write(source / "notebooks" / path.name, nbformat.writes(with_inline_pictures(notebook)).encode())


def contents(root: pathlib.Path) -> list[str]:
    """The pages in the order of the table of contents, without suffix."""
    toc = yaml.safe_load((root / "_toc.yml").read_text())
    return [toc["root"], *(chapter["file"] for part in toc.get("parts", []) for chapter in part["chapters"])]


def write(path: pathlib.Path, content: bytes) -> None:
    """Write a file unless it has this content already: what is not touched is not built again."""
    if not path.exists() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def anywidget_js() -> pathlib.Path:
    """The part of anywidget that runs in the browser, as its Python package installs it."""
    return pathlib.Path(sys.prefix, "share/jupyter/nbextensions/anywidget/index.js")


def run(path: pathlib.Path) -> pathlib.Path:
    """Run a notebook if that has not been done since it or the package changed; return the executed copy."""
    package = [file for file in sorted((ROOT / "kvmbook").rglob("*")) if file.suffix in (".py", ".js", ".css")]
    key = hashlib.sha256(b"".join(file.read_bytes() for file in [path, *package])).hexdigest()[:16]
    executed = ROOT / "build/executed" / f"{path.stem}.{key}.ipynb"
    if not executed.exists():
        executed.parent.mkdir(parents=True, exist_ok=True)
        for old in executed.parent.glob(f"{path.stem}.*"):
            old.unlink()
        executed.write_text(store_outputs.executed(path))
    return executed


def with_inline_pictures(notebook: Any) -> Any:
    """Our SVG pictures become part of the page, so that they take its colours, light or dark."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if drawn := output.get("data", {}).pop("image/svg+xml", ""):
                one_line = drawn.replace("\n", "")
                output.data["text/html"] = f'<div class="kvmbook-picture">{one_line}</div>'
    return notebook


# ---- pages -----------------------------------------------------------------------------------------------------------


def build(folder: pathlib.Path, stored: bool = False, root: pathlib.Path = ROOT) -> pathlib.Path:
    """Build the pages of the book in ``root`` and return their folder. SystemExit says what is wrong, and where."""
    stage(root, folder / "source", stored)
    command = [
        sys.executable,
        "-c",
        "from jupyter_book.cli.main import main; main()",
        "build",
        "-W",
        "--keep-going",
        "-q",
    ]
    done = subprocess.run(
        [*command, "--path-output", str(folder), str(folder / "source")], capture_output=True, text=True, check=False
    )
    printed = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr).replace(f"{folder / 'source'}/", "")
    warnings = [line for line in printed.splitlines() if "WARNING" in line or "ERROR" in line]
    pages = folder / "_build/html"
    if done.returncode or warnings or not (pages / "index.html").exists():
        said = "\n".join(map(name_the_cell, warnings)) or printed[-3000:]
        raise SystemExit(f"the pages were not built:\n{said}")
    return pages


def name_the_cell(warning: str) -> str:
    """In warnings myst-nb counts 10,000 lines for each cell: say which cell that is."""
    return re.sub(
        r"\.ipynb:(\d{5,})",
        lambda match: f".ipynb, cell {int(match[1]) // 10000}, line {int(match[1]) % 10000}",
        warning,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--stored", action="store_true", help="take the outputs stored in the notebooks; run nothing")
    options = parser.parse_args()
    print(build(options.folder.resolve(), options.stored) / "index.html")
