"""All flush rules that look at SPTE bits: which are sound, and what do they cost?

A rule of this kind flushes iff some leaf that the enabling passes visit satisfies a predicate over its bits before and
after. On given hardware the passes meet only a few kinds of leaf, so all predicates are the subsets of these kinds: a
handful of rules, each of which is judged by an exhaustive search (`kvmbook.search.anynumber`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kvmbook.model import FlushPolicy, FlushRule, Hardware, Kernel, SpteFormat, Vm
from kvmbook.search.anynumber import AnyNumber
from kvmbook.search.cells import Cells
from kvmbook.search.schedule import Grain

BITS = ("W", "MW", "HW", "A", "D", "tracked", "has A/D")


def bits_of(fmt: SpteFormat, spte: int) -> int:
    """What a pass can see of a present leaf, bit n for ``BITS[n]``. A and D as the helpers answer, with or without the
    hardware's bits."""
    answers = (
        fmt.is_writable_pte(spte),
        fmt.is_mmu_writable_spte(spte),
        spte & fmt.shadow_host_writable_mask != 0,
        fmt.is_accessed_spte(spte),
        fmt.is_dirty_spte(spte),
        fmt.is_access_track_spte(spte),
        fmt.spte_ad_enabled(spte),
    )
    return sum(answer << n for n, answer in enumerate(answers))


class Leaf(NamedTuple):
    """A kind of leaf, as the pass meets it and as it leaves it: `bits_of` before and after."""

    before: int
    after: int

    def __str__(self) -> str:
        said = [name for n, name in enumerate(BITS) if self.before >> n & 1]
        lost = [name for n, name in enumerate(BITS) if (self.before & ~self.after) >> n & 1]
        return ", ".join(said) + (f"; loses {', '.join(lost)}" if lost else "; unchanged")


@dataclass(frozen=True)
class BitRule:
    """Flush iff a pass met a leaf of one of these kinds."""

    kinds: frozenset[Leaf]
    unconditional: bool = field(default=False, init=False)

    def _answer(self, fmt: SpteFormat, old: int, new: int) -> bool:
        return Leaf(bits_of(fmt, old), bits_of(fmt, new)) in self.kinds

    def after_write_protect(self, fmt: SpteFormat, old: int, new: int, answer: bool) -> bool:
        """As `kvmbook.model.kernel.FlushRule` asks."""
        return self._answer(fmt, old, new)

    def after_clear_dirty(self, fmt: SpteFormat, old: int, new: int, answer: bool) -> bool:
        """The same predicate in the other pass."""
        return self._answer(fmt, old, new)

    def __str__(self) -> str:
        return " | ".join(f"[{kind}]" for kind in sorted(self.kinds)) or "never"


# ---- which rules there are, and which are sound ----------------------------------------------------------------------


@dataclass
class _Recorder:
    """Never flushes, and notes which kinds of leaf it was asked about and what ``rule`` would have said."""

    rule: FlushRule
    unconditional: bool = False
    kinds: dict[Leaf, bool] = field(default_factory=dict)

    def _note(self, fmt: SpteFormat, old: int, new: int, says: bool) -> bool:
        if self.rule.unconditional:
            raise ValueError("an unconditional rule is not one over bits: it also flushes where the pass meets no leaf")
        leaf = Leaf(bits_of(fmt, old), bits_of(fmt, new))
        if self.kinds.setdefault(leaf, says) != says:
            raise ValueError(f"the rule says yes and no to [{leaf}]: it looks at more than these bits")
        return False

    def after_write_protect(self, fmt: SpteFormat, old: int, new: int, answer: bool) -> bool:
        return self._note(fmt, old, new, self.rule.after_write_protect(fmt, old, new, answer))

    def after_clear_dirty(self, fmt: SpteFormat, old: int, new: int, answer: bool) -> bool:
        return self._note(fmt, old, new, self.rule.after_clear_dirty(fmt, old, new, answer))


