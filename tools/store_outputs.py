"""Run notebooks and store their outputs, so that two runs of the same book give the same bytes.

Usage: store_outputs.py NOTEBOOK...   Stops, naming notebook and cell, at the first cell that fails.
The panels' states are stored too: JupyterLab shows them before anything is run. Names that change from run to run
(widget ids, execution times, the Python release) are replaced or dropped.
"""

import pathlib
import re
import sys

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.checks import WIDGET_STATE, models_of  # noqa: E402

TIMEOUT = 120  # seconds a cell


def executed(path: pathlib.Path) -> str:
    """Run a notebook and return it with its outputs, as text. SystemExit names the notebook and the cell that fails."""
    try:
        notebook = nbformat.read(path, as_version=4)
    except (OSError, nbformat.reader.NotJSONError) as error:
        raise SystemExit(f"{path.name}: {error}") from None
    notebook.metadata.pop("widgets", None)
    running = ["before its first cell"]

    def remember(cell: nbformat.NotebookNode, cell_index: int) -> None:
        running[0] = f"cell {cell_index + 1} ({cell.id})"

    resources = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(
        notebook, timeout=TIMEOUT, coalesce_streams=True, resources=resources, on_cell_start=remember
    )
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise SystemExit(f"{path.name}, {running[0]}: {error}") from None
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return with_lasting_names(notebook, path.stem) + "\n"


def with_lasting_names(notebook: nbformat.NotebookNode, name: str) -> str:
    """Keep the widgets that are shown, and number them in the order in which they are met; chapters differ in the first
    digits."""
    text = nbformat.writes(notebook)
    states = notebook.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    met = models_of(re.findall(r'"model_id": "([0-9a-f]{32})"', text), states)
    for model in set(states) - set(met):  # such as a progress bar that is gone
        del states[model]
    text = nbformat.writes(notebook)
    chapter = int(re.match(r"\d*", name)[0] or 0)
    for number, random_name in enumerate(met):
        text = text.replace(random_name, f"{chapter:04d}{number:028x}")
    return nbformat.writes(nbformat.reads(text, as_version=4))  # the names were keys, and keys are sorted


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    for path in map(pathlib.Path, sys.argv[1:]):
        text = executed(path)
        path.write_text(text)
        print(path, len(text) // 1024, "KiB")
