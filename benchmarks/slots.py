"""Passes over a slot as large as slots are, as multiples of numpy.copyto of the same SPTEs, timed in turns.

    python -m benchmarks.slots [BITS ...]      # slots of 2^BITS pages; 16 20 24 unless told otherwise

The host has huge pages: one write each maps them, and enabling dirty logging splits them to 4K. Then SPTEs are put back
before each turn as fresh writes leave them ("one kind"), or a third of them aged and a third write-protected or cleaned by
the model's helpers, in random order ("mixed"). The protecting and cleaning passes are timed as the step of enabling that
they are; all others are the whole call of user space or of the host. Harvests take the bitmap in one step. Their dirty pages
are random, and set in the bitmap by hand. Memory is in words a page, SPTEs included, at most.
"""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from unittest.mock import patch

import numpy as np

from benchmarks import report
from benchmarks.report import timed
from kvmbook import Hardware, Kernel, Vm
from kvmbook.model import SpteFormat, each, numba_is_there, to_words

BASE, GIB, CHUNK = 1 << 18, 1 << 18, 1 << 18
NO_AD, AD, PML = Hardware.ept(ad_bits=False), Hardware.ept(ad_bits=True), Hardware.ept(ad_bits=True, pml=True)


@dataclass
class Slot:
    """A VM with one slot that logs, all of it mapped by 4K pages; ``sptes`` as they are put back before each turn."""

    vm: Vm
    npages: int
    sptes: list[np.ndarray]

    @classmethod
    def of(cls, hardware: Hardware, kernel: Kernel, npages: int) -> Slot:
        vm = Vm(hardware, kernel, page_size="1G")
        vm.words_per_step = None
        vm.set_user_memory_region(0, BASE, npages)
        for gfn in range(BASE, BASE + npages, GIB if npages >= GIB else 512):
            vm.vcpu[0].write(gfn)
        slot = cls(vm, npages, [])
        enabling = slot.enabling(until="split_huge_tdp_sptes")
        vm.step(enabling)
        slot.sptes = [rows.copy() for rows in slot.rows()]
        vm.run(enabling)
        return slot

    def rows(self) -> Iterator[np.ndarray]:
        """The arrays that the 4K tables lie in."""
        return (table.rows for table in self.vm.page_tables.runs.values() if table.level == 1)

    def enabling(self, until: str) -> object:
        """KVM_SET_USER_MEMORY_REGION with LOG_DIRTY_PAGES, up to one of its steps."""
        operation = self.vm.user_memory_region(0, BASE, self.npages, log_dirty_pages=True)
        self.vm.start(operation)
        while operation.todo[0] != until:
            self.vm.step(operation)
        return operation

    def mix(self) -> None:
        """Age a third of the SPTEs, and protect or clean another."""
        chance, fmt = np.random.default_rng(1), self.vm.fmt
        for rows in self.sptes:
            for part in rows.reshape(-1, min(rows.size, 1 << 18)):
                which = chance.integers(0, 3, part.size)
                aged, armed = each(fmt.mmu_spte_age, part).spte, each(armed_by(fmt), part).spte
                part[:] = np.choose(which, (part, aged, armed))

    def put_back(self, dirty: np.ndarray | None = None) -> None:
        """SPTEs as they were, and the bitmap: words."""
        for rows, sptes in zip(self.rows(), self.sptes, strict=True):
            rows[:] = sptes
        self.vm.log.clear()
        if dirty is not None:
            bitmap = self.vm.memslots.slots[0, 0].dirty_bitmap
            assert bitmap is not None
            bitmap[0] = dirty


def armed_by(fmt: SpteFormat) -> Callable[..., object]:
    return fmt.tdp_clear_dirty if fmt.kvm_ad_enabled else fmt.tdp_wrprot


Pass = Callable[[Slot], Callable[[], object]]  # what makes a slot ready, and returns what is timed


def step_of_enabling(name: str) -> Pass:
    def ready(slot: Slot) -> Callable[[], object]:
        slot.put_back()
        vm, pages = slot.vm, slot.npages
        for operation in list(vm.in_flight):
            vm.run(operation)
        slot_now = vm.memslots.slots[0, 0]
        vm.memslots.slots[0, 0] = type(slot_now)(0, 0, BASE, pages, slot_now.userspace_addr)  # as if it did not log yet
        operation = slot.enabling(until=name)
        slot.put_back()
        return lambda: vm.step(operation)

    return ready


