"""Exercises and questions of chapter 12."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from kvmbook.exercises.mechanism import Answer, checker, question
from kvmbook.scenes import (
    AGEINGS,
    IDLE,
    LUCKY,
    AtRest,
    Life,
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
INTEGERS = int, np.integer

# ---- questions -------------------------------------------------------------------------------------------------------


@question("the same two", "two others", "more pages", "none")
def quiz_12_1() -> Answer:
    """The shop that goes on, with Dave, Erin and Alice's second order: on v5.19, without A/D bits, GET brought two pages over
    wrong. User space now uses manual protect, GET and CLEAR. Which pages are wrong?"""
    three = [Request("put", *one) for one in (("alice", "12"), ("bob", "7"), ("carol", "3"))]
    new = [Request("put", "dave", "1"), Request("put", "erin", "5")]
    script = Script({0: three, 48: [Request("delete", "bob")], 49: new, 56: [Request("put", "alice", "13")]})
    by_get, by_clear = (
        set(migrate(Setting(mode=mode, ageing=16), script).differing) for mode in ("GET", "GET + CLEAR")
    )
    said = "more pages" if by_get < by_clear else "none" if not by_clear else "two others"
    because = (
        "The GET of tick 56 only tells of Erin's page; the CLEAR that flushes comes with the last pages, in tick 57. Alice's "
        "order comes between the two, and is lost as well: the log stays old, and agrees with the index once more."
    )
    return Answer("the same two" if by_get == by_clear else said, because)


@question("none", "one or two", "about a third", "all of them")
def quiz_12_2() -> Answer:
    """Thirty half-idle guests, v5.19, no A/D bits, ageing every 8 ticks; each on 512 pages of a host with huge pages, so that
    one SPTE maps the guest. User space uses INITIALLY_SET. How many arrive wrong?"""
    setting = Setting(mode="INITIALLY_SET", ageing=8, pages=512, page_size="2M")
    moved = [copied(replace(setting, warm_up=40 + seed % 8), Workload(seed, 0.5)) for seed in range(30)]
    assert all(one.finished for one in moved)
    wrong = sum(bool(one.differing) for one in moved)
    because = (
        "Huge pages make sure that the condition is met, and INITIALLY_SET makes sure that enabling does not flush. But all "
        "bits are set: the first CLEAR splits the huge page and flushes, and no page of the chunk is sent before that."
    )
    return Answer(
        "none" if not wrong else "all of them" if wrong == 30 else "one or two" if wrong < 3 else "about a third",
        because,
    )


@question("never idle", "idle in half of its ticks", "idle in 98 of 100 ticks")
def quiz_12_3() -> Answer:
    """v5.19, no A/D bits, ageing every 16 ticks. Which guest is lucky most often: enabling does not flush for it, and yet
    it arrives right?"""
    names = {0.0: "never idle", 0.5: "idle in half of its ticks", 0.98: "idle in 98 of 100 ticks"}
    assert set(names) <= set(IDLE) and 16 in AGEINGS
    luckiest = max(names, key=lambda idle: chance(Life("v5.19", idle, 16), LUCKY).share)
    because = (
        "Its pages stay aged, so enabling finds nothing and flushes for nobody; but a guest that writes nothing meanwhile "
        "has nothing to lose. A test on an idle guest meets the bug's condition nearly always, and sees the bug seldom."
    )
    return Answer(names[luckiest], because)


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
        if not isinstance(limit, INTEGERS) or limit < 0:
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
        if not isinstance(tick, INTEGERS) or not BEGINS // 2 <= tick < BEGINS:
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
    """Both memories of a migration, all that the clients asked, in order, and the first request that has not arrived.
    ``plain``: it is of the first page that is wrong."""

    source: list[bytes]
    destination: list[bytes]
    asked: list[Request]
    first: int
    plain: bool


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
    return Case(list(moved.source), list(moved.destination), asked, min(lost), lost[0] == min(lost)) if lost else None


@functools.cache
def cases_12_3() -> tuple[Case, ...]:
    """Five migrations that went wrong, first those in which to look at one page is not enough."""
    return tuple(sorted([case for case in map(_case, range(60)) if case is not None], key=lambda case: case.plain)[:5])


@checker
def check_12_3(find: Callable[[list[bytes], list[bytes], list[Request]], Any]) -> str:
    """A function that finds, in five migrations, the first request of which something has not arrived."""
    if not callable(find):
        return "give a function of the two memories and of what was asked"
    for number, case in enumerate(cases_12_3(), 1):
        said = find(list(case.source), list(case.destination), list(case.asked))
        if not isinstance(said, INTEGERS) or not 0 <= said < len(case.asked):
            return f"case {number}: return a place in the list, 0 to {len(case.asked) - 1}; got {said!r}"
        if said != case.first:
            where = "later" if said < case.first else "earlier"
            return f"case {number}: {said} is not the first that was lost, it is {where}; did you look at every wrong page?"
    return ""
