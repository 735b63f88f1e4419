"""Which tests and chapters reach a mutant, who kills it, and what share is killed."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.mutants.mutating import ROOT, Mutant, equivalent, mutants_of, rooms
from tools.mutants.running import is_python, killed_by, unmutated

KEPT = ROOT / "build" / "mutants"
FOLDERS = ("tests/model", "tests/scenes")
# Random runs, large slots and whole migrations, for minutes: not asked, nor the searches' tests. What they alone would notice
# counts as surviving.
NOT_ASKED = ("test_properties.py", "test_large_slots.py", "test_migration.py", "test_relaxing.py")
CHAPTERS = sorted(f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))
SLOW = 20.0  # seconds: a test that takes longer is not asked
AT_MOST = 40.0  # seconds of tests that one mutant gets
LONG, SHARE = 6.0, 5  # a chapter of more seconds is asked of one mutant in so many, and of those that no other notices
Times = dict[str, float]


@functools.cache
def of_package() -> str:
    """Names the package as it is now."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "kvmbook").rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def measured(file: str) -> dict[str, Any]:
    """What `running.unmutated` says of a file; from build/mutants if neither it nor the package has changed since."""
    digest = hashlib.sha256((of_package() + (ROOT / file).read_text()).encode()).hexdigest()
    kept = KEPT / f"{Path(file).stem}-{digest[:16]}.json"
    if not kept.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        found = unmutated(file)
        if found["failed"]:
            raise SystemExit(f"{file} fails without any mutant: {found['failed'][0]}")
        kept.write_text(json.dumps(found))
    return json.loads(kept.read_text())  # type: ignore[no-any-return]


def test_files() -> list[str]:
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("test_*.py"))]
    return [str(path.relative_to(ROOT)) for path in files if path.name not in NOT_ASKED]


def asked() -> list[str]:
    """The files of all chapters and tests, those first that take longest."""
    return [*reversed(CHAPTERS), *test_files()]


class Reach:
    """Which tests and which chapters run the lines of a mutant, and how long each takes."""

    def __init__(self) -> None:
        self.tests: Times = {}
        self.chapters: Times = {}
        self.at: dict[tuple[str, int], set[str]] = {}
        self.imports: set[str] = set()
        for file in asked():
            self._add(file, measured(file))

    def _add(self, file: str, found: dict[str, Any]) -> None:
        self.imports.update(found["imports"])
        chapter = file in CHAPTERS
        if chapter:
            self.chapters[file] = sum(found["seconds"].values())
        else:
            self.tests |= {name: seconds for name, seconds in found["seconds"].items() if seconds <= SLOW}
        for name, lines in found["lines"].items():
            for module, line in lines:
                self.at.setdefault((module, line), set()).add(file if chapter else name)

    def _of(self, mutant: Mutant, among: Times) -> list[str]:
        first, last = mutant.lines
        there = set().union(*(self.at.get((mutant.module, line), set()) for line in range(first, last + 1)))
        return sorted((name for name in among if not mutant.called or name in there), key=lambda name: among[name])

    def tests_of(self, mutant: Mutant) -> list[str]:
        """The fastest first; no more than fit into `AT_MOST`. (What no test runs may run when the model is imported.)"""
        names, seconds = [], 0.0
        for name in self._of(mutant, self.tests) or sorted(self.tests, key=self.tests.__getitem__):
            seconds += self.tests[name]
            if seconds <= AT_MOST:
                names.append(name)
        return names

    def chapters_of(self, mutant: Mutant) -> list[str]:
        return self._of(mutant, self.chapters)


@dataclass
class Verdict:
    """Who kills a mutant: ``tests`` a test, ``notebooks`` a cell, "" for nobody. ``asked``: of each chapter that was asked
    whatever others said, whether it kills it."""

    tests: str
    notebooks: str
    asked: dict[str, bool]


def judge(mutant: Mutant, reach: Reach) -> Verdict | None:
    """None if the mutant cannot be imported."""
    if not is_python(mutant):
        return None
    return Verdict(by_tests(mutant, reach), *by_notebooks(mutant, reach))


def by_tests(mutant: Mutant, reach: Reach) -> str:
    names = reach.tests_of(mutant)
    files = sorted({name.split("::")[0] for name in names})
    limit = 30 + 4 * sum(reach.tests[name] for name in names)
    return (names and killed_by(mutant, files, names, limit)) or ""


def by_notebooks(mutant: Mutant, reach: Reach) -> tuple[str, dict[str, bool]]:
    killer, asked = "", {}
    draw = random.Random(mutant.key)
    for chapter in reach.chapters_of(mutant):
        seconds = reach.chapters[chapter]
        counts = seconds <= LONG or draw.randrange(SHARE) == 0
        if counts or not killer:
            by = killed_by(mutant, [chapter], None, 30 + 4 * seconds) or ""
            killer = killer or (by and f"{Path(chapter).stem[:2]} {by.rpartition('::')[2]}")
            if counts:
                asked[chapter] = bool(by)
    return killer, asked


# ---- scores ----------------------------------------------------------------------------------------------------------


def wilson(killed: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % bounds of a share."""
    if not of:
        return 0.0, 1.0
    share, scale = killed / of, 1 + z * z / of
    middle, half = share + z * z / (2 * of), z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return (middle - half) / scale, (middle + half) / scale


def said(killed: int, of: int) -> str:
    low, high = wilson(killed, of)
    return f"{killed}/{of} = {killed / max(1, of):.0%} ({low:.0%} to {high:.0%})"


def drawn(seed: int, count: int | None, only: list[str]) -> list[Mutant]:
    """Mutants in an order that depends on the seed alone; those that are known to be equivalent are left out."""
    known = equivalent()
    mutants = [m for room in only or rooms() for m in mutants_of(room) if m.key not in known]
    random.Random(seed).shuffle(mutants)
    return mutants[:count]
