"""Exercises and questions of chapter 06."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from kvmbook.exercises.mechanism import Answer, checker, question
from kvmbook.exercises.vms import PAGES, aged, enable
from kvmbook.model import Hardware, Kernel, Outcome, Vm
from kvmbook.scenes import BASE_GFN

NO_AD = Hardware.ept(ad_bits=False)
PAGE = (BASE_GFN, BASE_GFN + 1)
ALL = range(BASE_GFN, BASE_GFN + 64)


@question("yes", "no")
def quiz_06_1() -> Answer:
    """A CPU with A/D bits. The guest reads a page, the host calls clear_young, the guest reads the page again, and the host
    asks with test_young. Is the page young?"""
    vm = Vm(Hardware.ept(), Kernel.v6_0)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=1)
    vm.vcpu[0].read(BASE_GFN)
    vm.clear_young(*PAGE)
    how = vm.vcpu[0].read(BASE_GFN)
    because = (
        f"The second read is a {how}. The CPU sets A when it walks, and a hit does not walk. So A bits do not cure the "
        "busiest page; they only make the walk do what costs a fault without them."
    )
    return Answer("yes" if vm.test_young(*PAGE) else "no", because)


@question("it is lost", "it is reported")
def quiz_06_2() -> Answer:
    """No A/D bits, dirty logging is on. The guest writes a page, the host calls clear_young, the guest writes the page again
    through its TLB, and user space harvests. What becomes of the second write?"""
    vm = Vm(NO_AD, Kernel.v5_19)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=1, log_dirty_pages=True)
    vm.vcpu[0].write(BASE_GFN)
    vm.clear_young(*PAGE)
    how = vm.vcpu[0].write(BASE_GFN)
    assert how is Outcome.HIT and vm.get_dirty_log(0)[0]
    because = (
        "While a page is logged, a TLB gets W only with the page's bit. So the bit was set before the ageing; the harvest "
        "finds it, and then it flushes, whatever the SPTE says. What ageing breaks is the moment of enabling, when no bit is "
        "set yet."
    )
    return Answer("it is lost" if len(vm.missed_dirty(0)) else "it is reported", because)


@question("it is lost", "it is reported")
def quiz_06_3() -> Answer:
    """Linux v5.19, no A/D bits. The guest reads all pages, the host ages them by clear_young, and then, to be sure, by
    clear_flush_young. User space enables logging and the guest writes a page. What becomes of the write?"""
    vm = aged(NO_AD, Kernel.v5_19)
    vm.clear_flush_young(BASE_GFN, BASE_GFN + PAGES)
    flushes = vm.counters.flushes
    enable(vm)
    vm.vcpu[0].write(BASE_GFN)
    because = (
        f"clear_flush_young met no young page, so it flushed {('not at all', 'once')[flushes]}. Ordinary reclaim cures what "
        "clear_young has left only if it comes first."
    )
    return Answer("it is lost" if len(vm.missed_dirty(0)) else "it is reported", because)


# ---- 1: who says what, and who flushes -------------------------------------------------------------------------------

NOTIFIERS = ("test_young", "clear_young", "clear_flush_young")


def _aged(vm: Vm) -> None:
    vm.clear_young(*PAGE)


def _aged_and_read(vm: Vm) -> None:
    vm.clear_young(*PAGE)
    vm.vcpu[1].read(BASE_GFN)


# What happens to the page after vCPU 0 has read it, and before the call.
STATES: dict[str, Callable[[Vm], None]] = {
    "just read": lambda vm: None,
    "aged": _aged,
    "aged, then read by vCPU 1": _aged_and_read,
}


def answer_and_flushes(notifier: str, state: str) -> tuple[bool, int]:
    """What the host is told, and how many flushes the call takes; under Linux v6.0, without A/D bits."""
    vm = Vm(NO_AD, Kernel.v6_0, vcpus=2)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=1)
    vm.vcpu[0].read(BASE_GFN)
    STATES[state](vm)
    before = vm.counters.flushes
    young: bool = getattr(vm, notifier)(*PAGE)
    return young, vm.counters.flushes - before


@checker
def check_06_1(table: Mapping[str, Sequence[tuple[bool, int]]]) -> str:
    """For each notifier and each state of the page: young or not, and the flushes."""
    if not isinstance(table, Mapping) or set(table) != set(NOTIFIERS):
        return f"the table needs the keys {', '.join(NOTIFIERS)}"
    for notifier in NOTIFIERS:
        if len(table[notifier]) != len(STATES) or any(len(cell) != 2 for cell in table[notifier]):
            return f"{notifier} needs {len(STATES)} pairs, (young, flushes)"
    right = [(n, s, answer_and_flushes(n, state)) for n in NOTIFIERS for s, state in enumerate(STATES)]
    wrong = [(n, s) for n, s, said in right if tuple(table[n][s]) != said]
    if not wrong:
        return ""
    notifier, number = wrong[0]
    young, _ = answer_and_flushes(notifier, list(STATES)[number])
    where = f"{len(wrong)} of {len(right)} pairs are wrong; the first is {notifier} of a page {list(STATES)[number]!r}"
    if bool(table[notifier][number][0]) != young:
        return f"{where}: is the page young at that moment, and to whom would its use have been visible?"
    return f"{where}: whose name has a flush in it, and on what does even that one depend?"


# ---- 2: count the faults ---------------------------------------------------------------------------------------------

EVENTS = ("read", "write", "clear_young", "clear_flush_young")


def count_faults(events: Iterable[str]) -> int:
    """What the model says: one page, one vCPU, no A/D bits, Linux v6.0; nothing is mapped at the start."""
    vm = Vm(NO_AD, Kernel.v6_0)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=1)
    faults = 0
    for event in events:
        if event in ("read", "write"):
            faults += vm.vcpu[0].complete(event, BASE_GFN) not in (Outcome.HIT, Outcome.WALK)
        else:
            getattr(vm, event)(*PAGE)
    return faults


def histories(seed: int = 6, number: int = 200) -> list[list[str]]:
    """Random histories of a page, the shortest first."""
    draw = random.Random(seed)
    return sorted((draw.choices(EVENTS, k=draw.randint(1, 9)) for _ in range(number)), key=len)


@checker
def check_06_2(faults: Callable[[list[str]], int]) -> str:
    """A function that says how many faults a history of one page takes."""
    if not callable(faults):
        return "give a function of a list of events"
    for events in histories():
        said = faults(list(events))
        if said != count_faults(events):
            return f"for {events} your function says {said}, and the model does not{_look_at(events)}"
    return ""


def _look_at(events: Sequence[str]) -> str:
    """What a reader may have overlooked in the shortest history that is counted wrong."""
    if not any(event.startswith("clear") for event in events):
        return "; which rights does the first access bring, to the SPTE and to the TLB?"
    if "write" in events and "read" in events:
        return "; what does a read give back, and what only a write? And when is the SPTE not looked at at all?"
    return "; what does the TLB still know after each call?"


# ---- 3: an ageing policy ---------------------------------------------------------------------------------------------


def _young(vm: Vm) -> None:
    """All pages have just been read."""


def _all_aged(vm: Vm) -> None:
    vm.clear_young(ALL.start, ALL.stop)


def _some_aged(vm: Vm) -> None:
    vm.clear_young(ALL.start, ALL.start + 40)


# What another part of the host has done before the policy begins; the guest's TLB has all pages.
BEFORE: dict[str, Callable[[Vm], None]] = {
    "all pages were just read": _young,
    "the host had aged 40 pages before": _some_aged,
    "the host had aged every page before": _all_aged,
}


@checker
def check_06_3(idle_pages: Callable[[Any, Callable[[], None]], Iterable[int]]) -> str:
    """A policy that finds exactly the idle pages, with at most one flush."""
    if not callable(idle_pages):
        return "give a function of host and turn"
    for hardware in (NO_AD, Hardware.ept()):
        for seed, (story, before) in enumerate(BEFORE.items()):
            if hint := _judge(idle_pages, hardware, before, seed):
                return f"{hardware.name}, and {story}: {hint}"
    return ""


def _judge(policy: Callable[..., Iterable[int]], hardware: Hardware, before: Callable[[Vm], None], seed: int) -> str:
    """One machine: a hint if the policy is wrong there."""
    vm = Vm(hardware, Kernel.v6_0)
    vm.set_user_memory_region(slot=0, base_gfn=ALL.start, npages=len(ALL))
    for gfn in ALL:
        vm.vcpu[0].read(gfn)
    before(vm)
    busy = random.Random(seed).sample(ALL, 20)
    turns, taken = list[int](), set[int]()

    def turn() -> None:
        turns.append(1)
        for number, gfn in enumerate(busy):
            vm.vcpu[0].complete(("read", "write")[number % 2], gfn)

    def invalidate_range(start: int, end: int) -> None:
        taken.update(range(start, end))
        vm.invalidate_range(start, end)

    calls = {name: getattr(vm, name) for name in NOTIFIERS}
    flushes = vm.counters.flushes
    answer = policy(SimpleNamespace(**calls, invalidate_range=invalidate_range), turn)
    said = {None} if answer is None else set(answer)
    if not said <= set(ALL):
        return "return the gfns of the idle pages, each from 0x200 to 0x23f"
    flushes = vm.counters.flushes - flushes
    if not turns:
        return "your policy never lets the guest run, so it cannot know"
    if len(taken) > 1:
        return f"you took {len(taken)} pages away; one page at most"
    if wrong := said & set(busy):
        return (
            f"{len(wrong)} busy pages are reported idle; through what did the guest use them, and what made it forget?"
        )
    if flushes > 1:
        return f"{flushes} flushes; one is enough, for a flush is for the whole VM"
    missing = set(ALL) - set(busy) - said
    return (
        f"{len(missing)} idle pages are not found; did you age every page before the guest's turn?" if missing else ""
    )
