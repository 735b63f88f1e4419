"""What can be asked of a machine from outside: short runs through the front door, each in several cases.

A case beside which the answer changes is a *control*: without one, nobody knows that the run can come out otherwise.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from kvmbook.real.losses import RING_GFN, clear_reports, ring_reports
from kvmbook.real.machines import Machine, live, record
from kvmbook.real.outside import Outside

BASE, PAGES = 0x200, 64
SLOT: dict[str, Any] = {"slot": 0, "base_gfn": BASE, "npages": PAGES}


def chapter_1(vm: Outside) -> list[int]:
    """The run that chapter 1 opens with: the pages that the log names after the host has aged a page without a flush, and
    logging is enabled. OSError where nobody can age."""
    vm.set_user_memory_region(**SLOT)
    vm.vcpu[0].write(BASE)
    vm.clear_young(BASE, BASE + PAGES)
    vm.set_user_memory_region(**SLOT, log_dirty_pages=True)
    vm.vcpu[0].write(BASE)
    return _pages(vm)


def plain(vm: Outside) -> list[int]:
    """A page is written, logging is enabled, and it is written again: the pages that the log names."""
    vm.set_user_memory_region(**SLOT)
    vm.vcpu[0].write(BASE)
    vm.set_user_memory_region(**SLOT, log_dirty_pages=True)
    vm.vcpu[0].write(BASE)
    return _pages(vm)


def _pages(vm: Outside) -> list[int]:
    pages: list[int] = vm.get_dirty_log(0).nonzero()[0].tolist()
    return pages


BEFORE = ("a page is writable", "it is protected already", "nothing is mapped")


def enabling_asks(vm: Outside, before: str = BEFORE[0]) -> int:
    """For how many flushes of all TLBs enabling asks, if the slot was used like that."""
    vm.set_user_memory_region(**SLOT)
    if before != "nothing is mapped":
        vm.vcpu[0].write(BASE)
    if before == "it is protected already":  # logged once before; switching it off does not give W back
        vm.set_user_memory_region(**SLOT, log_dirty_pages=True)
        vm.set_user_memory_region(**SLOT)
    asked = vm.flush_requests
    vm.set_user_memory_region(**SLOT, log_dirty_pages=True)
    return vm.flush_requests - asked


def who_asks(vm: Outside, manual: int = 0) -> list[int]:
    """For how many flushes enabling asks, then a GET of one written page, then its CLEAR."""
    vm.enable_cap_manual_dirty_log_protect2(manual)
    vm.set_user_memory_region(**SLOT)
    vm.vcpu[0].write(BASE)
    counts = [vm.flush_requests]
    vm.set_user_memory_region(**SLOT, log_dirty_pages=True)
    counts.append(vm.flush_requests)
    vm.vcpu[0].write(BASE)
    vm.get_dirty_log(0)
    counts.append(vm.flush_requests)
    if manual:
        vm.clear_dirty_log(0, 0, PAGES, [page == 0 for page in range(PAGES)])
    counts.append(vm.flush_requests)
    return [after - before for before, after in pairwise(counts)]


def read_reports(vm: Outside, mapped: bool = False) -> list[int]:
    """The pages that the log names after a read alone, of a page that was mapped before or not."""
    vm.set_user_memory_region(**SLOT)
    if mapped:
        vm.vcpu[0].write(BASE)
    vm.set_user_memory_region(**SLOT, log_dirty_pages=True)
    vm.vcpu[0].read(BASE)
    return _pages(vm)


def neighbour_reports(vm: Outside, read: int = 3) -> list[int]:
    """Page 0 is read, logging is enabled, and then page number ``read`` is read: the pages that the log names. The host has
    all pages from the start; KVM has none."""
    vm.set_user_memory_region(**SLOT)
    for page in range(PAGES):
        vm.vcpu[0].read(BASE + page)
    vm.set_user_memory_region(slot=0)  # deleted: KVM forgets, the host does not
    vm.set_user_memory_region(**SLOT)
    vm.vcpu[0].read(BASE)
    vm.set_user_memory_region(**SLOT, log_dirty_pages=True)
    vm.vcpu[0].read(BASE + read)
    return _pages(vm)


def ring_and_memory(vm: Outside, manual: int = 3) -> tuple[list[tuple[int, int]], int]:
    """`ring_reports`, and what memory has afterwards: 2 if the second write has happened."""
    return ring_reports(vm, manual), vm.value(RING_GFN)


def clear_and_memory(vm: Outside, written: int, **others: Any) -> tuple[bool, int]:
    """`clear_reports`, and which of the guest's writes the written page has afterwards: the last, if it has happened."""
    return clear_reports(vm, written=written, **others), vm.value(written)


