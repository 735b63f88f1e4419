"""Programs that come from Debian, not from PyPI: found, and in CI installed when missing."""

from __future__ import annotations

import fcntl
import os
import pathlib
import shutil
import subprocess
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
PATIENCE = 300  # seconds, while another program has the package manager


class Missing(SystemExit):
    """A program is not there. The sentence says what to do; a tool ends with it, a test shows it."""


def program(*names: str, packages: tuple[str, ...]) -> str | None:
    """The path of the first of ``names`` that is there, or None. In CI (CI=true, as root) ``packages`` come first; Missing
    if they do not."""
    if not _found(names) and os.environ.get("CI") == "true" and os.geteuid() == 0 and shutil.which("apt-get"):
        until = time.monotonic() + PATIENCE
        (ROOT / "build").mkdir(exist_ok=True)
        with (ROOT / "build/.apt.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of two that test at once, the first installs
            if not _found(names):
                _install(packages, until)
    return _found(names)


def _found(names: tuple[str, ...]) -> str | None:
    return next(filter(None, map(shutil.which, names)), None)


def _install(packages: tuple[str, ...], until: float) -> None:
    _apt("update", "-qq", until=until)  # if that fails, what is known of packages may still do
    if said := _apt("install", "-qq", "-y", "--no-install-recommends", *packages, until=until):
        wanted, said = " ".join(packages), said.removesuffix(".")
        raise Missing(
            f"{wanted} could not be installed; apt-get says: {said}. When that is mended: apt-get install {wanted}"
        )


def _apt(*arguments: str, until: float) -> str:
    """Run apt-get, again and again while another program holds one of its locks; what it says if it fails. Its own option
    DPkg::Lock::Timeout waits for some of the locks only."""
    plain = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    while True:
        done = subprocess.run(["apt-get", *arguments], env=plain, capture_output=True, text=True, check=False)
        if not done.returncode:
            return ""
        if "Could not get lock" not in done.stderr or time.monotonic() > until:
            return next((line for line in done.stderr.splitlines() if line.startswith("E:")), done.stderr[-300:])
        time.sleep(2)
