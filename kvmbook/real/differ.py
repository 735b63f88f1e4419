"""The differential: sequences of calls on the model and on the machine, answers compared after each; `python -m kvmbook.real
differ`. A difference is tried again, made small, and printed as a script. Or one sequence is kept with the machine's answers,
for the model to be held against anywhere: `python -m kvmbook.real record`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from kvmbook.real.calls import Call, perform
from kvmbook.real.machines import Machine, counting, live, record
from kvmbook.real.modelled import ModelVm
from kvmbook.real.offers import Offers, ask_machine
from kvmbook.real.sequences import DIFFERENCES, KINDS, Setting, known_to_differ, sequence
from kvmbook.real.vm import RealVm

HANG = "ETIMEDOUT"  # what the watchdog calls back
TRIES = 3  # how often a difference is looked for again


@dataclass
class Found:
    """A difference. ``calls``: as few as show it; ``steady``: whether it came again in each of `TRIES`. ``hangs``: the guest
    did not come back from the last of the calls; that is not tried again, so there may be more calls than it takes."""

    seed: int
    vcpus: int
    page_size: str
    calls: list[Call]
    steady: bool = False
    hangs: bool = False

    def script(self) -> str:
        """The difference as a program; of one that did not come again, where it was."""
        if not (self.steady or self.hangs):
            return f"# did not come again: seed {self.seed}, call {len(self.calls)}"
        rows = "".join(f"    {call!r},\n" for call in self.calls)
        how = f"{self.vcpus}, page_size={self.page_size!r}"
        return HANGS * self.hangs + SCRIPT.format(seed=self.seed, how=how, rows=rows)


NAMES = {"done": "accesses", "MMIO": "exits for MMIO", "dirty ring full": "exits as a ring was full"}
HANGS = "# In the last call the guest hangs. It was not tried again, nor made small: look at the host first.\n"
SCRIPT = """\
# found by: python -m kvmbook.real differ --sequences 1 --seed {seed}
from kvmbook.real import ModelVm, RealVm, ask_machine, perform
model, machine = ModelVm.of(ask_machine(), {how}), RealVm({how})
for call in [
{rows}]:
    said, seen = perform(model, *call), perform(machine, *call)
    print(*call, "->", seen if said == seen else f"model: {{said}}, machine: {{seen}}")
"""


@dataclass
class Tally:
    """What was compared. ``met``: how often there was something to see, by its name."""

    sequences: int = 0
    calls: int = 0
    seconds: float = 0.0
    met: Counter[str] = field(default_factory=Counter)
    found: list[Found] = field(default_factory=list)

    def __str__(self) -> str:
        met = ", ".join(f"{count:,} {name}" for name, count in sorted(self.met.items()))
        pace = f"{self.calls / max(self.seconds, 1e-9):,.0f} calls/s"
        once = sum(not found.steady and not found.hangs for found in self.found)
        found = f"{len(self.found) - once} differences"
        lines = [f"{self.sequences:,} sequences, {self.calls:,} calls, {pace}: {found}", f"seen: {met}"]
        if once:
            lines.append(f"besides, {once} that did not come again: the host may have moved pages meanwhile")
        if any(found.hangs for found in self.found):
            lines.append("ended, as a guest has hung")
        return "\n".join(lines)


class Otherwise(NamedTuple):
    """The number of a call, and an answer to it that is another than the model's."""

    number: int
    answer: Any


def first_difference(vm: RealVm | ModelVm, calls: list[Call], answers: list[Any]) -> Otherwise | None:
    """The first call that ``vm`` answers otherwise, None if there is none."""
    for number, (call, answer) in enumerate(zip(calls, answers, strict=True)):
        if (said := perform(vm, *call)) != answer:
            return Otherwise(number, said)
    return None


def differ(seeds: Iterator[int] | range, calls: int, machine: Offers, told: Callable[[Tally], None]) -> Tally:
    """Compare the sequences of these seeds; ``told`` hears after each. Ctrl-C ends it early, or a guest that hangs."""
    tally, start = Tally(), time.monotonic()
    try:
        for seed in seeds:
            setting, made, answers = sequence(seed, machine, calls)
            with RealVm(setting.vcpus, page_size=setting.page_size) as real:
                other = first_difference(real, made, answers)
            asked = made if other is None else made[: other.number + 1]
            tally.sequences += 1
            tally.calls += len(asked)
            tally.met += _something_to_see(made, answers)
            tally.met.update(_kinds(setting))
            if other is not None:
                hangs = other.answer == HANG
                found = Found(seed, setting.vcpus, setting.page_size, asked, hangs=hangs)
                tally.found.append(found if hangs else _examine(found, machine))
            tally.seconds = time.monotonic() - start
            told(tally)
            if tally.found and tally.found[-1].hangs:
                break
    except KeyboardInterrupt:
        pass
    return tally


def _kinds(setting: Setting) -> list[str]:
    """What a sequence was on."""
    kinds = {
        "with two vCPUs": setting.vcpus > 1,
        "on 2M pages": setting.page_size == "2M",
        f"with {setting.kind}": True,
    }
    return [name for name, so in kinds.items() if so]


def _something_to_see(calls: list[Call], answers: list[Any]) -> Counter[str]:
    """What made this sequence worth its while."""
    seen: Counter[str] = Counter()
    for (name, *_), answer in zip(calls, answers, strict=True):
        if isinstance(answer, str):
            seen["refusals"] += 1
        elif name == "run":
            seen.update(NAMES[one] for one in answer)
        elif name == "get_dirty_log":
            seen["pages reported"] += len(answer[1])
        elif name == "harvest":
            seen["ring entries"] += len(answer or ())
        elif name == "reset_dirty_rings":
            seen["entries reset"] += answer
    return seen