@dataclass(frozen=True)
class Question:
    """A run with its cases. ``cases``: in words, and the run's arguments; ``page_size`` is the host's."""

    says: str
    run: Callable[..., Any]
    cases: dict[str, dict[str, Any]]

    def asked(self, case: str, machine: Machine) -> Any:
        """The answer of a new VM of the machine, None where an OSError ends the run. TimeoutError if a guest hangs."""
        return self.told(case, machine)[0]

    def told(self, case: str, machine: Machine) -> tuple[Any, Outside]:
        """The answer, and the VM with all that was said."""
        arguments = dict(self.cases[case])
        with machine.vm(page_size=arguments.pop("page_size", "4K")) as vm:
            try:
                return self.run(vm, **arguments), vm
            except TimeoutError:
                raise
            except OSError:
                return None, vm


TWO = {"cleared": (0x3FF, 0x400), "written": 0x400, "page_size": "2M"}
QUESTIONS = {
    "plain": Question("a page is written, logged, and written again", plain, {"written": {}}),
    "chapter 1": Question("chapter 1's run", chapter_1, {"aged": {}}),
    "enabling": Question("flushes that enabling asks for", enabling_asks, {said: {"before": said} for said in BEFORE}),
    "who asks": Question(
        "flushes that each call asks for", who_asks, {f"manual protect {n}": {"manual": n} for n in (0, 1, 3)}
    ),
    "read": Question(
        "pages reported after a read", read_reports, {"not mapped": {"mapped": False}, "mapped": {"mapped": True}}
    ),
    "neighbour": Question(
        "pages reported after a read beside a mapped page",
        neighbour_reports,
        {f"page {page}": {"read": page} for page in (3, 7, 8)},
    ),
    "ring": Question(
        "entries of the ring, and what memory has",
        ring_and_memory,
        {f"manual protect {n}": {"manual": n} for n in (3, 1, 0)},
    ),
    "CLEAR": Question(
        "whether a write after CLEAR is reported, and which write memory has",
        clear_and_memory,
        {
            "3ff and 400": TWO,
            "400": {**TWO, "cleared": (0x400,)},
            "3ff and 401": {**TWO, "cleared": (0x3FF, 0x401), "written": 0x401},
            "3ff, 400, 401": {**TWO, "cleared": (0x3FF, 0x400, 0x401)},
            "3ff and 400, 4K pages": {**TWO, "page_size": "4K"},
            "3ff and 400, manual protect 1": {**TWO, "manual": 1},
        },
    ),
}


def ask_all(machine: Machine) -> None:
    """Ask every question in every case: what a recording is made of."""
    for question in QUESTIONS.values():
        for case in question.cases:
            question.asked(case, machine)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", type=Path, help="where to keep what was said, as JSON, for `recorded`")


def show_answers(arguments: argparse.Namespace) -> int:
    """ask chapter 15's questions of this machine and of its model, show the answers, and keep them in a file"""
    machine = live()
    model, differ = machine.model(), 0
    for question in QUESTIONS.values():
        print(question.says)
        for case in question.cases:
            here, there = question.asked(case, model), question.asked(case, machine)
            refused = there is None
            differ += here != there and not refused
            said = "cannot be tried here" if refused else f"machine {there}"
            print(f"  {case:<34}model {here!s:<18}{said}{'' if here == there or refused else '   DIFFERS'}")
    if arguments.file:
        record(machine, [ask_all], arguments.file)
        print(f"kept in {arguments.file}")
    return int(bool(differ))
