"""How long it takes to know that no run of a small VM loses a write, or how the shortest one does: SPIN, the plain search,
`kvmbook.search` and `kvmbook.products`, on the same transition systems, in turns, each in a process of its own.

SPIN gets a generated model with tables in C (`benchmarks.promela`) and the options that were fastest. All sides are one
thread. Times are medians; a side whose first run takes more than a minute runs once. Ratios are of CPU times, which other
work on the machine disturbs less; on an idle one they are the same. Memory is the peak of the process, for ours with the
interpreter and numpy, and numba where the loops are compiled. "From nothing" is what somebody waits for who asks: for SPIN
with writing and compiling the model, for ours with the tables and numba's loops. `python -m benchmarks.explore 0 1` has the
first two instances only, which takes less than a minute.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks import report
from benchmarks.promela import Measured, Verifier, measured, missing
from kvmbook import FlushPolicy, Hardware, Kernel
from kvmbook.model import numba_is_there
from kvmbook.search import (
    AnyNumber,
    Cells,
    Grain,
    PageSteps,
    Pagewise,
    Pairs,
    Search,
    Space,
    count_any_size,
    count_states,
    explore,
    plain_search,
    search_pagewise,
    smallest_vm,
    space_of,
)

ROOT = Path(__file__).parent.parent
ONCE = 60.0  # seconds
FEW_STATES, SMALL = 2000, 1 << 17  # what `explore` visits one by one before it makes tables; what it needs no numba for
EPT, NPT = Hardware.ept(ad_bits=False), Hardware.npt()
Instance = tuple[Hardware, Kernel, int, int, Grain]
INSTANCES: list[tuple[str, Instance, bool, int]] = [  # whether a write is lost, and the number of rounds
    ("EPT without A/D, v5.19, 1 page, 1 vCPU, cut by step", (EPT, Kernel.v5_19, 1, 1, Grain.STEP), True, 5),
    ("EPT without A/D, v5.19, 2 pages, 2 vCPUs, cut by fault", (EPT, Kernel.v5_19, 2, 2, Grain.FAULT), True, 5),
    ("EPT without A/D, v5.19, 2 pages, 3 vCPUs, cut by fault", (EPT, Kernel.v5_19, 2, 3, Grain.FAULT), True, 1),
    ("NPT, v5.19, 2 pages, 2 vCPUs, cut by step", (NPT, Kernel.v5_19, 2, 2, Grain.STEP), False, 1),
    ("NPT, v5.19, 5 pages, 1 vCPU, cut by access", (NPT, Kernel.v5_19, 5, 1, Grain.ACCESS), False, 1),
]
PLAIN_ON = 1  # so many of them are small enough for the plain search
SEED = (
    "import kvmbook; from kvmbook.search import explore; "
    "print(explore(kvmbook.Hardware.ept(ad_bits=False), kvmbook.Kernel.v5_19, whole=False))"
)


@dataclass(frozen=True)
class Found:
    """What one side found, None where it did not look, and what it took. ``steps``: of the shortest run that loses a
    write, 0 if there is none. ``extra``: CPU seconds for what must be there before it can begin: tables, or a compiled
    model; ``loading``: for numba and the loops that it keeps compiled; ``asked``: of all that somebody waits for who asks
    `explore` in a process where nothing was asked before."""

    seconds: float
    cpu: float
    extra: float
    peak_bytes: int
    states: int | None = None
    safe: bool | None = None
    depth: int | None = None
    steps: int | None = None
    loading: float = 0.0
    asked: float = 0.0


# ---- our sides, each in a child process ------------------------------------------------------------------------------


class Watch:
    """Seconds and CPU seconds since it was made, or since it was last read."""

    def __init__(self) -> None:
        self.then = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        now = time.perf_counter(), time.process_time()
        passed, self.then = (now[0] - self.then[0], now[1] - self.then[1]), now
        return passed


def plain(instance: Instance) -> dict[str, float | None]:
    hardware, kernel, pages, vcpus, grain = instance
    watch = Watch()
    reach = plain_search(smallest_vm(hardware, kernel, pages, vcpus, grain), grain)
    seconds, cpu = watch.read()
    told = {"states": reach.states, "safe": reach.trace is None, "depth": reach.depth, "steps": len(reach.trace or ())}
    return {"seconds": seconds, "cpu": cpu, "extra": 0.0, **told}


def search(instance: Instance) -> dict[str, float | None]:
    watch = Watch()
    made = Search(space_of(*instance))
    _, extra = watch.read()
    load(made)
    _, loading = watch.read()
    made.run()
    trace = made.shortest_loss()
    seconds, cpu = watch.read()
    told = {"states": made.states, "safe": trace is None, "depth": made.depth, "steps": len(trace or ())}
    return {"seconds": seconds, "cpu": cpu, "extra": extra, "loading": loading, **told}


def load(made: Search) -> None:
    """Have its loops compiled, or what was compiled before read from disk, unless it is too small for them."""
    if made.space.bound >= SMALL and numba_is_there():
        made.load()


def loss(instance: Instance) -> dict[str, float | None]:
    """The search that stops: asked for in a new process; and alone, when all that it needs is there."""
    watch = Watch()
    result = explore(*instance, whole=False)
    _, asked = watch.read()
    steps = PageSteps(Cells(*instance[:3], instance[4]), instance[3])
    vm = Pagewise(steps)
    if search_pagewise(vm, FEW_STATES) is not None:
        _, extra = watch.read()
        search_pagewise(vm, FEW_STATES)
    else:
        made = Search(Space(Pairs(steps)))
        load(made)
        _, extra = watch.read()
        made.run(whole=False)
        made.shortest_loss()
    seconds, cpu = watch.read()
    told = {"safe": result.safe, "steps": len(result.trace or ())}
    return {"seconds": seconds, "cpu": cpu, "extra": extra, "asked": asked, **told}


def products(instance: Instance) -> dict[str, float | None]:
    watch = Watch()
    made = space_of(*instance)
    _, extra = watch.read()
    count = count_states(made)
    seconds, cpu = watch.read()
    return {"seconds": seconds, "cpu": cpu, "extra": extra, "states": count.states, "safe": count.safe}


def child(name: str, number: int) -> None:
    """What a child process does: one side on one instance, its findings as JSON."""
    sides = {"plain": plain, "search": search, "loss": loss, "products": products}
    print(json.dumps(sides[name](INSTANCES[number][1])))


def ours(name: str, number: int) -> Found:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from benchmarks import explore; "
    done = measured([sys.executable, "-c", f"{code}explore.child({name!r}, {number})"], ROOT)
    return Found(peak_bytes=done.peak_bytes, **json.loads(done.output))


# ---- SPIN's sides ----------------------------------------------------------------------------------------------------


def spin_count(spin: Verifier) -> Found:
    run = spin.count()
    return Found(run.seconds, run.cpu, spin.seconds, run.peak_bytes, run.states, not run.lost)


def spin_levels(spin: Verifier) -> Found:
    run = spin.breadth_first()
    steps = None if run.lost else 0
    return Found(run.seconds, run.cpu, spin.seconds, run.peak_bytes, run.states, not run.lost, run.depth, steps)


def spin_trail(spin: Verifier) -> Found:
    run, steps = spin.shortest_loss()
    return Found(run.seconds, run.cpu, spin.seconds, run.peak_bytes, safe=not run.lost, steps=steps or 0)


# ---- the table -------------------------------------------------------------------------------------------------------

Sides = dict[str, Callable[[], Found]]


def in_turns(title: str, sides: Sides, rounds: int) -> dict[str, list[Found]]:
    """Each side once, then each once more, and so on."""
    found: dict[str, list[Found]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name, run in sides.items():
            report.progress(f"{title}: {name}, {turn + 1} of {rounds}")
            if not found[name] or found[name][0].seconds < ONCE:
                found[name].append(run())
    return found


def agree(found: dict[str, list[Found]]) -> None:
    """All sides say the same, as far as they say anything."""
    for what in ("states", "safe", "depth", "steps"):
        said = {getattr(run, what) for runs in found.values() for run in runs} - {None}
        assert len(said) <= 1, f"{what}: {said}"


Cost = Callable[[Found], tuple[float, float]]  # seconds, and CPU seconds


def alone(run: Found) -> tuple[float, float]:
    return run.seconds, run.cpu


def with_tables(run: Found) -> tuple[float, float]:
    return run.seconds + run.extra, run.cpu + run.extra


def from_nothing(run: Found) -> tuple[float, float]:
    """For SPIN with writing and compiling the model; for ours with numba's loops, or as `explore` is asked."""
    whole = run.seconds + run.extra + run.loading, run.cpu + run.extra + run.loading
    return (run.asked, run.asked) if run.asked else whole


