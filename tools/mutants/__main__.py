"""Mutation testing of kvmbook/model: python -m tools.mutants [OPTIONS]

It goes on where it was interrupted (build/mutants), as long as neither the package nor a chapter has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context

from tools.mutants import running, scoring
from tools.mutants.mutating import ROOT, Mutant, mutants_of, rooms
from tools.mutants.scoring import KEPT, Reach, Verdict, drawn, judge, said, wilson

REACH: list[Reach] = []  # what forked workers share


def judged(mutant: Mutant) -> Verdict | None:
    return judge(mutant, REACH[0])


def main() -> None:
    parser = argparse.ArgumentParser(description="Mutation testing of kvmbook/model.")
    parser.add_argument("--sample", type=int, default=60, help="this many mutants (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="every mutant: most of a day")
    parser.add_argument("--seed", type=int, default=1, help="of the sample (default: %(default)s)")
    parser.add_argument("--module", action="append", default=[], choices=rooms(), help="of this room of the model only")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    running.prepare(["numpy", "matplotlib.pyplot", "ipywidgets", "numba"])
    with ProcessPoolExecutor(given.jobs, get_context("fork")) as pool:
        for file, _ in zip(scoring.asked(), pool.map(scoring.measured, scoring.asked()), strict=True):
            print(f"without a mutant: {file}", flush=True)
    REACH.append(Reach())
    running.prepare(sorted(REACH[0].imports))
    mutants = drawn(given.seed, None if given.all else given.sample, given.module)
    report(mutants, verdicts(mutants, given.jobs))


def state() -> str:
    """Names what is tested and what it is tested by, as they are now."""
    digest = hashlib.sha256(scoring.of_package().encode())
    for file in scoring.asked():
        digest.update((ROOT / file).read_bytes())
    return digest.hexdigest()[:16]


def verdicts(mutants: list[Mutant], jobs: int) -> dict[str, Verdict | None]:
    """Of each mutant, by the name that `name_of` gives it; those that are kept are not judged again."""
    kept = KEPT / f"verdicts-{state()}.jsonl"
    found: dict[str, Verdict | None] = {}
    for line in kept.read_text().splitlines() if kept.exists() else ():
        name, verdict = json.loads(line)
        found[name] = Verdict(**verdict) if verdict else None
    todo = [mutant for mutant in mutants if name_of(mutant) not in found]
    begun = time.monotonic()
    with ProcessPoolExecutor(jobs, get_context("fork")) as pool, kept.open("a") as file:
        for done, (mutant, verdict) in enumerate(zip(todo, pool.map(judged, todo), strict=True), 1):
            found[name_of(mutant)] = verdict
            print(json.dumps([name_of(mutant), verdict and asdict(verdict)]), file=file, flush=True)
            minutes = (time.monotonic() - begun) / 60
            print(f"{done}/{len(todo)}  {minutes:.1f} min  {mutant.place}  {short(verdict)}", flush=True)
    return found


def name_of(mutant: Mutant) -> str:
    return f"{mutant.module} {mutant.operator} {mutant.occurrence}"


def short(verdict: Verdict | None) -> str:
    if verdict is None:
        return "cannot be imported"
    return f"tests: {verdict.tests or 'SURVIVES'}; notebooks: {verdict.notebooks or 'SURVIVES'}"


def report(mutants: list[Mutant], found: dict[str, Verdict | None]) -> None:
    """Print the scores, and each survivor."""
    judged = [(mutant, verdict) for mutant in mutants if (verdict := found[name_of(mutant)])]
    everything = sum(len(mutants_of(room)) for room in rooms())
    print(f"\n{len(judged)} mutants of {everything:,}; {len(mutants) - len(judged)} more cannot be imported")
    for name in ("tests", "notebooks"):
        print(f"killed by the {name}: {said(sum(bool(getattr(v, name)) for _, v in judged), len(judged))}")
    print("\nroom: by the tests, by the notebooks")
    for room in rooms():
        here = [verdict for mutant, verdict in judged if mutant.module == room]
        if here:
            tests, books = sum(bool(v.tests) for v in here), sum(bool(v.notebooks) for v in here)
            print(f"  {room:16} {tests}/{len(here)}  {books}/{len(here)}")
    chapters: dict[str, list[bool]] = defaultdict(list)
    for mutant, verdict in judged:
        for chapter, kills in verdict.asked.items() if mutant.called else ():
            chapters[chapter].append(kills)
    print("\nchapter: of the mutants in functions that it calls, those that it kills")
    for chapter, kills in sorted(chapters.items()):
        low, high = wilson(sum(kills), len(kills))
        print(
            f"  {chapter[10:12]}  {sum(kills)}/{len(kills)} = {sum(kills) / len(kills):.0%} ({low:.0%} to {high:.0%})"
        )
    for name in ("tests", "notebooks"):
        print(f"\nsurvive the {name}:")
        for mutant, verdict in judged:
            if not getattr(verdict, name):
                print(f"  {mutant.place} {mutant.where}\n    - {mutant.before}\n    + {mutant.after}")


if __name__ == "__main__":
    main()
