"""The same run for thousands of seeds and settings, on any `concurrent.futures.Executor`, with the same results on each.

    found = sweep(run, settings, range(1000), lambda: ProcessPoolExecutor(2), keep="found.jsonl")
    found.of(settings[0])  # a list of 1000 values, in the order of the seeds

``run(setting, seed)`` is a function of a module, so that other processes can import it, and depends on nothing but its
arguments. What it returns must fit into JSON, and comes back as JSON has it, whoever ran it: a tuple is a list, a number
of numpy's a number, a key of a dict a text.

Invariants. A result is in the file before anybody sees it. An error that ``run`` raises is carried as a value, so an
exception of a future means that no worker answered. Then each seed that was under way is tried again alone, with nothing
beside it: what is lost three times, twice of them alone, is named and not tried a fourth time.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from contextlib import closing
from dataclasses import dataclass
from io import FileIO
from operator import index
from typing import Any, NamedTuple, TextIO

import numpy as np

Run = Callable[[Any, int], Any]
Workers = Executor | Callable[[], Executor] | None
Path = str | os.PathLike[str]

TASK_SECONDS, LONGEST_TASK = 0.2, 256  # what a task should take, and the most runs that it has
LONGEST_QUEUE = 1024  # tasks
LOSSES = 3
TICKETS = itertools.count()


class Done(NamedTuple):
    """What ``run(setting, seed)`` returned."""

    setting: Any
    seed: int
    value: Any


@dataclass(frozen=True)
class Sweep:
    """All results: ``values[i][j]`` is that of ``settings[i]`` and ``seeds[j]``. Equal whatever the executor."""

    settings: tuple[Any, ...]
    seeds: tuple[int, ...]
    values: list[list[Any]]

    def of(self, setting: Any) -> list[Any]:
        """The results of one setting, in the order of the seeds. ValueError if it is none of ``settings``."""
        return self.values[self.settings.index(setting)]

    @property
    def array(self) -> np.ndarray:
        """All values, of shape (settings, seeds) for numbers, (settings, seeds, n) for lists of n."""
        return np.array(self.values)

    def __iter__(self) -> Iterator[Done]:
        """Results one by one, in the order of settings, then of seeds."""
        for setting, row in zip(self.settings, self.values, strict=True):
            yield from (Done(setting, seed, value) for seed, value in zip(self.seeds, row, strict=True))

    def __len__(self) -> int:
        return len(self.settings) * len(self.seeds)


class SweepError(RuntimeError):
    """A run raised an error, a seed loses its workers, or a pool is broken for good. What was done until then is kept."""


# ---- the two ways to ask ---------------------------------------------------------------------------------------------


def sweep(
    run: Run,
    settings: Iterable[Any],
    seeds: Iterable[int],
    executor: Workers = None,
    *,
    keep: Path | None = None,
    progress: bool | TextIO | None = None,
) -> Sweep:
    """``run(setting, seed)`` for each of ``settings`` and ``seeds``, in this process or on the workers of ``executor``.

    An executor that replaces its lost workers is passed as it is: `dask.distributed.Client().get_executor()`. A
    `ProcessPoolExecutor` is broken for good when it loses one: pass what makes it, ``lambda: ProcessPoolExecutor(2)``. What
    `sweep` makes it also shuts down.

    ``keep``: a file, to which results are appended. What it has is not run again: a sweep that was interrupted goes on, and
    one with more seeds runs only these. The file knows the sweep by the name of ``run`` and the `repr` of each setting:
    delete it when you have changed what they do.

    ``progress``: a line on stderr, or on the stream that you give; None shows it on a terminal only.

    SweepError if a run raises an error, or its worker is lost whenever it is tried. ValueError if settings or seeds are
    not distinct, or the file is of another sweep."""
    settings, seeds = tuple(settings), tuple(map(index, seeds))
    rows: dict[int, dict[int, Any]] = {id(setting): {} for setting in settings}
    with closing(stream(run, settings, seeds, executor, keep=keep, progress=progress)) as arrivals:  # also on Ctrl-C
        for setting, seed, value in arrivals:
            rows[id(setting)][seed] = value
    return Sweep(settings, seeds, [[row[seed] for seed in seeds] for row in rows.values()])


def stream(
    run: Run,
    settings: Iterable[Any],
    seeds: Iterable[int],
    executor: Workers = None,
    *,
    keep: Path | None = None,
    progress: bool | TextIO | None = None,
) -> Generator[Done, None, None]:
    """As `sweep`, but results one by one, as they come: first those that the file has. To close it cancels the rest."""
    return _Work(run, tuple(settings), tuple(map(index, seeds)), executor, keep, progress).arrivals()


# ---- what a worker does ----------------------------------------------------------------------------------------------


class _Answer(NamedTuple):
    """A task's values, as JSON, up to the first seed that raised an error; and that error, in a line and in full."""

    values: list[str]
    seconds: float
    error: tuple[str, str] | None


