"""Recordings: what a machine answered to a sequence of calls, kept as JSON, and held against the model anywhere.

A file says which machine it was and then, a line each: a call, its arguments, the answer, and the counters that changed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kvmbook.real.calls import AnyVm, Call, perform
from kvmbook.real.machines import without_local_name
from kvmbook.real.modelled import ModelVm
from kvmbook.real.offers import Offers, ask_machine
from kvmbook.real.sequences import KINDS, sequence
from kvmbook.real.vm import RealVm

COUNTERS = (
    "remote_tlb_flush_requests", "pf_taken", "pf_fixed", "pf_fast", "pf_spurious", "pf_emulate", "insn_emulation",
    "mmio_exits", "pages_4k", "pages_2m",
)  # fmt: skip


class Recorded(NamedTuple):
    """One call. ``counters``: by how much which of `COUNTERS` changed; the guest's own pages are in them."""

    name: str
    arguments: list[Any]
    answer: Any
    counters: dict[str, int]

    @property
    def call(self) -> Call:
        return self.name, *self.arguments


@dataclass(frozen=True)
class Recording:
    """One VM's life on ``machine``. ``about``: how it came about."""

    machine: Offers
    about: str
    vcpus: int
    page_size: str
    calls: list[Recorded]

    def save(self, path: Path) -> None:
        """A call a line, so that two recordings can be compared line by line."""
        head = {"about": self.about, "machine": asdict(self.machine), "vcpus": self.vcpus, "page_size": self.page_size}
        lines = ",\n".join(json.dumps(call, separators=(",", ":")) for call in self.calls)
        path.write_text(f'{json.dumps(head)[:-1]}, "calls": [\n{lines}\n]}}\n')

    @classmethod
    def load(cls, path: Path) -> Recording:
        kept = json.loads(path.read_text())
        calls = [Recorded(*call) for call in kept["calls"]]
        return cls(Offers(**kept["machine"]), kept["about"], kept["vcpus"], kept["page_size"], calls)


class Replayed(NamedTuple):
    """One call of a recording, asked of another VM, which ``answered``."""

    recorded: Recorded
    answered: Any

    @property
    def agrees(self) -> bool:
        return bool(self.answered == self.recorded.answer)


def replay(recording: Recording, vm: AnyVm | None = None) -> Iterator[Replayed]:
    """Ask each call of ``vm``; of the model of the recorded machine, if None."""
    asked = ModelVm.of(recording.machine, recording.vcpus, page_size=recording.page_size) if vm is None else vm
    for recorded in recording.calls:
        yield Replayed(recorded, perform(asked, *recorded.call))


def record(calls: list[Call], about: str, vcpus: int = 1, *, page_size: str = "4K") -> Recording:
    """Ask each call of this machine, and keep its answers. `NoKvm` where there is no usable KVM."""
    kept = []
    with RealVm(vcpus, page_size=page_size) as vm:
        before = vm.counters
        for call in calls:
            answer, after = perform(vm, *call), vm.counters
            changes = {name: after.get(name, 0) - before.get(name, 0) for name in COUNTERS}
            kept.append(Recorded(call[0], list(call[1:]), answer, {name: by for name, by in changes.items() if by}))
            before = after
    return Recording(without_local_name(ask_machine()), about, vcpus, page_size, kept)


# ---- the command -----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="OUT.json", type=Path)
    parser.add_argument("--kind", choices=KINDS, help="what the sequence is about (as the seed has it)")
    parser.add_argument("--calls", type=int, default=200, help="how many (200)")
    parser.add_argument("--seed", type=int, default=0, help="of the sequence (0)")


def make_recording(arguments: argparse.Namespace) -> int:
    """a random sequence of calls to this machine's KVM, with its answers, into a file that the model can be held against"""
    kind, count, seed = arguments.kind, arguments.calls, arguments.seed
    setting, calls, _ = sequence(seed, ask_machine(), count, kind)
    about = f"python -m kvmbook.real record --kind {setting.kind} --calls {count} --seed {seed}"
    recording = record(calls, about, setting.vcpus, page_size=setting.page_size)
    recording.save(arguments.path)
    agree = sum(replayed.agrees for replayed in replay(recording))
    vm = f"{setting.vcpus} vCPUs, {setting.page_size} pages"
    print(f"{arguments.path}: {count} calls on {vm}; the model agrees with {agree}")
    return int(agree < count)
