"""The house keeps its rules: imports go one way, types and style hold, what is declared twice agrees, notebooks are tidy."""

import ast
import json
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# From the ground up: a module may import those before it, and nobody else.
ORDER = [
    "views", "arrays", "spte", "tlb", "hardware", "kernel", "host", "memslots", "page_tables", "machine", "access_tracking",
    "huge_pages", "wrprot", "faults", "memory_regions", "dirty_log", "vm", "invariants", "schedule", "cells", "tables",
    "explore", "products", "anynumber", "flush_rules", "scenes", "slot_scenes", "runs", "figures", "word_figures", "decoding",
    "run_figures", "panels", "slot_panels", "inspector", "scheduler", "quiz", "exercises",
]  # fmt: skip


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_go_one_way():
    files = [path.relative_to(ROOT / "kvmbook") for path in (ROOT / "kvmbook").rglob("*.py")]
    rooms = {path: path.parts[0].removesuffix(".py") for path in files if str(path) != "__init__.py"}
    assert set(rooms.values()) == set(ORDER)
    for path, name in rooms.items():
        for imported in imports_of(ROOT / "kvmbook" / path):
            room = imported.removeprefix("kvmbook.").split(".")[0]
            if imported.startswith("kvmbook.") and room in ORDER and room != name:
                assert ORDER.index(room) < ORDER.index(name), f"{path} imports {room}, which lies above it"


def test_importing_kvmbook_imports_neither_matplotlib_nor_ipywidgets():
    heavy = "('matplotlib', 'ipywidgets', 'anywidget')"
    code = f"import sys, kvmbook, kvmbook.figures; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_no_function_is_longer_than_a_screen():
    for path in (ROOT / "kvmbook").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"


@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]], ids=" ".join)
def test_style_and_types(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_environment_yml_is_in_step_with_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line.strip() for line in (ROOT / "environment.yml").read_text().splitlines()]
    packages = [line[2:] for line in lines if line.startswith("- ") and not line.endswith(":")]
    wanted = {f"{package}" for package in project["dependencies"]}
    assert wanted <= set(packages)
    assert set(packages) - wanted == {"conda-forge", "python=3.12", "pip", "-e ."}


def test_ci_runs_the_readmes_test_command():
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("\nmake test")
    assert "make lab" in (ROOT / "README.md").read_text() and "make test" in (ROOT / "README.md").read_text()


def test_the_readmes_ten_lines_print_what_the_readme_says_also_at_a_prompt():
    readme = (ROOT / "README.md").read_text()
    code, printed = re.search(r"```python\n(.*?)```\n.*?```text\n(.*?)```", readme, re.S).groups()
    for options in ([], ["-i", "-q"]):
        done = subprocess.run([sys.executable, *options], input=code, capture_output=True, text=True, check=True)
        assert done.stdout == printed


def test_the_readmes_map_names_every_room():
    readme = (ROOT / "README.md").read_text()
    for name in ORDER:
        assert f"`{name}.py`" in readme or f"`{name}/`" in readme, name


# ---- notebooks -------------------------------------------------------------------------------------------------------

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))  # the chapters


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_tidy(path):
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        source = "".join(cell["source"])
        solution = "solution" in cell["metadata"].get("tags", [])
        assert solution or len(source.splitlines()) <= 8, source
        assert solution == cell["metadata"].get("jupyter", {}).get("source_hidden", False)
        assert "print(" not in source or cell["outputs"] or "def " in source, f"prints, but stores no output: {source}"
        for output in cell["outputs"]:
            assert output["output_type"] != "error" and output.get("name") != "stderr"
    text = "".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    for part in ("Before you read", "## In the kernel", "## Quiz", "## Exercises", "## Synopsis"):
        assert part in text, part
    assert text.count("*Solution of ") == 3


@pytest.mark.parametrize("path", NOTEBOOKS[:3], ids=lambda path: path.stem)  # those whose first number is soon there
def test_the_strict_check_notices_a_falsified_number(path, tmp_path):
    """nbval compares: the first number that a chapter prints, changed in its stored output, makes it fail."""
    notebook = json.loads(path.read_text())
    printed = [
        (number, output)
        for number, cell in enumerate(notebook["cells"])
        for output in cell.get("outputs", [])
        if re.search(r"\d", "".join(output.get("text", [])))
    ]
    number, output = printed[0]
    output["text"] = re.sub(r"\d+", "999", "".join(output["text"]), count=1)
    del notebook["cells"][number + 1 :]
    (tmp_path / path.name).write_text(json.dumps(notebook))
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-q", "-p", "no:cacheprovider", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Cell outputs differ" in done.stdout, done.stdout[-500:]