TASKS = [  # what is asked, and which sides answer it: SPIN's, ours
    ("count, verdict", "spin_count", "products"),
    ("depths, shortest run", "spin_levels", "search"),
    ("depths, plain search", "spin_levels", "plain"),
    ("shortest run only", "spin_trail", "loss"),
]
HEAD = (
    "states",
    "what",
    "SPIN's search",
    "ours",
    "x",
    "with our tables",
    "x",
    "from nothing, SPIN / ours",
    "x",
    "MiB, SPIN / ours",
)


def rows(states: str, found: dict[str, list[Found]]) -> Iterator[list[str]]:
    """One for each task: medians, and SPIN's as a multiple of ours."""
    for task, theirs, side in TASKS:
        if side in found:
            spin = found.get(theirs, [])
            searched, made, began = (cost_of(found[side], cost) for cost in (alone, with_tables, from_nothing))
            both = f"{cost_of(spin, from_nothing)} / {began}" if spin else f"{began}"
            yield [
                *(
                    states,
                    task,
                    str(cost_of(spin, alone)) if spin else "-",
                    str(searched),
                    times(spin, alone, searched),
                ),
                *(str(made) if found[side][0].extra else "", times(spin, alone, made) if found[side][0].extra else ""),
                *(both, times(spin, from_nothing, began)),
                " / ".join(
                    f"{max(run.peak_bytes for run in runs) / 2**20:,.0f}" for runs in (spin, found[side]) if runs
                ),
            ]
            states = ""


