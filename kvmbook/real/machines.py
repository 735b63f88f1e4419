"""Machines that one run can be tried on: this one, one that has been recorded, and the model of either.

A recording says which machine it was, how it came about, and of each VM what was said: a line each, a call, its arguments,
the answer, and with it the sentence of a refusal and KVM's counters, where they were kept.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kvmbook.model import Hardware, Kernel
from kvmbook.real.calls import Ask, Outside, Said, ask, asking
from kvmbook.real.modelled import ModelVm, as_hardware, as_kernel
from kvmbook.real.offers import Offers, ask_machine
from kvmbook.real.vm import RealVm

RECORDED = Path(__file__).with_name("recorded")
FIRST = "6.18-kvm_pvm"  # the recording that the book shows


@dataclass(frozen=True)
class Machine:
    """``make(vcpus, page_size)`` makes a VM that is seen from outside. ``offers``: what the machine said of itself."""

    name: str
    offers: Offers
    make: Callable[[int, str], Outside]

    def vm(self, vcpus: int = 1, page_size: str = "4K") -> Outside:
        """A new VM. ``page_size``: the host's, "4K" or "2M"."""
        return self.make(vcpus, page_size)

    def model(self, hardware: Hardware | None = None, kernel: Kernel | None = None) -> Machine:
        """The model of this machine, or of one with another CPU or kernel."""
        hardware, kernel = hardware or as_hardware(self.offers), kernel or as_kernel(self.offers)

        def make(vcpus: int, page_size: str) -> Outside:
            return Outside(asking(ModelVm(hardware, kernel, vcpus, page_size=page_size)), vcpus=vcpus)

        return Machine(f"the model of {hardware.name} under {kernel.name}", self.offers, make)

    def __repr__(self) -> str:
        return self.name


# ---- live ------------------------------------------------------------------------------------------------------------


def live(asking: Callable[[RealVm], Ask] = asking) -> Machine:
    """This machine. ``asking``: how its VMs are asked (`counting` keeps counters too). A VM on 2M pages refuses every call
    where the host has none: its answers would be those of another question. `NoKvm` where there is no usable KVM."""
    offers = without_local_name(ask_machine())

    def make(vcpus: int, page_size: str) -> Outside:
        if page_size == "2M" and not offers.huge_pages:
            return Outside(_without_huge_pages, vcpus=vcpus)
        vm = RealVm(vcpus, page_size=page_size)
        return Outside(asking(vm), vm.close, vcpus)

    return Machine("this machine", offers, make)


def _without_huge_pages(name: str, *arguments: Any) -> Said:
    says = f"{os.strerror(errno.EOPNOTSUPP)}: this host has no transparent huge pages"
    return Said(name, list(arguments), errno.errorcode[errno.EOPNOTSUPP], says)


def without_local_name(offers: Offers) -> Offers:
    """The release without what its builder added to it: a recording need not say whose machine it is."""
    found = re.match(r"[\d.]*\d", offers.release)
    return replace(offers, release=found[0] if found else offers.release)


COUNTERS = (
    "remote_tlb_flush_requests", "pf_taken", "pf_fixed", "pf_fast", "pf_spurious", "pf_emulate", "insn_emulation",
    "mmio_exits", "pages_4k", "pages_2m",
)  # fmt: skip


def counting(vm: RealVm) -> Ask:
    """Have a real VM answer, and say by how much which of `COUNTERS` changed; the guest's own pages are in them. Where KVM
    shows no counters, none have changed. Without the sentences of refusals: they name addresses, each time others."""
    before = _counters(vm)

    def ask_and_count(name: str, *arguments: Any) -> Said:
        nonlocal before
        said, after = ask(vm, name, *arguments), _counters(vm)
        changes = {name: after.get(name, 0) - before.get(name, 0) for name in COUNTERS}
        before = after
        return said._replace(says="", counters={name: by for name, by in changes.items() if by})

    return ask_and_count


