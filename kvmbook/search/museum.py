"""Twelve lost writes of KVM's history, each as two kernels that differ in one switch, and the search that tells them apart.

An `Exhibit` says what is searched: its `Space`. The search finds the shortest run in which the bad kernel does harm, and
over the same space that the good one does none. What stands here was true, or is the wrong variant of an optimisation that
is right; `Exhibit.kind` says which. For chapter 13.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, NamedTuple, Protocol

from kvmbook.model import (
    PG_LEVEL_4K,
    AsksForAllRoots,
    FlushPolicy,
    GuardAsksForW,
    Hardware,
    Kernel,
    OneTypeForAll,
    SavesW,
    TdpGuardAsksForW,
    Vm,
    WBringsD,
)
from kvmbook.search.cast import Cast, freed_pages, missed_writes, unseen_writes
from kvmbook.search.configurations import Configuration, Slot
from kvmbook.search.explore import explore
from kvmbook.search.hunt import hunt_one
from kvmbook.search.litmus import Litmus
from kvmbook.search.playing import Call
from kvmbook.search.schedule import BASE_GFN, Action, Grain, forget_history, search_plainly

# ---- what is searched ------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """What a search came to: how many ``states`` and ``transitions`` (where harm is done, up to there), and a shortest
    ``run`` that does harm, or None."""

    states: int
    transitions: int
    run: tuple[Action, ...] | tuple[Call, ...] | None


class Space(Protocol):
    """All the runs that an exhibit is about. ``words``: which they are."""

    @property
    def words(self) -> str: ...

    def search(self, hardware: Hardware, kernel: Kernel) -> Found: ...


@dataclass(frozen=True)
class Interleavings:
    """What `explore` knows: one page; guests, host and user space, one step at a time."""

    vcpus: int = 1
    grain: Grain = Grain.STEP

    @property
    def words(self) -> str:
        return f"every interleaving of one page, {self.vcpus} vCPU{'s' * (self.vcpus > 1)}, cut by {self.grain.value}"

    def search(self, hardware: Hardware, kernel: Kernel) -> Found:
        result = explore(hardware, kernel, vcpus=self.vcpus, grain=self.grain)
        return Found(result.states, result.transitions, result.trace)


@dataclass(frozen=True)
class Moves:
    """What a `Cast` can do: one vCPU, and these ``moves``, step by step or ``whole``. ``before``: what was done, whole,
    before the search begins; ``nested`` and ``nested_base``: see `Vm`."""

    moves: tuple[Action, ...]
    harm: Callable[[Cast], set[int]] = missed_writes
    pages: int = 1
    whole: bool = False
    before: tuple[Action, ...] = ()
    nested: str | None = None
    nested_base: int = 0

    @property
    def words(self) -> str:
        who = sorted({move.who for move in self.moves})
        cut = "whole moves" if self.whole else "steps"
        return f"every order of {cut} of {', '.join(who)}, on {self.pages} page{'s' * (self.pages > 1)}"

    def cast(self, hardware: Hardware, kernel: Kernel) -> Cast:
        """A new VM at the start of the search. ValueError for what no CPU can do."""
        nested = self.nested
        vm = Vm(hardware, kernel, eager_page_split=False, nested=nested, nested_base_gfn=self.nested_base)
        vm.pages_per_step, vm.fast_retries = None if self.whole else 1, 1
        vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=self.pages)
        assert len(vm.vcpu) == 1
        for root in (vm.l1_root, vm.l2_root):
            if root is not None:
                vm.page_tables.descend(root, BASE_GFN, PG_LEVEL_4K)
        cast = Cast(vm, self.moves, self.harm, whole=True)
        for action in self.before:
            cast.do(action)
        cast.whole = self.whole
        forget_history(vm)
        return cast

    def search(self, hardware: Hardware, kernel: Kernel) -> Found:
        reach = search_plainly(self.cast(hardware, kernel), 20_000, stop_at_loss=True)
        return Found(reach.states, reach.transitions, reach.trace)


@dataclass(frozen=True)
class Calls:
    """What a `hunt` knows: all runs of up to so many ``calls`` in one configuration."""

    calls: int
    slot: Slot
    manual: int = 0

    @property
    def words(self) -> str:
        return f"every run of up to {self.calls} whole calls, on a slot of {self.slot.npages} pages"

    def configuration(self, hardware: Hardware, kernel: Kernel) -> Configuration:
        return Configuration(kernel, hardware, manual=self.manual, slot=self.slot)

    def litmus(self, hardware: Hardware, kernel: Kernel, run: Sequence[Call]) -> Litmus:
        """The run, to be retold."""
        return Litmus(self.configuration(hardware, kernel), tuple(run), ())

    def search(self, hardware: Hardware, kernel: Kernel) -> Found:
        covered = hunt_one(self.configuration(hardware, kernel), self.calls)
        shortest = min((litmus.run for litmus in covered.found), key=len, default=None)
        return Found(covered.states, covered.transitions, shortest)


# ---- an exhibit ------------------------------------------------------------------------------------------------------

BUG, OPTIMISATION = "bug", "optimisation, and its wrong variant"
W0, NOTHING, THEN, WRONG_THING = (
    "W=0, so nobody can write",
    "nothing changed, so nobody need forget",
    "what I saw is still so",
    "the right question, of the wrong thing",
)
CONFUSIONS = W0, NOTHING, THEN, WRONG_THING


@dataclass(frozen=True)
class Exhibit:
    """One room of the museum. ``commit`` and ``release``: of the repair, or of the optimisation; ``shares``: what of the
    seed's mistake is in it; ``hardware`` that it needs, and ``elsewhere``, other hardware to try; ``harm`` in words."""

    number: int
    title: str
    commit: str
    release: str
    kind: str
    confusion: str
    shares: str
    hardware: Hardware
    elsewhere: Hardware
    good: Kernel
    bad: Kernel
    space: Space
    harm: str = "the write is lost"

    @property
    def switch(self) -> str:
        """The name of the one field of `Kernel` in which the two differ."""
        values = {each.name: (getattr(self.good, each.name), getattr(self.bad, each.name)) for each in fields(Kernel)}
        (differs,) = [name for name, (good, bad) in values.items() if name != "name" and good != bad]
        return differs

    @property
    def diff(self) -> str:
        """The two lines in which the bad kernel and the good one differ."""

        def said(value: Any) -> str:
            return getattr(value, "__name__", str(value))

        values = (said(getattr(kernel, self.switch)) for kernel in (self.bad, self.good))
        return "\n".join(f"{sign} {self.switch} = {value}" for sign, value in zip("-+", values, strict=True))

    @property
    def verdict(self) -> str:
        """What the search says of the two kernels on its hardware, in three lines."""
        found, proof = self.look(), self.look(fixed=True)
        bad = f"in {len(found.run)} steps, {self.harm}" if found.run else "no run does harm"
        good = "harm is done, too" if proof.run else f"no run does harm: {proof.states:,} states, all of them"
        return f"bad:      {bad}\nrepaired: {good}\nsearched: {self.space.words}"

    def look(self, fixed: bool = False, elsewhere: bool = False) -> Found:
        """Search its space, under the good kernel or the bad one. Remembered."""
        return _searched(self, fixed, elsewhere)

    def __hash__(self) -> int:
        return self.number