def as_bits(hardware: Hardware, rule: FlushRule) -> BitRule:
    """The same rule as a set of kinds of leaf, of those that the passes can meet on this hardware.
    ValueError if it is none: unconditional, or with an eye for more than `BITS`."""
    recorder = _Recorder(rule)
    AnyNumber(Cells(hardware, Kernel.v5_19.with_(flush=recorder), 1, Grain.FAULT)).search()
    return BitRule(frozenset(kind for kind, yes in recorder.kinds.items() if yes))


def leaves_met(hardware: Hardware) -> list[Leaf]:
    """The kinds of leaf that the passes can meet on this hardware, whatever the number of pages and vCPUs."""
    recorder = _Recorder(Kernel.v5_19.flush)
    AnyNumber(Cells(hardware, Kernel.v5_19.with_(flush=recorder), 1, Grain.FAULT)).search()
    return sorted(recorder.kinds)


def all_rules(hardware: Hardware) -> list[BitRule]:
    """Every rule over the bits of SPTEs: those that flush for fewer kinds of leaf first."""
    kinds = leaves_met(hardware)
    sizes = range(len(kinds) + 1)
    return [BitRule(frozenset(chosen)) for size in sizes for chosen in itertools.combinations(kinds, size)]


def sound_rules(hardware: Hardware, rules: Iterable[BitRule]) -> list[BitRule]:
    """Those of ``rules`` under which no write is lost, for any number of pages and vCPUs."""
    cells = Cells(hardware, Kernel.v5_19.with_(flush=FlushPolicy.NEVER), 1, Grain.FAULT)
    AnyNumber(cells).search()  # what no rule is asked about is known from here on
    return [rule for rule in rules if AnyNumber(cells.with_flush(rule)).search(stop_at_loss=True).verdict().safe]


def least(rules: Iterable[BitRule]) -> list[BitRule]:
    """Those of ``rules`` that do more than none of the others."""
    rules = list(rules)
    return [rule for rule in rules if not any(other.kinds < rule.kinds for other in rules)]


# ---- what a rule costs -----------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """``flushes`` while enabling, and writes ``missed`` by the harvests, over a whole workload."""

    flushes: int
    missed: int


def cost(hardware: Hardware, rule: FlushRule, seed: int = 1, migrations: int = 60, npages: int = 8) -> Cost:
    """Begin the migration of many small VMs under ``rule``, and count.

    Each VM touches some of its pages, sometimes from two vCPUs whose faults race; in half of them the host then ages all
    pages, and some are touched again; logging is enabled, pages are written, the log is harvested. Equal seeds give equal
    workloads, whatever the rule.
    """
    rng, base, flushes, missed = np.random.default_rng(seed), 0x200, 0, 0
    for _ in range(migrations):
        vm = Vm(hardware, Kernel.v5_19.with_(flush=rule), vcpus=2)
        vm.set_user_memory_region(slot=0, base_gfn=base, npages=npages)
        _touch(vm, rng, rng.random())
        if rng.random() < 0.5:
            vm.clear_young(base, base + npages)
            _touch(vm, rng, rng.random() / 4)
        before = vm.counters.flushes
        vm.set_user_memory_region(slot=0, base_gfn=base, npages=npages, log_dirty_pages=True)
        flushes += vm.counters.flushes - before
        for gfn in base + np.flatnonzero(rng.random(npages) < 0.5):
            vm.vcpu[int(rng.integers(2))].write(int(gfn))
        vm.get_dirty_log(0)
        missed += vm.missed_dirty(0).size
    return Cost(flushes, missed)


def _touch(vm: Vm, rng: np.random.Generator, share: float) -> None:
    """Let about that share of the pages be read, written, or read by both vCPUs at once, whose faults then race."""
    slot, (one, other) = vm.memslots.slots[0, 0], vm.vcpu
    for gfn in slot.base_gfn + np.flatnonzero(rng.random(slot.npages) < share):
        how = str(rng.choice(["read", "write", "race"]))
        if how != "race":
            one.complete(how, int(gfn))
            continue
        one.attempt("read", int(gfn))
        other.attempt("read", int(gfn))
        for vcpu in (one, other):
            if vcpu.fault is not None:
                vm.run(vcpu.fault)
            vcpu.read(int(gfn))
