"""The model cut into cells: one page, one vCPU, one moment of user space's ioctl; each step found by running the model.

A VM of many pages and vCPUs is made of three kinds of things, and what they share is little:

- the *control*: which ioctl is under way, at which step, and what it knows of the slot as a whole;
- of each page a *word*: its SPTE, its bit in the bitmap, whether a harvest holds it, whether it was written;
- of each vCPU and page a *view*: the TLB entry, whether the PML buffer has the page, the fault that is being handled.

A vCPU's step reads one control, one word, one view, and changes that word and that view. So it is run once on a VM with
one vCPU and remembered; whoever searches a larger VM looks it up. Nothing here says what a step does: `Cells` puts the
parts into a `Vm`, calls the model, and takes the parts out again. That the parts suffice is what the tests show, by
comparing with searches that drive whole VMs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

from kvmbook.model import (
    KVM_MEM_LOG_DIRTY_PAGES,
    PAGE_SHIFT,
    PG_LEVEL_4K,
    ClearYoung,
    FlushRule,
    GetDirtyLog,
    Hardware,
    Kernel,
    MemorySlot,
    Operation,
    PageFault,
    SpteFormat,
    TlbEntry,
    VcpuState,
    Vm,
    no_words,
)
from kvmbook.search.schedule import BASE_GFN, Action, Grain, act, possible, smallest_vm, steps_left_out

Method = TypeVar("Method", bound=Callable[..., Any])


def remembered(method: Method) -> Method:
    """Run a method of `Cells` once for the same arguments."""

    @wraps(method)
    def run_once(self: Cells, *args: Any) -> Any:
        key = method, *args
        if key not in self._known:
            self._rule.asked = False
            self._known[key] = method(self, *args)
            if self._rule.asked:
                assert method.__name__ == "user_step", f"{method.__name__} asked the flush rule"
                self._by_rule.add(key)
        return self._known[key]

    return cast(Method, run_once)


@dataclass
class _Watched:
    """A flush rule that notes whether it was ``asked``."""

    rule: FlushRule
    asked: bool = False

    @property
    def unconditional(self) -> bool:
        self.asked = True
        return self.rule.unconditional

    def after_write_protect(self, fmt: SpteFormat, old: int, new: int, answer: bool) -> bool:
        self.asked = True
        return self.rule.after_write_protect(fmt, old, new, answer)

    def after_clear_dirty(self, fmt: SpteFormat, old: int, new: int, answer: bool) -> bool:
        self.asked = True
        return self.rule.after_clear_dirty(fmt, old, new, answer)


class Word(NamedTuple):
    """One page. ``live``: its bit in the bitmap; ``taken``: a harvest holds it; ``written`` since its last report."""

    spte: int = 0
    live: bool = False
    taken: bool = False
    written: bool = False


class Fault(NamedTuple):
    """A `PageFault` as a value. ``current``: it holds the published slot, else the one before."""

    kind: str
    todo: tuple[str, ...]
    lock: str | None
    current: bool
    generation: int
    retries: int
    old_spte: int
    new_spte: int

    @property
    def gate(self) -> tuple[str | None, int]:
        """All of it that others may have to wait for: the lock it holds, and whether it began before the publication."""
        return self.lock, self.generation


class View(NamedTuple):
    """What one vCPU has of one page."""

    tlb: TlbEntry | None = None
    pml: bool = False
    fault: Fault | None = None


BLANK_WORD, BLANK_VIEW = Word(), View()


class Control(NamedTuple):
    """User space's ioctl under way (None: none), as data; and what the slot and the VM know of logging."""

    operation: tuple[Any, ...] | None
    logs: bool
    watched: bool
    loggers: int

    @property
    def lock(self) -> str | None:
        return self.operation[2] if self.operation is not None else None


