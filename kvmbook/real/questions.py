"""What can be asked of a machine from outside: short runs through the front door, each in several cases; two of them lose a
write on kernels of today.

A case beside which the answer changes is a *control*: without one, nobody knows that the run can come out otherwise.
"""

from __future__ import annotations

import argparse
import errno
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from kvmbook.real.calls import Outside
from kvmbook.real.machines import Machine, live, record

# ---- two losses: through the front door alone, so that they work on `Vm` and on `RealVm` unchanged -------------------


class FrontDoor(Protocol):
    """What the runs ask of a VM: `Vm` and `RealVm` have it."""

    @property
    def vcpu(self) -> Any: ...
    def set_user_memory_region(self, slot: int = ..., base_gfn: int = ..., npages: int = ..., **flags: Any) -> None: ...
    def enable_cap_manual_dirty_log_protect2(self, args: int) -> None: ...
    def enable_dirty_ring(self, size_bytes: int) -> None: ...
    def get_dirty_log(self, slot: int = ...) -> np.ndarray: ...
    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, bitmap: np.ndarray) -> None: ...


RING_GFN = 0x100


def ring_reports(vm: FrontDoor, manual: int = 3) -> list[tuple[int, int]]:
    """A write, logging to a ring enabled, a second write: what the ring says, (slot, page number)s. Empty: it is lost.

    With ``manual`` 3 (manual protect, initially set) enabling protects nothing, for all bits are to be set; but a ring has no
    bits. With 0 or 1 it is reported."""
    vm.enable_dirty_ring(1 << 16)
    vm.enable_cap_manual_dirty_log_protect2(manual)
    vm.set_user_memory_region(slot=0, base_gfn=RING_GFN, npages=64)
    vm.vcpu[0].write(RING_GFN)
    vm.set_user_memory_region(slot=0, base_gfn=RING_GFN, npages=64, log_dirty_pages=True)
    vm.vcpu[0].write(RING_GFN)
    harvested: list[tuple[int, int]] = vm.vcpu[0].dirty_ring.harvest()
    return harvested


CLEAR_FIRST, CLEAR_PAGES, NEXT_2M = 0x3FF, 513, 0x400


def clear_reports(
    vm: FrontDoor, cleared: Collection[int] = (0x3FF, 0x400), written: int = 0x400, manual: int = 3
) -> bool:
    """A slot whose second page begins a 2M page; all its pages written, logged, and told as dirty; a CLEAR of the gfns
    ``cleared``; a write to ``written``. Whether GET says so; False: it is lost.

    In each word of 64 pages KVM compares the first and the last gfn by addresses rounded *up* to 2M, and takes them for one
    huge page's. So with the first two pages it overlooks the huge page of the second. Needs 2M pages, and ``manual`` 3
    (initially set)."""
    slot = {"slot": 0, "base_gfn": CLEAR_FIRST, "npages": CLEAR_PAGES}
    vm.enable_cap_manual_dirty_log_protect2(manual)
    vm.set_user_memory_region(**slot)
    for gfn in (CLEAR_FIRST, NEXT_2M, NEXT_2M + 1):
        vm.vcpu[0].write(gfn)
    vm.set_user_memory_region(**slot, log_dirty_pages=True)
    if not manual & 2:  # then a page is only told as dirty once it has been written
        for gfn in cleared:
            vm.vcpu[0].write(gfn)
    vm.get_dirty_log(0)
    bitmap = np.zeros(64, bool)
    bitmap[[gfn - CLEAR_FIRST for gfn in cleared]] = True
    vm.clear_dirty_log(0, 0, 64, bitmap)
    vm.vcpu[0].write(written)
    return bool(vm.get_dirty_log(0)[written - CLEAR_FIRST])


# ---- what chapter 15 asks --------------------------------------------------------------------------------------------

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


def who_asks(vm: Outside, manual: int = 0) -> tuple[int, ...]:
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
    return tuple(after - before for before, after in pairwise(counts))


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


class Refused(str):
    """The answer of a machine that refused a call: the errno's name. ``says``: why, in a sentence."""

    def __new__(cls, refusal: OSError) -> Self:
        self = super().__new__(cls, errno.errorcode.get(refusal.errno or 0, "refused"))
        self.says = refusal.strerror or str(refusal)
        return self

    says: str


@dataclass(frozen=True)
class Question:
    """A run with its cases. ``cases``: in words, and the run's arguments; ``page_size`` is the host's. ``parts``: how many
    an answer has, if it is a tuple."""

    says: str
    run: Callable[..., Any]
    cases: dict[str, dict[str, Any]]
    parts: int = 0

    def asked(self, case: str, machine: Machine) -> Any:
        """The answer of a new VM of the machine. Where an OSError ends the run it is `Refused`, in each of its parts.
        TimeoutError if a guest hangs."""
        return self.told(case, machine)[0]

    def told(self, case: str, machine: Machine) -> tuple[Any, Outside]:
        """The answer, and the VM with all that was said."""
        arguments = dict(self.cases[case])
        with machine.vm(page_size=arguments.pop("page_size", "4K")) as vm:
            try:
                return self.run(vm, **arguments), vm
            except TimeoutError:
                raise
            except OSError as error:
                refused = Refused(error)
                return (refused,) * self.parts if self.parts else refused, vm


def refusal(answer: Any) -> Refused | None:
    """The refusal that an answer is, None if it is none."""
    first = answer[0] if isinstance(answer, tuple) else answer
    return first if isinstance(first, Refused) else None


TWO = {"cleared": (0x3FF, 0x400), "written": 0x400, "page_size": "2M"}
QUESTIONS = {
    "plain": Question("a page is written, logged, and written again", plain, {"written": {}}),
    "chapter 1": Question("chapter 1's run", chapter_1, {"aged": {}}),
    "enabling": Question("flushes that enabling asks for", enabling_asks, {said: {"before": said} for said in BEFORE}),
    "who asks": Question(
        "flushes that each call asks for", who_asks, {f"manual protect {n}": {"manual": n} for n in (0, 1, 3)}, parts=3
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
        parts=2,
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
        parts=2,
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
            if refused := refusal(there):
                print(f"  {case:<34}model {here!s:<18}cannot be tried here: {refused.says}")
                continue
            differ += here != there
            print(f"  {case:<34}model {here!s:<18}machine {there}{'   DIFFERS' * (here != there)}")
    if arguments.file:
        record(machine, [ask_all], arguments.file, "chapter 15's questions: python -m kvmbook.real ask FILE")
        print(f"kept in {arguments.file}")
    return int(bool(differ))
