"""The state of one VM, the few things that everything does to it, and what it means for an operation to be in flight.

`Machine` is data: slots, tables, vCPUs, and a list of operations under way. An `Operation` is data too: which steps are
still to come, which lock it holds, what it has learned. So a machine can be copied, compared, hashed and put back.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import numpy as np

from kvmbook.model.arrays import any_of, rewrite
from kvmbook.model.hardware import Hardware
from kvmbook.model.host import FEW_FRAMES, HostMemory
from kvmbook.model.kernel import Kernel
from kvmbook.model.memslots import DirtyRing, MemorySlot, Memslots, bits_between
from kvmbook.model.page_tables import LEVELS, PageTable, PageTables, Root, Sptep, Stretch
from kvmbook.model.spte import SpteFormat
from kvmbook.model.tlb import Tlb, TlbEntry

Rule = Callable[[int], Any]  # a helper of SpteFormat: an SPTE to a named tuple of the new one and an answer
StepFunction = TypeVar("StepFunction", bound=Callable[..., str | None])


class Event(NamedTuple):
    """One line of ``vm.log``: who did which step, to which gfn, and what came of it."""

    actor: str
    step: str
    gfn: int | None = None
    note: str = ""

    def __str__(self) -> str:
        where = "" if self.gfn is None else f" gfn {self.gfn:#x}"
        return f"{self.actor}: {self.step}{where}" + (f" -> {self.note}" if self.note else "")


@dataclass
class Counters:
    """What it all cost. ``walks`` and ``hits`` count guest accesses that ended that way."""

    exits: int = 0
    flushes: int = 0
    ipis: int = 0
    walks: int = 0
    hits: int = 0


# ---- operations in flight --------------------------------------------------------------------------------------------


def step(lock: str | None = None, keeps: bool = False) -> Callable[[StepFunction], StepFunction]:
    """Mark a method as one atomic step. ``lock``: how it needs mmu_lock, "read" or "write". ``keeps``: if the next step
    needs the lock too, it is not let go, so that nobody else who needs it comes in between.
    Source: include/linux/kvm_host.h: mmu_lock (of struct kvm), v5.19."""

    def mark(function: StepFunction) -> StepFunction:
        setattr(function, "lock", lock)
        setattr(function, "keeps", keeps)
        return function

    return mark


@dataclass(eq=False)
class Operation:
    """Something under way that other CPUs can interrupt. ``todo`` names the steps to come, in order; each is a method
    marked by `step`. A step may change ``todo``: that is how an operation decides and how it repeats. ``refusal`` is
    raised when the last step is done."""

    actor: ClassVar[str] = "user space"

    todo: list[str] = field(default_factory=list, init=False)
    started: bool = field(default=False, init=False)
    refusal: OSError | ValueError | None = field(default=None, init=False)
    lock: str | None = field(default=None, init=False)
    result: Any = field(default=None, init=False)

    def begin(self, m: Machine) -> None:
        """Check the arguments, raise OSError or ValueError, and set ``todo``. Must not change the machine."""
        raise NotImplementedError

    @property
    def needs_slots_lock(self) -> bool:
        """Whether it holds slots_lock, or waits for it: such operations go one after the other.
        Source: include/linux/kvm_host.h: slots_lock (of struct kvm), v5.19."""
        return False

    @step()
    def mutex_lock(self, m: Machine) -> None:
        """slots_lock is free now; only now can the arguments be checked."""
        try:
            self.begin(m)
        except (OSError, ValueError) as refusal:
            self.todo, self.refusal = [], refusal

    @property
    def who(self) -> str:
        """The actor's name in the log."""
        return self.actor

    @property
    def where(self) -> int | None:
        """The gfn that the next step is about, if it is about one."""
        return None

    def wants_lock(self, name: str) -> str | None:
        """How the step ``name`` needs mmu_lock."""
        wants: str | None = getattr(getattr(self, name), "lock")
        return wants

    def waits_for(self, m: Machine, name: str) -> list[Operation]:
        """Which operations in flight must move on before the step ``name`` can be done."""
        others = [op for op in m.in_flight if op is not self]
        wants = self.wants_lock(name)
        blockers = []
        if self.lock is None and wants is not None:
            blockers = [op for op in others if op.lock == "write" or (op.lock == "read" and wants == "write")]
        if self.needs_slots_lock:
            ahead = m.in_flight[: m.in_flight.index(self)]
            blockers += [op for op in ahead if op.needs_slots_lock and op not in blockers]
        return blockers

    def covers(self, slot: MemorySlot, gfn: int) -> bool:
        """Whether this operation holds news of a write to ``gfn`` that is not in the log, or no longer."""
        return False


