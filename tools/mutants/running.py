"""Run tests, or a chapter, on a mutant: in a forked process, which has everything imported but kvmbook.

The chapter is run as in ``make test``, by nbval, which compares what its cells give with what is stored. Its kernel is this
process (`Kernel`), and pictures, which nbval does not compare, are not painted.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import json
import os
import resource
import select
import signal
import sys
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import coverage
import matplotlib
import nbval.plugin
import pytest
from IPython.core.displayhook import CapturingDisplayHook
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from matplotlib_inline.backend_inline import configure_inline_support
from matplotlib_inline.config import InlineBackend

from tools.mutants.mutating import MODEL, ROOT, Mutant

OPTIONS = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-seed=0", "--nbval", "--nbval-current-env"]
INLINE = "module://matplotlib_inline.backend_inline"
MEMORY = 6 << 30  # bytes that a mutant may take
OURS = ("kvmbook", "tools.", "tests", "conftest", "test_", "__main__")


# ---- a process of its own --------------------------------------------------------------------------------------------


def in_a_fork(work: Callable[[], Any], limit: float) -> Any:
    """What ``work`` returns, by way of json; None if it dies, or takes longer than ``limit`` seconds."""
    end, begin = os.pipe()
    if not (child := os.fork()):
        os.setpgid(0, 0)
        os.close(end)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        try:
            said = json.dumps(work()).encode()
            with os.fdopen(begin, "wb") as pipe:
                pipe.write(said)
        finally:
            os._exit(0)
    os.close(begin)
    said, until = b"", time.monotonic() + limit
    while select.select([end], [], [], max(0, until - time.monotonic()))[0] and (part := os.read(end, 1 << 16)):
        said += part
    os.close(end)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        return json.loads(said)
    except ValueError:
        return None


class Mutated(importlib.machinery.SourceFileLoader):
    """Loads a room from the source of a mutant; `inspect` finds that source, too."""

    source: str

    def get_code(self, fullname: str) -> types.CodeType:
        import linecache

        linecache.cache[self.path] = (len(self.source), None, self.source.splitlines(keepends=True), self.path)
        code: types.CodeType = compile(self.source, self.path, "exec", dont_inherit=True)
        return code


class Finder:
    """Finds the mutant where Python would find the room."""

    def __init__(self, mutant: Mutant) -> None:
        self.name, self.source = f"kvmbook.model.{mutant.module}", mutant.source()

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec and spec.origin
        spec.loader = Mutated(name, spec.origin)
        spec.loader.source = self.source
        return spec


def put_in(mutant: Mutant | None) -> None:
    """From here on, importing kvmbook imports the mutant."""
    assert not any(name.startswith("kvmbook") for name in sys.modules), "kvmbook was imported before its mutant"
    if mutant:
        sys.meta_path.insert(0, Finder(mutant))  # type: ignore[arg-type]


def is_python(mutant: Mutant) -> bool:
    """Whether the mutant can be imported. One that cannot is no mistake that anybody could overlook, and is not counted."""

    def work() -> bool:
        put_in(mutant)
        importlib.import_module("kvmbook")
        return True

    return bool(in_a_fork(work, 20))


def prepare(modules: Iterable[str]) -> None:
    """Import once what every run imports, such as numpy; nothing of this project."""
    os.chdir(ROOT)
    for name in modules:
        if not name.startswith(OURS):
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def imported_by(files: list[str]) -> list[str]:
    """What collecting these files imports."""

    def work() -> list[str]:
        pytest.main(["--collect-only", *OPTIONS, *files])
        return sorted(sys.modules)

    return in_a_fork(work, 120) or []


# ---- the kernel of a chapter -----------------------------------------------------------------------------------------


class Kernel:
    """What nbval asks of a kernel, in this process."""

    def __init__(self, *_: object, cwd: str, **__: object) -> None:
        os.chdir(cwd)
        sys.modules.setdefault("__main__", types.ModuleType("__main__"))
        self.shell = InteractiveShell.instance()
        self.shell.history_manager.enabled = False
        self.shell.display_trap.hook = CapturingDisplayHook(shell=self.shell, outputs=[])
        InlineBackend.instance(parent=self.shell).figure_formats = set()
        matplotlib.use(INLINE)
        configure_inline_support(self.shell, INLINE)
        self.messages: list[dict[str, Any]] = []

    def execute_cell_input(self, source: str, allow_stdin: bool | None = None) -> str:
        with capture_output() as captured:
            assert isinstance(self.shell.display_pub, CapturingDisplayPublisher)
            self.shell.display_trap.hook.outputs = self.shell.display_pub.outputs
            result = self.shell.run_cell(source, store_history=False)
        said = {"stdout": captured.stdout, "stderr": captured.stderr}
        error = result.error_before_exec or result.error_in_exec
        if error:
            said = {}
        for name, text in said.items():
            if text:
                self._tell("stream", name=name, text=text)
        for output in captured.outputs:
            self._tell("display_data", data=output.data, metadata=output.metadata or {})
        if error:
            self._tell("error", ename=type(error).__name__, evalue=str(error), traceback=[])
        self._tell("status", execution_state="idle")
        return "cell"

    def _tell(self, kind: str, **content: Any) -> None:
        self.messages.append({"msg_type": kind, "content": content, "parent_header": {"msg_id": "cell"}})

    def get_message(self, stream: str, timeout: float | None = None) -> dict[str, Any]:
        return self.messages.pop(0)

    def await_idle(self, msg_id: str, timeout: float) -> None:
        self.messages.clear()

    def await_reply(self, msg_id: str, timeout: float | None = None) -> None:
        """A cell has been run when it has been sent."""

    def is_alive(self) -> bool:
        return True

    interrupt = stop = restart = lambda self: None


# ---- tests -----------------------------------------------------------------------------------------------------------


class Watcher:
    """A pytest plugin: runs those items that are wanted, in this order, and keeps how each ended, and its time."""

    def __init__(self, wanted: list[str] | None, measured: coverage.Coverage | None) -> None:
        self.place = None if wanted is None else {name: place for place, name in enumerate(wanted)}
        self.measured = measured
        self.failed: list[str] = []
        self.seconds: dict[str, float] = defaultdict(float)
        self.passed: set[str] = set()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if (place := self.place) is not None:
            items[:] = sorted((i for i in items if i.nodeid in place), key=lambda item: place[item.nodeid])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        if self.measured:
            self.measured.switch_context(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.when == "call" and report.passed:
            self.passed.add(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


def killed_by(mutant: Mutant | None, files: list[str], wanted: list[str] | None, limit: float) -> str | None:
    """The first test or cell that fails with this mutant, or "time", "death" or the like; None if it survives.
    ValueError if nothing was run, for then nothing is known."""

    def work() -> dict[str, Any]:
        put_in(mutant)
        nbval.plugin.RunningKernel = Kernel
        watcher = Watcher(wanted, None)
        code = pytest.main(["-x", *OPTIONS, *files], plugins=[watcher])
        return {"code": int(code), "failed": watcher.failed, "passed": len(watcher.passed)}

    begun = time.monotonic()
    said = in_a_fork(work, limit)
    if said is None:
        return "time" if time.monotonic() - begun >= limit else "death"
    if said["failed"]:
        return str(said["failed"][0])
    if mutant and not said["passed"]:
        return "no test is left"  # conftest.py breaks, or parameters that come from the model are gone
    if said["code"] or not said["passed"]:
        raise ValueError(f"pytest ended with {said['code']} and ran {said['passed']} tests: {files}")
    return None


def unmutated(file: str, limit: float = 900) -> dict[str, Any]:
    """What a file of tests, or a chapter, does with the model as it is: the seconds of each item that passes, the lines of
    the model that it runs, and what it imports. Of a chapter each cell is an item."""

    def work() -> dict[str, Any]:
        put_in(None)
        nbval.plugin.RunningKernel = Kernel
        measured = coverage.Coverage(data_file=None, include=[f"{MODEL}/*"], config_file=False)
        watcher = Watcher(None, measured)
        measured.start()
        pytest.main([*OPTIONS, file], plugins=[watcher])
        measured.stop()
        found, lines = measured.get_data(), defaultdict(list)
        for path in found.measured_files():
            for line, names in found.contexts_by_lineno(path).items():
                for name in names:
                    lines[name].append((os.path.basename(path).removesuffix(".py"), line))
        return {
            "failed": watcher.failed,
            "seconds": {name: watcher.seconds[name] for name in watcher.passed},
            "lines": {name: lines[name] for name in watcher.passed},
            "imports": sorted(sys.modules),
        }

    said = in_a_fork(work, limit)
    if said is None:
        raise ValueError(f"{file} takes longer than {limit} s, or dies, without any mutant")
    return said  # type: ignore[no-any-return]
