"""What comes from Debian: programs that are installed, and packages that are only fetched and unpacked, from any suite."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
PROGRAMS = {
    "bochs": "bochs bochsbios vgabios",
    "grub-mkrescue": "grub-common grub-pc-bin xorriso mtools",
    "busybox": "busybox-static",
    "cpio": "cpio",
    "gcc": "gcc libc6-dev",
    "make": "make",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "xz": "xz-utils",
    "dpkg": "dpkg",
}


class NotAsExpected(SystemExit):
    """A step failed, or something is not what it is made for. The sentence says which."""


def run(*command: str, cwd: Path | None = None) -> None:
    """Run one command quietly. NotAsExpected, with the end of what it said, if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise NotAsExpected(f"{' '.join(command)} failed:\n{said}")


def see_programs() -> None:
    """NotAsExpected, with what to install, if a program is missing."""
    if missing := [packages for name, packages in PROGRAMS.items() if shutil.which(name) is None]:
        raise NotAsExpected(f"programs are missing; on Debian: apt-get install {' '.join(missing)} libelf-dev")


def unpacked(where: Path, package: str, suite: str) -> Path:
    """The directory with the contents of a package of a Debian suite: fetched by apt, with its signatures checked, and
    not installed. The machine's own package lists are left alone."""
    target = where / "packages" / package
    if not target.exists():
        own = where / "apt"
        (own / "lists/partial").mkdir(parents=True, exist_ok=True)
        security = suite.endswith("-security")
        archive = f"http://deb.debian.org/debian{'-security' if security else ''}"
        (own / "sources.list").write_text(f"deb [signed-by={KEYRING}] {archive} {suite} main\n")
        apt = ["apt-get", "-qq", *_options(own)]
        run(*apt, "update")
        run(*apt, "download", package, cwd=own)
        (found,) = own.glob(f"{package}_*.deb")
        partial = target.with_name(f"{package}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        run("dpkg", "-x", str(found), str(partial))
        partial.rename(target)
        found.unlink()
    return target


def _options(own: Path) -> list[str]:
    settings = {
        "Dir::Etc::SourceList": own / "sources.list",
        "Dir::Etc::SourceParts": "-",
        "Dir::State::Lists": own / "lists",
        "Dir::Cache": own,
        "APT::Sandbox::User": "root",
        "pkgCacheFile": "",
    }
    return [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