class Visit(NamedTuple):
    """What a pass makes of one entry: the new SPTE, and whether it was a dirty leaf and is no longer."""

    spte: int
    was_dirty: bool


# ---- the state -------------------------------------------------------------------------------------------------------


@dataclass
class VcpuState:
    """One vCPU. ``pml``: the gfns in its page-modification log, oldest first. ``kicked``: asked to leave the guest.
    ``guest_mode``: it was running the nested guest last. ``fault``: the page fault that KVM is handling for it, if any;
    meanwhile it is outside the guest."""

    id: int
    tlb: Tlb = field(default_factory=Tlb)
    pml: list[int] = field(default_factory=list)
    dirty_ring: DirtyRing | None = None
    kicked: bool = False
    guest_mode: bool = False
    fault: Operation | None = None

    @property
    def name(self) -> str:
        return f"vCPU{self.id}"


@dataclass
class Machine:
    """All of a VM that the model knows. Its vCPUs run in address space 0: nothing of another one is ever mapped or written.

    ``pages_per_step``: how many pages one step of a slot-wide pass takes; None = all. ``words_per_step``: how many words of
    the dirty bitmap one step of a harvest takes, None = all. ``fast_retries``: how often the
    fast path tries again when the SPTE changed under it (fast_page_fault(), v5.19). ``mmu_notifier_seq`` and
    ``invalidating`` are what makes a fault retry that raced with the host.

    The last three are not KVM's: they are the truth that the log is held against. User space copies a page when it was told
    that the page is dirty, and KVM has armed it again. ``watched`` has the slots whose log it relies on, since enabling
    returned; ``written`` the gfns of those slots that were written and not copied since; ``told``, for manual protect, the
    bits of which a GET has told it and that no CLEAR has taken (with INITIALLY_SET it knows of all at first).
    """

    hardware: Hardware
    kernel: Kernel
    fmt: SpteFormat
    l1_root: Root
    l2_root: Root | None
    page_tables: PageTables
    host: HostMemory
    eager_page_split: bool = True
    nx_huge_pages: bool = False
    pages_per_step: int | None = None
    words_per_step: int | None = 1
    fast_retries: int = 4
    memslots: Memslots = field(default_factory=Memslots)
    vcpus: list[VcpuState] = field(default_factory=list)
    in_flight: list[Operation] = field(default_factory=list)
    manual_protect: bool = False
    initially_set: bool = False
    dirty_ring_size: int = 0
    slot_zap_all: bool = True
    nr_memslots_dirty_logging: int = 0
    mmu_notifier_seq: int = 0
    invalidating: list[tuple[int, int]] = field(default_factory=list)
    write_tracked: set[int] = field(default_factory=set)
    counters: Counters = field(default_factory=Counters)
    log: list[Event] = field(default_factory=list)
    watched: set[tuple[int, int]] = field(default_factory=set)
    written: set[int] = field(default_factory=set)
    told: dict[int, np.ndarray] = field(default_factory=dict)  # by the slot's number: words, as of a bitmap

    # ---- running operations -----------------------------------------------------------------------------------------

    def start(self, operation: Operation) -> Operation:
        """Put an operation in flight, none of its steps done. Raises what its checks raise, and then changes nothing;
        if slots_lock is taken, the checks wait for it. ValueError for an operation that was started before."""
        if operation.started:
            raise ValueError(f"this {type(operation).__name__} was started already; make a new one")
        if operation.needs_slots_lock and any(op.needs_slots_lock for op in self.in_flight):
            operation.todo = ["mutex_lock"]
        else:
            operation.begin(self)
        operation.started = True
        if operation.todo:
            self.in_flight.append(operation)
        return operation

    def step(self, operation: Operation) -> None:
        """Do the next step of an operation in flight. Raises ValueError if it must wait for others, or is over; after its
        last step, what it was refused with."""
        if operation not in self.in_flight:
            raise ValueError(f"{type(operation).__name__} is not in flight: it was not started here, or is over")
        name = operation.todo[0]
        if blockers := operation.waits_for(self, name):
            raise ValueError(f"{name} must wait for {blockers[0].who}: {blockers[0].todo[0]}")
        method, where, logged = getattr(operation, name), operation.where, len(self.log)
        operation.lock = operation.lock or operation.wants_lock(name)
        del operation.todo[0]
        self.record(operation.who, name, where)
        if note := method(self):
            self.log[logged] = self.log[logged]._replace(note=note)
        if not (getattr(method, "keeps") and operation.todo and operation.wants_lock(operation.todo[0])):
            operation.lock = None
        if not operation.todo:
            self.in_flight.remove(operation)
            if operation.refusal is not None:
                raise operation.refusal

    def run(self, operation: Operation) -> Any:
        """Do all steps that an operation has left, and return its result. Where it must wait, those it waits for go on. A
        vCPU that is kicked leaves the guest at once."""
        if not operation.started:
            self.start(operation)
        while operation.todo:
            mover = operation
            while blockers := mover.waits_for(self, mover.todo[0]):
                mover = blockers[0]
            if mover is operation:
                self.step(mover)
            else:
                with suppress(OSError, ValueError):  # if it is refused, that is its own caller's affair
                    self.step(mover)
            for vcpu in self.vcpus:
                if vcpu.kicked:
                    self.vcpu_exit(vcpu)
        if operation.refusal is not None:
            raise operation.refusal
        return operation.result

    def record(self, actor: str, step: str, gfn: int | None = None, note: str = "") -> None:
        """Add one line to the log."""
        self.log.append(Event(actor, step, gfn, note))

    # ---- what vCPUs are made to do ----------------------------------------------------------------------------------

    def vcpu_exit(self, vcpu: VcpuState) -> None:
        """Leave the guest and come back. Every exit from L1 drains the PML buffer; none flushes the TLB."""
        vcpu.kicked = False
        self.counters.exits += 1
        if vcpu.guest_mode and not self.kernel.pml_logs_nested:
            return
        logged, vcpu.pml = vcpu.pml, []
        for gfn in logged if self.kernel.pml_drains_oldest_first else reversed(logged):
            self.mark_page_dirty_in_slot(self.memslots.gfn_to_memslot(gfn), gfn, vcpu)

    def kick_all(self) -> None:
        """Ask each vCPU that runs the guest to leave it, and do not wait.
        Source: virt/kvm/kvm_main.c: kvm_vcpu_kick(), v5.19."""
        for vcpu in self.vcpus:
            vcpu.kicked = vcpu.fault is None

    def kvm_flush_remote_tlbs(self) -> None:
        """Flush every vCPU's TLB. Each that runs the guest takes an IPI and an exit. Slot ranges are not told apart:
        only hosts under Hyper-V can do that. Source: virt/kvm/kvm_main.c, v5.19."""
        self.counters.flushes += 1
        for vcpu in self.vcpus:
            if vcpu.fault is None:
                self.counters.ipis += 1
                self.vcpu_exit(vcpu)
            vcpu.tlb.flush()

    # ---- SPTEs in bulk ----------------------------------------------------------------------------------------------

    def update_leaves(
        self,
        side: bool,
        start: int,
        end: int,
        rule: Rule,
        levels: tuple[int, int] = LEVELS,
        only: np.ndarray | None = None,
    ) -> bool:
        """Apply a helper of `SpteFormat` to each present leaf of one side over [start, end). Whether it said yes to one.
        ``only``: words of a bitmap that begins at ``start``, of the pages that are meant.
        Source: mmu/mmu.c: slot_handle_level(), slot_handle_level_4k(), v5.19."""
        asked = False
        for stretch in self.page_tables.stretches(side, start, end, levels):
            words, where = stretch.words, None
            if only is not None:
                where = bits_between(only, stretch.gfn - start, words.size)
            if only is None or where is not None:
                asked |= self.update_words(words, stretch.table.level, rule, where)
        return asked

    def update_words(self, words: np.ndarray, level: int, rule: Rule, where: np.ndarray | None = None) -> bool:
        """The same for entries that lie beside each other, in place; all, or (a bool array) those that are meant."""
        asked = False

        def visit(old: int) -> Visit:
            nonlocal asked
            if not self.fmt.maps_page(old, level):
                return Visit(old, False)
            new, yes, *_ = rule(old)
            asked = asked or bool(yes)
            return Visit(new, self._stops_being_dirty(old, new))

        words, was_dirty, in_a_row = rewrite(visit, words, where)
        if was_dirty.any() and in_a_row and words.size > FEW_FRAMES:
            self.host.dirty.add_run(self.fmt.spte_to_pfn(int(words[0])), was_dirty)
        elif was_dirty.any():
            frames: Any = words[was_dirty]
            self.host.dirty.add_each(np.asarray(self.fmt.spte_to_pfn(frames)))
        return asked

    def any_leaf(self, side: bool, start: int, end: int, asks: Callable[[int], bool]) -> bool:
        """Whether the answer is yes for some present leaf of one side over [start, end)."""

        def says(stretch: Stretch) -> bool:
            level = stretch.table.level
            return any_of(lambda spte: self.fmt.maps_page(spte, level) and asks(spte), stretch.words)

        return any(says(stretch) for stretch in self.page_tables.stretches(side, start, end))

    def drop_table(self, sptep: Sptep) -> None:
        """Cut off a table with all that hangs below it, flush, and give the tables back."""
        freed, dropped = self.page_tables.unlink(sptep)
        for spte in dropped:
            self.tell_host(spte, 0)
        self.kvm_flush_remote_tlbs()
        self.page_tables.free(freed)

    def zap_all(self) -> None:
        """Drop every tree of the VM; flush if there was more than bare roots. (A bare root of the legacy MMU costs a flush
        at the next entry of a vCPU, which frees it; the model does not count that one.)
        Source: mmu/mmu.c: kvm_mmu_zap_all_fast(), v5.19."""
        for _, _, _, spte in self.page_tables.every_leaf():
            self.tell_host(spte, 0)
        if self.page_tables.zap_all():
            self.kvm_flush_remote_tlbs()

    def tell_host(self, old: int, new: int) -> None:
        """Mark the host's frame dirty if an SPTE stops being dirty. This is ``struct page``, not the dirty bitmap."""
        if self._stops_being_dirty(old, new):
            self.host.dirty.add(self.fmt.spte_to_pfn(old))

    def _stops_being_dirty(self, old: int, new: int) -> bool:
        return self.fmt.is_dirty_spte(old) and not self.fmt.is_dirty_spte(new)

    # ---- dirty pages ------------------------------------------------------------------------------------------------

    @property
    def have_rmaps(self) -> bool:
        """Whether a slot-wide pass must visit the rmaps: the TDP MMU is off, or a nested guest has run.
        Source: arch/x86/kvm/mmu.h: kvm_memslots_have_rmaps(), v5.19."""
        return not self.hardware.tdp_mmu or self.page_tables.shadow_root_allocated

    @property
    def pml_on(self) -> bool:
        """Whether vCPUs run with PML switched on: some slot logs.
        Source: arch/x86/kvm/vmx/vmx.c: vmx_update_cpu_dirty_logging(), v5.19."""
        return bool(self.hardware.pml_entries) and self.nr_memslots_dirty_logging > 0

    def mark_page_dirty_in_slot(self, slot: MemorySlot | None, gfn: int, vcpu: VcpuState | None) -> None:
        """Log a write, if the slot logs: in the running vCPU's ring if rings are used, else in the bitmap. What nobody can
        be told is dropped, with a warning. Source: virt/kvm/kvm_main.c, v5.19."""
        if slot is None or not slot.logs_dirty:
            return
        if vcpu is None and (self.dirty_ring_size or not self.kernel.marks_without_vcpu):
            self.record("KVM", "WARN", gfn, "dirty, but on no vCPU's behalf: the mark is dropped")
        elif vcpu is not None and vcpu.dirty_ring is not None:
            if vcpu.dirty_ring.full:
                self.record("KVM", "WARN", gfn, "the dirty ring is full: its oldest entry is overwritten")
            vcpu.dirty_ring.push(slot, gfn)
        else:
            slot.set_bit(gfn)

    def watch(self, slot: MemorySlot) -> None:
        """From now on user space relies on the slot's log."""
        self.unwatch(slot)
        self.watched.add((slot.as_id, slot.id))

    def unwatch(self, slot: MemorySlot) -> None:
        """User space relies on it no longer."""
        self.watched.discard((slot.as_id, slot.id))
        self.told.pop(slot.number, None)
        if slot.as_id == 0:
            self.written = {gfn for gfn in self.written if gfn not in slot}

    def tell(self, slot: MemorySlot) -> None:
        """User space has read the live bitmap, and the bits stay set."""
        assert slot.dirty_bitmap is not None
        self.told[slot.number] = self.told.get(slot.number, 0) | slot.dirty_bitmap[0]

    def take_told(self, slot: MemorySlot, first: int, taken: np.ndarray) -> np.ndarray:
        """Those of the pages ``taken``, words of the bitmap from word ``first`` on, of which user space was told; their bits
        are gone now."""
        if (told := self.told.get(slot.number)) is None:
            return np.zeros_like(taken)
        here = told[first : first + taken.size]
        known: np.ndarray = here & taken
        here &= ~taken
        return known

    def note_copies(self, slot: MemorySlot, gfns: Iterable[int]) -> None:
        """User space copies these pages now."""
        if slot.as_id == 0:
            self.written.difference_update(gfn for gfn in gfns if gfn in slot)

    def note_write(self, gfn: int) -> None:
        """The guest's memory at ``gfn`` has changed. KVM may or may not know."""
        if any(as_id == 0 and gfn in self.memslots.slots[as_id, number] for as_id, number in self.watched):
            self.written.add(gfn)

    def knows_of_write(self, slot: MemorySlot, gfn: int) -> bool:
        """Whether a bitmap, ring, PML buffer or operation in flight will bring ``gfn`` into a report."""
        page, rings = (slot.number, gfn - slot.base_gfn), [vcpu.dirty_ring for vcpu in self.vcpus]
        return (
            (slot.test_bit(gfn) and not self.dirty_ring_size)
            or any(gfn in vcpu.pml for vcpu in self.vcpus)
            or any(page in ring.news for ring in rings if ring is not None)
            or any(op.covers(slot, gfn) for op in self.in_flight)
        )

    # ---- state as a value -------------------------------------------------------------------------------------------

    def copy(self) -> Self:
        """An independent copy of everything, operations in flight included. What never changes is shared."""
        other: Self = copied(self, {id(self.log): list(self.log)})
        return other

    def state(self) -> Any:
        """A hashable value: machines with equal states have equal futures. (Not the other way round: numbers that only
        count up are in it too.) The log and the counters are not."""
        names = [f.name for f in fields(self) if f.name not in ("log", "counters", "kernel")]
        return id(self.kernel), freeze([getattr(self, name) for name in names])


