"""A signal during KVM_RESET_DIRTY_RINGS: `python -m kvmbook.real interrupt`.

Since v6.17 the reset stops at a signal, and returns how many entries it has freed. Those that it gathered last, up to 64
that lie together, it has freed and not armed: the guest's next writes to them are never reported. No run of whole calls
can make a signal come at the right moment, but a timer can: a reset of many entries takes long enough.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Self

from kvmbook.real.offers import Offers, ask_machine
from kvmbook.real.vm import RealVm

BASE, PAGES = 0x10000, 20_000  # the slot: more entries than a reset frees in the time AFTER
RING_BYTES = 1 << 20
AFTER = 0.0003  # seconds
WORD = 64
KEPT = Path(__file__).with_name("interrupted.json")


class Round(NamedTuple):
    """One reset of a ring of `PAGES` entries. ``signals``: how many came during it; ``freed``: what the call returned;
    ``lost``: the pages that were written again, and that no report names."""

    signals: int
    freed: int
    lost: tuple[int, ...]


def interrupted_reset(after: float | None = AFTER, pages: int = PAGES) -> Round:
    """Write each page of a slot, harvest, reset while a timer sends a signal ``after`` so many seconds (None: no
    signal), reset again until the counts add up, write each page again, and harvest. For the main thread, where
    Python's signals go."""
    with RealVm() as vm:
        vm.enable_dirty_ring(RING_BYTES)
        vm.set_user_memory_region(slot=0, base_gfn=BASE, npages=pages)
        vm.set_user_memory_region(slot=0, base_gfn=BASE, npages=pages, log_dirty_pages=True)
        _write_all(vm, pages)
        entries = len(_harvest(vm))
        with _alarm(after) as came:
            counts = [vm.reset_dirty_rings()]
        while sum(counts) < entries:
            counts.append(vm.reset_dirty_rings())
        _write_all(vm, pages)
        named = {page for _, page in _harvest(vm)}
        return Round(len(came), counts[0], tuple(sorted(set(range(pages)) - named)))


def forgotten(freed: int, pages: int = PAGES) -> tuple[int, ...]:
    """The rule, of entries in order from page 0: what a reset loses that stopped after so many. It gathers word by word;
    the last word that it began is not armed. None if it was not stopped, or before its first entry."""
    return tuple(range((freed - 1) // WORD * WORD, freed)) if 0 < freed < pages else ()


def _write_all(vm: RealVm, pages: int, at_once: int = 4000) -> None:
    for first in range(0, pages, at_once):
        vm.vcpu[0].run(("write", BASE + page) for page in range(first, min(first + at_once, pages)))


def _harvest(vm: RealVm) -> list[tuple[int, int]]:
    ring = vm.vcpu[0].dirty_ring
    assert ring is not None
    return ring.harvest()


@contextmanager
def _alarm(after: float | None) -> Iterator[list[float]]:
    """A list of the times at which the alarm came: at most once, ``after`` so many seconds."""
    came: list[float] = []
    before = signal.signal(signal.SIGALRM, lambda *_: came.append(time.monotonic()))
    try:
        signal.setitimer(signal.ITIMER_REAL, after or 0)
        yield came
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- kept ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounds:
    """What a machine did: ``with_signal`` and, as control, ``without``."""

    machine: Offers
    pages: int
    after: float
    with_signal: tuple[Round, ...]
    without: tuple[Round, ...]

    @classmethod
    def made(cls, rounds: int, after: float = AFTER) -> Self:
        """On this machine, in turn. `NoKvm` where there is no usable KVM."""
        machine = ask_machine()
        pairs = [(interrupted_reset(after), interrupted_reset(None)) for _ in range(rounds)]
        return cls(machine, PAGES, after, tuple(one for one, _ in pairs), tuple(other for _, other in pairs))

    @classmethod
    def kept(cls, path: Path = KEPT) -> Self:
        """Those that were recorded on Linux 6.18."""
        said = json.loads(path.read_text())
        rounds = {name: _rounds(said[name]) for name in ("with_signal", "without")}
        return cls(Offers(**said["machine"]), said["pages"], said["after"], **rounds)

    def keep(self, path: Path = KEPT) -> None:
        path.write_text(json.dumps(asdict(self), indent=None) + "\n")

    @property
    def losing(self) -> tuple[int, int]:
        """In how many rounds a write was lost: with a signal, and without."""
        return sum(bool(one.lost) for one in self.with_signal), sum(bool(one.lost) for one in self.without)


def _rounds(said: Sequence[Sequence[object]]) -> tuple[Round, ...]:
    return tuple(Round(signals, freed, tuple(lost)) for signals, freed, lost in said)  # type: ignore[arg-type]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rounds", type=int, default=20, help="with a signal, and as many without (default: %(default)s)"
    )
    parser.add_argument("--after", type=float, default=AFTER, help="seconds until the signal (default: %(default)s)")
    parser.add_argument("--keep", type=Path, help="write them to a file")


def show_interrupted(asked: argparse.Namespace) -> int:
    """resets of a dirty ring that a signal stops, and which pages are never reported again"""
    made = Rounds.made(asked.rounds, asked.after)
    for one in made.with_signal:
        print(f"signal after {one.freed:6,} of {made.pages:,} entries: {len(one.lost):2} pages lost")
    with_signal, without = made.losing
    print(
        f"a write was lost in {with_signal} of {asked.rounds} rounds with a signal, in {without} of {asked.rounds} without"
    )
    if asked.keep is not None:
        made.keep(asked.keep)
    return 0
