"""The two losses of chapter 16: a hunted run retold, the words of a CLEAR that overlook a huge page, and what a test must
have to see it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cache
from itertools import chain, combinations

import numpy as np

from kvmbook.model import Hardware, Kernel, Vm, pages_per_level
from kvmbook.scenes.runs import Run, RunMoment, now_of
from kvmbook.search import Action, Call, Litmus, Play

# ---- a run of whole calls, retold ------------------------------------------------------------------------------------


def retell_litmus(litmus: Litmus, kernel: Kernel | None = None, numbers: Iterable[int] = ()) -> Run:
    """The run of a litmus, call by call, on its own kernel or on another. ``numbers``: the pages of the slot to tell of, by
    default all that the run is about. ValueError for a call of nobody that pictures show."""
    configuration = litmus.configuration.with_(kernel=kernel) if kernel else litmus.configuration
    pages = tuple(numbers) or configuration.slot.pages
    play, moments = Play.start(configuration), []
    vm = play.vm
    _ = vm.vcpu  # created when they are first asked for; they are shown from the start
    start = now_of(vm, pages)
    for call in litmus.run:
        if not call.who.startswith(("vCPU", "host", "user space")):
            raise ValueError(f"{call.phrase!r}: pictures of runs show vCPUs, the host and user space")
        flushes, hits, exits = vm.counters.flushes, vm.counters.hits, vm.counters.exits
        play.do(call)
        answered = "KVM" if vm.counters.exits > exits else "TLB" if vm.counters.hits > hits else "SPTE"
        answered = answered if call.what in ("reads", "writes") else ""
        moments.append(RunMoment(_action(call), now_of(vm, pages), "", vm.counters.flushes > flushes, answered))
    return Run(start, tuple(moments), pages, "ring" if configuration.ring else "bit")


def _action(call: Call) -> Action:
    """The call as a step of a run."""
    if call.cleared is None:
        return Action(call.who, call.what, call.page)
    return Action(call.who, f"clears page{'s' * (len(call.cleared.pages) > 1)} {call.cleared}")


# ---- which word loses? -----------------------------------------------------------------------------------------------

HUGE = pages_per_level(2)
BORDER = 0x800  # a 2M page begins here; the word that is looked at begins up to 63 pages before
WORD = 64


def up(gfn: int) -> int:
    """A gfn's address rounded up to 2M, in huge pages."""
    return -(-gfn // HUGE)


# Where KVM looks for a huge page that it must protect, given the gfns that a word names, ascending.
COMPARISONS: dict[str, Callable[[Sequence[int]], Sequence[int]]] = {
    "each page (v1, 2020)": lambda gfns: gfns,
    "rounded up (since v5.14)": lambda gfns: (gfns[0], gfns[-1])[: 1 + (up(gfns[0]) != up(gfns[-1]))],
    "rounded down": lambda gfns: (gfns[0], gfns[-1])[: 1 + (gfns[0] // HUGE != gfns[-1] // HUGE)],
    "the last page always": lambda gfns: (gfns[0], gfns[-1]),
    "last + 1 rounded up": lambda gfns: (gfns[0], gfns[-1])[: 1 + (up(gfns[0]) != up(gfns[-1] + 1))],
}


def overlooked(rule: str, gfns: Sequence[int]) -> set[int]:
    """The 2M pages, as gfn // 512, of which a word names a page, and at which KVM does not look."""
    return {gfn // HUGE for gfn in gfns} - {gfn // HUGE for gfn in COMPARISONS[rule](gfns)}


def losing_pairs(border: int, rule: str = "rounded up (since v5.14)") -> list[tuple[int, int]]:
    """The pairs (first, last) of bits that a word can name, in whose 2M pages one is overlooked. ``border``: the bit at which
    a 2M page begins."""
    begins = BORDER - border
    pairs = [(first, last) for last in range(WORD) for first in range(last + 1)]
    return [pair for pair in pairs if overlooked(rule, [begins + bit for bit in pair])]


# What a CLEAR names of a word in which a 2M page begins at a bit.
NAMED: dict[str, Callable[[int], set[int]]] = {
    "its first page and the one before": lambda border: {border - 1, border},
    "all pages up to its first": lambda border: set(range(border + 1)),
    "its first page alone": lambda border: {border},
    "its first two pages": lambda border: {border, border + 1},
    "its second page and the one before it": lambda border: {border - 1, border + 1},
    "all 64 pages": lambda border: set(range(WORD)),
}


def named_bits(border: int, named: str) -> list[int]:
    """The bits of the word that a CLEAR names, ascending."""
    return sorted(NAMED[named](border) & set(range(WORD)))


def lost_by_model(border: int, bits: Collection[int], kernel: Kernel = Kernel.v6_18) -> list[int]:
    """What the model says: which of the word's pages lose the write that follows on a CLEAR of ``bits``. Both 2M pages are
    mapped as such before logging begins, with INITIALLY_SET, and KVM splits none of them first."""
    vm, begins = _two_huge_pages(border, kernel).copy(), BORDER - border
    bitmap = np.zeros(WORD, bool)
    bitmap[list(bits)] = True
    vm.clear_dirty_log(0, HUGE, WORD, bitmap)
    for bit in bits:
        vm.vcpu[0].write(begins + bit)
    return [int(gfn) - begins for gfn in vm.missed_dirty(0)]


@cache
def _two_huge_pages(border: int, kernel: Kernel) -> Vm:
    """A VM whose user space has just been told of all pages of a slot: 2M pages, one before `BORDER` and one from there."""
    vm = Vm(Hardware.shadow(), kernel, page_size="2M")
    slot = {"slot": 0, "base_gfn": BORDER - HUGE - border, "npages": 2 * HUGE + WORD}
    vm.enable_manual_dirty_log_protect(initially_set=True)
    vm.set_user_memory_region(**slot)
    for gfn in (BORDER - HUGE - border, BORDER - 1, BORDER):
        vm.vcpu[0].write(gfn)
    vm.set_user_memory_region(**slot, log_dirty_pages=True)
    vm.get_dirty_log(0)
    return vm


# ---- what a test must have to see it ---------------------------------------------------------------------------------

CONDITIONS = {
    "odd base": "the slot begins at no multiple of 64 gfns",
    "huge": "the host has it on huge pages",
    "mapped": "the guest has used it before logging begins",
    "bit 1": "all bits are set at first (INITIALLY_SET)",
    "sparse": "the first CLEAR ends, in a word, with a huge page's first",
    "unsplit": "KVM does not split huge pages first",
}
# What the kernel's own tests of the bitmap have of it, where the machine is as bad as they let it be.
TESTS = {
    "dirty_log_test, clear-log": {"odd base", "bit 1", "unsplit"},
    "dirty_log_perf_test, huge pages": {"huge", "mapped", "bit 1", "unsplit"},
    "dirty_log_page_splitting_test": {"huge", "mapped", "bit 1"},
    "a run of 2021, on the list": {"odd base", "mapped", "bit 1", "unsplit"},
}


def each_set_of_conditions() -> list[frozenset[str]]:
    """All 64."""
    names = list(CONDITIONS)
    return [frozenset(some) for some in chain(*(combinations(names, size) for size in range(len(names) + 1)))]


@cache
def loses_under(conditions: frozenset[str], kernel: Kernel = Kernel.v6_18) -> bool:
    """Whether the model loses a write to the first page of a 2M page, under these conditions and the opposite of the
    others: EPT, a slot of three 2M pages and more."""
    vm = Vm(
        Hardware.ept(),
        kernel,
        page_size="2M" if "huge" in conditions else "4K",
        eager_page_split="unsplit" not in conditions,
    )
    vm.enable_manual_dirty_log_protect(initially_set="bit 1" in conditions)
    slot = {"slot": 0, "base_gfn": BORDER - HUGE - 4 * ("odd base" in conditions), "npages": 3 * HUGE}
    if "mapped" in conditions:
        vm.set_user_memory_region(**slot)
        vm.vcpu[0].write(BORDER)
    vm.set_user_memory_region(**slot, log_dirty_pages=True)
    vm.vcpu[0].write(BORDER)
    told = vm.get_dirty_log(0)
    if "sparse" in conditions:
        told[:] = False
        told[[BORDER - 1 - slot["base_gfn"], BORDER - slot["base_gfn"]]] = True
    vm.clear_dirty_log(0, 0, slot["npages"], told)
    vm.vcpu[0].write(BORDER)
    return len(vm.missed_dirty(0)) > 0