NEVER_CHANGE = int, bool, str, type(None), Event, TlbEntry


@functools.cache
def fields_that_change(kind: type) -> tuple[str, ...]:
    """The fields that tell objects of a dataclass apart, if they can change: of one that is not frozen, or of a slot, for its
    bitmap. (What is left out of comparisons follows from the rest.)"""
    changes = is_dataclass(kind) and (kind is MemorySlot or not getattr(kind, "__dataclass_params__").frozen)
    return tuple(each.name for each in fields(kind) if each.compare or kind is MemorySlot) if changes else ()


class _Shared(dict[type, bool]):
    """Whether copies can share objects of a type: looked up, and worked out when it is first asked."""

    def __missing__(self, kind: type) -> bool:
        self[kind] = issubclass(kind, NEVER_CHANGE) or (is_dataclass(kind) and not fields_that_change(kind))
        return self[kind]


SHARED = _Shared()


def copied(value: Any, memo: dict[int, Any]) -> Any:
    """What ``copy.deepcopy`` makes, but fast: keys and what is frozen are shared. ``memo``: what is copied already."""
    kind: Any = type(value)
    if SHARED[kind]:
        return value
    if (known := memo.get(id(value))) is not None:
        return known
    new: Any
    if kind is list:
        memo[id(value)] = new = []
        new += [item if SHARED[type(item)] else copied(item, memo) for item in value]
    elif kind is dict:
        memo[id(value)] = new = {}
        for key, item in value.items():
            new[key] = item if SHARED[type(item)] else copied(item, memo)
    elif kind is np.ndarray or kind is set:
        memo[id(value)] = new = value.copy()
    elif fields_that_change(kind):
        memo[id(value)] = new = object.__new__(kind)
        new.__dict__.update(value.__dict__)
        for name, item in value.__dict__.items():
            if not SHARED[type(item)]:
                new.__dict__[name] = copied(item, memo)
    else:
        new = copy.deepcopy(value, memo)
    return new


