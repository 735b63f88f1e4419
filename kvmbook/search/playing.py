"""What of a run user space can play: its own ioctls, the guest's accesses, and of the host its ageing.

A run says each step. From outside, an access with all its faults is one thing, and so is an ioctl with all its passes:
`calls` gathers the steps of a run into such things. Where the steps of two are mixed, they can only be begun together, and
how they meet is left to chance.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvmbook.model import Hardware, Kernel, Vm, to_bits, to_words
from kvmbook.search.schedule import BASE_GFN, Action, Grain, act, smallest_vm

# A CPU lets a TLB entry go when it likes, nobody can make it; and each access that is played ends with an exit anyway.
NOT_PLAYED = ("forgets", "exits")
MOMENTS = (*NOT_PLAYED, "ages", "ages and flushes")  # over with their step, also in the middle of another call

WORDS = {
    "enables": "enables logging",
    "disables": "disables logging",
    "gets": "gets the dirty log",
    "harvests": "harvests the ring",
    "resets": "resets the dirty rings",
}


class Cleared(NamedTuple):
    """What a CLEAR is given: ``number`` pages from ``first``, and the ``words`` of its bitmap."""

    first: int
    number: int
    words: tuple[int, ...]

    @classmethod
    def of(cls, pages: Collection[int], npages: int) -> Cleared:
        """These pages of a slot of ``npages``, with no words around them that are not needed."""
        first, end = min(pages) // 64 * 64, min((max(pages) // 64 + 1) * 64, npages)
        bits = np.zeros(end - first, bool)
        bits[np.array(sorted(pages)) - first] = True
        return cls(first, end - first, tuple(to_words(bits).tolist()))

    @property
    def bitmap(self) -> np.ndarray:
        """Bool array, one per page from ``first``."""
        return to_bits(np.array(self.words, np.uint64), self.number)

    @property
    def pages(self) -> list[int]:
        """The pages of the slot whose bits are set."""
        found: list[int] = (self.first + np.flatnonzero(self.bitmap)).tolist()
        return found

    def __str__(self) -> str:
        """The pages, "0, 1" or "0..511"."""
        runs = np.split(self.pages, np.flatnonzero(np.diff(self.pages) != 1) + 1)
        said = (f"{run[0]}..{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
        return ", ".join(said)


class Call(NamedTuple):
    """``who`` does ``what`` to ``page``, if it is about one, as an `Action` has it; in recorded runs there is also "clears"
    what ``cleared`` says, "harvests" the ``ring`` of a vCPU, and "resets". It ``begins`` and ``ends`` with these steps of the
    run; ``inside`` are those of them that are KVM's."""

    who: str
    what: str
    page: int | None = None
    begins: int = 0
    ends: int = 0
    inside: tuple[str, ...] = ()
    cleared: Cleared | None = None
    ring: int | None = None

    @property
    def phrase(self) -> str:
        """In words: "vCPU0 reads page 0"."""
        if self.cleared is not None:
            return f"{self.who} clears {self.cleared} of the dirty log"
        about = {" page ": self.page, " of vCPU": self.ring}
        which = "".join(f"{word}{number}" for word, number in about.items() if number is not None)
        return f"{self.who} {WORDS.get(self.what, self.what)}{which}"

    def meets(self, other: Call) -> bool:
        """Whether the steps of the two are mixed."""
        return self.begins < other.ends and other.begins < self.ends and self != other


@dataclass(frozen=True)
class Script:
    """A run as user space can play it, on one slot of ``pages`` pages from ``base_gfn``. ``manual``: the argument of
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2; ``ring_bytes``: of each vCPU's dirty ring, 0 without; ``huge``: on 2M pages of the
    host; ``steps``: the whole run in words; ``lost``: the pages whose writes the model loses."""

    title: str
    steps: tuple[str, ...]
    lost: tuple[int, ...]
    base_gfn: int
    pages: int
    vcpus: int
    calls: tuple[Call, ...]
    manual: int = 0
    ring_bytes: int = 0
    huge: bool = False

    def met(self, call: Call) -> list[Call]:
        """The calls that can be played and whose steps are mixed with those of ``call``."""
        played = [other for other in self.calls if other.what not in NOT_PLAYED]
        return [other for other in played if call.meets(other) and call in played]


def script_of(
    hardware: Hardware, kernel: Kernel, pages: int, vcpus: int, grain: Grain, trace: Sequence[Action]
) -> Script:
    """The script of a run on a `smallest_vm`, such as a search finds."""
    vm = smallest_vm(hardware, kernel, pages, vcpus, grain)
    made = calls(vm, trace, grain)
    steps = tuple(f"{number:3}  {action}" for number, action in enumerate(trace, 1))
    lost = tuple(int(gfn) - BASE_GFN for gfn in vm.missed_dirty(0))
    return Script(f"A run on {hardware.name}, {kernel.name}", steps, lost, BASE_GFN, pages, vcpus, made)


def calls(vm: Vm, trace: Iterable[Action], grain: Grain) -> tuple[Call, ...]:
    """The calls that the steps of ``trace`` make, in the order in which they begin. ``vm``, a `smallest_vm`, is taken through
    the run: only it knows when an access has retired and an ioctl returned. (An access that the run does not take up again
    after its fault retires nevertheless, at the fault's end: a real guest does not change its mind.)"""
    made: list[Call] = []
    under_way: dict[str, int] = {}  # whose call is not over, and which it is
    for number, action in enumerate(trace, 1):
        who = action.who.removeprefix("KVM for ")
        act(vm, action, grain)
        if action.what in MOMENTS:
            made.append(Call(who, action.what, action.page, number, number))
            continue
        at = under_way.setdefault(who, len(made))
        by_kvm = action.who != who or (who == "user space" and at < len(made))
        if at < len(made) and not by_kvm and made[at][:3] != action:  # what went on is not taken up again
            under_way[who] = at = len(made)
        if at == len(made):
            made.append(Call(who, action.what, action.page, number, number))
        else:
            made[at] = made[at]._replace(ends=number)
        if by_kvm:
            made[at] = made[at]._replace(inside=(*made[at].inside, f"{number} {action.what}"))
        if not _goes_on(vm, action, who):
            del under_way[who]
    return tuple(made)


def _goes_on(vm: Vm, action: Action, who: str) -> bool:
    """Whether after this step the ioctl has not returned, or the access is still to be tried again."""
    if who == "user space":
        return any(operation.who == who for operation in vm.in_flight)
    return action.who != who or any(vcpu.fault is not None for vcpu in vm.vcpu if vcpu.state.name == who)