def age(slot: Slot) -> Callable[[], object]:
    slot.put_back()
    return lambda: slot.vm.clear_young(BASE, BASE + slot.npages)


def harvest(percent: int) -> Pass:
    def ready(slot: Slot) -> Callable[[], object]:
        slot.put_back(dirty_words(slot.npages, percent))
        return lambda: slot.vm.get_dirty_log(0)

    return ready


def harvest_100_pages(slot: Slot) -> Callable[[], object]:
    dirty = np.zeros(slot.npages, bool)
    dirty[:: slot.npages // 100] = True
    slot.put_back(to_words(dirty))
    return lambda: slot.vm.get_dirty_log(0)


def clear_in_chunks(slot: Slot) -> Callable[[], object]:
    slot.put_back(dirty_words(slot.npages, 100))
    size = min(CHUNK, slot.npages)
    asked = np.ones(size, bool)
    return lambda: [slot.vm.clear_dirty_log(0, first, size, asked) for first in range(0, slot.npages, size)]


def dirty_words(npages: int, percent: int) -> np.ndarray:
    return to_words(np.random.default_rng(2).random(npages, np.float32) < percent / 100)


PASSES: list[tuple[str, Hardware, Kernel, Pass]] = [
    ("protect", NO_AD, Kernel.v6_0, step_of_enabling("write_protect_tdp")),
    ('protect, asking "changed"', NO_AD, Kernel.v5_19, step_of_enabling("write_protect_tdp")),
    ("age, without A/D", NO_AD, Kernel.v6_0, age),
    ("harvest, 100 pages", NO_AD, Kernel.v6_0, harvest_100_pages),
    ("harvest, 1 % dirty", NO_AD, Kernel.v6_0, harvest(1)),
    ("harvest, 10 % dirty", NO_AD, Kernel.v6_0, harvest(10)),
    ("harvest, all dirty", NO_AD, Kernel.v6_0, harvest(100)),
    ("clear in chunks of 1 GiB", NO_AD, Kernel.v6_0, clear_in_chunks),
    ("clear dirty", PML, Kernel.v6_0, step_of_enabling("clear_dirty_tdp")),
    ("age, with A/D", AD, Kernel.v6_0, age),
    ("age without mmu_lock", AD, Kernel.v6_15, age),
]


def ratio(ready: Pass, slot: Slot) -> float:
    """How long a pass takes, as a multiple of copying the slot's SPTEs."""
    copies = [np.empty_like(sptes) for sptes in slot.sptes]

    def copy() -> None:
        for to, sptes in zip(copies, slot.sptes, strict=True):
            np.copyto(to, sptes)

    ready(slot)()  # compiles
    copy()
    rounds = 5 if slot.npages > 1 << 22 else 9 if slot.npages > 1 << 18 else 31
    return report.ratio((timed(ready(slot)), timed(copy)) for _ in range(rounds))


def words_a_page(ready: Pass, slot: Slot) -> float:
    call = ready(slot)
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 8 / slot.npages + 1


def measure(bits: Sequence[int] = (16, 20, 24)) -> str:
    """A table of ratios, in Markdown: "one kind / mixed" in each column."""
    ways = ["with numba", "without"] if numba_is_there() else ["without"]
    head = ["pass, as a multiple of copyto", *(f"{way}, 2^{power}" for way in ways for power in bits), "words a page"]
    slots: dict[tuple[object, ...], Slot] = {}
    rows = []
    for name, hardware, kernel, ready in PASSES:
        row, memory = [name], 0.0
        for way, power in product(ways, bits):
            report.progress(f"{name}, {way}, 2^{power} pages")
            both = []
            for mixed in (False, True):
                key = hardware, kernel, power, mixed
                if key not in slots:
                    slots[key] = Slot.of(hardware, kernel, 1 << power)
                    if mixed:
                        slots[key].mix()
                with patch("kvmbook.model.compiled.numba_is_there", lambda way=way: way == "with numba"):
                    both.append(f"{ratio(ready, slots[key]):.1f}")
                    memory = max(memory, words_a_page(ready, slots[key])) if power == bits[-1] else 0
            row.append(" / ".join(both))
        rows.append([*row, f"{memory:.1f}"])
    return report.table(head, rows)


if __name__ == "__main__":
    print(measure([int(power) for power in sys.argv[1:]] or [16, 20, 24]))
