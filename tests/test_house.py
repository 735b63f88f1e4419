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
# From the ground up: a wing may import from those before it, by their face; a room from those before it in its wing.
WINGS = {
    "model": [
        "compiled", "arrays", "spte", "layout", "spte_rules", "tlb", "host", "hardware", "switches", "kernel",
        "memslots", "page_tables", "machine", "access_tracking", "guest_memory", "huge_pages", "wrprot", "faults",
        "memory_regions", "dirty_log", "vm", "invariants",
    ],
    "real": [
        "abi", "device", "guest", "watchdog", "host", "vcpu", "vm", "offers", "modelled", "calls", "machines", "questions",
        "sequences", "differ", "interrupted", "emulated", "tracepoints", "traced_sptes", "judging", "replaying", "trace",
        "__main__",
    ],
    "search": [
        "schedule", "playing", "selftest", "recorder", "cells", "tables", "pagewise", "space", "levels", "explore",
        "products", "anynumber", "flush_rules", "configurations", "userspace", "known_faults", "litmus",
        "random_runs", "hunt", "cast", "museum", "sweep", "__main__",
    ],
    "scenes": [
        "enabling", "ageing", "faulting", "slots", "writes", "words", "decoding", "remembering", "reasons",
        "beside", "runs", "losses", "museum", "relaxing", "store", "migration", "chances",
    ],
    "views": [
        "scripts", "results", "drawing", "figures", "word_figures", "run_figures", "widget", "panel", "enabling_panels",
        "ageing_panel", "slot_panels", "remembering_panel", "faulting_panel", "writes_panel", "reasons_panel",
        "rules_panel", "beside_panel", "losses_panel", "museum_panel", "relaxing_panel",
        "migration_panel", "inspector", "scheduler", "quiz", "guess", "book_map",
    ],
    "exercises": [
        "mechanism", "vms", "ch01", "ch02", "ch03", "ch04", "ch05", "ch06", "ch07", "ch08", "ch09", "ch10",
        "ch11", "ch12", "ch13", "ch14", "ch15", "ch16",
    ],
}  # fmt: skip
PACKAGE = ROOT / "kvmbook"
NAMED_AS_THEIR_ROOM = ("explore", "hunt", "sweep", "book_map")


def imports_of(path):
    """The modules that a file imports; ``from kvmbook.model import faults`` imports a room too, but `NAMED_AS_THEIR_ROOM` are
    functions that a face hands on."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            rooms = WINGS.get(node.module.removeprefix("kvmbook."), []) if node.module.startswith("kvmbook.") else []
            inside = [
                f"{node.module}.{alias.name}"
                for alias in node.names
                if alias.name in rooms and alias.name not in NAMED_AS_THEIR_ROOM
            ]
            yield from inside or [node.module]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room_of(path):
    """(wing, room) of a file of the package; the room of a face is ""."""
    wing, *room = path.relative_to(PACKAGE).with_suffix("").parts
    return wing, "" if room == ["__init__"] else ".".join(room)


ROOMS = sorted(path for wing in WINGS for path in (PACKAGE / wing).rglob("*.py"))


def test_tests_have_one_conftest():
    """Tests import from it by its name, which a folder's own would take."""
    assert list((ROOT / "tests").rglob("conftest.py")) == [ROOT / "tests/conftest.py"]


def test_the_house_has_six_wings_and_these_rooms():
    assert {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"} == {*WINGS, "__init__.py"}
    assert sorted(room_of(path) for path in ROOMS) == sorted((w, r) for w, rooms in WINGS.items() for r in ["", *rooms])


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: ".".join(room_of(path)))
def test_imports_go_one_way_and_through_the_face(path):
    wing, room = room_of(path)
    for imported in imports_of(path):
        if not imported.startswith("kvmbook"):
            continue
        there, *inside = imported.split(".")[1:] or [""]
        if there != wing:
            assert not inside, f"{path.name} reaches into {imported}: the face of {there} hands on what others may use"
            assert list(WINGS).index(there) < list(WINGS).index(wing), f"{wing} stands below {there}"
        elif room:
            order = WINGS[wing]
            assert inside and order.index(inside[0]) < order.index(room), (
                f"{imported} lies above {room}, or is its own face"
            )


def test_everybody_else_comes_through_a_door():
    """Notebooks, decks, tools and benchmarks use faces, and a chapter's own exercises; a wing's tests may look inside it."""
    for path in [p for folder in ("tools", "benchmarks", "tests") for p in (ROOT / folder).rglob("*.py")]:
        own = path.relative_to(ROOT).parts[1] if path.parts[-3:-2] == ("tests",) else ""
        for imported in imports_of(path):
            wing, *room = imported.split(".")[1:] if imported.startswith("kvmbook.") else [""]
            assert not room or wing == own or room[0] in WINGS["exercises"], f"{path}: {imported}"
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text())["cells"]:
            for imported in re.findall(r"from (kvmbook[\w.]*) import", "".join(cell["source"])):
                assert re.fullmatch(r"kvmbook(\.(model|real|search|scenes|views|exercises\.ch\d\d))?", imported), (
                    imported
                )


def test_only_views_import_matplotlib_or_a_widget_library():
    heavy = "('matplotlib', 'ipywidgets', 'anywidget', 'numba')"
    code = f"import sys, kvmbook.search, kvmbook.scenes; print([m for m in {heavy} if m in sys.modules])"
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


def test_the_readmes_sweep_runs(tmp_path):
    (code,) = re.findall(r"```python\n(from concurrent.*?)```", (ROOT / "README.md").read_text(), re.S)
    few = code.replace("range(100)", "range(2)")
    assert few != code
    done = subprocess.run([sys.executable, "-c", few], cwd=tmp_path, capture_output=True, text=True, check=True)
    results, band = done.stdout.splitlines()
    assert re.fullmatch(r"\[[012], [012]\]", results) and re.fullmatch(r"\(0\.\d+, 0\.\d+\)", band)


def test_the_readmes_map_names_every_wing_and_room():
    readme = (ROOT / "README.md").read_text()
    for wing, rooms in WINGS.items():
        assert f"`{wing}/`" in readme, wing
        for room in rooms:
            assert f"`{room}`" in readme or wing == "exercises", room


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


LONGEST_LINE = 88  # characters that a page of 1366 pixels shows without scrolling


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_code_and_what_it_prints_fit_the_page(path):
    """Solutions too. Text that stands for a picture, a panel or a table is not shown with it, so it may be longer."""
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        shown = [cell["source"], *(output["text"] for output in cell["outputs"] if "text" in output)]
        shown += [o["data"]["text/plain"] for o in cell["outputs"] if list(o.get("data", {})) == ["text/plain"]]
        too_long = [line for text in shown for line in "".join(text).splitlines() if len(line) > LONGEST_LINE]
        assert not too_long, f"{cell['id']}: {too_long}"


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
