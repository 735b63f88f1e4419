"""Run notebooks and store their outputs, so that two runs of the same book give the same bytes.

Usage: store_outputs.py NOTEBOOK...   Stops, naming notebook and cell, at the first cell that fails.
The panels' states are stored too: JupyterLab shows them before anything is run. Names that change from run to run
(widget ids, execution times, the Python release) are replaced or dropped.
"""

import json
import pathlib
import re
import sys

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

WIDGET_STATE = "application/vnd.jupyter.widget-state+json"


def executed(path: pathlib.Path) -> str:
    """Run a notebook and return it with its outputs, as text. SystemExit names the notebook and the cell that fails."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)
    try:
        NotebookClient(
            notebook, timeout=120, coalesce_streams=True, resources={"metadata": {"path": str(path.parent)}}
        ).execute()
    except CellExecutionError as error:
        raise SystemExit(f"{path.name}, {failing_cell(notebook)}: {error}") from None
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return with_lasting_names(notebook, path.stem) + "\n"


def failing_cell(notebook: nbformat.NotebookNode) -> str:
    """The number, from 1, and the id of the first cell whose output is an error."""
    for number, cell in enumerate(notebook.cells, 1):
        if any(output.output_type == "error" for output in cell.get("outputs", [])):
            return f"cell {number} ({cell.id})"
    return "a cell that did not come to an end"


def with_lasting_names(notebook: nbformat.NotebookNode, name: str) -> str:
    """Number the widgets in the order in which they are met; chapters differ in the first digits."""
    text = nbformat.writes(notebook)
    found: list[str] = []
    for view in re.findall(r'"model_id": "([0-9a-f]{32})"', text):
        found.append(view)
        model = notebook.metadata["widgets"][WIDGET_STATE]["state"][view]
        found += re.findall(r"IPY_MODEL_([0-9a-f]{32})", json.dumps(model, sort_keys=True))
    chapter = int(re.match(r"\d*", name)[0] or 0)
    for number, random_name in enumerate(dict.fromkeys(found)):
        text = text.replace(random_name, f"{chapter:04d}{number:028x}")
    return nbformat.writes(nbformat.reads(text, as_version=4))  # the names were keys, and keys are sorted


if __name__ == "__main__":
    for path in map(pathlib.Path, sys.argv[1:]):
        text = executed(path)
        path.write_text(text)
        print(path, len(text) // 1024, "KiB")