class Taken(NamedTuple):
    seconds: float
    cpu: float

    def __str__(self) -> str:
        return f"{1000 * self.seconds:.3g} ms" if self.seconds < 0.1 else f"{self.seconds:.3g} s"


def cost_of(runs: Sequence[Found], cost: Cost) -> Taken:
    """The median."""
    return Taken(*(statistics.median(column) for column in zip(*map(cost, runs), strict=True)))


def times(spin: Sequence[Found], cost: Cost, ours: Taken) -> str:
    """By CPU time, to two digits."""
    return f"{float(f'{cost_of(spin, cost).cpu / ours.cpu:.2g}'):,g}" if spin else "-"


def one_instance(number: int, with_spin: bool) -> list[list[str]]:
    """Its rows. AssertionError if two sides do not agree."""
    name, instance, loses, rounds = INSTANCES[number]
    sides: Sides = {"search": lambda: ours("search", number)}
    sides["products"] = lambda: ours("products", number)
    if loses:
        sides["loss"] = lambda: ours("loss", number)
    if number < PLAIN_ON:
        sides["plain"] = lambda: ours("plain", number)
    with tempfile.TemporaryDirectory() as directory:
        if with_spin:
            spin = Verifier(space_of(*instance), Path(directory))
            sides = {
                "spin_count": lambda: spin_count(spin),
                "spin_levels": lambda: spin_levels(spin),
                **({"spin_trail": lambda: spin_trail(spin)} if loses else {}),
                **sides,
            }
        found = in_turns(name, sides, rounds)
    agree(found)
    first = found["search"][0]
    assert first.safe is not loses
    return list(rows(f"{first.states:,} ({name})", found))


