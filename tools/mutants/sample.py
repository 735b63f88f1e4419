"""The fixed sample of mutants that ``make test`` runs: each must be killed by the test that is named beside it.

Drawn by seed from rooms of the model, at most two from each, among those that a fast test of tests/model kills.
``python -m tools.mutants.sample`` prints, as json, for each the test that killed it; first what the model as it is gives.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from tools.mutants import running
from tools.mutants.mutating import find

KEPT = Path(__file__).with_name("sample.json")
LIMIT = 40  # seconds for one


def killer(one: dict[str, str] | None) -> str | None:
    """Who kills a mutant of the sample; None: all their tests on the model as it is."""
    tests = [one["test"]] if one else sorted({each["test"] for each in sample()})
    mutant = find(one["room"], one["operator"], one["before"], one["after"]) if one else None
    return running.killed_by(mutant, sorted({test.split("::")[0] for test in tests}), tests, LIMIT)


def sample() -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(KEPT.read_text())
    return found


def main() -> None:
    running.prepare(["numpy"])
    running.prepare(running.imported_by(sorted({each["test"].split("::")[0] for each in sample()})))
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        print(json.dumps(list(pool.map(killer, [None, *sample()]))))


if __name__ == "__main__":
    main()