@cache
def _searched(exhibit: Exhibit, fixed: bool, elsewhere: bool) -> Found:
    hardware = exhibit.elsewhere if elsewhere else exhibit.hardware
    return exhibit.space.search(hardware, exhibit.good if fixed else exhibit.bad)


# ---- the twelve ------------------------------------------------------------------------------------------------------

V6_0 = Kernel.v6_0
ASKS = V6_0.with_(flush=FlushPolicy.IF_CHANGED)  # enabling asks what changed, as up to v5.19
BY_W = V6_0.with_(spte_rules=GuardAsksForW)
READS, WRITES = Action("vCPU0", "reads", 0), Action("vCPU0", "writes", 0)
GETS, ENABLES, DISABLES = (Action("user space", what) for what in ("gets", "enables", "disables"))
AGES, GUARDS = Action("host", "ages", 0), Action("KVM", "guards", 0)
LOGGED = (ENABLES,)  # the slot logs from the start
UNSEEN = "a table write goes unseen"


def _guarded(*moves: Action, before: tuple[Action, ...] = ()) -> Moves:
    return Moves((READS, WRITES, *moves, GUARDS), unseen_writes, before=before)


def _beside(page: int, nested: str, pages: int = 1) -> Moves:
    """L1 and a nested guest on one page."""
    guests = [Action(who, what, page) for who in ("vCPU0", "L2 on vCPU0") for what in ("reads", "writes")]
    moves = (*guests, GETS, ENABLES, DISABLES, AGES._replace(page=page))
    return Moves(moves, pages=pages, whole=True, nested=nested, nested_base=page)


