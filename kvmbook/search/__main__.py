"""`python -m kvmbook.search`: hunt a release for writes that are lost."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor

from kvmbook.model import Kernel
from kvmbook.search.hunt import Hunt, hunt, hunt_at_random
from kvmbook.search.known_faults import repaired

NEW = "NEW: no known fault explains it"


def main() -> None:
    """Hunt as the command line says; the exit code is 1 if something new was found."""
    names = [kernel.name.removeprefix("Linux ") for kernel in Kernel.releases]
    parser = argparse.ArgumentParser(prog="python -m kvmbook.search", description=__doc__)
    parser.add_argument("release", choices=names, nargs="?", default=names[-1], help="default: %(default)s")
    parser.add_argument("--repaired", action="store_true", help="without the faults that are known")
    parser.add_argument("--minutes", type=float, default=10, help="how long (default: %(default)s)")
    parser.add_argument(
        "--calls", type=int, default=4, help="first all runs of so many calls, then longer ones (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="of the configurations' order, and of random runs (default: %(default)s)"
    )
    parser.add_argument("--random", action="store_true", help="longer runs at random instead (needs hypothesis)")
    parser.add_argument(
        "--by", nargs="*", default=["hardware"], help="fields by which the table counts (default: hardware)"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one for each CPU)")
    asked = parser.parse_args()
    kernel = Kernel.releases[names.index(asked.release)]
    kernel = repaired(kernel) if asked.repaired else kernel
    if asked.random:
        raise SystemExit(_at_random(kernel, asked))
    found = _over_configurations(kernel, asked)
    print(f"{kernel.name}: {found.transitions:,} transitions in {found.seconds:,.0f} s")
    for row in (*asked.by, "configurations", "calls, least", "most", "states", "transitions"), *found.rows(*asked.by):
        print("  ".join(f"{value:,}" if isinstance(value, int) else value for value in row))
    raise SystemExit(None in found.met)


def _over_configurations(kernel: Kernel, asked: argparse.Namespace) -> Hunt:
    """Hunt until the time is over, or Ctrl-C or SIGTERM comes: what was found until then counts."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    found, told, said = Hunt(kernel), set[str | None](), 0

    def note(so_far: Hunt) -> None:
        nonlocal found, said
        found = so_far
        _tell(so_far, told)
        if so_far.seconds // 60 > said:
            said = int(so_far.seconds // 60)
            counts = f"{len(so_far.covered):,} configurations, {so_far.transitions:,} transitions"
            print(f"{said} min: {counts}", file=sys.stderr, flush=True)

    with ProcessPoolExecutor(asked.jobs, initializer=_leave_signals) as executor:
        try:
            hunt(kernel, 60 * asked.minutes, calls=(asked.calls, 9), seed=asked.seed, executor=executor, progress=note)
        except KeyboardInterrupt:
            print("ended before its time")
        executor.shutdown(cancel_futures=True)
    return found


def _leave_signals() -> None:
    """In each worker: the process that shares out the work decides when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _tell(so_far: Hunt, told: set[str | None]) -> None:
    for fault in so_far.met.keys() - told:
        told.add(fault)
        met = so_far.met[fault]
        after = f"{met.configurations:,} configurations, {met.transitions:,} transitions, {met.seconds:.0f} s"
        print(f"--- {fault or NEW}: after {after}")
        print(met.litmus, flush=True)


def _at_random(kernel: Kernel, asked: argparse.Namespace) -> int:
    litmus, runs = hunt_at_random(kernel, 60 * asked.minutes, seed=asked.seed)
    print(f"{kernel.name}: {runs:,} runs at random")
    if litmus is not None:
        print(f"--- {litmus.fault or NEW}")
        print(litmus)
    return int(litmus is not None and litmus.fault is None)


if __name__ == "__main__":
    main()
