"""Linux's own KVM on CPUs that an emulator has, as `make real-bug` recorded it; and what the model says of the same.

There it can be had what no machine of today shows: a CPU whose EPT has no A/D bits, and the one line of the patch taken
out. Twelve *cells*: three flush rules, aged or not, without A/D bits or with them. Beside them the losses of later kernels,
on the TDP MMU.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from kvmbook.model import FlushPolicy, Hardware, Kernel, Vm

KEPT = Path(__file__).with_name("emulated.json")
EMULATED = {hardware.name: hardware for hardware in (Hardware.ept(ad_bits=False), Hardware.ept())}
FLUSH_RULES = FlushPolicy.NEVER, FlushPolicy.IF_CHANGED, FlushPolicy.ALWAYS
PAGES_WRITTEN = 16
REPAIRS = {  # what the kernel's parameter `repairs` does there, as changes of `Kernel`
    "clear_compares_rounded_up": False,
    "ring_skips_protection": False,
    "reset_forgets_at_signal": False,
}


class Turn(NamedTuple):
    """Of `PAGES_WRITTEN` pages that the guest writes all the time: how many were ``written`` after enabling had returned, how
    many of those were ``reported``; and for how many flushes KVM had asked while it was enabling."""

    written: int
    reported: int
    flushes: int

    @property
    def lost(self) -> int:
        return self.written - self.reported


@dataclass(frozen=True)
class Cell:
    """Some rounds with one flush rule, of pages that were ``aged`` before enabling, or not."""

    flush: str
    aged: bool
    rounds: tuple[Turn, ...]

    @property
    def lost(self) -> str:
        """How many rounds lost all pages, or which other numbers."""
        return _counted(round.lost for round in self.rounds)

    @property
    def flushes(self) -> str:
        return _counted(round.flushes for round in self.rounds)


def _counted(numbers: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(set(numbers))))


class Loss(NamedTuple):
    """A program that plays one run: how many of its ``rounds`` lost a write, as the kernel is or with `REPAIRS`.
    ``litmus``: the run as text, for `read_litmus`; empty if the release has not all of its calls."""

    name: str
    repaired: bool
    rounds: int
    lost: int
    litmus: str


@dataclass(frozen=True)
class Boot:
    """One boot: a kernel's release, the CPU by what its EPT can do and as the emulator calls it, how long it took."""

    kernel: str
    hardware: str
    cpu: str
    emulator: str
    seconds: int
    cells: tuple[Cell, ...]
    losses: tuple[Loss, ...]

    def lost(self, name: str, repaired: bool = False) -> str:
        """In how many rounds of a program a write was lost. KeyError if there is none of this name."""
        found = {(loss.name, loss.repaired): f"{loss.lost} of {loss.rounds}" for loss in self.losses}
        return found[name, repaired]

    @classmethod
    def of(cls, said: dict[str, Any]) -> Self:
        """From what `asdict` made of it."""
        cells = tuple(Cell(c["flush"], c["aged"], tuple(Turn(*r) for r in c["rounds"])) for c in said["cells"])
        return cls(**{**said, "cells": cells, "losses": tuple(Loss(*loss) for loss in said["losses"])})


def emulated_boots(path: Path = KEPT) -> tuple[Boot, ...]:
    """The boots that were recorded."""
    return tuple(Boot.of(said) for said in json.loads(path.read_text()))


def keep_boots(boots: Iterable[Boot], path: Path = KEPT) -> None:
    path.write_text(json.dumps([asdict(boot) for boot in boots]) + "\n")


def by_model(kernel: str, hardware: str, flush: str, aged: bool) -> Turn:
    """The same round on the model: with the rules of the newest release that is here and not newer than ``kernel``."""
    vm = Vm(EMULATED[hardware], Kernel.of(kernel).with_(flush=FlushPolicy(flush)))
    vm.set_user_memory_region(slot=0, base_gfn=0, npages=PAGES_WRITTEN)
    _write_all(vm)
    for gfn in range(PAGES_WRITTEN if aged else 0):
        vm.clear_young(gfn, gfn + 1)
    before = vm.counters.flushes
    vm.set_user_memory_region(slot=0, base_gfn=0, npages=PAGES_WRITTEN, log_dirty_pages=True)
    asked = vm.counters.flushes - before
    _write_all(vm)
    return Turn(PAGES_WRITTEN, PAGES_WRITTEN - len(vm.missed_dirty(0)), asked)


def _write_all(vm: Vm) -> None:
    for gfn in range(PAGES_WRITTEN):
        vm.vcpu[0].write(gfn)
