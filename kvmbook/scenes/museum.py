"""Chapter 13: the exhibits' runs retold, two runs without names, and kernels to be told apart."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace

from kvmbook.model import FlushPolicy, Hardware, Kernel, Vm
from kvmbook.scenes.losses import retell_litmus
from kvmbook.scenes.runs import Run, RunMoment, now_of, retell
from kvmbook.scenes.slots import ProtectFirst
from kvmbook.search import (
    BEGINS,
    EXHIBITS,
    Action,
    Calls,
    Cast,
    Exhibit,
    Found,
    Interleavings,
    Moves,
    act,
    possible,
    search_plainly,
    smallest_vm,
)


def exhibit(number: int) -> Exhibit:
    """The exhibit of a room. ValueError for a room that is not there."""
    if not 1 <= number <= len(EXHIBITS):
        raise ValueError(f"the rooms are 1 to {len(EXHIBITS)}; got {number}")
    return EXHIBITS[number - 1]


def retell_exhibit(shown: Exhibit, fixed: bool = False, elsewhere: bool = False) -> Run:
    """The shortest run that does harm, told on the bad kernel, or (``fixed``) on the good one as far as it can go there;
    ``elsewhere``: on its other hardware. Where the bad kernel does no harm, it is the run of the hardware where it does."""
    run = shown.look(elsewhere=elsewhere).run or shown.look().run
    hardware = shown.elsewhere if elsewhere else shown.hardware
    kernel, space = shown.good if fixed else shown.bad, shown.space
    if isinstance(space, Interleavings):
        vm, goes = smallest_vm(hardware, kernel, 1, space.vcpus, space.grain), list[Action]()
        ahead = vm.copy()
        for action in run or ():
            if action not in possible(ahead, space.grain):
                break
            act(ahead, action, space.grain)
            goes.append(Action(*action[:3]))
        return retell(vm, goes, space.grain)
    if isinstance(space, Calls):
        litmus = space.litmus(hardware, kernel, run or ())  # type: ignore[arg-type]
        return retell_litmus(litmus, numbers=[1])
    assert isinstance(space, Moves)
    about = max(move.page or 0 for move in space.moves)
    told = tell(space.cast(hardware, kernel), run or (), numbers=(about,))  # type: ignore[arg-type]
    return replace(told, loss=shown.harm)


def tell(cast: Cast, run: Iterable[Action], numbers: tuple[int, ...] = (0,)) -> Run:
    """The steps of ``run`` on ``cast``, up to the first that is not possible, and how these pages look after each."""
    vm, moments, l2 = cast.vm, list[RunMoment](), cast.vm.l2_root is not None
    start = now_of(vm, numbers, l2, cast.harm(cast))
    for action in run:
        if action not in cast.possible():
            break
        flushes, hits, exits = vm.counters.flushes, vm.counters.hits, vm.counters.exits
        cast.do(action)
        note = "; ".join(event.note for event in vm.log if event.note)
        answered = "KVM" if vm.counters.exits > exits else "TLB" if vm.counters.hits > hits else "SPTE"
        answered = answered if action.what in ("reads", "writes") else ""
        now = now_of(vm, numbers, l2, cast.harm(cast))
        moments.append(RunMoment(action, now, note, vm.counters.flushes > flushes, answered))
        cast.key()  # as the search does
    return Run(start, tuple(moments), numbers)


# ---- two runs without names ------------------------------------------------------------------------------------------

GUEST = tuple(Action("vCPU0", what, 0) for what in ("reads", "writes"))
LOGGING_ON = (Action("user space", "enables"),)


def unnamed(case: str) -> Run:
    """Case "A" or "B": a run that loses a write, by a search. KeyError for others."""
    tellers: dict[str, Callable[[], Run]] = {"A": _the_order_of_get, "B": _the_seed}
    return tellers[case]()


def _the_seed() -> Run:
    return retell_exhibit(exhibit(11))


def get_in_order(protects_first: bool) -> Found:
    """Search one page of a slot that logs, under a GET that protects before it takes the bits, as until 2010
    (edde99ce0529), or after."""
    reach = search_plainly(_logged(protects_first), stop_at_loss=True)
    return Found(reach.states, reach.transitions, reach.trace)


def _logged(protects_first: bool) -> Cast:
    moves = (*GUEST, Action("user space", "gets"))
    cast = Moves(moves, before=LOGGING_ON).cast(Hardware.npt(), Kernel.v6_0)
    return replace(cast, begins={**BEGINS, "gets": lambda vm, gfn: ProtectFirst(0)}) if protects_first else cast


def _the_order_of_get() -> Run:
    run = get_in_order(protects_first=True).run
    return tell(_logged(True), [Action(*action[:3]) for action in run or ()])


# ---- kernels without names -------------------------------------------------------------------------------------------

HIDDEN = (2, 5, 9, 11, 12)  # rooms whose bad kernels differ from v6.0 in one switch, and show it in a few calls
Lab = Callable[..., Vm]


def hidden_rooms(seed: int = 13) -> list[int]:
    """The rooms that three kernels without names belong to."""
    return random.Random(seed).sample(HIDDEN, 3)


def laboratory(room: int) -> Lab:
    """A function that builds a `Vm` of a room's bad kernel, which does not tell its name."""
    kernel = exhibit(room).bad.with_(name="a kernel without a name")

    def build(hardware: Hardware, **options: object) -> Vm:
        """A VM with one page, gfn 0x200; options as `Vm` has them."""
        vm = Vm(hardware, kernel, **options)  # type: ignore[arg-type]
        vm.set_user_memory_region(slot=0, base_gfn=0x200, npages=1)
        return vm

    return build


def with_repair(room: int, flush: FlushPolicy) -> Exhibit:
    """A room whose two kernels both have another flush rule than their own."""
    shown = exhibit(room)
    return replace(shown, bad=shown.bad.with_(flush=flush), good=shown.good.with_(flush=flush))