EXHIBITS = (
    Exhibit(
        1, "The lock that was let go", "6dbf79e7164e", "v3.4", BUG, W0,
        "The guard finds W=0 and believes that no CPU can write; the flush is still to come.",
        Hardware.shadow(), Hardware.ept(), BY_W.with_(harvest_flushes_before_unlock=True), BY_W,
        _guarded(GETS, before=LOGGED), UNSEEN,
    ),
    Exhibit(
        2, "The mark before the deed", "c7ba5b48cc8d", "v3.6", OPTIMISATION, THEN,
        "A harvest comes between two steps that were thought of as one.",
        Hardware.npt(), Hardware.shadow(), V6_0, V6_0.with_(fast_path_marks_first=True), Interleavings(),
    ),
    Exhibit(
        3, "A flush outside the lock", "198c74f43f0f", "v3.16", OPTIMISATION, W0,
        "W=0 says what the next walk will find, not what a TLB remembers.",
        Hardware.shadow(), Hardware.ept(), V6_0, BY_W, _guarded(ENABLES), UNSEEN,
    ),
    Exhibit(
        4, "Dirty in advance", "9b51a63024bd", "v4.0", OPTIMISATION, NOTHING,
        "The pass finds D=0, changes nothing, and so does not flush; a TLB remembers D=1.",
        Hardware.ept(pml=True), Hardware.ept(), ASKS.with_(spte_rules=WBringsD), ASKS,
        Interleavings(2, Grain.FAULT),
    ),
    Exhibit(
        5, "W saved with R and X", "f160c7b7bb32", "v4.11", OPTIMISATION, THEN,
        "It is the seed's other half: ageing takes W away, and somebody believes what was so before.",
        Hardware.ept(ad_bits=False), Hardware.ept(), V6_0, V6_0.with_(spte_rules=SavesW), _guarded(AGES), UNSEEN,
    ),
    Exhibit(
        6, "Whose address is it?", "1f4e5fc83a42", "v5.4", BUG, WRONG_THING,
        "A bit of the SPTE is trusted to tell of writes that it does not tell of.",
        Hardware.ept(pml=True), Hardware.ept(), V6_0.with_(pml_logs_nested=True),
        V6_0.with_(pml_logs_nested=True).with_(spte_rules=OneTypeForAll), _beside(1, "ept", pages=2),
    ),
    Exhibit(
        7, "The last page of the range", "1aa4bb916808", "v6.8", BUG, WRONG_THING,
        "Each mechanism leaves the page to the other, as the pass leaves the flush to whoever took W.",
        Hardware.ept(), Hardware.shadow(), Kernel.v6_2.with_(clear_split_forgets_last=False), Kernel.v6_2,
        Calls(4, Slot(0x3FF, 513, (0, 1), "2M"), manual=3),
    ),
    Exhibit(
        8, "The flush that was owed", "a835429cda91", "v5.12", BUG, NOTHING,
        "The second walk finds nothing to zap and does not flush; the first has yet to.",
        Hardware.ept(), Hardware.npt(), V6_0, V6_0.with_(yields_after_flush=False),
        Moves((READS, Action("KVM", "zaps all pages"), Action("host", "replaces", 0)), freed_pages, pages=2),
        "a freed page is reached",
    ),
    Exhibit(
        9, "A guard that asked for W", "7c8a4742c4ab", "v5.17", BUG, W0,
        "It is room 3 once more, ten years later, in the new MMU: W was asked where MMU-writable tells.",
        Hardware.ept(), Hardware.shadow(), V6_0, V6_0.with_(spte_rules=TdpGuardAsksForW),
        _guarded(GETS, before=LOGGED), UNSEEN,
    ),
    Exhibit(
        10, "A store over an exchange", "ba3a6120a4e7", "v5.18", BUG, THEN,
        "It ends as the seed does: W=0 in the SPTE, W=1 in a TLB, and a pass that finds nothing to change.",
        Hardware.npt(), Hardware.shadow(), ASKS, ASKS.with_(ages_by_plain_store=True),
        Moves((READS, WRITES, GETS, ENABLES, DISABLES, AGES), before=(READS, ENABLES, DISABLES)),
    ),
    Exhibit(
        11, "The seed", "b64d740ea7dd", "v6.0", BUG, NOTHING,
        "The pass finds W=0, changes nothing, and so does not flush; ageing took W, and a TLB remembers it.",
        Hardware.ept(ad_bits=False), Hardware.npt(), V6_0, ASKS, Interleavings(),
    ),
    Exhibit(
        12, "One question for all roots", "2673dfb591a3", "v6.9", BUG, WRONG_THING,
        "D is cleared where only W tells: the pass changed something, and armed nothing.",
        Hardware.ept(pml=True), Hardware.ept(), V6_0, V6_0.with_(spte_rules=AsksForAllRoots), _beside(0, "tdp"),
    ),
)  # fmt: skip