def control_of(vm: Vm) -> Control:
    """The control that a VM is in."""
    operation, said = ioctl_of(vm), None
    if operation is not None:
        learned = [getattr(operation, name, None) for name in ("flush", "cursor")]
        words = tuple(np.asarray(getattr(operation, "words", ())).tolist())
        said = type(operation).__name__, tuple(operation.todo), operation.lock, *learned, words
    return Control(said, vm.memslots.slots[0, 0].logs_dirty, bool(vm.watched), vm.nr_memslots_dirty_logging)


def word_of(vm: Vm, page: int = 0) -> Word:
    """The word of one of its pages."""
    gfn, slot = BASE_GFN + page, vm.memslots.slots[0, 0]
    taken = (operation := ioctl_of(vm)) is not None and operation.covers(slot, gfn)
    return Word(_moved(vm.spte(gfn), -page), slot.test_bit(gfn), taken, gfn in vm.written)


def view_of(vm: Vm, vcpu: VcpuState, page: int = 0) -> View:
    """What one of its vCPUs has of a page."""
    gfn, fault = BASE_GFN + page, None
    if isinstance(op := vcpu.fault, PageFault) and op.gfn == gfn:
        current = op.slot is vm.memslots.slots[0, 0]
        sptes = _moved(op.old_spte, -page), _moved(op.new_spte, -page)
        fault = Fault(op.kind, tuple(op.todo), op.lock, current, op.generation, op.retries, *sptes)
    entry = vcpu.tlb.entries.get(("L1", gfn, 1))
    return View(entry and entry._replace(pfn=entry.pfn - page), gfn in vcpu.pml, fault)


def _moved(spte: int, pages: int) -> int:
    """The SPTE of a page so many pages further on, whose frame is as many frames further on: all pages count as page 0."""
    return spte and spte + (pages << PAGE_SHIFT)


def ioctl_of(vm: Vm) -> Operation | None:
    """User space's ioctl under way, if there is one."""
    return next((op for op in vm.in_flight if op.needs_slots_lock), None)


class Step(NamedTuple):
    """What a vCPU's or the host's step made of one word and one view. ``flushed``: all TLBs; ``exited``: this vCPU left
    the guest, which drains its PML buffer."""

    word: Word
    view: View
    flushed: bool
    exited: bool


