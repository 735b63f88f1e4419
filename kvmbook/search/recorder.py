"""A run written down while it is done: `Recorder` stands before a `Vm`, answers as it does, and keeps what was asked.

So a run that somebody wrote as calls, not as steps, becomes a C program too: `recorder.to_selftest()`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvmbook.model import PG_LEVEL_4K, Outcome, Vm, to_words
from kvmbook.search.playing import Call, Cleared, Script
from kvmbook.search.selftest import c_program


class RecordedRing:
    """A dirty ring, as far as user space harvests it."""

    def __init__(self, recorder: Recorder, number: int) -> None:
        self._recorder, self._number = recorder, number

    def harvest(self) -> list[tuple[int, int]]:
        ring = self._recorder.vm.vcpu[self._number].dirty_ring
        assert ring is not None
        taken: list[tuple[int, int]] = ring.harvest()
        self._recorder.note("user space", "harvests", ring=self._number)
        return taken


class RecordedVcpu:
    """What is asked of one vCPU: accesses by gfn, and its dirty ring (None if the VM has none)."""

    def __init__(self, recorder: Recorder, number: int) -> None:
        self._recorder, self._number = recorder, number
        vcpu = recorder.vm.vcpu[number]
        self.dirty_ring = RecordedRing(recorder, number) if vcpu.dirty_ring is not None else None

    def read(self, gfn: int) -> Outcome:
        return self._access("read", gfn)

    def write(self, gfn: int) -> Outcome:
        return self._access("write", gfn)

    def _access(self, kind: str, gfn: int) -> Outcome:
        page = self._recorder.page(gfn)
        outcome = self._recorder.vm.vcpu[self._number].complete(kind, gfn)
        self._recorder.note(f"vCPU{self._number}", f"{kind}s", page=page)
        return outcome


class Recorder:
    """A `Vm` with a pen: the calls of its front door that a C program can play. A program has one slot, 0, which keeps its
    place and begins without logging; ValueError for what it could not play."""

    def __init__(self, vm: Vm, title: str = "A run written by hand") -> None:
        self.vm, self.title = vm, title
        self._calls: list[Call] = []
        self._slot: tuple[int, int] | None = None
        self._logs = False
        self._manual = 0

    def note(self, who: str, what: str, **about: Any) -> None:
        """Write a call down. ``about``: further fields of `Call`."""
        number = len(self._calls) + 1
        self._calls.append(Call(who, what, begins=number, ends=number, **about))

    def page(self, gfn: int) -> int:
        """Which page of the slot a gfn is."""
        base_gfn, npages = self._slot or (0, 0)
        if not base_gfn <= gfn < base_gfn + npages:
            raise ValueError(f"gfn {gfn:#x} is not in the slot; a C program plays that slot only")
        return gfn - base_gfn

    # ---- the front door ---------------------------------------------------------------------------------------------

    @property
    def vcpu(self) -> list[RecordedVcpu]:
        return [RecordedVcpu(self, number) for number in range(len(self.vm.vcpu))]

    def set_user_memory_region(
        self, slot: int = 0, base_gfn: int = 0, npages: int = 0, *, log_dirty_pages: bool = False
    ) -> None:
        if slot or not npages or (base_gfn, npages) != (self._slot or (base_gfn, npages)):
            raise ValueError("a C program has one slot, 0, and does not move or delete it")
        if log_dirty_pages and self._slot is None:
            raise ValueError("a C program's slot begins without logging")
        self.vm.set_user_memory_region(slot, base_gfn, npages, log_dirty_pages=log_dirty_pages)
        self._slot = base_gfn, npages
        if log_dirty_pages != self._logs:
            self.note("user space", "enables" if log_dirty_pages else "disables")
        self._logs = log_dirty_pages

    def enable_manual_dirty_log_protect(self, initially_set: bool = False) -> None:
        self.enable_cap_manual_dirty_log_protect2(1 | 2 * initially_set)

    def enable_cap_manual_dirty_log_protect2(self, args: int) -> None:
        if self._calls:
            raise ValueError("a C program says what is to be protected by hand at its beginning")
        self.vm.enable_cap_manual_dirty_log_protect2(args)
        self._manual = args

    def enable_dirty_ring(self, size_bytes: int) -> None:
        self.vm.enable_dirty_ring(size_bytes)

    def get_dirty_log(self, slot: int = 0) -> np.ndarray:
        report = self.vm.get_dirty_log(slot)
        self.note("user space", "gets")
        return report

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, bitmap: np.ndarray) -> None:
        self.vm.clear_dirty_log(slot, first_page, num_pages, bitmap)
        words = tuple(int(word) for word in to_words(np.asarray(bitmap, bool)))
        self.note("user space", "clears", cleared=Cleared(first_page, num_pages, words))

    def reset_dirty_rings(self) -> int:
        count = self.vm.reset_dirty_rings()
        self.note("user space", "resets")
        return count

    def clear_young(self, start: int, end: int) -> bool:
        pages = [self.page(gfn) for gfn in range(start, end)]
        young = self.vm.clear_young(start, end)
        for page in pages:
            self.note("host", "ages", page=page)
        return young

    # ---- what was written down --------------------------------------------------------------------------------------

    @property
    def script(self) -> Script:
        """The run so far. ValueError before there is a slot."""
        if self._slot is None:
            raise ValueError("nothing has been recorded: there is no slot yet")
        base_gfn, npages = self._slot
        vm = self.vm
        return Script(
            self.title,
            steps=tuple(f"{call.begins:3}  {call.phrase}" for call in self._calls),
            lost=tuple(int(gfn) - base_gfn for gfn in vm.missed_dirty(0)),
            base_gfn=base_gfn,
            pages=npages,
            vcpus=vm.vcpus_to_create,
            calls=tuple(self._calls),
            manual=self._manual,
            ring_bytes=vm.dirty_ring_size,
            huge=vm.host.level > PG_LEVEL_4K,
        )

    def to_selftest(self, form: str = "standalone") -> str:
        """The run so far as a C program for a real KVM (see `c_program`)."""
        return c_program(self.script, form)
