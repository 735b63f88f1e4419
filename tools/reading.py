"""Open the book in JupyterLab: a reader's own copy of it, so that reading, running and answering change nothing of the book.

Usage: reading.py [--sources]   Prints an address, and opens a browser if there is a screen. The copy is reading/.
With --sources the book itself is opened, for its authors.

The copy is kept from one start to the next and follows the book, but what a reader has written is never replaced. That is
the cells of a notebook: outputs and metadata are rewritten by running and saving. Needs only what `make lab` installs.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterable, Iterator

import nbformat
from jupyter_core import paths
from nbformat.sign import NotebookNotary

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import made_pages  # noqa: E402

COPY = ROOT / "reading"
FIRST = "notebooks/01-a-write-that-nobody-saw.ipynb"
DELIVERED = ".delivered.json"  # in the copy: for each file, hashes of it and of what is written in it, as delivered

# ---- the copy --------------------------------------------------------------------------------------------------------


def deliver(copy: pathlib.Path, root: pathlib.Path = ROOT) -> list[str]:
    """Bring a copy up to date with the book in ``root``. Return a sentence for each file that a reader has changed and that
    was kept though the book has another one by now."""
    book, delivered, kept = dict(files(root)), manifest(copy), []
    for name in sorted({*book, *delivered}):
        path, before = copy / name, delivered.get(name, {})
        own = written(name, path.read_bytes()) if path.exists() else None
        if name not in book:
            if own == before["written"]:
                path.unlink()
            elif own:
                kept.append(f"{copy.name}/{name}: the book no longer has it; yours was kept.")
            del delivered[name]
            continue
        now = {"file": digest(book[name]), "written": written(name, book[name])}
        if own is None or (now != before and own in (before.get("written"), now["written"])):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(book[name])
            delivered[name] = now
        elif now != before:
            kept.append(
                f"{copy.name}/{name}: the book has a newer one; yours was kept, for you have changed it. "
                "To get the new one, rename or delete yours and start again."
            )
    (copy / DELIVERED).write_text(json.dumps(delivered, indent=1))
    return kept


def files(root: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """What a reader gets: the chapters and all that they link to, by its path in the book."""
    for path in sorted([*(root / "notebooks").rglob("*"), *(root / "book").rglob("*")]):
        name = path.relative_to(root)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            yield str(name), path.read_bytes()
    yield from made_pages.made()


def manifest(copy: pathlib.Path) -> dict[str, dict[str, str]]:
    """What was delivered; nothing if that cannot be told, and then all that differs from the book counts as changed."""
    try:
        found: dict[str, dict[str, str]] = json.loads((copy / DELIVERED).read_text())
        return found
    except (OSError, ValueError):
        return {}


def digest(content: bytes) -> str:
    """A name for these bytes."""
    return hashlib.sha256(content).hexdigest()


def written(name: str, content: bytes) -> str:
    """A name for what somebody wrote in a file: in a notebook its cells, less the empty one that running the last adds."""
    if name.endswith(".ipynb"):
        try:
            cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(content)["cells"]]
            return digest(json.dumps([cell for cell in cells if cell[1].strip()]).encode())
        except (ValueError, KeyError, TypeError):
            pass  # it is no notebook any more
    return digest(content)


# ---- JupyterLab ------------------------------------------------------------------------------------------------------


def folders(own: pathlib.Path) -> dict[str, str]:
    """The variables that give Jupyter, IPython and matplotlib folders in ``own`` instead of the user's."""
    places = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "share", "JUPYTER_RUNTIME_DIR": "runtime"}
    places |= {"IPYTHONDIR": "ipython", "MPLCONFIGDIR": "matplotlib"}
    return {name: str(own / place) for name, place in places.items()}


def environment(own: pathlib.Path) -> dict[str, str]:
    """The variables for JupyterLab. A user's own folders and settings are used where they can be written in; for those that
    cannot there are others in ``own``."""
    users = {
        "JUPYTER_CONFIG_DIR": paths.jupyter_config_dir(),
        "JUPYTER_DATA_DIR": paths.jupyter_data_dir(),
        "JUPYTER_RUNTIME_DIR": paths.jupyter_runtime_dir(),
        "IPYTHONDIR": os.environ.get("IPYTHONDIR", "~/.ipython"),
        "MPLCONFIGDIR": os.environ.get("MPLCONFIGDIR", "~/.config/matplotlib"),
    }
    instead = {name: place for name, place in folders(own).items() if not can_write(users[name])}
    return {"JUPYTER_DATA_DIR": users["JUPYTER_DATA_DIR"], **os.environ, **instead}


def can_write(folder: str) -> bool:
    """Whether something can be put into a folder, which is made if it is not there."""
    try:
        path = pathlib.Path(folder).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except (OSError, RuntimeError):  # the latter if nobody knows where home is
        return False
    return True


def trust(notebooks: Iterable[pathlib.Path], data: str) -> None:
    """Sign notebooks: a trusted one shows its panels before anything is run. ``data`` is Jupyter's data folder."""
    pathlib.Path(data).mkdir(parents=True, exist_ok=True)
    notary = NotebookNotary(data_dir=data)
    for path in notebooks:
        try:
            notary.sign(nbformat.read(path, as_version=4))
        except Exception as error:  # whatever somebody has made of it: it is shown untrusted, or not at all
            print(f"{path.name} cannot be read as a notebook: {error}")
    notary.store.close()


def server(folder: pathlib.Path) -> list[str]:
    """The command that serves a folder."""
    as_root = ["--allow-root"] * (os.geteuid() == 0)
    return [sys.executable, "-m", "jupyterlab", *as_root, f"--ServerApp.root_dir={folder}"]


def has_screen() -> bool:
    """Whether a browser can be shown; one for terminals would only be in the way of the address."""
    return sys.platform != "linux" or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")))


def start(sources: bool) -> None:
    """Become the server."""
    folder = ROOT if sources else COPY
    if sources:
        for name, content in made_pages.made():
            (ROOT / name).write_bytes(content)
    else:
        for said in deliver(COPY):
            print(said)
    variables = environment(pathlib.Path(sys.prefix, "home"))
    trust(sorted((folder / "notebooks").glob("*.ipynb")), variables["JUPYTER_DATA_DIR"])
    command = [
        *server(folder),
        f"--LabApp.default_url=/lab/tree/{FIRST}",
        "--log-level=WARN",
        "--LabApp.log_level=WARN",
    ]
    command += [] if has_screen() else ["--no-browser"]
    where = "the book itself" if sources else "your copy of the book, in reading/; what you write there is kept"
    print(f"JupyterLab shows {where}. Control-C, twice, ends it. Its address:", flush=True)
    os.execve(command[0], command, variables)


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--sources"]):
        raise SystemExit(__doc__)
    try:
        start("--sources" in sys.argv)
    except OSError as error:
        raise SystemExit(f"{error}; the folder of kvmbook must be yours to write in") from None