class Cells:
    """The steps of a VM with ``pages`` pages on this hardware and kernel, each one run when first asked for."""

    def __init__(
        self,
        hardware: Hardware,
        kernel: Kernel,
        pages: int = 1,
        grain: Grain = Grain.STEP,
        without: Collection[str] = (),
    ) -> None:
        if not kernel.srcu_grace_period:
            raise ValueError(
                "without a grace period a fault may hold any slot that ever was; kvmbook.search.schedule can run that"
            )
        if kernel.neighbour_prefetch and not hardware.tdp_mmu:
            raise ValueError("with neighbour_prefetch a fault maps several pages; here each page is on its own")
        self.grain, self.without = Grain(grain), steps_left_out(without)
        self.pages = pages
        self._rule = _Watched(kernel.flush)
        self._by_rule: set[tuple[Any, ...]] = set()  # the steps that asked it
        self._vm = smallest_vm(hardware, kernel.with_(flush=self._rule), pages, 1, grain)
        self._vcpu = self._vm.vcpus[0]
        tables, root = self._vm.page_tables, self._vm.l1_root
        self._sptep = [tables.entry_at(root, BASE_GFN + page, PG_LEVEL_4K) for page in range(pages)]
        self._exemplars: dict[Control, tuple[MemorySlot, Operation | None]] = {}
        self.start = self._control()
        self._known: dict[tuple[Any, ...], Any] = {}

    def with_flush(self, rule: FlushRule) -> Cells:
        """The same under another flush rule. Steps that did not ask the rule are already known."""
        other = copy.copy(self)
        other._vm, other._rule, other._by_rule = self._vm.copy(), _Watched(rule), set()
        other._vcpu, other._vm.kernel = other._vm.vcpus[0], self._vm.kernel.with_(flush=other._rule)
        other._exemplars = dict(self._exemplars)
        other._known = {key: found for key, found in self._known.items() if key not in self._by_rule}
        return other

    # ---- putting parts in, taking parts out -------------------------------------------------------------------------

    def _control(self) -> Control:
        """The control of the VM as it is now; remembers how to make it again."""
        control = control_of(self._vm)
        if control not in self._exemplars:
            self._exemplars[control] = self._vm.memslots.slots[0, 0], _independent(ioctl_of(self._vm))
        return control

    def calm(self, control: Control) -> Control:
        """The same without an ioctl under way: all that vCPUs and the host can tell of it, locks aside."""
        calm = control._replace(operation=None)
        self._exemplars.setdefault(calm, (self._exemplars[control][0], None))
        return calm

    def _load(self, control: Control, word: Word = BLANK_WORD, view: View = BLANK_VIEW, page: int = 0) -> Vm:
        """The VM in that control, all pages blank but ``page``."""
        vm, vcpu = self._vm, self._vcpu
        slot, operation = self._exemplars[control]
        operation = _independent(operation)
        vm.memslots.slots[0, 0], vm.memslots.generation = slot, 0
        vm.nr_memslots_dirty_logging = control.loggers
        vm.watched = {(0, 0)} if control.watched else set()
        vm.in_flight = [] if operation is None else [operation]
        for other in (slot, getattr(operation, "old", None), getattr(operation, "new", None)):
            if other is not None and other.dirty_bitmap is not None:
                other.dirty_bitmap[:] = 0
        gfn = BASE_GFN + page
        for number, sptep in enumerate(self._sptep):
            vm.page_tables.write(sptep, _moved(word.spte, page) if number == page else 0)
        if slot.dirty_bitmap is not None:
            slot.dirty_bitmap[:, 0] = word.live << page, word.taken << page
        if isinstance(operation, GetDirtyLog) and word.taken:
            operation.taken = np.array([1 << page], np.uint64)
            operation.mask = operation.taken if operation.todo[0] == "rearm" else no_words()
        vm.written = {gfn} if word.written else set()
        vcpu.tlb.entries = {} if view.tlb is None else {("L1", gfn, 1): view.tlb._replace(pfn=view.tlb.pfn + page)}
        vcpu.pml = [gfn] if view.pml else []
        vcpu.fault = None if view.fault is None else self._make_fault(view.fault, slot, page)
        if vcpu.fault is not None:
            vm.in_flight.insert(0, vcpu.fault)
        return vm

    def _make_fault(self, fault: Fault, slot: MemorySlot, page: int) -> PageFault:
        vm, gfn = self._vm, BASE_GFN + page
        made = PageFault(gfn, 0, fault.kind, vm.l1_root, False)
        made.todo, made.lock, made.started = list(fault.todo), fault.lock, True
        made.generation, made.retries = fault.generation, fault.retries
        made.old_spte, made.new_spte = _moved(fault.old_spte, page), _moved(fault.new_spte, page)
        if not {"fast_pf_fix_direct_spte", "set_spte"}.isdisjoint(fault.todo):
            made.sptep = self._sptep[page]
        made.slot = slot if fault.current else _before(slot)
        if fault.todo[0] == "make_spte":
            made.page = vm.host.lookup(slot.hva(gfn))
        return made

    def _step(self, loaded: Word, run: Callable[[], object]) -> Step:
        """What ``run`` makes of the loaded parts. Without the harvest nobody knows what it holds: that stays."""
        counters = self._vm.counters
        flushes, exits = counters.flushes, counters.exits
        run()
        word = word_of(self._vm)._replace(taken=loaded.taken)
        return Step(word, view_of(self._vm, self._vcpu), counters.flushes > flushes, counters.exits > exits)

    # ---- steps of one vCPU, or of the host, on one page -------------------------------------------------------------

    @remembered
    def vcpu_step(self, calm: Control, word: Word, view: View) -> dict[Action, Step]:
        """All that the vCPU, or KVM on its behalf, could do here if no lock were held elsewhere; without "exits"."""
        moves = [a for a in self._possible(self._load(calm, word, view)) if "vCPU0" in a.who and a.what != "exits"]
        return {action: self._act(calm, word, view, action) for action in moves if action.page in (None, 0)}

    @remembered
    def host_step(self, calm: Control, word: Word) -> dict[Action, Step]:
        """Both ways of ageing."""
        moves = [a for a in self._possible(self._load(calm, word)) if a.who == "host"]
        return {action: self._act(calm, word, BLANK_VIEW, action) for action in moves if action.page == 0}

    def _possible(self, vm: Vm) -> list[Action]:
        return possible(vm, self.grain, self.without)

    def _act(self, calm: Control, word: Word, view: View, action: Action) -> Step:
        vm = self._load(calm, word, view)
        return self._step(word, lambda: act(vm, action, self.grain))

    @remembered
    def flushed(self, calm: Control, word: Word, view: View) -> Step:
        """What kvm_flush_remote_tlbs() makes of a page and a view of it."""
        return self._step(word, self._load(calm, word, view).kvm_flush_remote_tlbs)

    @remembered
    def exited(self, calm: Control, word: Word, view: View) -> Step:
        """What an exit of the vCPU makes of it."""
        vm = self._load(calm, word, view)
        return self._step(word, lambda: vm.vcpu_exit(self._vcpu))

    @remembered
    def waits(self, fault: Fault | None, lock: str) -> bool:
        """Whether the next step of that fault (None: ageing) must wait for somebody who holds mmu_lock like that."""
        vm, holder = self._load(self.start, view=View(fault=fault)), Operation()
        holder.lock = lock
        asks = self._vcpu.fault or vm.start(ClearYoung(BASE_GFN, BASE_GFN + 1))
        vm.in_flight = [asks, holder]
        return bool(asks.waits_for(vm, asks.todo[0]))

    @remembered
    def lost(self, control: Control, word: Word, view: View) -> bool:
        """Whether the page was written, and nothing here knows."""
        return bool(self._load(control, word, view).missed_dirty(0).size)

    # ---- steps of user space ----------------------------------------------------------------------------------------

    @remembered
    def user_starts(self, control: Control) -> list[Action]:
        """What user space could do next, faults that hold it up aside."""
        vm = self._load(control)
        return [a for a in self._possible(vm) if a.who == "user space"]

    @remembered
    def blocks_user(self, control: Control, fault: Fault) -> bool:
        """Whether user space's next step must wait for that fault."""
        if control.operation is None:
            return False
        vm = self._load(control, view=View(fault=fault))
        return not any(a.who == "user space" for a in self._possible(vm))

    @remembered
    def user_step(
        self, control: Control, action: Action, word: Word = BLANK_WORD, view: View = BLANK_VIEW, page: int = 0
    ) -> tuple[Control, Word, View]:
        """What ``action`` of user space makes of the control, and of ``page`` if all others are blank."""
        act(self._load(control, word, view, page), action, self.grain)
        return self._control(), word_of(self._vm, page), view_of(self._vm, self._vcpu, page)


def _independent(operation: Operation | None) -> Operation | None:
    """A copy with lists of its own, that knows of no page."""
    if operation is None:
        return None
    made = copy.copy(operation)
    made.todo, made.result = list(operation.todo), None
    if isinstance(made, GetDirtyLog):
        made.words, made.taken, made.mask = made.words.copy(), np.zeros_like(made.taken), no_words()
    return made


def _before(slot: MemorySlot) -> MemorySlot:
    """The slot as it was before its logging was switched."""
    bitmap = None if slot.logs_dirty else np.zeros((2, 1), np.uint64)
    return replace(slot, flags=slot.flags ^ KVM_MEM_LOG_DIRTY_PAGES, dirty_bitmap=bitmap)
