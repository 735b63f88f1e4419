"""Programs that come from Debian, not from PyPI: found, and in CI installed when missing."""

from __future__ import annotations

import os
import shutil
import subprocess


def program(*names: str, packages: tuple[str, ...]) -> str | None:
    """The path of the first of ``names`` that is there, or None; in CI (CI=true, as root) ``packages`` come first."""
    if not _found(names) and os.environ.get("CI") == "true" and os.geteuid() == 0 and shutil.which("apt-get"):
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        subprocess.run(["apt-get", "install", "-qq", "-y", "--no-install-recommends", *packages], check=True)
    return _found(names)


def _found(names: tuple[str, ...]) -> str | None:
    return next(filter(None, map(shutil.which, names)), None)