def _do(run: Run, setting: Any, seeds: Sequence[int], ticket: int) -> _Answer:
    """In a worker. ``ticket`` makes no two calls equal: dask would take them for one, and never try the second."""
    begin, values, failed = time.perf_counter(), list[str](), None
    for seed in seeds:
        try:
            values.append(json.dumps(run(setting, seed), default=_plain))
        except Exception as error:
            failed = f"{type(error).__name__}: {error}", traceback.format_exc()
            break
    return _Answer(values, time.perf_counter() - begin, failed)


def _plain(value: Any) -> Any:
    """What JSON has for numpy's numbers and arrays."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"a run returns what JSON can hold, and a {type(value).__name__} is not")


class _Here(Executor):
    """Does a task when it is handed in, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = Future[Any]()
        future.set_result(fn(*args, **kwargs))
        return future


# ---- who shares it out -----------------------------------------------------------------------------------------------


class _Task(NamedTuple):
    """Runs of the setting with this number. ``losses``: how often a worker was lost while it had them."""

    number: int
    seeds: Sequence[int]
    losses: int = 0


@dataclass
class _Work:
    """A sweep under way. ``flying`` is what was handed out, and when; ``suspects`` are tried before all else. ``size`` (runs
    a task) and ``window`` (tasks handed out at a time) follow what is measured."""

    run: Run
    settings: tuple[Any, ...]
    seeds: tuple[int, ...]
    executor: Workers
    keep: Path | None
    progress: bool | TextIO | None

    def __post_init__(self) -> None:
        if len({*map(repr, self.settings)}) < len(self.settings) or len({*self.seeds}) < len(self.seeds):
            raise ValueError("seeds must be distinct, and settings too, each with a repr of its own")
        self.pool: Executor | None = None
        self.make: Callable[[], Executor] | None = None
        if isinstance(self.executor, Executor):
            self.pool = self.executor
        else:
            self.make = self.executor or _Here
        self.flying: dict[Future[_Answer], tuple[_Task, float]] = {}
        self.suspects: deque[_Task] = deque()
        self.size, self.window = 1, 2

    def arrivals(self) -> Generator[Done, None, None]:
        """Each run once: what the file has, then the others as they come."""
        self.lines = _Lines(self.keep, self.run, self.settings)
        wanted = list(itertools.product(range(len(self.settings)), self.seeds))
        kept = {key: self.lines.kept[key] for key in wanted if key in self.lines.kept}
        self.tasks = self._tasks(kept)
        bar = _Bar(self.progress, len(wanted), len(kept))
        try:
            yield from (Done(self.settings[number], seed, value) for (number, seed), value in kept.items())
            while (handed := self._hand_out()) or self.flying:
                for future in wait(self.flying, 0 if handed else None, FIRST_COMPLETED).done:
                    for arrival in self._take(future):
                        bar.one_more()
                        yield arrival
        finally:
            bar.end()
            self._end()

    def _tasks(self, kept: Collection[tuple[int, int]]) -> Iterator[_Task]:
        for number in range(len(self.settings)):
            missing = [seed for seed in self.seeds if (number, seed) not in kept]
            while missing:
                now, missing = missing[: self.size], missing[self.size :]
                yield _Task(number, now)

    def _hand_out(self) -> bool:
        """Hand out one more task, if one is due. A suspect is alone: nothing else is under way."""
        if self.suspects:
            task = None if self.flying else self.suspects[0]
        else:
            task = next(self.tasks, None) if len(self.flying) < self.window else None
        if task is None:
            return False
        if self.pool is None and self.make is not None:
            self.pool = self.make()
        assert self.pool is not None, "an executor that was passed is never given up"
        begin = time.monotonic()
        try:
            future = self.pool.submit(_do, self.run, self.settings[task.number], task.seeds, next(TICKETS))
        except BrokenExecutor as error:  # it lost a worker that had nothing to do
            future = Future()
            future.set_exception(error)
        self.flying[future] = task, begin
        return True

    def _take(self, future: Future[_Answer]) -> Iterator[Done]:
        """Keep what came, then hand it on."""
        task, begin = self.flying.pop(future)
        if task.losses:
            self.suspects.popleft()
        try:
            answer = future.result()
        except Exception as error:  # none of the run's: no worker answered
            return self._lost(task, error)
        self.lines.write(task, answer)
        if not task.losses:
            self._measure(answer, time.monotonic() - begin)
        for seed, value in zip(task.seeds, answer.values, strict=False):
            yield Done(self.settings[task.number], seed, json.loads(value))
        if answer.error:
            line, in_full = answer.error
            failed = SweepError(f"{self._named(task, task.seeds[len(answer.values)])} raised {line}")
            failed.add_note(in_full)
            raise failed

    def _measure(self, answer: _Answer, seconds: float) -> None:
        """Make tasks as long as they should be, and so many that each worker finds another one waiting: a task that
        was run as soon as it was handed out says that there are too few."""
        if runs := len(answer.values):
            fit = int(TASK_SECONDS * runs / max(answer.seconds, 1e-6))
            self.size = max(1, min(fit, 4 * self.size, LONGEST_TASK))
        if seconds < 2 * answer.seconds:
            self.window = min(self.window + 1, LONGEST_QUEUE)

    def _lost(self, task: _Task, error: Exception) -> None:
        """Its seeds become suspects, each for itself; after some losses it is accused. A broken pool is replaced."""
        losses = task.losses + 1
        if losses == LOSSES:
            message = f"{self._named(task, task.seeds[0])} lost its worker {losses} times, {losses - 1} of them alone"
            raise SweepError(f"{message}; the last time: {type(error).__name__}: {error}") from error
        self.suspects.extend(_Task(task.number, [seed], losses) for seed in task.seeds)
        if isinstance(error, BrokenExecutor) and self.pool is not None:
            if self.make is None:
                raise SweepError("the pool is broken; pass what makes it: lambda: ProcessPoolExecutor(2)") from error
            self.pool.shutdown()
            self.pool = None  # a new one is made when the next task is handed out

    def _named(self, task: _Task, seed: int) -> str:
        return f"{getattr(self.run, '__qualname__', self.run)}({self.settings[task.number]!r}, {seed})"

    def _end(self) -> None:
        """Cancel what waits, and keep what has been done meanwhile."""
        for future in self.flying:
            future.cancel()
        if self.make is not None and self.pool is not None:
            self.pool.shutdown()
        for future, (task, _) in self.flying.items():
            if future.done() and not future.cancelled() and future.exception() is None:
                self.lines.write(task, future.result())
        self.lines.close()


