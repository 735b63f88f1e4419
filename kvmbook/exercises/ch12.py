"""Exercises and questions of chapter 12."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kvmbook.exercises.mechanism import Answer, checker, question
from kvmbook.scenes import (
    AGEINGS,
    IDLE,
    INDEX,
    LOG,
    MODES,
    WRONG,
    AtRest,
    Life,
    Migrated,
    Request,
    Script,
    Setting,
    Store,
    Workload,
    chance,
    copied,
    migrate,
)

PAGES = Setting().pages

# ---- questions -------------------------------------------------------------------------------------------------------


@question("the log", "the index", "the log and the index", "the log, the index and bob's record")
def quiz_12_1() -> Answer:
    """Alice, Bob and Carol have been stored, the host has aged all pages, the migration has begun, and bob is deleted. The
    guest arrives, asked for bob it answers, and it finds log and index in agreement. Which pages are old?"""
    names = [(name, value) for name, value in (("alice", "12"), ("bob", "7"), ("carol", "3"))]
    script = Script({0: [Request("put", *one) for one in names], 48: [Request("delete", "bob")]})
    moved = migrate(Setting(ageing=16), script)
    assert moved.store.get("bob") == "7" and not moved.store.disagreements()
    said = {(LOG,): "the log", (INDEX,): "the index", (LOG, INDEX): "the log and the index"}
    because = (
        "A deletion writes two pages, the log and the index. Both writes went through stale entries, so both pages arrived "
        "as they were before: an old state, in perfect order. The record's page was not written at all."
    )
    return Answer(said[tuple(moved.differing)], because)


@question(*MODES)
def quiz_12_2() -> Answer:
    """v5.19, EPT without A/D bits, and a host that ages: by which way of taking the log does every guest of forty arrive
    right?"""
    right = [mode for mode in MODES if not any(_life(mode, seed).differing for seed in range(40))]
    because = (
        "With INITIALLY_SET enabling protects nothing, and flushes nothing. But all bits are set, so the first CLEAR takes "
        "bits, and a CLEAR that takes bits flushes, whatever its SPTEs look like. Each page is sent after that."
    )
    return Answer(right[0] if len(right) == 1 else ", ".join(right), because)


def _life(mode: str, seed: int) -> Migrated:
    return copied(Setting(mode=mode, ageing=8, warm_up=40 + seed % 8), Workload(seed, 0.5))


@question("never idle", "idle in half of its ticks", "idle in 98 of 100 ticks")
def quiz_12_3() -> Answer:
    """v5.19, no A/D bits, a host that ages every 16 ticks, a TLB that holds most of what the guest uses. Which guest arrives
    wrong most often?"""
    names = {0.0: "never idle", 0.5: "idle in half of its ticks", 0.98: "idle in 98 of 100 ticks"}
    assert set(names) <= set(IDLE) and 16 in AGEINGS
    worst = max(names, key=lambda idle: chance(Life("v5.19", idle, 16), WRONG).share)
    because = (
        "A busy guest soon misses its TLB somewhere, and a fault brings W back: enabling finds it, and flushes. For a guest "
        "that is almost always idle it hardly ever flushes, but that guest hardly ever writes. It takes both."
    )
    return Answer(names[worst], because)


# ---- 1: the shortest downtime ----------------------------------------------------------------------------------------

RUSH = tuple(Workload(seed, rate=4) for seed in range(10))
CASES_12_1 = ((2, False), (3, False), (4, False), (6, False), (2, True), (3, True))


@functools.cache
def _arrive(bandwidth: int, auto_converge: bool, downtime: int) -> int:
    """How many of the ten arrive."""
    setting = Setting(bandwidth=bandwidth, auto_converge=auto_converge, downtime=downtime)
    return sum(copied(setting, clients).finished for clients in RUSH)


@checker
def check_12_1(limits: Mapping[tuple[int, bool], int]) -> str:
    """For each (bandwidth, auto_converge) the shortest downtime limit with which all ten guests arrive."""
    if not isinstance(limits, Mapping) or set(limits) != set(CASES_12_1):
        return f"give a dict with these keys: {', '.join(map(str, CASES_12_1))}"
    for case, limit in limits.items():
        if type(limit) is not int or limit < 0:
            return f"{case}: a limit is a whole number of ticks; got {limit!r}"
        if (arrived := _arrive(*case, limit)) < len(RUSH):
            return f"{case}: with a limit of {limit} only {arrived} of {len(RUSH)} arrive; the others are given up"
        if limit and _arrive(*case, limit - 1) == len(RUSH):
            return f"{case}: all arrive with a limit of {limit}; is it the shortest?"
    return ""


# ---- 2: a single ageing ----------------------------------------------------------------------------------------------

BEGINS = 64
GUESTS_12_2 = (Workload(8, 0.8), Workload(9, 0.9), Workload(10, 0.9))


@functools.cache
def _loses(clients: Workload, ageing: int) -> bool:
    return bool(copied(Setting(ageing=ageing, warm_up=BEGINS), clients).differing)


@checker
def check_12_2(earliest: Mapping[int, int]) -> str:
    """For the seed of each guest the earliest tick, from 32 on, of a single ageing after which a page arrives wrong."""
    seeds = [clients.seed for clients in GUESTS_12_2]
    if not isinstance(earliest, Mapping) or sorted(earliest) != seeds:
        return f"give a dict with these keys: {', '.join(map(str, seeds))}"
    for clients in GUESTS_12_2:
        tick = earliest[clients.seed]
        if type(tick) is not int or not BEGINS // 2 <= tick < BEGINS:
            return f"seed {clients.seed}: the only ageing before tick {BEGINS} is in tick 32 to 63; got {tick!r}"
        if not _loses(clients, tick):
            return (
                f"seed {clients.seed}: aged in tick {tick}, the guest arrives as it was; which SPTE is writable again?"
            )
        if sooner := [t for t in range(BEGINS // 2, tick) if _loses(clients, t)]:
            return f"seed {clients.seed}: {tick} is not the earliest; there are {len(sooner)} before"
    return ""


# ---- 3: which write was lost? ----------------------------------------------------------------------------------------


class Case(NamedTuple):
    """Both memories of a migration, all that the clients asked, in order, and the first request that has not arrived."""

    source: list[bytes]
    destination: list[bytes]
    asked: list[Request]
    first: int


def _versions(asked: list[Request], page: int) -> list[tuple[int, bytes]]:
    """The contents that a page has had, each with the number of the request that wrote it."""
    memory, found = AtRest([b""] * PAGES), list[tuple[int, bytes]]()
    for number, request in enumerate(asked):
        before = memory.pages[page]
        Store(memory, PAGES).do(request)
        if memory.pages[page] != before:
            found.append((number, memory.pages[page]))
    return found


def _case(seed: int) -> Case | None:
    """The case of a seed; None if its guest arrives right, or if an old page looks like two of its states."""
    clients = Workload(seed, 0.5, rate=1)
    moved = migrate(Setting(ageing=8), clients)
    asked = [request for tick in range(moved.rounds[-1].begin) for request in clients.requests(tick)]
    lost = list[int]()
    for wrong in moved.wrong:
        versions = _versions(asked, wrong.page)
        like = [n for n, (_, content) in enumerate(versions) if content == wrong.destination]
        if len(like) != 1:
            return None
        lost.append(versions[like[0] + 1][0])
    return Case(list(moved.source), list(moved.destination), asked, min(lost)) if lost else None


@functools.cache
def cases_12_3() -> tuple[Case, ...]:
    """Five migrations that went wrong."""
    return tuple([case for case in map(_case, range(40)) if case is not None][:5])


@checker
def check_12_3(find: Callable[[list[bytes], list[bytes], list[Request]], Any]) -> str:
    """A function that finds, in five migrations, the first request of which something has not arrived."""
    if not callable(find):
        return "give a function of the two memories and of what was asked"
    for number, case in enumerate(cases_12_3(), 1):
        said = find(list(case.source), list(case.destination), list(case.asked))
        if type(said) is not int or not 0 <= said < len(case.asked):
            return f"case {number}: return a place in the list, 0 to {len(case.asked) - 1}; got {said!r}"
        if said != case.first:
            where = "later" if said < case.first else "earlier"
            return f"case {number}: {said} is not the first that was lost, it is {where}; did you look at every wrong page?"
    return ""
