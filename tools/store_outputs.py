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


def store(path: pathlib.Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)
    try:
        NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(path.parent)}}).execute()
    except CellExecutionError as error:
        raise SystemExit(f"{path}: {error}") from None
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    text = nbformat.writes(notebook)
    names: list[str] = []
    for view in re.findall(r'"model_id": "([0-9a-f]{32})"', text):
        names.append(view)
        model = notebook.metadata["widgets"][WIDGET_STATE]["state"][view]
        names += re.findall(r"IPY_MODEL_([0-9a-f]{32})", json.dumps(model, sort_keys=True))
    for number, name in enumerate(dict.fromkeys(names)):
        text = text.replace(name, f"{number:032x}")
    text = nbformat.writes(nbformat.reads(text, as_version=4))  # the names were keys, and keys are sorted
    path.write_text(text + "\n")
    print(path, len(text) // 1024, "KiB")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        store(pathlib.Path(argument))
