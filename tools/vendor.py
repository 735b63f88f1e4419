"""Fetch what the built pages and slides need from npm, by the pinned versions and checksums of vendor.json.

Usage: vendor.py FOLDER   Each package's files go to FOLDER/name/, once. No Node.js is needed. The registry is
``npm_config_registry`` if that is set. Stops if a checksum differs.
"""

import base64
import fcntl
import fnmatch
import hashlib
import io
import json
import os
import pathlib
import shutil
import sys
import tarfile
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOCK = pathlib.Path(__file__).with_name("vendor.json")


def fetch(folder: pathlib.Path) -> None:
    """Bring ``folder`` up to date with the lock file. SystemExit says which package cannot be had, and why."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several that fetch at once, the first does it
        for package, pinned in json.loads(LOCK.read_text()).items():
            here = folder / package.split("/")[-1]
            stamp = here / ".fetched"
            if not stamp.exists() or stamp.read_text() != json.dumps(pinned):
                shutil.rmtree(here, ignore_errors=True)
                unpack(download(package, pinned["version"], pinned["integrity"]), pinned["files"], here)
                stamp.write_text(json.dumps(pinned))


def lay_out(folder: pathlib.Path, *packages: str) -> None:
    """Put what lets widgets live without a kernel into ``folder``, and these packages besides."""
    fetch(ROOT / "build/vendor")
    for package in ("requirejs", "html-manager", *packages):
        shutil.copytree(ROOT / "build/vendor" / package, folder / package, dirs_exist_ok=True)
    anywidget = pathlib.Path(sys.prefix, "share/jupyter/nbextensions/anywidget/index.js")  # its Python package's own
    shutil.copy(anywidget, folder / "anywidget.js")
    shutil.copy(ROOT / "tools/widgets.js", folder / "widgets.js")


def download(package: str, version: str, integrity: str) -> bytes:
    """A package, packed, as the registry has it; its checksum must be ``integrity``."""
    registry = os.environ.get("npm_config_registry", "https://registry.npmjs.org").rstrip("/")  # noqa: SIM112 (npm's own)
    address = f"{registry}/{package}/-/{package.split('/')[-1]}-{version}.tgz"
    try:
        with urllib.request.urlopen(address, timeout=60) as reply:
            packed: bytes = reply.read()
    except OSError as error:
        raise SystemExit(f"{address} cannot be fetched: {error}") from None
    found = "sha512-" + base64.b64encode(hashlib.sha512(packed).digest()).decode()
    if found != integrity:
        raise SystemExit(f"{address}: its checksum is {found}, vendor.json says {integrity}")
    return packed


def unpack(packed: bytes, patterns: list[str], folder: pathlib.Path) -> None:
    """Write the files of an npm package that match one of ``patterns``. SystemExit if a pattern matches none."""
    left = set(patterns)
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for member in archive:
            path = member.name.removeprefix("package/")
            matched = {pattern for pattern in patterns if fnmatch.fnmatch(path, pattern)}
            left -= matched
            if member.isfile() and matched:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                content = archive.extractfile(member)
                assert content is not None
                (folder / path).write_bytes(content.read())
    if left:
        raise SystemExit(f"{folder.name} has no file {', '.join(sorted(left))}; vendor.json wants it")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    fetch(pathlib.Path(sys.argv[1]))