def median_of(call: Callable[[], object], rounds: int = 5) -> tuple[float, object]:
    """The median time of a call, and its result."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def all_verdicts() -> tuple[float, float]:
    """Seconds for the verdicts of 4 policies on 5 kinds of hardware: the searches alone, and with what they ask the model."""
    alone = whole = 0.0
    for hardware in (EPT, Hardware.ept(), Hardware.ept(pml=True), NPT, Hardware.shadow()):
        start = time.perf_counter()
        never = Cells(hardware, Kernel.v5_19.with_(flush=FlushPolicy.NEVER), 1, Grain.FAULT)
        whole += time.perf_counter() - start
        for policy in FlushPolicy:
            start = time.perf_counter()
            cells = never if policy is FlushPolicy.NEVER else never.with_flush(policy)
            AnyNumber(cells).search().verdict()
            again = time.perf_counter()  # now every cell is known
            AnyNumber(cells).search().verdict()
            whole, alone = whole + again - start, alone + time.perf_counter() - again
    return alone, whole


def beyond() -> Iterator[list[str]]:
    """What no search state by state does; medians of five."""
    for pages, vcpus, grain in ((3, 2, Grain.FAULT), (4, 2, Grain.FAULT), (4, 1, Grain.STEP)):
        report.progress(f"{pages} pages, {vcpus} vCPUs")
        space = space_of(EPT, Kernel.v5_19, pages, vcpus, grain)
        seconds, count = median_of(lambda space=space: count_states(space))  # type: ignore[misc]
        name = f"{count.states:,} states: {pages} pages, {vcpus} vCPU{'s' * (vcpus > 1)}, cut by {grain.value}"  # type: ignore[attr-defined]
        yield [f"{name}: count and verdict", f"{seconds:.2f} s"]
    report.progress("2^18 pages")
    seconds, _ = median_of(lambda: count_any_size(EPT, Kernel.v5_19, 1 << 18))
    yield ["the exact number of states of a slot of 2^18 pages, with the tables", f"{seconds:.2f} s"]
    report.progress("all verdicts")
    runs = [all_verdicts() for _ in range(5)]
    searched, whole = (statistics.median(column) for column in zip(*runs, strict=True))
    what = "all verdicts (5 kinds of hardware, 4 flush rules) for any number of pages and vCPUs"
    yield [what, f"{searched:.2f} s, with the tables {whole:.2f} s"]
    seconds, cpu = statistics.median(seed().seconds for _ in range(5)), warm()
    yield ["from `import kvmbook` to the printed run of the seed's bug, a whole process", f"{seconds:.2f} s"]
    yield ["the same search, asked again in a process that has asked it before", f"{1000 * cpu:.1f} ms"]


def seed() -> Measured:
    """A whole process, from the start of the interpreter to the printed trace."""
    return measured([sys.executable, "-c", SEED], ROOT)


def warm() -> float:
    """Seconds of `explore` on the seed's bug, where it was asked before."""
    return median_of(lambda: explore(EPT, Kernel.v5_19, whole=False), rounds=21)[0]


def measure(numbers: Sequence[int] = ()) -> str:
    """All tables, in Markdown, or that of these instances."""
    lacks = missing()
    found = [row for number in numbers or range(len(INSTANCES)) for row in one_instance(number, with_spin=not lacks)]
    tables = [report.table(HEAD, found)]
    if lacks:
        tables.append(f"SPIN is left out: {lacks}.")
    if not numbers:
        tables.append(report.table(["without SPIN", ""], beyond()))
    return "\n\n".join(tables)


if __name__ == "__main__":
    print(measure([int(number) for number in sys.argv[1:]]))
