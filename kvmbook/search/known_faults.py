"""The faults of releases that lose writes, each with the change of `Kernel` that repairs it, and which of them a run
meets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from kvmbook.model import FlushPolicy, Kernel
from kvmbook.search.configurations import Configuration
from kvmbook.search.playing import Call
from kvmbook.search.userspace import Play


class Fault(NamedTuple):
    """``name``, in words: ``switch`` of `Kernel` has a value that loses writes (``bad``, or any other than ``good``),
    and with ``good`` it has not."""

    name: str
    switch: str
    good: Any
    bad: Any = None

    def repair(self, kernel: Kernel) -> dict[str, Any]:
        """What `Kernel.with_` is to be told; nothing where the release has not this fault."""
        has = getattr(kernel, self.switch)
        return {self.switch: self.good} if has != self.good and self.bad in (None, has) else {}


KNOWN_FAULTS = (
    Fault("enabling need not flush", "flush", FlushPolicy.ALWAYS),
    Fault("CLEAR compares addresses rounded up", "clear_compares_rounded_up", False),
    Fault("CLEAR's split forgets the last page", "clear_split_forgets_last", False),
    Fault("INITIALLY_SET protects nothing, with a ring too", "ring_skips_protection", False),
    Fault("RESET forgets what it freed at a signal", "reset_forgets_at_signal", False),
    Fault("a mark on nobody's behalf is dropped", "marks_without_vcpu", True),
    Fault(
        "clear-dirty takes D for W's place in every root", "spte_rules", Kernel.v6_9.spte_rules, Kernel.v6_4.spte_rules
    ),
)
SEVERAL = "several known ones at once"
REPAIRED = " without its known faults"


def faults_in(kernel: Kernel) -> list[Fault]:
    """The known faults that a release has."""
    return [fault for fault in KNOWN_FAULTS if fault.repair(kernel)]


def repaired(kernel: Kernel) -> Kernel:
    """The release without its known faults."""
    repairs = {key: value for fault in KNOWN_FAULTS for key, value in fault.repair(kernel).items()}
    return kernel.with_(**repairs, name=kernel.name + REPAIRED)


def play(configuration: Configuration, run: Sequence[Call]) -> Play | None:
    """The run, on a new VM of the model; None if a call of it is not possible there."""
    made = Play.start(configuration)
    for call in run:
        if call not in made.possible() + made.rarer():
            return None
        made.do(call)
    return made


def loses(configuration: Configuration, run: Sequence[Call]) -> tuple[int, ...]:
    """The pages whose writes the run loses; none, too, if it cannot be made."""
    made = play(configuration, run)
    return () if made is None else made.lost()


def fault_of(configuration: Configuration, run: Sequence[Call], likely: Iterable[str | None] = ()) -> str | None:
    """A known fault without which a run that loses a write loses none (those that are ``likely`` are tried first);
    `SEVERAL` if that takes all repairs; None if not even they help: then it is new."""
    kernel, first = configuration.kernel, set(likely)
    for fault in sorted(faults_in(kernel), key=lambda fault: fault.name not in first):
        if not loses(configuration.with_(kernel=kernel.with_(**fault.repair(kernel))), run):
            return fault.name
    return SEVERAL if not loses(configuration.with_(kernel=repaired(kernel)), run) else None
