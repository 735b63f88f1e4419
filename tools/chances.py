"""Chapter 12's sweep: 2,000 migrations of each of fifty lives, kept in kvmbook/scenes/chances.json.

    python -m tools.chances                    # all of them on two processes, compared with what is kept
    python -m tools.chances --on dask --store  # on a dask cluster on this machine, and kept

It goes on where it was interrupted, and says how many runs a second it made.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from kvmbook.scenes import LIVES, SEEDS, kept, move
from kvmbook.search import sweep

KEPT = Path(__file__).parents[1] / "kvmbook" / "scenes" / "chances.json"
Workers = Executor | Callable[[], Executor] | None


@contextmanager
def workers(on: str, jobs: int) -> Iterator[Workers]:
    """What a sweep runs on: "here", "processes", "dask" or "ipyparallel"; the last two on a cluster that is started here."""
    if on == "here":
        yield None
    elif on == "processes":
        yield lambda: ProcessPoolExecutor(jobs)
    elif on == "dask":
        from distributed import Client, LocalCluster

        cluster = LocalCluster(n_workers=jobs, threads_per_worker=1, dashboard_address=None)
        with cluster, Client(cluster) as client:
            yield client.get_executor()
    else:
        import ipyparallel

        with ipyparallel.Cluster(n=jobs) as client:
            yield client.executor()


def main() -> None:
    parser = argparse.ArgumentParser(description="Chapter 12's sweep.")
    parser.add_argument("--on", default="processes", choices=["here", "processes", "dask", "ipyparallel"])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="of each life (default: %(default)s)")
    parser.add_argument("--store", action="store_true", help="keep the results instead of comparing them")
    given = parser.parse_args()
    seeds, begin = range(given.seeds), time.monotonic()
    part = Path("build") / f"chances-{given.on}.jsonl"
    part.parent.mkdir(exist_ok=True)
    with workers(given.on, given.jobs) as executor:
        found = sweep(move, LIVES, seeds, executor, keep=part, progress=True)
    seconds = time.monotonic() - begin
    rows = [[*life, "".join(map(str, found.of(life)))] for life in LIVES]
    print(f"{len(found):,} migrations on {given.on}: {len(found) / seconds:.0f} a second")
    if given.store:
        lines = ",\n".join(map(json.dumps, rows))
        KEPT.write_text(f"[\n{lines}\n]\n")
        print(f"kept in {KEPT}")
    else:
        same = all(kept()[life].startswith(row[-1]) for life, row in zip(LIVES, rows, strict=True))
        print("the same as those that are kept" if same else "NOT the same as those that are kept")
    part.unlink()
    raise SystemExit(not (given.store or same))


if __name__ == "__main__":
    main()
