"""Install into .venv what a command needs. What is there already is not asked for again, so that no network is needed then.

Usage: install.py lab|book|test   The Makefile has it run by the Python of .venv, or by the one that is to make .venv.
Needs nothing but the standard library. Stops with a sentence that says what to do.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
# For each command: an extra of pyproject.toml, what it brings, what is fetched for it at most, and what that takes on disk.
NEEDS = {
    "lab": ("", "JupyterLab, widgets, matplotlib, numpy", "90 MB", "430 MB"),
    "book": ("book", "JupyterLab, Jupyter Book, Playwright", "160 MB", "680 MB"),
    "test": ("test", "everything", "250 MB", "1 GB"),
}


def main(command: str) -> None:
    """Bring .venv up to what ``command`` needs."""
    with alone():
        if pathlib.Path(sys.prefix).resolve() == VENV.resolve():
            install(command)
            return
        if not works(VENV / "bin/python", "pip"):  # somebody may have made it while we waited
            make_environment()
    python = str(VENV / "bin/python")
    os.execv(python, [python, __file__, command])


@contextmanager
def alone() -> Iterator[None]:
    """Of several that install at once, the others wait for the first."""
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build/.install.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another make is installing into .venv; waiting for it.", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_environment() -> None:
    """Make .venv with the Python that runs this. One that works is completed, any other is made anew."""
    version = ".".join(map(str, sys.version_info[:2]))
    advice = "on Debian or Ubuntu: apt-get install python3-venv; or name another Python: PYTHON=python3.12 make ..."
    if importlib.util.find_spec("ensurepip") is None:
        raise SystemExit(f"{sys.executable} comes without ensurepip, and .venv cannot be made; {advice}")
    print(f"Making .venv with Python {version}.", flush=True)
    again = [] if works(VENV / "bin/python") else ["--clear"]
    done = subprocess.run([sys.executable, "-m", "venv", *again, VENV], capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())
        raise SystemExit(f"{sys.executable} -m venv says: {said[-500:]}\n.venv could not be made; {advice}")


def works(python: pathlib.Path, module: str = "sys") -> bool:
    """Whether a Python is there, runs, is new enough and has this module."""
    if not python.exists():
        return False
    return subprocess.run([python, "-c", f"import tomllib, {module}"], capture_output=True, check=False).returncode == 0


# ---- what is there, and what is missing ------------------------------------------------------------------------------


ITSELF = "kvmbook itself"


def unmet(lines: list[str]) -> list[str]:
    """What of these requirements this environment has not; the clone itself counts as there if a path file names it."""
    path_files = pathlib.Path(sysconfig.get_path("purelib")).glob("*.pth")
    named = [line for file in path_files for line in file.read_text(errors="replace").splitlines()]
    return [line for line in lines if not is_there(line)] + [ITSELF] * (str(ROOT) not in named)


def requirements(extra: str) -> list[str]:
    """What pyproject.toml wants for readers, and for this extra if it is one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *(of_extra(project, extra) if extra else [])]


def of_extra(project: dict[str, Any], extra: str) -> Iterator[str]:
    """The requirements of an extra and of those that it includes."""
    for line in project["optional-dependencies"][extra]:
        if included := re.fullmatch(rf"{project['name']}\[(.+)\]", line):
            for other in included[1].split(","):
                yield from of_extra(project, other.strip())
        else:
            yield line


def is_there(line: str) -> bool:
    """Whether this Python has what a requirement asks for."""
    try:
        from packaging.requirements import Requirement

        requirement = Requirement(line)
        there = metadata.version(requirement.name)
    except (ImportError, metadata.PackageNotFoundError):  # JupyterLab brings packaging
        return False
    return requirement.specifier.contains(there, prereleases=True)


# ---- installing ------------------------------------------------------------------------------------------------------


def install(command: str) -> None:
    """Have pip install what is missing. If it fails and all packages are there nevertheless, as in a clone that was moved and
    has no network, that is said and no more."""
    extra, what, fetched, room = NEEDS[command]
    lines = requirements(extra)
    if missing := unmet(lines):
        print(
            f"Installing into .venv what `make {command}` needs, once: {what}. That is {fetched} to fetch at most and "
            f"{room} on disk, and takes half a minute besides the fetching.",
            flush=True,
        )
        if said := pip(*lines, *["--editable", "."] * (ITSELF in missing)):
            print(*said, sep="\n")
            if missing := [line for line in unmet(lines) if line != ITSELF]:
                raise SystemExit(
                    f"pip could not install what is missing: {', '.join(missing)}. What it said is above. See to the "
                    f"network, or to the proxy or mirror in pip's settings, and say `make {command}` again."
                )
            pathlib.Path(sysconfig.get_path("purelib"), "kvmbook.pth").write_text(f"{ROOT}\n")  # what pip would do
            print("pip failed, but everything that is needed is there; going on.")
    settings = VENV / "share/jupyter/lab/settings"
    settings.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "tools/overrides.json", settings)


def pip(*arguments: str) -> list[str]:
    """Run ``pip install`` and show what it is at; return its last complaints if it fails, otherwise nothing."""
    command = [sys.executable, "-m", "pip", "install", "--progress-bar=off", "--disable-pip-version-check", *arguments]
    complaints, line = deque[str](maxlen=3), ""
    begun, on_terminal = time.monotonic(), sys.stdout.isatty()
    into_venv = {**os.environ, "PIP_USER": "0"}  # whatever a user's own settings of pip say
    running = subprocess.Popen(
        command, cwd=ROOT, env=into_venv, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert running.stdout is not None
    for line in map(str.strip, running.stdout):
        if re.match("(?i)error|warning", line):
            complaints.append(line)
        seconds = f"{time.monotonic() - begun:5.0f} s  "
        if line.startswith("Installing collected packages:"):
            line = f"unpacking {line.count(',') + 1} packages"
        if on_terminal:  # one line, written over and over
            print(f"\r\x1b[K{seconds}{line}"[: shutil.get_terminal_size().columns + 3], end="", flush=True)
        elif line.startswith("unpacking"):
            print(f"{seconds}{line}", flush=True)
    failed = running.wait()
    print("\r\x1b[K" * on_terminal + f"{time.monotonic() - begun:5.0f} s  {'pip failed' if failed else 'done'}")
    return (list(complaints) or [line]) if failed else []


if __name__ == "__main__":
    if sys.argv[1:] not in [[name] for name in NEEDS]:
        raise SystemExit(__doc__)
    try:
        main(sys.argv[1])
    except OSError as error:
        raise SystemExit(f"{error}; the folder of kvmbook must be yours to write in, with room for 1 GB") from None
    except KeyboardInterrupt:
        raise SystemExit("\nStopped. The next make goes on where this one was.") from None
