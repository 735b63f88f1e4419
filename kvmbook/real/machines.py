"""Machines that one run can be tried on: this one, one that has been recorded, and the model of either."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kvmbook.model import Hardware, Kernel
from kvmbook.real.modelled import ModelVm, as_hardware, as_kernel
from kvmbook.real.offers import Offers, ask_machine
from kvmbook.real.outside import Ask, Outside, Said, asking
from kvmbook.real.vm import RealVm

RECORDED = Path(__file__).with_name("recorded")
FIRST = "6.18-kvm_pvm"  # the recording that the book shows
LEVELS = {"4K": 1, "2M": 2}


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
            return Outside(asking(model_vm(hardware, kernel, vcpus, page_size)), vcpus=vcpus)

        return Machine(f"the model of {hardware.name} under {kernel.name}", self.offers, make)

    def __repr__(self) -> str:
        return self.name


def model_vm(hardware: Hardware, kernel: Kernel, vcpus: int = 1, page_size: str = "4K") -> ModelVm:
    """The model in the place of a real VM, also on a host with huge pages."""
    vm = ModelVm(hardware, kernel, vcpus)
    vm.host.level = LEVELS[page_size]
    return vm


def live() -> Machine:
    """This machine. `NoKvm` where there is no usable KVM."""

    def make(vcpus: int, page_size: str) -> Outside:
        vm = RealVm(vcpus, page_size=page_size)
        return Outside(asking(vm), vm.close, vcpus)

    return Machine("this machine", without_local_name(ask_machine()), make)


def without_local_name(offers: Offers) -> Offers:
    """The release without what its builder added to it: a recording need not say whose machine it is."""
    found = re.match(r"[\d.]*\d", offers.release)
    return replace(offers, release=found[0] if found else offers.release)


class NotRecorded(LookupError):
    """A recording has no answer to this call. The message is one sentence that says what to do."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows instead of a traceback."""
        return [str(self)]


# ---- recordings ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Session:
    """One VM's life: how it was made, and what was said."""

    vcpus: int
    page_size: str
    said: tuple[Said, ...]


def recorded(name: str = FIRST, folder: Path = RECORDED) -> Machine:
    """A machine that was recorded. It answers what was asked then: a run that begins as one of the recorded runs did is
    answered as far as that one went. `NotRecorded` for others. ValueError if there is no such recording."""
    path = folder / f"{name}.json"
    if not path.exists():
        raise ValueError(
            f"there are recordings of {', '.join(sorted(p.stem for p in folder.glob('*.json')))}; got {name!r}"
        )
    kept = json.loads(path.read_text())
    sessions = [
        Session(one["vcpus"], one["page_size"], tuple(Said(*said) for said in one["said"])) for one in kept["sessions"]
    ]

    def make(vcpus: int, page_size: str) -> Outside:
        return Outside(
            _played(name, [s for s in sessions if (s.vcpus, s.page_size) == (vcpus, page_size)]), vcpus=vcpus
        )

    return Machine(f"the recorded machine {name}", Offers(**kept["machine"]), make)


def _played(name: str, sessions: Sequence[Session]) -> Ask:
    """Answer as the sessions do that have had the same calls so far."""
    alike, asked = list(sessions), 0

    def ask(call: str, arguments: list[Any]) -> Any:
        nonlocal alike, asked
        alike = [s for s in alike if s.said[asked : asked + 1] and list(s.said[asked][:2]) == [call, arguments]]
        if not alike:
            said = Said(call, arguments, None)
            raise NotRecorded(f"{name} was not asked {said} at this point of a run: ask your own machine, with live().")
        asked += 1
        return alike[0].said[asked - 1].answer

    return ask


def record(machine: Machine, runs: Sequence[Callable[[Machine], object]], path: Path) -> None:
    """Have each run asked of a machine, and keep what was said."""
    kept: list[tuple[int, str, Outside]] = []

    def make(vcpus: int, page_size: str) -> Outside:
        kept.append((vcpus, page_size, machine.vm(vcpus, page_size)))
        return kept[-1][2]

    for run in runs:
        run(replace(machine, make=make))
    sessions = ",\n".join(_session(*one) for one in kept)
    text = f'{{"machine": {json.dumps(asdict(machine.offers))},\n"sessions": [\n{sessions}\n]}}\n'
    path.write_text(text)


def _session(vcpus: int, page_size: str, vm: Outside) -> str:
    """One session, a call a line."""
    said = ",\n  ".join(json.dumps(one) for one in vm.said)
    return f' {{"vcpus": {vcpus}, "page_size": "{page_size}", "said": [\n  {said}]}}'