def _counters(vm: RealVm) -> dict[str, int]:
    try:
        return vm.counters
    except OSError as refusal:
        if refusal.errno != errno.ENOTTY:
            raise
        return {}


# ---- recordings ------------------------------------------------------------------------------------------------------


class NotRecorded(LookupError):
    """A recording has no answer to this call. The message is one sentence that says what to do."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows instead of a traceback."""
        return [str(self)]


@dataclass(frozen=True)
class Session:
    """One VM's life: how it was made, and what was said."""

    vcpus: int
    page_size: str
    said: tuple[Said, ...]


@dataclass(frozen=True)
class Recording:
    """What a machine said, VM by VM. ``about``: how it came about."""

    about: str
    machine: Offers
    sessions: tuple[Session, ...]

    def save(self, path: Path) -> None:
        """A call a line, so that two recordings can be compared line by line."""
        sessions = ",\n".join(_session(session) for session in self.sessions)
        head = f'"about": {json.dumps(self.about)},\n"machine": {json.dumps(asdict(self.machine))}'
        path.write_text(f'{{{head},\n"sessions": [\n{sessions}\n]}}\n')

    @classmethod
    def load(cls, path: Path) -> Recording:
        kept = json.loads(path.read_text())
        sessions = tuple(
            Session(one["vcpus"], one["page_size"], tuple(Said(*said) for said in one["said"]))
            for one in kept["sessions"]
        )
        return cls(kept["about"], Offers(**kept["machine"]), sessions)


def _session(session: Session) -> str:
    lines = []
    for said in session.said:
        kept: list[Any] = list(said)
        while len(kept) > 3 and not kept[-1]:
            kept.pop()
        lines.append(json.dumps(kept, separators=(",", ":")))
    calls = ",\n  ".join(lines)
    return f' {{"vcpus": {session.vcpus}, "page_size": "{session.page_size}", "said": [\n  {calls}]}}'


def record(machine: Machine, runs: Sequence[Callable[[Machine], object]], path: Path, about: str = "") -> Recording:
    """Have each run asked of a machine, and keep what was said in a file."""
    kept: list[tuple[int, str, Outside]] = []

    def make(vcpus: int, page_size: str) -> Outside:
        kept.append((vcpus, page_size, machine.vm(vcpus, page_size)))
        return kept[-1][2]

    for run in runs:
        run(replace(machine, make=make))
    sessions = tuple(Session(vcpus, page_size, tuple(vm.said)) for vcpus, page_size, vm in kept)
    recording = Recording(about, machine.offers, sessions)
    recording.save(path)
    return recording


def recorded(name: str = FIRST, folder: Path = RECORDED) -> Machine:
    """A machine that was recorded. It answers what was asked then: a run that begins as one of the recorded runs did is
    answered as far as that one went. `NotRecorded` for others. ValueError if there is no such recording."""
    path = folder / f"{name}.json"
    if not path.exists():
        raise ValueError(
            f"there are recordings of {', '.join(sorted(p.stem for p in folder.glob('*.json')))}; got {name!r}"
        )
    recording = Recording.load(path)

    def make(vcpus: int, page_size: str) -> Outside:
        alike = [s for s in recording.sessions if (s.vcpus, s.page_size) == (vcpus, page_size)]
        return Outside(_played(name, alike), vcpus=vcpus)

    return Machine(f"the recorded machine {name}", recording.machine, make)


def _played(name: str, sessions: Sequence[Session]) -> Ask:
    """Answer as the sessions do that have had the same calls so far."""
    alike, asked = list(sessions), 0

    def ask(*call: Any) -> Said:
        nonlocal alike, asked
        alike = [s for s in alike if s.said[asked : asked + 1] and s.said[asked].call == call]
        if not alike:
            said = Said(call[0], list(call[1:]), None)
            raise NotRecorded(f"{name} was not asked {said} at this point of a run: ask your own machine, with live().")
        asked += 1
        return alike[0].said[asked - 1]

    return ask