class _Lines:
    """The file: a line that says of which sweep it is, then one for each task: number of the setting, seeds, values. The
    last is torn, and cut off, if a process was killed while it wrote."""

    def __init__(self, path: Path | None, run: Run, settings: Sequence[Any]) -> None:
        self.kept: dict[tuple[int, int], Any] = {}
        self.file: FileIO | None = None
        if path is None:
            return
        named = {"run": f"{run.__module__}.{run.__qualname__}", "settings": list(map(repr, settings))}
        head = json.dumps(named).encode()
        if b" at 0x" in head:
            raise ValueError("a setting that is kept needs a repr that says what it is, not where in memory")
        text = pathlib.Path(path).read_bytes() if os.path.exists(path) else b""
        whole, newline, torn = text.rpartition(b"\n")
        first, *lines = whole.split(b"\n")
        if first != head if newline else not head.startswith(torn):
            raise ValueError(f"{os.fspath(path)} is of another run or of other settings: keep this sweep elsewhere")
        for number, seeds, values in map(json.loads, lines):
            self.kept.update(((number, seed), value) for seed, value in zip(seeds, values, strict=True))
        self.file = FileIO(path, "a")  # not buffered: a line is written by one call
        self.file.truncate(len(whole + newline))
        if not newline:
            self.file.write(head + b"\n")

    def write(self, task: _Task, answer: _Answer) -> None:
        if self.file and answer.values:
            seeds = json.dumps(list(task.seeds[: len(answer.values)]))
            self.file.write(f"[{task.number}, {seeds}, [{', '.join(answer.values)}]]\n".encode())

    def close(self) -> None:
        if self.file:
            self.file.close()


class _Bar:
    """A line that rewrites itself, ten times a second."""

    def __init__(self, progress: bool | TextIO | None, total: int, kept: int) -> None:
        self.stream = sys.stderr if progress is True or (progress is None and sys.stderr.isatty()) else progress
        self.total, self.kept, self.done = total, kept, kept
        self.begin = self.said = time.monotonic()

    def one_more(self) -> None:
        self.done += 1
        now = time.monotonic()
        if self.stream and (now > self.said + 0.1 or self.done == self.total):
            rate, self.said = (self.done - self.kept) / max(now - self.begin, 1e-6), now
            text = f"{self.done:,} of {self.total:,} runs, {rate:,.0f} a second"
            self.stream.write(f"\r[{'#' * (30 * self.done // self.total):30}] {text:45}")
            self.stream.flush()

    def end(self) -> None:
        if self.stream and self.done > self.kept:
            self.stream.write("\n")
