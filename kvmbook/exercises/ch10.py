"""Exercises and questions of chapter 10."""

from collections.abc import Collection, Sequence

from kvmbook.exercises.mechanism import Answer, checker, question
from kvmbook.model import FlushPolicy, Hardware, Kernel
from kvmbook.scenes import HARDWARE, graph_of
from kvmbook.search import Grain, Result, act, explore, possible, smallest_vm


@question("980 runs were tried", "every run up to the depth of the search", "every run, of any length")
def quiz_10_1() -> Answer:
    """A search over 980 states says "safe". What has been shown?"""
    graph = graph_of(Hardware.ept(ad_bits=False), Kernel.v6_0, grain=Grain.STEP)
    depth = 40  # more than the search is deep
    runs = [1] + [0] * (len(graph.states) - 1)  # runs that end in each state
    for _ in range(depth):
        longer = [0] * len(runs)
        for state, edges in enumerate(graph.edges):
            for _, to in edges:
                longer[to] += runs[state]
        runs = longer
    closed = len(graph.states) == 980 and graph.shortest_loss() is None
    because = (
        f"Every step from each of these states leads to one of them, so no run ever leaves them. There are {sum(runs):.0e} "
        f"runs of {depth} steps alone."
    )
    return Answer("every run, of any length" if closed else "980 runs were tried", because)


@question("yes", "no")
def quiz_10_2() -> Answer:
    """Cut by access, the loss with PML disappears. Can it be the other way round, a loss that only a coarser cut finds?"""
    lost = {
        grain: {
            (name, flush)
            for name, hardware in HARDWARE.items()
            for flush in (FlushPolicy.IF_CHANGED, FlushPolicy.IF_MMU_WRITABLE)
            if not explore(hardware, Kernel.v5_19.with_(flush=flush), vcpus=2, grain=grain).safe
        }
        for grain in (Grain.ACCESS, Grain.FAULT)
    }
    because = (
        "What a coarse step does, finer steps can do one after the other with nobody in between. Of 6 configurations "
        f"{len(lost[Grain.ACCESS])} lose a write by access, and {len(lost[Grain.FAULT])} by fault, those among them."
    )
    return Answer("no" if lost[Grain.ACCESS] < lost[Grain.FAULT] else "yes", because)


@question("yes", "no")
def quiz_10_3() -> Answer:
    """Without A/D bits, is there a flush policy under which three vCPUs can lose a write, and two cannot?"""
    verdicts = {
        vcpus: [
            explore(Hardware.ept(ad_bits=False), Kernel.v5_19.with_(flush=flush), vcpus=vcpus, grain=Grain.ACCESS).safe
            for flush in FlushPolicy
        ]
        for vcpus in (2, 3)
    }
    because = (
        "A step touches one vCPU's view, or all alike, so two are enough to have one that moves and one that keeps a stale "
        "copy. That is only a reason to expect it; the searches and the table for any number are the proof."
    )
    return Answer("no" if verdicts[2] == verdicts[3] else "yes", because)


@checker
def check_10_1(without: Collection[str]) -> str:
    """The one step without which v5.19 loses no write on a CPU without A/D bits."""
    if isinstance(without, str) or len(without) != 1:
        return 'give one step in a list or tuple, like ("forgets",)'
    (name,) = without
    if name in ("writes", "enables"):
        return "that one must stay: without it nobody writes, or nobody logs"
    if name not in ("reads", "forgets", "ages", "ages and flushes", "gets", "disables"):
        return f"{name!r} is none of the steps that somebody chooses; give the name alone, without who and which page"
    if explore(Hardware.ept(ad_bits=False), Kernel.v5_19, vcpus=2, grain=Grain.FAULT, without=without).safe:
        return ""
    return "a write is still lost; which step of the run leaves the TLB stale?"


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
        return f"{len(vm.missed_dirty(0))} of 2 writes are lost; can one pass of enabling miss both pages?"
    return "" if len(steps) <= 13 else f"both are lost, in {len(steps)} steps; 13 are enough"


@checker
def check_10_3(results: tuple[Result, Result]) -> str:
    """Reclaim alone loses a write where clear_flush_young does not flush, unless enabling flushes always."""
    if not isinstance(results, tuple) or len(results) != 2:
        return "give two results, the losing one and the safe one"
    losing, safe = results
    for result in (losing, safe):
        if result.hardware.format.kvm_ad_enabled:
            return f"the bug is about CPUs without A/D bits, this is {result.hardware.name}"
        if result.kernel.clear_flush_young_flushes:
            return "both kernels need clear_flush_young_flushes=False"
        if "ages" not in result.without or "ages and flushes" in result.without:
            return 'leave out "ages", and nothing of "ages and flushes"'
        if {"reads", "writes", "enables"} & result.without:
            return "the guest must be able to read and write, and user space to enable logging"
    releases = [kernel.with_(clear_flush_young_flushes=False) for kernel in (Kernel.v5_19, Kernel.v6_0)]
    if [result.kernel for result in (losing, safe)] == releases[::-1]:
        return "the first result should lose a write, the second be safe; which flush rule does each release have?"
    if [result.kernel for result in (losing, safe)] != releases:
        return "change that one switch of Kernel.v5_19 and Kernel.v6_0, and nothing else"
    return ""
