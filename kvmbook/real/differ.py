"""The differential: sequences of calls on the model and on the machine, answers compared after each; `python -m kvmbook.real
differ`. A difference is made small, tried again, and printed as a script.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from kvmbook.real.calls import Call, perform
from kvmbook.real.modelled import ModelVm
from kvmbook.real.offers import Offers, ask_machine
from kvmbook.real.progress import Progress
from kvmbook.real.sequences import DIFFERENCES, KINDS, Setting, known_to_differ, sequence
from kvmbook.real.vm import RealVm

TRIES = 3  # how often a difference is looked for again


@dataclass
class Found:
    """A difference. ``calls``: as few as show it; ``steady``: whether it came again in each of `TRIES`."""

    seed: int
    vcpus: int
    page_size: str
    calls: list[Call]
    steady: bool

    def script(self) -> str:
        """The difference as a program."""
        rows = "".join(f"    {call!r},\n" for call in self.calls)
        how = f"{self.vcpus}, page_size={self.page_size!r}"
        return SCRIPT.format(seed=self.seed, how=how, rows=rows)


NAMES = {"done": "accesses", "MMIO": "exits for MMIO", "dirty ring full": "exits as a ring was full"}
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
        steady = sum(found.steady for found in self.found)
        lines = [f"{self.sequences:,} sequences, {self.calls:,} calls, {pace}: {steady} differences", f"seen: {met}"]
        if once := len(self.found) - steady:
            lines.append(f"besides, {once} that did not come again: the host may have moved pages meanwhile")
        return "\n".join(lines)


def first_difference(vm: RealVm | ModelVm, calls: list[Call], answers: list[Any]) -> int | None:
    """The number of the first call that ``vm`` answers otherwise, None if there is none."""
    for number, (call, answer) in enumerate(zip(calls, answers, strict=True)):
        if perform(vm, *call) != answer:
            return number
    return None


def differ(seeds: Iterator[int] | range, calls: int, machine: Offers, told: Callable[[Tally], None]) -> Tally:
    """Compare the sequences of these seeds; ``told`` hears after each. Ctrl-C ends it early."""
    tally, start = Tally(), time.monotonic()
    try:
        for seed in seeds:
            setting, made, answers = sequence(seed, machine, calls)
            with RealVm(setting.vcpus, page_size=setting.page_size) as real:
                number = first_difference(real, made, answers)
            tally.sequences += 1
            tally.calls += len(made) if number is None else number + 1
            tally.met += _something_to_see(made, answers)
            tally.met.update(_kinds(setting))
            if number is not None:
                tally.found.append(_examine(seed, setting, made[: number + 1], machine))
            tally.seconds = time.monotonic() - start
            told(tally)
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
            seen["pages reported"] += len(answer)
        elif name == "harvest":
            seen["ring entries"] += len(answer or ())
        elif name == "reset_dirty_rings":
            seen["entries reset"] += answer
    return seen


# ---- a difference is made small --------------------------------------------------------------------------------------


def _examine(seed: int, setting: Setting, calls: list[Call], machine: Offers) -> Found:
    vcpus, page_size = setting.vcpus, setting.page_size

    def differs(some: list[Call]) -> bool:
        model, answers = ModelVm.of(machine, vcpus, page_size=page_size), []
        for call in some:
            if known_to_differ(model, call):
                return False
            answers.append(perform(model, *call))
        with RealVm(vcpus, page_size=page_size) as real:
            return first_difference(real, some, answers) is not None

    if not all(differs(calls) for _ in range(TRIES)):
        return Found(seed, vcpus, page_size, calls, steady=False)
    apart = [one for call in calls for one in access_by_access(call)]
    return Found(seed, vcpus, page_size, minimise(apart if differs(apart) else calls, differs), steady=True)


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


# ---- the command -----------------------------------------------------------------------------------------------------


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
        print(found.script() if found.steady else f"# did not come again: seed {found.seed}, call {len(found.calls)}")
    print(tally)
    return int(any(found.steady for found in tally.found))
