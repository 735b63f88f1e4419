"""A start that does not fail: what is there is not fetched, what is locked is waited for, what is missing is a sentence."""

import ast
import os
import re
import shutil
import subprocess
import sys
import threading
from importlib.metadata import packages_distributions, requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools import debian, install

ROOT = install.ROOT
LOCKED = "echo 'E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 7 (apt)' >&2; exit 100"


def script(path, text):
    """A program, written for the shell."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# ---- Debian's programs -----------------------------------------------------------------------------------------------


@pytest.fixture
def apt(tmp_path, monkeypatch):
    """Say what apt-get does, here called in CI by root; return what it was asked for. Nothing else is on the PATH."""
    for name in ("echo", "touch", "chmod", "sleep", "wc"):
        (tmp_path / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(debian.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(debian, "ROOT", tmp_path)
    asked = tmp_path / "asked"

    def does(text):
        script(tmp_path / "apt-get", f'echo "$1" >> {asked}; {text}')
        return lambda: asked.read_text().split() if asked.exists() else []

    return does


INSTALL = '[ $1 = update ] || { touch "${0%/*}/chromium"; chmod +x "${0%/*}/chromium"; }'


def test_another_programs_lock_is_waited_for(apt, tmp_path):
    asked = apt(f"[ $(wc -l < {tmp_path}/asked) -gt 5 ] || {{ {LOCKED}; }}; {INSTALL}")
    assert debian.program("chromium", packages=("chromium",)) == str(tmp_path / "chromium")
    assert asked() == ["update"] * 6 + ["install"]


def test_a_lock_that_is_never_given_back_is_one_sentence(apt, monkeypatch):
    monkeypatch.setattr(debian, "PATIENCE", -1)
    apt(LOCKED)
    with pytest.raises(debian.Missing) as missing:
        debian.program("chromium", packages=("chromium",))
    assert str(missing.value) == (
        "chromium could not be installed; apt-get says: E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by "
        "process 7 (apt). When that is mended: apt-get install chromium"
    )


def test_another_failure_is_not_waited_for(apt):
    asked = apt("echo 'E: Unable to locate package' >&2; exit 100")
    with pytest.raises(debian.Missing, match=r"E: Unable to locate package\. When that is mended"):
        debian.program("spin", packages=("spin", "gcc"))
    assert asked() == ["update", "install"]


def test_of_two_that_need_it_at_once_one_installs_it(apt):
    asked, found = apt(f"sleep 0.2; {INSTALL}"), []
    both = [
        threading.Thread(target=lambda: found.append(debian.program("chromium", packages=("chromium",))))
        for _ in range(2)
    ]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert None not in found and len(found) == 2 and asked() == ["update", "install"]


def test_nothing_is_installed_outside_ci(apt, monkeypatch):
    asked = apt(INSTALL)
    monkeypatch.setenv("CI", "")
    assert debian.program("chromium", packages=("chromium",)) is None and not asked()


@pytest.mark.parametrize("tool", [["browser.py"], ["pdf.py", "build/none", "build/none.pdf"]], ids=lambda tool: tool[0])
def test_a_tool_that_needs_chromium_says_so_and_no_more(tool, tmp_path):
    done = run([sys.executable, ROOT / "tools" / tool[0], *tool[1:]], PATH=str(tmp_path), CI="")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "chromium is missing; on Debian: apt-get install chromium\n"


def test_in_ci_no_test_starts_without_chromium(tmp_path):
    script(tmp_path / "apt-get", "echo 'E: There is no network.' >&2; exit 100")
    done = run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/book/test_start.py"], PATH=tmp_path, CI="true"
    )
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "apt-get install chromium" in said
    assert "Traceback" not in said and "passed" not in said, said


def run(command, **variables):
    """Run a command in the clone, with these variables besides."""
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


# ---- .venv -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", install.NEEDS)
def test_what_is_there_is_not_asked_for_again(command, monkeypatch):
    monkeypatch.setattr(install, "pip", lambda *arguments: pytest.fail("pip is asked"))
    assert install.unmet(install.requirements(install.NEEDS[command][0])) == []
    install.install(command)


@pytest.fixture
def wishes(tmp_path, monkeypatch):
    """A clone whose pyproject.toml is given."""
    monkeypatch.setattr(install, "ROOT", tmp_path)
    monkeypatch.setattr(install, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(install.sysconfig, "get_path", lambda name: tmp_path)
    (tmp_path / "kvmbook.pth").write_text(f"{tmp_path}\n")
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/overrides.json").write_text("{}")

    def wish(*readers, **extras):
        lines = ["[project]", 'name = "kvmbook"', f"dependencies = {list(readers)}", "[project.optional-dependencies]"]
        lines += [f"{name} = {wanted}" for name, wanted in extras.items()]
        (tmp_path / "pyproject.toml").write_text("\n".join(lines))

    return wish


def test_what_is_missing_or_too_old_is_named(wishes, tmp_path):
    wishes("numpy>=1", book=["numpy>=99"], fast=["no-such-package"], test=["kvmbook[book,fast]", "pytest"])
    assert [install.unmet(install.requirements(extra)) for extra in ("", "book", "test")] == [
        [], ["numpy>=99"], ["numpy>=99", "no-such-package"]
    ]  # fmt: skip
    (tmp_path / "kvmbook.pth").write_text("/where/it/was\n")
    assert install.unmet([]) == ["kvmbook itself"]


def test_if_pip_fails_its_complaints_and_one_sentence_are_shown(wishes, monkeypatch, capsys):
    wishes("no-such-package")
    monkeypatch.setattr(install, "pip", lambda *arguments: ["ERROR: there is no network"])
    with pytest.raises(SystemExit, match=r"missing: no-such-package.*say `make lab` again"):
        install.install("lab")
    assert "90 MB to fetch at most" in (said := capsys.readouterr().out) and said.endswith("there is no network\n")


def test_if_pip_fails_though_everything_is_there_we_go_on(wishes, tmp_path, monkeypatch, capsys):
    """As where a clone was moved, and there is no network: the path file is old."""
    wishes("numpy")
    (tmp_path / "kvmbook.pth").write_text("/where/it/was\n")
    monkeypatch.setattr(install, "pip", lambda *arguments: ["ERROR: there is no network"])
    install.install("lab")
    assert (tmp_path / "kvmbook.pth").read_text() == f"{tmp_path}\n"
    assert capsys.readouterr().out.endswith("everything that is needed is there; going on.\n")


@pytest.mark.parametrize("status", [0, 1])
def test_pips_many_words_become_a_line_for_each_stage(wishes, tmp_path, monkeypatch, capsys, status):
    many = 'echo "Collecting $0"; echo "  WARNING: Retrying"; ' * 30
    python = script(
        tmp_path / "python",
        f'{many} echo "Installing collected packages: a, b, c"; echo ERROR: full >&2; exit {status}',
    )
    monkeypatch.setattr(sys, "executable", str(python))
    last = install.pip("-e", ".")
    assert last == [] if status == 0 else (last[-1] == "ERROR: full" and len(last) == 3)
    said = capsys.readouterr().out.splitlines()
    assert [line.split("s  ")[1] for line in said] == ["unpacking 3 packages", "pip failed" if status else "done"]


def test_a_python_without_ensurepip_is_told_from_one_that_has_it(monkeypatch):
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"comes without ensurepip.*apt-get install python3-venv.*PYTHON="):
        install.make_environment()


@pytest.mark.parametrize("broken", ["exit 1", "exit 0"])
def test_an_environment_that_does_not_work_is_made_anew(wishes, tmp_path, monkeypatch, broken):
    script(tmp_path / ".venv/keep", "")
    (tmp_path / ".venv/bin").mkdir()
    script(tmp_path / ".venv/bin/python", broken)
    called = script(tmp_path / "python", f'echo "$*" > {tmp_path}/called')
    monkeypatch.setattr(sys, "executable", str(called))
    install.make_environment()
    assert ("--clear" in (tmp_path / "called").read_text()) == (broken == "exit 1")


@pytest.fixture
def clone(tmp_path):
    """A clone without .venv, in a folder with a space in its name."""
    place = tmp_path / "with space"
    (place / "tools").mkdir(parents=True)
    for name in ("Makefile", "tools/install.py"):
        shutil.copy(ROOT / name, place / name)
    return place


def make(clone, *arguments, **variables):
    """Run make there; return its exit status and its last words but for make's own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")} | variables
    done = subprocess.run(["make", *arguments], cwd=clone, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, [line for line in done.stderr.splitlines() if not line.startswith("make")]


def test_a_python_that_is_too_old_is_one_sentence(clone, tmp_path):
    old = f"""exec "{sys.executable}" -c 'import sys; sys.version_info = (3, 9, 2); exec(sys.argv[1])' "$2" """
    script(tmp_path / "python3.9", old)
    status, said = make(clone, "lab", f"PYTHON={tmp_path}/python3.9")
    assert status and said == [
        f"kvmbook needs Python 3.11 or newer, {tmp_path}/python3.9 is 3.9; name another: PYTHON=python3.12 make lab"
    ]


def test_no_python_at_all_is_one_sentence(clone):
    status, said = make(clone, "test", "PYTHON=python3.99")
    assert status and said == [
        "there is no program python3.99; install Python 3.11 or newer, or name yours: PYTHON=python3.12 make test"
    ]


def test_from_the_folder_above_a_clone_named_kvmbook_the_package_is_found(tmp_path):
    """An import hook, which setuptools installs for some layouts, comes after the folder without an __init__.py."""
    (tmp_path / "kvmbook/kvmbook").mkdir(parents=True)
    code = "import kvmbook; print(kvmbook.Vm.__name__, kvmbook.__file__)"
    for options in (["-c", code], ["-i", "-q"]):
        done = subprocess.run(
            [sys.executable, *options], cwd=tmp_path, input=code, capture_output=True, text=True, check=True
        )
        assert done.stdout == f"Vm {ROOT / 'kvmbook/__init__.py'}\n"


# For each command what it runs, and the extra that it installs.
COMMANDS = {
    "lab": (["reading.py"], "lab"),
    "edit": (["reading.py"], "lab"),
    "book": (["book.py"], "book"),
    "slides": (["slides.py"], "book"),
    "pdf": (["browser.py", "book.py", "pdf.py"], "book"),
    "run": (["store_outputs.py", "minutes.py", "store_outputs.py"], "book"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_needs_no_more_than_it_installs(command):
    tools, extra = COMMANDS[command]
    rule = re.search(rf"^{command}: install-(\w+)\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert rule[1] == extra and re.findall(r"tools/(\S+\.py)", rule[2]) == tools
    allowed = brought_by(install.requirements(install.NEEDS[extra][0]))
    there = {*sys.stdlib_module_names, "kvmbook"}
    for module in imported({f"tools.{tool.removesuffix('.py')}" for tool in tools}) - there:
        assert set(map(canonicalize_name, packages_distributions()[module])) & allowed, module


def test_the_readme_names_every_command_and_no_other():
    makefile, readme = (ROOT / "Makefile").read_text(), (ROOT / "README.md").read_text()
    commands = {*COMMANDS, "check", "test", "benchmark", "mutants", "soak", "real-bug"}
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", readme, re.M)) == commands
    assert all(re.search(rf"^{name}: install-", makefile, re.M) for name in commands)


def imported(tools):
    """The top-level modules that these tools import, and the tools that they import."""
    left, met, found = list(tools), set(), set()
    while left:
        met.add(tool := left.pop())
        for name in imports_of(ROOT / f"{tool.replace('.', '/')}.py"):
            if name.startswith("tools."):
                left += {name} - met
            else:
                found.add(name.split(".")[0])
    return found


def imports_of(path):
    """The modules that a file imports, ``tools.x`` for ``from tools import x``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from [f"tools.{name.name}" for name in node.names] if node.module == "tools" else [node.module]
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def brought_by(lines):
    """The names of the packages that these requirements bring, with those that they require in turn."""
    left, found = [Requirement(line) for line in lines], set()
    while left:
        wanted = left.pop()
        if (name := canonicalize_name(wanted.name)) not in found:
            found.add(name)
            inner = map(Requirement, requires(name) or [])
            left += [each for each in inner if not each.marker or each.marker.evaluate({"extra": ""})]
    return found
