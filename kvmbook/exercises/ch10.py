"""Exercises and questions of chapter 10."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

from kvmbook.exercises.mechanism import Answer, checker, question
from kvmbook.model import FlushPolicy, Hardware, Kernel
from kvmbook.scenes import HARDWARE, graph_of
from kvmbook.search import Grain, Result, act, explore, possible, smallest_vm
from kvmbook.views import NumberGuess


def guess_10_1() -> NumberGuess:
    """How many states the smallest VM has."""
    states = explore(Hardware.ept(ad_bits=False), Kernel.v5_19, grain=Grain.ACCESS).states
    because = (
        "A state is the SPTE, one TLB entry, the dirty bitmap, and how far an ioctl is. Each has few values, so there are "
        "few combinations: a search comes to an end, although a run need not."
    )
    return NumberGuess(
        "One page, one vCPU, no A/D bits, Linux v5.19. Guest, host and user space take the steps printed above, and those "
        "that follow, in any order, for as long as they like. In how many different states can this VM be?",
        states,
        top=1_000_000,
        because=because,
    )


@question("980 runs were tried", "every run up to the depth of the search", "every run, of any length")
def quiz_10_1() -> Answer:
    """A search over 980 states says "safe". What has been shown?"""
    graph = graph_of(Hardware.ept(ad_bits=False), Kernel.v6_0, grain=Grain.STEP)
    depth = 40  # more than the search is deep
    runs = graph.runs(depth)
    closed = len(graph.states) == 980 and graph.shortest_loss() is None
    because = (
        f"Every step from each of these states leads to one of them, so no run ever leaves them. There are more "
        f"than 10^{len(str(sum(runs))) - 1} runs of {depth} steps alone."
    )
    return Answer("every run, of any length" if closed else "980 runs were tried", because)


@question("yes", "no")
def quiz_10_2() -> Answer:
    """Take six configurations: EPT without A/D bits, EPT with them, EPT with PML, each under the flush rules "if changed" and
    "if MMU-writable", with two vCPUs. Cut by access, the search does not find the loss with PML. Is there also a loss that
    only the coarser cut finds?"""
    names = {"off": "EPT without A/D bits", "on": "EPT with them", "on, with PML": "EPT with PML"}
    lost = {
        grain: [
            f'{names[ad_bits]} under "{flush.value}"'
            for ad_bits, hardware in HARDWARE.items()
            for flush in (FlushPolicy.IF_CHANGED, FlushPolicy.IF_MMU_WRITABLE)
            if not explore(hardware, Kernel.v5_19.with_(flush=flush), vcpus=2, grain=grain).safe
        ]
        for grain in (Grain.ACCESS, Grain.FAULT)
    }
    coarse, fine = lost[Grain.ACCESS], lost[Grain.FAULT]
    because = (
        "What a coarse step does, finer steps can do one after the other with nobody in between. Cut by access, a write is "
        f"lost with {' and '.join(coarse)}. Cut by fault, a write is also lost with "
        f"{' and '.join(x for x in fine if x not in coarse)}."
    )
    return Answer("no" if set(coarse) < set(fine) else "yes", because)


@question("yes", "no")
def quiz_10_3() -> Answer:
    """Without A/D bits, is there a flush rule, of the four, under which three vCPUs can lose a write, and two cannot?"""
    verdicts = {
        vcpus: [
            explore(Hardware.ept(ad_bits=False), Kernel.v5_19.with_(flush=flush), vcpus=vcpus, grain=Grain.ACCESS).safe
            for flush in FlushPolicy
        ]
        for vcpus in (2, 3)
    }
    because = (
        "A step changes what one vCPU remembers, or all of them alike. So two vCPUs are enough: one that moves, and one that "
        "keeps a stale copy. That makes the answer likely; the searches, and the table for any number of vCPUs, prove it."
    )
    return Answer("no" if verdicts[2] == verdicts[3] else "yes", because)


# ---- 1: which step is to blame? --------------------------------------------------------------------------------------


class Loss(NamedTuple):
    """A hardware and a kernel under which a write can be lost, with two vCPUs, cut by fault."""

    hardware: Hardware
    kernel: Kernel

    def is_cured_without(self, names: Collection[str]) -> bool:
        return explore(self.hardware, self.kernel, vcpus=2, grain=Grain.FAULT, without=tuple(names)).safe


NO_AD = Hardware.ept(ad_bits=False)
NO_FLUSH = Kernel.v5_19.with_(clear_flush_young_flushes=False)
LOSSES = {
    "a": Loss(NO_AD, Kernel.v5_19),
    "b": Loss(NO_AD, NO_FLUSH),
    "c": Loss(Hardware.ept(pml=True), Kernel.v5_19.with_(flush=FlushPolicy.IF_MMU_WRITABLE)),
}
MAY_GO = ("reads", "forgets", "exits", "ages", "ages and flushes", "gets", "disables")


def _hint_10_1(letter: str, names: Collection[str] | None) -> str:
    """What is wrong with the answer for one loss, or nothing."""
    loss = LOSSES[letter]
    if names is None:
        return f"{letter}: there are steps whose absence saves every write" if loss.is_cured_without(MAY_GO) else ""
    if isinstance(names, str):
        return f'{letter}: give the steps in a list or tuple, like ("forgets",), or None'
    for name in names:
        if name in ("writes", "enables"):
            return f"{letter}: {name!r} must stay: without it nobody writes, or nobody logs"
        if name not in MAY_GO:
            return f"{letter}: {name!r} is none of {', '.join(MAY_GO)}"
    if not loss.is_cured_without(names):
        look = "have the run searched and printed: which of its steps leaves a TLB stale, or is it none that may go?"
        return f"{letter}: a write is still lost; {look}"
    fewer = [[name for name in names if name != spared] for spared in names]
    return f"{letter}: fewer steps are enough" if any(map(loss.is_cured_without, fewer)) else ""


@checker
def check_10_1(without: Sequence[Collection[str] | None]) -> str:
    """For each of three losses the fewest steps without which no write is lost, or None."""
    if isinstance(without, str) or len(without) != len(LOSSES):
        return 'give three answers, each a list or tuple of steps like ("forgets",), or None'
    hints = (_hint_10_1(letter, names) for letter, names in zip(LOSSES, without, strict=True))
    return next(filter(None, hints), "")


# ---- 2: both pages ---------------------------------------------------------------------------------------------------


def _hint_10_2(steps: Sequence[str]) -> str:
    """What a run that loses too few writes lacks."""
    said = [" ".join(step.split()) for step in steps]
    if "user space return_to_user_space" not in said:
        return "enabling has not returned, and until then no write is lost"
    back = len(said) - said[::-1].index("user space return_to_user_space")
    if not all(f"writes page {page}" in " ".join(said[back:]) for page in (0, 1)):
        return "after enabling has returned the guest must write both pages"
    return "can one pass of enabling miss both pages?"


@checker
def check_10_2(steps: Sequence[str]) -> str:
    """Lose the writes to both pages of a slot, in as few steps as can be."""
    if isinstance(steps, str):
        return "give a list of steps"
    vm = smallest_vm(Hardware.ept(ad_bits=False), Kernel.v5_19, pages=2, grain=Grain.ACCESS)
    for number, said in enumerate(steps, 1):
        can = {" ".join(str(action).split()): action for action in possible(vm, Grain.ACCESS)}
        if " ".join(said.split()) not in can:
            return f"step {number}, {said!r}, is not possible there; possible: {', '.join(can)}"
        act(vm, can[" ".join(said.split())], Grain.ACCESS)
    if len(vm.missed_dirty(0)) < 2:
        return f"{len(vm.missed_dirty(0))} of 2 writes are lost; {_hint_10_2(steps)}"
    return "" if len(steps) <= 13 else f"both writes are lost, in {len(steps)} steps; 13 steps are enough"


# ---- 3: where a flush would have helped ------------------------------------------------------------------------------


def _saved_by_a_flush_after(run: Result, moment: int) -> bool:
    """Whether the write that ``run`` loses is not lost if all TLBs are flushed after its step ``moment``."""
    vm = smallest_vm(run.hardware, run.kernel, run.pages, run.vcpus, run.grain)
    for number, action in enumerate(run.trace or (), 1):
        act(vm, action, run.grain)
        if number == moment:
            vm.kvm_flush_remote_tlbs()
    return not len(vm.missed_dirty(0))


def _runs_10_3() -> dict[str, Result]:
    """Losing runs: of reclaim alone, of an SPTE made twice, and one in which a TLB forgets and is filled once more."""
    reclaim = explore(NO_AD, NO_FLUSH, without=("ages",))
    by_access = explore(NO_AD, NO_FLUSH, without=("ages",), grain=Grain.ACCESS)
    assert by_access.trace is not None
    first, *others = by_access.trace
    twice = replace(by_access, trace=(first, first._replace(what="forgets"), first, *others))
    return {
        "the run of reclaim alone": reclaim,
        "exercise 1's run c": explore(*LOSSES["c"], vcpus=2, grain=Grain.FAULT),
        "a run in which vCPU 0 forgets the page, and reads it again": twice,
    }


@checker
def check_10_3(helps: Callable[[Result], Collection[int]]) -> str:
    """The steps of a losing run after which one flush saves the write."""
    if not callable(helps):
        return "give a function that takes a result of explore() and returns step numbers"
    for what, run in _runs_10_3().items():
        steps = range(1, len(run.trace or ()) + 1)
        said, right = set(helps(run)), {number for number in steps if _saved_by_a_flush_after(run, number)}
        if said - set(steps):
            return f"{what} has the steps 1 to {len(steps)}; you name {min(said - set(steps))}"
        if said - right:
            early = f"a flush after step {min(said - right)} comes too early or too late"
            return f"{what}: {early}; what does the TLB hold afterwards?"
        if right - said:
            miss = f"you miss {len(right - said)} of its steps"
            return f"{what}: {miss}; must the SPTE have lost its rights before the TLB forgets?"
    return ""
