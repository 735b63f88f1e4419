"""Runs per second of a sweep: in this process, on two processes, on dask's workers if distributed is installed."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import get_context
from typing import Any, NamedTuple

from benchmarks import report
from kvmbook import FlushPolicy, Hardware, Kernel, Vm
from kvmbook.search import Run, sweep

WORKERS, TURNS = 2, 5


class Setting(NamedTuple):
    """A VM whose dirty log is enabled while it runs: how many of its ``pages`` are missed?"""

    ad_bits: bool
    flush: FlushPolicy
    pages: int = 4
    steps: int = 40


SETTINGS = [
    Setting(ad_bits, flush) for ad_bits in (False, True) for flush in (FlushPolicy.IF_CHANGED, FlushPolicy.ALWAYS)
]


def missed_pages(setting: Setting, seed: int) -> int:
    """Two vCPUs read and write, and the host ages pages, at random; then the log is enabled, and they go on. The number of
    pages whose writes were missed."""
    chance = random.Random(seed)
    kernel = Kernel.v5_19.with_(flush=setting.flush)
    vm, base = Vm(Hardware.ept(ad_bits=setting.ad_bits), kernel, vcpus=2), 0x200
    vm.set_user_memory_region(slot=0, base_gfn=base, npages=setting.pages)
    for step in range(setting.steps):
        gfn = base + chance.randrange(setting.pages)
        what, vcpu = chance.choice(("read", "write", "age")), vm.vcpu[chance.randrange(2)]
        if what == "age":
            vm.clear_young(gfn, gfn + 1)
        else:
            getattr(vcpu, what)(gfn)
        if step == setting.steps // 2:
            vm.set_user_memory_region(slot=0, base_gfn=base, npages=setting.pages, log_dirty_pages=True)
    return int(vm.missed_dirty(0).size)


@contextmanager
def processes() -> Iterator[Executor]:
    with ProcessPoolExecutor(WORKERS, get_context("spawn")) as executor:
        yield executor


@contextmanager
def dask() -> Iterator[Executor]:
    """A cluster on this machine. ImportError without distributed."""
    from distributed import Client, LocalCluster

    options = {"n_workers": WORKERS, "threads_per_worker": 1, "dashboard_address": None, "silence_logs": 50}
    with LocalCluster(host="127.0.0.1", **options) as cluster, Client(cluster) as client:
        yield client.get_executor()


def nothing(setting: Any, seed: int) -> None:
    pass


def in_turns(run: Run, settings: Sequence[Any], seeds: range, workers: dict[str, Executor | None]) -> list[list[float]]:
    """Seconds of a whole sweep, for each of ``workers``, in turns, so that what else the machine does hits all alike."""
    seconds: list[list[float]] = [[] for _ in workers]
    for turn in range(-1, TURNS):
        report.progress(f"sweep, turn {turn + 1} of {TURNS}")
        for taken, executor in zip(seconds, workers.values(), strict=True):
            begin = time.perf_counter()
            sweep(run, settings, seeds if turn >= 0 else seeds[:WORKERS], executor)
            taken += [time.perf_counter() - begin] if turn >= 0 else []  # the first is short, and starts the workers
    return seconds


def round_trip(executor: Executor) -> float:
    """Milliseconds of a task that does nothing: median of 100, one after another."""
    taken = []
    for number in range(100):
        begin = time.perf_counter()
        executor.submit(nothing, None, number).result()
        taken.append(time.perf_counter() - begin)
    return 1000 * statistics.median(taken)


def measure(run: Run = missed_pages, settings: Sequence[Any] = SETTINGS, seeds: range = range(200)) -> str:
    """A table of rates, in Markdown."""
    with ExitStack() as stack:
        workers: dict[str, Executor | None] = {"this process": None}
        workers[f"{WORKERS} processes"] = stack.enter_context(processes())
        with suppress(ImportError):
            workers[f"dask, {WORKERS} workers"] = stack.enter_context(dask())
        seconds = in_turns(run, settings, seeds, workers)
        runs, rows = len(settings) * len(seeds), []
        for (name, executor), taken in zip(workers.items(), seconds, strict=True):
            faster = report.ratio(zip(seconds[0], taken, strict=True))
            empty = f"{round_trip(executor):.2f} ms" if executor else ""
            rows.append([name, f"{runs / statistics.median(taken):.0f}", f"{faster:.2f}", empty])
        return report.table([f"{runs} short runs on", "runs a second", "x one process", "an empty task"], rows)


if __name__ == "__main__":
    print(measure())