# ---- a difference is made small --------------------------------------------------------------------------------------


def _examine(found: Found, machine: Offers) -> Found:
    """The difference, made small if it is steady."""
    vcpus, page_size, calls = found.vcpus, found.page_size, found.calls

    def differs(some: list[Call]) -> bool:
        model, answers = ModelVm.of(machine, vcpus, page_size=page_size), []
        for call in some:
            if known_to_differ(model, call):
                return False
            answers.append(perform(model, *call))
        with RealVm(vcpus, page_size=page_size) as real:
            other = first_difference(real, some, answers)
        if other is not None and other.answer == HANG:
            raise Hung(some[: other.number + 1])
        return other is not None

    try:
        if not all(differs(calls) for _ in range(TRIES)):
            return found
        apart = [one for call in calls for one in access_by_access(call)]
        return replace(found, calls=minimise(apart if differs(apart) else calls, differs), steady=True)
    except Hung as hung:
        return replace(found, calls=hung.calls, hangs=True)


class Hung(Exception):
    """A guest hangs, in the last of the calls."""

    def __init__(self, calls: list[Call]) -> None:
        super().__init__("a guest hangs")
        self.calls = calls


def access_by_access(call: Call) -> list[Call]:
    """A run of many accesses as as many runs."""
    if call[0] != "run":
        return [call]
    return [("run", call[1], [access]) for access in call[2]]


def minimise(calls: list[Call], differs: Callable[[list[Call]], bool]) -> list[Call]:
    """As few of the calls as still show the difference: none of them can be left out."""
    size = len(calls)
    while size:
        at, before = 0, len(calls)
        while at < len(calls):
            fewer = calls[:at] + calls[at + size :]
            if differs(fewer):
                calls = fewer
            else:
                at += size
        if size > 1 or len(calls) == before:
            size //= 2
    return calls


# ---- the commands ----------------------------------------------------------------------------------------------------

WIDTH = 20
OFTEN, SELDOM = 0.2, 30.0  # seconds between two lines, on a terminal and elsewhere


class Progress:
    """How far a long command is, of ``total`` things to do: one line, drawn again and again on a terminal, and now and then
    elsewhere."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self.total, self.stream = total, stream or sys.stderr
        self._terminal = self.stream.isatty()
        self._began = self._last = time.monotonic()
        self._width = 0

    def show(self, done: int, said: str = "") -> None:
        """``done`` of them are done. Draws if it is time, and at the end."""
        now, pause = time.monotonic(), OFTEN if self._terminal else SELDOM
        if now - self._last < pause and done < self.total:
            return
        self._last = now
        left = (now - self._began) / max(done, 1) * (self.total - done)
        bar = "#" * (WIDTH * done // max(self.total, 1))
        line = f"[{bar:.<{WIDTH}}] {done:,} of {self.total:,}, {said}, {left // 60:.0f}:{left % 60:02.0f} left"
        self.stream.write("\r" + line.ljust(self._width) if self._terminal else line + "\n")
        self.stream.flush()
        self._width = len(line)

    def end(self) -> None:
        if self._terminal and self._width:
            self.stream.write("\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sequences", type=int, default=1000, help="how many (1000)")
    parser.add_argument("--calls", type=int, default=25, help="in each (25)")
    parser.add_argument("--seed", type=int, default=0, help="of the first sequence (0); each has the next number")


def show_differences(arguments: argparse.Namespace) -> int:
    """random calls on the model and on this machine's KVM, answers compared after each"""
    machine, first, count = ask_machine(), arguments.seed, arguments.sequences
    print(f"{machine.release}, {machine.paging} paging, beside {ModelVm.of(machine)}")
    print(f"seeds from {first}; {', '.join(KINDS)}; {arguments.calls} calls each")
    print(f"not asked, as it is known to differ: {', '.join(difference.name for difference in DIFFERENCES)}")
    progress = Progress(count)

    def told(tally: Tally) -> None:
        progress.show(tally.sequences, f"{tally.calls / tally.seconds:,.0f} calls/s, {len(tally.found)} differences")

    tally = differ(range(first, first + count), arguments.calls, machine, told)
    progress.end()
    for found in tally.found:
        print(found.script())
    print(tally)
    return int(any(found.steady or found.hangs for found in tally.found))


def add_recording_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="OUT.json", type=Path)
    parser.add_argument("--kind", choices=KINDS, help="what the sequence is about (as the seed has it)")
    parser.add_argument("--calls", type=int, default=200, help="how many (200)")
    parser.add_argument("--seed", type=int, default=0, help="of the sequence (0)")


def make_recording(arguments: argparse.Namespace) -> int:
    """a random sequence of calls to this machine's KVM, with its answers, into a file that the model can be held against"""
    kind, count, seed = arguments.kind, arguments.calls, arguments.seed
    machine = live(counting)
    setting, calls, answers = sequence(seed, machine.offers, count, kind)

    def run(machine: Machine) -> None:
        with machine.vm(setting.vcpus, setting.page_size) as vm:
            for call in calls:
                vm.ask(*call)

    about = f"python -m kvmbook.real record --kind {setting.kind} --calls {count} --seed {seed}"
    (session,) = record(machine, [run], arguments.path, about).sessions
    agree = sum(said.answer == answer for said, answer in zip(session.said, answers, strict=True))
    vm = f"{setting.vcpus} vCPUs, {setting.page_size} pages"
    print(f"{arguments.path}: {count} calls on {vm}; the model agrees with {agree}")
    return int(agree < count)
