"""A sweep is the same on every executor; it survives lost workers, goes on after an interruption, and names who is guilty."""

import io
import json
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest

from benchmarks.sweep import SETTINGS, missed_pages
from kvmbook.search import Done, SweepError, stream, sweep

SEEDS = range(12)


@pytest.fixture(scope="module")
def here():
    """The sweep in this process, with which all others are compared."""
    return sweep(missed_pages, SETTINGS, SEEDS)


def processes(workers=2):
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))  # pytest has threads: no fork


one_process = partial(processes, 1)


@pytest.fixture(scope="module")
def dask():
    """An executor of two workers on this machine, each of which comes again when it is killed. A task that has killed one
    is not tried again by dask itself, so that its loss is ours to deal with."""
    distributed, config = pytest.importorskip("distributed"), pytest.importorskip("dask").config
    options = {"n_workers": 2, "threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": None}
    with (
        config.set({"distributed.scheduler.allowed-failures": 0}),
        distributed.LocalCluster(**options, silence_logs=50) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client.get_executor()


@pytest.fixture(scope="module")
def ipyparallel(tmp_path_factory):
    """An executor of two engines on this machine, whose files are not in the user's folder. An engine is there after its
    first heartbeat, and lost after ten that are missing, so they beat faster than by default."""
    ipp = pytest.importorskip("ipyparallel")
    options = {"controller_ip": "127.0.0.1", "controller_args": ["--HeartMonitor.period=150"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        with ipp.Cluster(n=2, log_level=50, **options) as client:
            yield client.executor()


# ---- runs that others can import -------------------------------------------------------------------------------------


def own_seed(setting, seed):
    return [setting, seed]


class Killing(NamedTuple):
    """Seed ``seed`` kills its worker as long as there are fewer than ``times`` files in ``folder``."""

    folder: str
    seed: int
    times: int


def killing(setting, seed):
    marks = pathlib.Path(setting.folder)
    if seed == setting.seed and len(list(marks.iterdir())) < setting.times:
        (marks / f"{os.getpid()}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return seed**2


def failing(setting, seed):
    if seed == 13:
        raise ZeroDivisionError("thirteen")
    return seed


def interrupted(setting, seed):
    """Ctrl-C, once, at seed 20."""
    mark = pathlib.Path(setting)
    if seed == 20 and not mark.exists():
        mark.touch()
        signal.raise_signal(signal.SIGINT)
    return seed


def numpys(setting, seed):
    return {1: (np.int64(setting), np.arange(seed + 1)[-1])}


def returning_a_set(setting, seed):
    return {seed}


def sleeping(setting, seed):
    time.sleep(setting)
    return seed


RUNNING, LOCK = set(), threading.Lock()


def how_many_run(setting, seed):
    """How many threads are in this function."""
    with LOCK:
        RUNNING.add(threading.get_ident())
        running = len(RUNNING)
    time.sleep(setting)
    with LOCK:
        RUNNING.discard(threading.get_ident())
    return running


def counting(setting, seed):
    with open(setting, "a") as made:
        made.write(f"{seed}\n")
    return seed


# ---- the same everywhere ---------------------------------------------------------------------------------------------


def test_results_are_those_of_the_run_in_the_order_of_settings_and_seeds(here):
    assert list(here) == [Done(c, seed, missed_pages(c, seed)) for c in SETTINGS for seed in SEEDS]
    assert here.of(SETTINGS[0]) == here.values[0] and sum(here.of(SETTINGS[0])) > 0
    assert len(here) == here.array.size == len(SETTINGS) * len(SEEDS) and here.array.shape == (4, 12)


def test_on_processes_the_results_are_the_same(here):
    assert sweep(missed_pages, SETTINGS, SEEDS, processes) == here


def test_on_dask_the_results_are_the_same(here, dask):
    assert sweep(missed_pages, SETTINGS, SEEDS, dask) == here


def test_on_ipyparallel_the_results_are_the_same(here, ipyparallel):
    assert sweep(missed_pages, SETTINGS, SEEDS, ipyparallel) == here
    with pytest.raises(SweepError, match=r"^failing\(0, 13\) raised ZeroDivisionError: thirteen"):
        sweep(failing, [0], range(40), ipyparallel)


def test_they_come_as_they_are_done_each_once(here):
    with ThreadPoolExecutor(2) as executor:
        come = list(stream(own_seed, ["a", "b"], range(500), executor))
    assert sorted(come) == list(sweep(own_seed, ["a", "b"], range(500)))


def test_values_are_as_json_has_them_from_any_executor_and_from_a_file(tmp_path):
    wanted = [{"1": [0, 0]}, {"1": [0, 1]}]
    assert sweep(numpys, [0], np.arange(2), keep=tmp_path / "kept").of(0) == wanted
    assert sweep(numpys, [0], np.arange(2), keep=tmp_path / "kept").of(0) == wanted
    with pytest.raises(SweepError, match=r"returning_a_set\(0, 7\) raised TypeError: .* a set is not"):
        sweep(returning_a_set, [0], [7])


def test_settings_and_seeds_must_be_distinct():
    for settings, seeds in (([{"pages": 1}, {"pages": 1}], [1]), ([1], [1, 1])):
        with pytest.raises(ValueError, match="must be distinct"):
            sweep(own_seed, settings, seeds)
    assert sweep(own_seed, [{"pages": 2}, {"pages": 1}], [3]).of({"pages": 1}) == [[{"pages": 1}, 3]]


# ---- how it is shared out --------------------------------------------------------------------------------------------


class Counted(ThreadPoolExecutor):
    """Notes how many runs each task has, and how many tasks were under way when it came."""

    def __init__(self, workers=2):
        super().__init__(workers)
        self.futures, self.runs, self.under_way = [], [], []

    def submit(self, fn, /, run, setting, seeds, ticket):
        self.runs.append(len(seeds))
        self.under_way.append(sum(not future.done() for future in self.futures))
        self.futures.append(super().submit(fn, run, setting, seeds, ticket))
        return self.futures[-1]


def test_short_runs_are_handed_out_many_at_a_time_and_few_tasks_wait():
    with Counted() as executor:
        assert sweep(sleeping, [0.002], range(1000), executor).of(0.002) == list(range(1000))
    assert sum(executor.runs) == 1000 and executor.runs[0] == 1 and 30 < max(executor.runs) <= 100
    assert 2 <= max(executor.under_way) <= 16


def test_the_queue_grows_until_all_workers_are_busy():
    with ThreadPoolExecutor(8) as executor:
        running = sweep(how_many_run, [0.2], range(40), executor).of(0.2)
    assert max(running) == 8


def test_long_runs_are_handed_out_one_by_one():
    with Counted() as executor:
        sweep(sleeping, [0.15], range(6), executor)
    assert executor.runs == [1] * 6


# ---- lost workers ----------------------------------------------------------------------------------------------------


def test_processes_that_lose_a_worker_are_replaced_and_its_seeds_are_tried_again(tmp_path):
    setting = Killing(str(tmp_path), seed=15, times=1)
    assert sweep(killing, [setting], range(30), processes).of(setting) == [seed**2 for seed in range(30)]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_seed_that_kills_each_worker_is_named_and_the_others_are_kept(tmp_path):
    (tmp_path / "marks").mkdir()
    setting = Killing(str(tmp_path / "marks"), seed=3, times=99)
    with pytest.raises(SweepError, match=r"^killing\(Killing\(.*\), 3\) lost its worker 3 times, 2 of them alone; "):
        sweep(killing, [setting], range(6), one_process, keep=tmp_path / "kept")
    assert len(list((tmp_path / "marks").iterdir())) == 3
    assert {0, 1, 2} <= set(seeds_in(tmp_path / "kept"))


def test_a_pool_that_was_passed_cannot_be_mended_and_that_is_said(tmp_path):
    setting = Killing(str(tmp_path), seed=3, times=1)
    with one_process() as executor, pytest.raises(SweepError, match="pass what makes it"):
        sweep(killing, [setting], range(6), executor)


def test_what_a_lost_worker_of_dask_had_is_tried_again(tmp_path, dask):
    setting = Killing(str(tmp_path), seed=15, times=2)
    assert sweep(killing, [setting], range(30), dask).of(setting) == [seed**2 for seed in range(30)]
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_lost_engine_of_ipyparallel_had_is_tried_again(tmp_path, ipyparallel):
    setting = Killing(str(tmp_path), seed=15, times=1)
    assert sweep(killing, [setting], range(30), ipyparallel).of(setting) == [seed**2 for seed in range(30)]
    assert len(list(tmp_path.iterdir())) == 1


class Losing(Executor):
    """Loses, without an answer, whatever is handed in together with seed 5, and what is under way beside it."""

    def __init__(self):
        self.under_way, self.tried = [], []

    def submit(self, fn, /, run, setting, seeds, ticket):
        self.tried.append(list(seeds))
        future = Future()
        if 5 in seeds:
            future.set_exception(OSError("the worker is gone"))
        else:
            future.set_result(fn(run, setting, seeds, ticket))
        return future


def test_an_innocent_seed_is_not_accused():
    executor = Losing()
    with pytest.raises(SweepError, match=r"own_seed\('a', 5\) lost its worker 3 times.*OSError: the worker is gone"):
        sweep(own_seed, ["a"], range(40), executor)
    together = next(seeds for seeds in executor.tried if 5 in seeds)
    assert len(together) > 1 and executor.tried.count([5]) == 2


# ---- errors, interruptions, files ------------------------------------------------------------------------------------


def seeds_in(path):
    return sorted(seed for line in path.read_text().splitlines()[1:] for seed in json.loads(line)[1])


@pytest.mark.parametrize("executor", [None, partial(ThreadPoolExecutor, 2)], ids=["here", "threads"])
def test_an_error_of_a_run_is_named_and_what_was_done_is_kept(executor, tmp_path):
    with pytest.raises(SweepError) as caught:
        sweep(failing, [0], range(40), executor, keep=tmp_path / "kept")
    assert str(caught.value) == "failing(0, 13) raised ZeroDivisionError: thirteen"
    assert 'raise ZeroDivisionError("thirteen")' in caught.value.__notes__[0]
    assert set(range(13)) <= set(seeds_in(tmp_path / "kept")) and 13 not in seeds_in(tmp_path / "kept")


def test_a_sweep_that_was_interrupted_goes_on_with_what_is_missing(tmp_path):
    setting = str(tmp_path / "mark")
    with pytest.raises(KeyboardInterrupt):
        sweep(interrupted, [setting], range(200), keep=tmp_path / "kept")
    before = seeds_in(tmp_path / "kept")
    assert 0 < len(before) < 200
    assert sweep(interrupted, [setting], range(200), keep=tmp_path / "kept").of(setting) == list(range(200))
    assert seeds_in(tmp_path / "kept") == list(range(200))


def test_an_interruption_cancels_what_waits_and_keeps_what_workers_finish(tmp_path):
    """Ctrl-C comes while the sweep waits for its workers."""
    with Counted(1) as executor:
        alarm = threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT])
        alarm.start()
        with pytest.raises(KeyboardInterrupt):
            sweep(sleeping, [0.02], range(1000), executor, keep=tmp_path / "kept")
        assert any(future.cancelled() for future in executor.futures)
    assert 0 < len(seeds_in(tmp_path / "kept")) < 200


def test_whoever_leaves_the_loop_finds_the_rest_later(tmp_path):
    made, kept = str(tmp_path / "made"), tmp_path / "kept"
    for done in stream(counting, [made], range(500), partial(ThreadPoolExecutor, 2), keep=kept):
        if done.seed == 100:
            break
    del done
    assert sweep(counting, [made], range(700), keep=kept).of(made) == list(range(700))
    assert sorted(map(int, pathlib.Path(made).read_text().split())) == list(range(700)) == seeds_in(kept)


@pytest.mark.parametrize("torn", [3, 30, -1, -20])
def test_a_file_whose_last_line_is_torn_is_mended(torn, tmp_path):
    kept = tmp_path / "kept"
    wanted = sweep(own_seed, ["a"], range(9), keep=kept)
    whole = kept.read_bytes()
    kept.write_bytes(whole[:torn])
    assert sweep(own_seed, ["a"], range(9), keep=kept) == wanted
    assert seeds_in(kept) == list(range(9)) and kept.read_bytes().splitlines()[0] == whole.splitlines()[0]


@pytest.mark.parametrize("text", ["a diary", "a diary\n", '{"run": "another", "settings": []}\n[0, [1], [1]]\n'])
def test_a_file_of_something_else_is_refused_and_left_alone(text, tmp_path):
    kept = tmp_path / "kept"
    kept.write_text(text)
    with pytest.raises(ValueError, match="is of another run or of other settings"):
        sweep(own_seed, ["a"], range(9), keep=kept)
    assert kept.read_text() == text


def test_a_setting_that_is_known_only_by_its_address_cannot_be_kept(tmp_path):
    with pytest.raises(ValueError, match="a repr that says what it is"):
        sweep(own_seed, [object()], range(3), keep=tmp_path / "kept")


# ---- what is shown ---------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_a_line_on_a_terminal_and_nothing_elsewhere(monkeypatch):
    for stderr, progress, shown in (Terminal(), None, True), (Terminal(), False, False), (io.StringIO(), None, False):
        monkeypatch.setattr(sys, "stderr", stderr)
        sweep(own_seed, ["a"], range(50), progress=progress)
        last = stderr.getvalue().split("\r")[-1]
        assert bool(last) == shown and (not shown or last.startswith(f"[{'#' * 30}] 50 of 50 runs, "))
    asked = io.StringIO()
    sweep(own_seed, ["a"], range(50), progress=asked)
    assert "50 of 50 runs" in asked.getvalue() and asked.getvalue().endswith("\n")
