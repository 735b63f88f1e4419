"""`make soak`: a million steps of random runs on each kind of hardware, over all releases. No write may be lost.

    python -m tools.soak --steps 20000        # fewer; --seed N: other runs
    python -m tools.soak --as-released        # with their known faults: it ends at the first write that is lost

Each release runs without the faults that are known of it. A step is an entry of the model's log: of a whole call, an
access, an exit. It goes on where it was interrupted; a write that is lost is shrunk by Hypothesis, and printed as a litmus
test that `kvmbook.search.read_litmus` reads back.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import NamedTuple

from kvmbook.model import Kernel
from kvmbook.search import every, repaired, runs_at_random, stream

LONGEST = 60  # calls in a run
KERNELS = {kernel.name: kernel for kernel in Kernel.releases}
ON = {each.hardware.name: each.hardware for each in every(Kernel.releases[-1])}


class Setting(NamedTuple):
    """By name, so that its repr says what it is."""

    hardware: str
    kernel: str
    repaired: bool


def soak(setting: Setting, seed: int) -> tuple[int, str | None]:
    """Some hundred runs: the steps that they took, and the text of one that loses a write."""
    kernel = KERNELS[setting.kernel]
    kernel = repaired(kernel) if setting.repaired else kernel
    made = runs_at_random(kernel, ON[setting.hardware], seed=seed, longest=LONGEST)
    return made.steps, None if made.litmus is None else str(made.litmus)


def main() -> None:
    parser = argparse.ArgumentParser(description="Random runs by the million, none of which may lose a write.")
    parser.add_argument("--steps", type=int, default=10**6, help="on each kind of hardware (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="processes (default: one for each CPU; 1: this one)"
    )
    parser.add_argument("--as-released", action="store_true", help="with the faults that are known")
    given = parser.parse_args()
    settings = [Setting(hardware, kernel, not given.as_released) for kernel in KERNELS for hardware in ON]
    keep = Path("build") / f"soak-{given.seed}{'-as-released' * given.as_released}.jsonl"
    keep.parent.mkdir(exist_ok=True)
    workers = None if given.jobs == 1 else lambda: ProcessPoolExecutor(given.jobs)
    print(f"{given.steps:,} steps on each of {len(ON)} kinds of hardware, {len(KERNELS)} releases, seed {given.seed}")
    for rounds in count(1):
        steps: Counter[str] = Counter()
        seeds = range(given.seed * 1_000_000, given.seed * 1_000_000 + rounds)
        done = stream(soak, settings, seeds, workers, keep=keep, progress=True)
        with closing(done):
            for setting, seed, (took, litmus) in done:
                steps[setting.hardware] += took
                if litmus is not None:
                    raise SystemExit(f"\n{setting.kernel}, seed {seed}: a write is lost\n{litmus}")
        if min(steps.values()) >= given.steps:
            break
        print(f"round {rounds}: {min(steps.values()):,} steps or more on each", file=sys.stderr)
    for name, took in steps.items():
        print(f"{name:42} {took:>12,} steps, no write lost")


if __name__ == "__main__":
    main()