def freeze(value: Any) -> Any:
    """A hashable stand-in for nested dataclasses, containers and arrays; equal values give equal stand-ins."""
    return _FREEZE[type(value)](value)


def _freeze_each(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple([_FREEZE[type(value)](value) for value in values])


def _freeze_dict(value: dict[Any, Any]) -> Any:
    return frozenset([(key, _FREEZE[type(item)](item)) for key, item in value.items()])


def _freeze_array(value: np.ndarray) -> Any:
    full = value.ravel().nonzero()[0]
    return value.shape, full.tobytes(), value.flat[full].tobytes()


def _freeze_slot(value: MemorySlot) -> Any:
    return value, freeze(value.dirty_bitmap)


def _freeze_table(value: PageTable) -> Any:
    return value.pfn, value.root, value.level, value.base_gfn, _freeze_array(value.sptes)


def _itself(value: Any) -> Any:
    return value


class _Freezers(dict[type, Callable[[Any], Any]]):
    """How objects of a type are frozen: looked up, and worked out when it is first asked."""

    def __missing__(self, kind: type) -> Callable[[Any], Any]:
        if names := fields_that_change(kind):
            values = attrgetter(*names, names[0])  # two at least, so that it is a tuple
            self[kind] = lambda value: (kind.__name__, _freeze_each(values(value)))
        else:
            self[kind] = _freeze_each if issubclass(kind, list | tuple) else _itself
        return self[kind]


_FREEZE = _Freezers(
    {dict: _freeze_dict, set: frozenset, np.ndarray: _freeze_array, MemorySlot: _freeze_slot, PageTable: _freeze_table}
)
