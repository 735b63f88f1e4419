"""The same transition system as a Promela model, and SPIN run on it: the yardstick for the searches of `kvmbook`.

The state vector is the number of each page's pair, which says the control too. The tables of `kvmbook.tables` become C
arrays. Each step is one d_step from a single control location, so SPIN stores no states of its own in between: the start
is its first state, and there is no last one. Steps that change nothing, and second ways to the same state, are left out.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from kvmbook.search import EXIT, Space

# The fastest found of SPIN's exact modes. SFH: a cheaper hash, of the bytes as they are; NOVSZ: no length beside each state.
# Partial order reduction has nothing to reduce: one process, and every step touches every variable.
FAST = ("-O3", "-march=native", "-DSAFETY", "-DNOREDUCE", "-DNOCOMP", "-DSFH", "-DNOVSZ", "-DNOFAIR", "-DMEMLIM=12000")
BREADTH_FIRST = (*FAST, "-DBFS")

PIECE = 4000  # numbers in one c_decl: SPIN takes 64 KiB at most


def promela(space: Space) -> str:
    """The model of all runs in ``space``. Its assertion: no write is lost."""
    tables = _Tables(space)
    arrays = tables.edges() + tables.facts() + tables.effects() + tables.user_steps()
    bits = max(1, (len(space.pairs.pairs) - 1).bit_length())
    state = [f"unsigned p{page} : {bits} = 0;" for page in range(space.pages)]
    scratch = "c_decl { static unsigned " + ", ".join(f"to{page}" for page in range(space.pages)) + "; }"
    steps = [*tables.page_steps(), *tables.exits(), *tables.steps_of_user_space()]
    return "\n".join([*arrays, scratch, *state, "active proctype vm() {", "do", *steps, "od", "}", ""])


class _Tables:
    """C arrays over pairs, and the steps that read them. ``loud``: the effects on other pages that change anything."""

    def __init__(self, space: Space) -> None:
        self.space, self.pairs = space, space.pairs
        self.pages = range(space.pages)
        self.here = [f"now.p{page}" for page in self.pages]
        unchanged = list(range(len(self.pairs.pairs)))
        self.loud = [what for what, to in self.pairs.everywhere.items() if to != unchanged]
        self.out: list[list[tuple[int, int, int]]] = []
        for number, edges in enumerate(self.pairs.edges):
            steps = {(to, what if what in self.loud else 0, unless) for to, what, unless in edges}
            self.out.append(sorted(step for step in steps if step[:2] != (number, 0)))
        waits = [self.pairs.holds_up_user[block] for block in self.pairs.block]
        self.users = [
            0 if wait else len(self.pairs.users[c]) for wait, (c, _) in zip(waits, self.pairs.pairs, strict=True)
        ]

    # ---- arrays -----------------------------------------------------------------------------------------------------

    def edges(self) -> list[str]:
        """``edges[first[i]]`` to ``edges[first[i + 1] - 1]``: the steps of pair i."""
        first, flat = [0], []
        for steps in self.out:
            flat += [f"{{{to},{what},{unless}}}" for to, what, unless in steps]
            first.append(len(flat))
        kind = _kind(len(self.out))
        struct = f"c_decl {{ struct edge {{ {kind} to; unsigned char what; unsigned short unless; }}; }}"
        return [*_array("first", first), struct, *_pieces("struct edge", "edges", flat or ["{0,0,0}"])]

    def facts(self) -> list[str]:
        """What others see of a pair, whether a write is lost in it, and how many steps user space has."""
        lost = [self.pairs.steps.lost(*pair) for pair in self.pairs.pairs]
        busy = [self.space.busy[block] for block in self.pairs.block]
        return [*_array("busy", busy), *_array("lost", lost), *_array("users", self.users)]

    def effects(self) -> list[str]:
        return [line for what in self.loud for line in _array(f"every{what}", self.pairs.everywhere[what])]

    def user_steps(self) -> list[str]:
        """For the n-th step of user space on the w-th page: who speaks, and what a pair becomes, silent and spoken."""
        lines: list[str] = []
        for nth in range(max(self.users)):
            for which in range(len(self.pairs.numbers)):
                says, becomes = [0] * len(self.users), [[0] * len(self.users) for _ in range(2)]
                for steps in self.pairs.users.values():
                    for pair, (page, speaks) in steps[nth].becomes[which].items() if nth < len(steps) else ():
                        says[pair] = int(speaks)
                        for to, control in zip(becomes, (steps[nth].silent, steps[nth].spoken), strict=True):
                            if control is not None and not (speaks and to is becomes[0]):
                                to[pair] = self.pairs.number[control, page]
                lines += _array(f"speaks{nth}_{which}", says)
                for spoken, to in enumerate(becomes):
                    lines += _array(f"user{nth}_{which}_{spoken}", to)
        return lines

    # ---- steps ------------------------------------------------------------------------------------------------------

    def _option(self, guard: str, after: dict[int, str]) -> str:
        """One way on: if ``guard`` holds, each page takes its new number at once."""
        take = " ".join([f"to{page} = {to};" for page, to in after.items()])
        give = " ".join([f"now.p{page} = to{page};" for page in after])
        lost = " | ".join(f"lost[{here}]" for here in self.here)
        return f":: d_step {{ c_expr {{ {guard} }} -> c_code {{ {take} {give} }}; assert(c_expr {{ !({lost}) }}) }}"

    def page_steps(self) -> Iterable[str]:
        """The first, second, ... step on each page, by what it does to the others."""
        for page, here in enumerate(self.here):
            elsewhere = " | ".join(f"busy[{other}]" for other in self.here if other != here) or "0"
            for nth in range(max(map(len, self.out))):
                edge = f"edges[first[{here}] + {nth}]"
                possible = f"first[{here}] + {nth} < first[{here} + 1] && !({edge}.unless & ({elsewhere}))"
                for what in sorted({steps[nth][1] for steps in self.out if nth < len(steps)}):
                    after = {other: f"every{what}[{self.here[other]}]" for other in self.pages} if what else {}
                    yield self._option(f"{possible} && {edge}.what == {what}", {**after, page: f"{edge}.to"})

    def exits(self) -> Iterable[str]:
        """A vCPU in the guest leaves it, if that drains something."""
        busy = " | ".join(f"busy[{here}]" for here in self.here)
        for vcpu in range(self.pairs.vcpus):
            if EXIT + vcpu in self.loud and "exits" not in self.pairs.cells.without:
                after = {page: f"every{EXIT + vcpu}[{here}]" for page, here in enumerate(self.here)}
                changes = " || ".join(f"{to} != {self.here[page]}" for page, to in after.items())
                yield self._option(f"!(({busy}) & {1 << vcpu}) && ({changes})", after)

    def steps_of_user_space(self) -> Iterable[str]:
        """All pages change at once; where to depends on whether one of them speaks."""
        which = [page % len(self.pairs.numbers) for page in self.pages]
        for nth in range(max(self.users)):
            guard = " && ".join(f"users[{here}] > {nth}" for here in self.here)
            spoken = " | ".join(f"speaks{nth}_{which[page]}[{self.here[page]}]" for page in self.pages)
            table = {page: f"user{nth}_{which[page]}" for page in self.pages}
            after = {p: f"({spoken}) ? {table[p]}_1[{now}] : {table[p]}_0[{now}]" for p, now in enumerate(self.here)}
            yield self._option(guard, after)


def _kind(bound: int) -> str:
    """The smallest C type for numbers below ``bound``."""
    return "unsigned char" if bound <= 1 << 8 else "unsigned short" if bound <= 1 << 16 else "unsigned"


def _array(name: str, values: Sequence[int]) -> list[str]:
    return _pieces(_kind(max(values) + 1), name, [str(int(value)) for value in values])


def _pieces(kind: str, name: str, values: list[str]) -> list[str]:
    """A C array, as macros that are short enough for SPIN."""
    pieces = [values[begin : begin + PIECE] for begin in range(0, len(values), PIECE)]
    macros = [f"{name.upper()}_{number}" for number in range(len(pieces))]
    defines = [f"c_decl {{\n\\#define {m} {','.join(piece)}\n}}" for m, piece in zip(macros, pieces, strict=True)]
    return [*defines, f"c_decl {{ static const {kind} {name}[] = {{{','.join(macros)}}}; }}"]


# ---- running it ------------------------------------------------------------------------------------------------------


def missing() -> str | None:
    """What SPIN needs and this machine lacks, if anything."""
    lacks = [program for program in ("spin", "cc") if shutil.which(program) is None]
    return f"not installed: {', '.join(lacks)}" if lacks else None


class Measured(NamedTuple):
    """A finished process: what it printed, its wall time, its CPU time, and the most memory it ever had."""

    output: str
    seconds: float
    cpu: float
    peak_bytes: int


# Runs in a process of its own: a child is charged with the memory of the process that started it, and this one is small.
_LAUNCH = """
import json, os, subprocess, sys, time
start = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
output = child.stdout.read()
_, status, usage = os.wait4(child.pid, 0)
seconds = time.perf_counter() - start
json.dump([output.decode(), seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, status], sys.stdout)
"""


def measured(command: Sequence[str], directory: Path) -> Measured:
    """Run ``command`` in ``directory``. RuntimeError if it fails."""
    launched = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _LAUNCH, *command], cwd=directory, capture_output=True, text=True, check=True
    )
    *found, status = json.loads(launched.stdout)
    done = Measured(*found)
    if status:
        raise RuntimeError(f"{command[0]} failed:\n{done.output[-2000:]}")
    return done


class Verifier:
    """SPIN's verifier for ``space``, in ``directory``, compiled for depth-first and for breadth-first search.
    ``seconds``: how long it took to write and compile the depth-first one."""

    def __init__(self, space: Space, directory: Path) -> None:
        self.space, self.directory = space, directory
        start = time.perf_counter()
        (directory / "model.pml").write_text(promela(space))
        measured(["spin", "-a", "model.pml"], directory)
        self._compile("depth", FAST)
        self.seconds = time.perf_counter() - start
        self._compile("breadth", BREADTH_FIRST)
        self.longest = max(10_000, space.bound // 2)  # steps on the stack; 44 bytes each
        self.hash_bits = max(16, round(math.log2(space.bound)))  # a larger hash table is slower: it misses the cache

    def _compile(self, name: str, options: Sequence[str]) -> None:
        measured(["cc", *options, "-w", "-o", name, "pan.c"], self.directory)

    def count(self) -> SpinRun:
        """Depth first over all states, past violations."""
        while True:
            run = self._run("depth", f"-m{self.longest}", "-c0")
            if "max search depth too small" not in run.output:
                return run
            self.longest *= 2

    def breadth_first(self) -> SpinRun:
        """All states again, and the greatest distance from the start."""
        return self._run("breadth", "-c0")

    def shortest_loss(self) -> tuple[SpinRun, int | None]:
        """Breadth first until a write is lost: the run, and its length in steps, or None if no write is."""
        run, trail = self._run("breadth", "-c1"), self.directory / "model.pml.trail"
        if not run.lost:
            return run, None
        steps = [line for line in trail.read_text().splitlines() if not line.startswith("-")]
        trail.unlink()
        return run, len(steps)

    def _run(self, name: str, *options: str) -> SpinRun:
        done = measured([f"./{name}", *options, f"-w{self.hash_bits}"], self.directory)
        said = re.search(r"depth reached (\d+), errors: (\d+)\s+(\d+) states, stored\s", done.output)
        if said is None:  # or SPIN has rounded the number: it prints eight digits
            raise RuntimeError(f"SPIN did not say how many states there are:\n{done.output[-2000:]}")
        depth, errors, states = (int(number) for number in said.groups())
        return SpinRun(states, depth, errors > 0, done.seconds, done.cpu, done.peak_bytes, done.output)


class SpinRun(NamedTuple):
    """What SPIN printed: states stored, greatest depth, whether an assertion failed; and what it took."""

    states: int
    depth: int
    lost: bool
    seconds: float
    cpu: float
    peak_bytes: int
    output: str
