"""Build the book: run the chapters, check what the pages need, and have Jupyter Book make HTML of them.

Usage: book.py [--stored] [--binder OWNER/REPO[@REF]] FOLDER   The pages are FOLDER/_build/html. A chapter is run only if it
or the package has changed since; ``--stored`` takes the outputs that are stored in the notebooks instead (tests compare
those with a run). With ``--binder`` each chapter links to itself on mybinder.org, in that repository of GitHub's.
Stops, naming notebook and cell, at whatever would be broken in the pages.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import nbformat
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import checks, made_pages, pages, store_outputs, vendor  # noqa: E402

# ---- the sources of the pages ----------------------------------------------------------------------------------------


def stage(root: pathlib.Path, source: pathlib.Path, stored: bool) -> None:
    """Bring together what Jupyter Book builds from."""
    for path in [root / "_config.yml", root / "_toc.yml", *sorted((root / "book").rglob("*"))]:
        if path.is_file():
            write(source / path.relative_to(root), path.read_bytes())
    for name, content in made_pages.made():
        write(source / name, content)
    write(source / "static/states.css", pages.states_style().encode())
    vendor.lay_out(source / "static/vendor")
    notebooks = sorted((root / "notebooks").glob("*.ipynb"))
    listed = {root / f"{file}.ipynb" for file in contents(root) if file.startswith("notebooks/")}
    if odd := listed.symmetric_difference(notebooks):
        raise SystemExit(
            f"in notebooks/ or in _toc.yml, but not in both: {', '.join(sorted(path.name for path in odd))}"
        )
    with ThreadPoolExecutor(2) as pool:
        executed = list(pool.map(lambda path: attempt(path, stored), notebooks))
    found = [said for said in executed if isinstance(said, str)]
    for path, ran in zip(notebooks, executed, strict=True):
        if isinstance(ran, pathlib.Path):
            notebook = nbformat.read(ran, as_version=4)
            found += [f"{path.relative_to(root)}: {problem}" for problem in checks.problems(notebook)]
            write(source / "notebooks" / path.name, nbformat.writes(for_the_page(notebook)).encode())
    if found:
        raise SystemExit("\n".join(found))


def attempt(path: pathlib.Path, stored: bool) -> pathlib.Path | str:
    """The executed notebook, or what is wrong with it."""
    try:
        return path if stored else run(path)
    except SystemExit as stopped:
        return str(stopped)


def contents(root: pathlib.Path) -> list[str]:
    """The pages in the order of the table of contents, without suffix."""
    toc = yaml.safe_load((root / "_toc.yml").read_text())
    return [toc["root"], *(chapter["file"] for part in toc.get("parts", []) for chapter in part["chapters"])]


def write(path: pathlib.Path, content: bytes) -> None:
    """Write a file, its folder too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


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


def for_the_page(notebook: Any) -> Any:
    """Our SVG pictures become part of the page, so that they take its colours, light or dark. Beside a widget stand, for who
    does not see it, the picture of how it begins, if there are no scripts, and its words, which are data in the page,
    hidden: Sphinx's search reads them, and nobody sees or hears them twice."""
    states = notebook.metadata.get("widgets", {}).get(checks.WIDGET_STATE, {}).get("state", {})
    for cell in notebook.cells:
        for output in list(cell.get("outputs", [])):
            drawn = output.get("data", {}).pop("image/svg+xml", "").replace("\n", "")
            picture = f'<div class="kvmbook-picture">{drawn}</div>' if drawn else ""
            if view := output.get("data", {}).get(checks.WIDGET_VIEW):
                words = html.escape("\n".join(words_of(states.get(view["model_id"], {}).get("state", {}))), quote=False)
                hidden = f'<div class="kvmbook-words" hidden>{words}</div>'
                still = f"<noscript>{picture}</noscript>" if picture else ""
                cell.outputs.append(nbformat.v4.new_output("display_data", {"text/html": hidden + still}))
            elif picture:
                output.data["text/html"] = picture
    return notebook


def words_of(model: dict[str, Any]) -> Iterator[str]:
    """What a search should find of a question or a guess, with its answer, and of a panel when the page is opened."""
    if "because" in model:
        yield from (model["asked"], *model["options"], model["because"])
        return
    yield from (model.get("title", ""), model.get("why", ""))
    settings = model.get("settings", [])
    for setting in settings:
        yield from (setting["name"], *setting["options"])
    first = " | ".join(setting["options"][0] for setting in settings)
    yield model.get("states", {}).get(first, {}).get("readout", "")


# ---- pages -----------------------------------------------------------------------------------------------------------


def build(
    folder: pathlib.Path, stored: bool = False, root: pathlib.Path = ROOT, binder: str | None = None
) -> pathlib.Path:
    """Build the pages of the book in ``root`` and return their folder. SystemExit says what is wrong, and where; then there
    are no pages. Nothing of an earlier build is kept, so what is gone from the book is gone from its pages."""
    source, built = folder / "source", folder / "_build/html"
    for old in (source, folder / "_build"):
        shutil.rmtree(old, ignore_errors=True)
    stage(root, source, stored)
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
        [*command, "--path-output", str(folder), str(source)], capture_output=True, text=True, check=False
    )
    printed = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr).replace(f"{source}/", "")
    wrong = [name_the_cell(line) for line in printed.splitlines() if "WARNING" in line or "ERROR" in line]
    if not wrong and (done.returncode or not (built / "index.html").exists()):
        wrong = [printed[-3000:]]
    if not wrong:
        drop_unread(built)
        empty_downloads(built)
        pages.finish(built, contents(root))
        if binder:
            pages.link_to_binder(built, contents(root), binder)
    if wrong := wrong or checks.broken(built, contents(root), root):
        shutil.rmtree(built, ignore_errors=True)
        raise SystemExit("\n".join(["the pages were not built:", *wrong]))
    return built


def drop_unread(built: pathlib.Path) -> None:
    """Remove what no reader's browser asks for: where the theme's scripts come from, and its words in other languages."""
    for source_map in (built / "_static").rglob("*.map"):
        source_map.unlink()
    shutil.rmtree(built / "_static/locales", ignore_errors=True)


def empty_downloads(built: pathlib.Path) -> None:
    """A notebook that a reader takes home from a page is run there: its outputs, with all that its widgets carry, are not in
    it."""
    for path in (built / "_sources").rglob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        notebook.metadata.pop("widgets", None)
        nbformat.write(notebook, path)


def name_the_cell(warning: str) -> str:
    """In warnings myst-nb counts 10,000 lines for each cell, and one more: say which cell and line that is."""
    return re.sub(
        r"\.ipynb:(\d{5,})",
        lambda match: f".ipynb, cell {int(match[1]) // 10000}, line {int(match[1]) % 10000 - 1}",
        warning,
    )


def repository(written: str) -> str:
    """OWNER/REPO[@REF], as it is given to ``--binder``."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", written):
        raise argparse.ArgumentTypeError(f"{written!r} is not OWNER/REPO or OWNER/REPO@REF")
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--stored", action="store_true", help="take the outputs stored in the notebooks; run nothing")
    parser.add_argument(
        "--binder", type=repository, metavar="OWNER/REPO[@REF]", help="link each chapter to itself on mybinder.org"
    )
    options = parser.parse_args()
    print(build(options.folder.resolve(), options.stored, binder=options.binder) / "index.html")
