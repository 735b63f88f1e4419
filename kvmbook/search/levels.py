"""The search's inner loop, compiled by numba: all that one step makes of the states of a level, and which of it is new.

Nobody needs to read this room to understand the search. It stands on the tables of `explore.Search` and knows no step of
the model; tests compare it with `Search.successors`, which does the same by numpy, and serves where numba is not installed.

A step of page p leads from one situation to one other, z, and there to a state that depends on the other pages only by
their ranks: ``to + sum(rank[q] * strides[z, q] for q != p)``. So for each situation, page and rank there is one row, with
the steps that are possible then as (to, z); those that do something on all pages, as (to, z, what), are kept apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from kvmbook.model import numba_is_there
from kvmbook.search.space import Space
from kvmbook.search.tables import EXIT

LARGE, SMALL = (
    1 << 23,
    1 << 17,
)  # numbers of a space from which on the loops pay: if they must be compiled, if they are there
CHUNK = 1 << 13  # states handled at once: what they lead to stays in the cache


_loaded: set[int] = set()  # for so many pages they are there


def pays(space: Space) -> bool:
    """Whether the compiled loops are to serve the search of this space. To compile them takes two seconds, to read them from
    disk, numba with them, half a second."""
    return space.bound >= (SMALL if space.pages in _loaded else LARGE) and numba_is_there()


class PageTables(NamedTuple):
    """The steps of single pages: step i leads from row ``row[i]`` (ascending) to pair ``to[i]``, and does ``what[i]``
    everywhere. A row is a pair (``pair``) and what may go on elsewhere: ``first[p][s]`` is that of rank 0 of page p in
    situation s, the other ranks follow. Second ways to the same state, and steps that change nothing, are left out; of the
    steps with them each row has ``degree``."""

    first: list[np.ndarray]
    pair: np.ndarray
    degree: np.ndarray
    row: np.ndarray
    what: np.ndarray
    to: np.ndarray


class VmTables(NamedTuple):
    """The steps of all pages at once. ``everywhere[what]``: the pair that a flush or an exit makes of each, itself for 0;
    ``may_exit[s, v]``. For the first, second, ... step of user space ``becomes[nth, control, which, pair]``, in the silent
    and the spoken control, and whether it ``speaks[nth, which, pair]``, on the first, second, ... page, if that makes a
    difference; ``user_steps[s]``: how many there are."""

    everywhere: np.ndarray
    may_exit: np.ndarray
    becomes: np.ndarray
    speaks: np.ndarray
    user_steps: np.ndarray


class Levels:
    """The loops for one space."""

    def __init__(self, space: Space, pages: PageTables, vm: VmTables) -> None:
        assert (space.block[vm.everywhere] == space.block).all(), "a flush or an exit changes what others wait for"
        self.pages = tuple(range(space.pages))  # its length is a constant to the compiler
        rows, degree, quiet, loud = _rows(space, pages)
        situations = space.base, np.array(space.strides).T, np.array(space.firsts).T, rows
        pairs = np.array(space.codes).T, space.lookup, space.rank, vm.everywhere
        self.tables = (
            *_narrow([*situations, *pairs, degree, *quiet, *loud]),
            *_narrow([EXIT + np.arange(vm.may_exit.shape[1]), vm.may_exit, vm.user_steps, vm.becomes, vm.speaks]),
        )
        most = np.diff(quiet[0].astype(int)).max(initial=0) + np.diff(loud[0].astype(int)).max(initial=0)
        self.most = int(most) * space.pages + vm.may_exit.shape[1] + len(vm.becomes)  # steps of one state
        self.out, self.ends = np.empty(CHUNK * self.most, np.uint32), np.empty(CHUNK, np.uint32)
        for _, after, _, _ in self.successors(np.zeros(1, np.int64)):
            self.mark(after, np.zeros(space.bound, np.uint8), 0)
        _loaded.add(space.pages)

    def successors(self, states: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray, int]]:
        """Of each chunk of ``states`` (ascending): where it is; what one step makes of them; where the successors of each
        end; how many transitions that are. The arrays hold until the next chunk."""
        for begin in range(0, states.size, CHUNK):
            chunk = states[begin : begin + CHUNK]
            count, transitions = _fill()(self.pages, *self.tables, chunk, self.out, self.ends)
            yield slice(begin, begin + chunk.size), self.out[:count], self.ends[: chunk.size], int(transitions)

    def mark(self, after: np.ndarray, level: np.ndarray, number: int) -> np.ndarray:
        """Give those of ``after`` that have no level yet this one, and return them."""
        met = np.empty(after.size, np.int64)
        return met[: _sift()(after, level, np.uint8(number), met)]


def _rows(space: Space, pages: PageTables) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """The first row of each situation and page; the degree of each row; where the quiet steps of each row begin, ``to``,
    ``z``; where the loud ones do, ``to``, ``z``, ``what``."""
    sizes, strides, codes = space.size[space.blocks], np.array(space.strides).T, np.array(space.codes)
    rows = (np.cumsum(sizes) - sizes.ravel()).reshape(sizes.shape)
    each = np.repeat(np.arange(sizes.size), sizes.ravel())
    shared = np.array(pages.first).T.ravel()[each] + np.arange(each.size) - rows.ravel()[each]
    begin = np.searchsorted(pages.row, shared)
    count = np.searchsorted(pages.row, shared, "right") - begin
    row = np.repeat(np.arange(each.size), count)
    step = np.arange(row.size) - (np.cumsum(count) - count - begin)[row]
    situation, page = np.divmod(each[row], space.pages)
    to, what = pages.to[step], pages.what[step]
    here = codes[np.arange(space.pages), space.first[space.blocks]]
    z = space.lookup[here.sum(axis=1)[situation] - here[situation, page] + codes[page, to]]
    columns = row, space.base[z] + space.rank[to] * strides[z, page], z, what
    parts = [[column[chosen] for column in columns] for chosen in (what == 0, what != 0)]
    firsts = [np.searchsorted(part[0], np.arange(each.size + 1)) for part in parts]
    return rows, pages.degree[shared], [firsts[0], *parts[0][1:3]], [firsts[1], *parts[1][1:4]]


def _narrow(tables: Iterable[np.ndarray]) -> list[np.ndarray]:
    """As unsigned numbers: the compiler need not ask whether an index counts from the end. What is -1 is never read."""
    return [np.ascontiguousarray(table).astype(np.int64).astype(np.uint32) for table in tables]


# ---- what numba compiles ---------------------------------------------------------------------------------------------


def _compiled(function: Callable[..., Any]) -> Callable[[], Callable[..., Any]]:
    """The same, compiled when first asked for, and kept on disk where there is a place to write to."""

    @functools.cache
    def when_asked() -> Callable[..., Any]:
        import numba

        try:
            made: Callable[..., Any] = numba.njit(cache=True)(function)
        except RuntimeError:  # no place to keep it
            made = numba.njit(function)
        return made

    return when_asked


@_compiled
def _sift(after, level, number, met):  # type: ignore[no-untyped-def]
    count = 0
    for i in range(after.size):
        to = after[i]
        if level[to] == 255:
            level[to] = number
            met[count] = to
            count += 1
    return count


@_compiled
def _fill(  # type: ignore[no-untyped-def]
    pages, base, strides, firsts, rows, codes, lookup, rank, everywhere, degree,
    quiet, quiet_to, quiet_z, loud, loud_to, loud_z, loud_what,
    exits, may_exit, user_steps, becomes, speaks, states, out, ends,
):  # fmt: skip
    """The successors of ``states`` into ``out``, where those of each end into ``ends``; their number, and that of the
    transitions."""
    ranks, pair = np.empty(len(pages), np.uint32), np.empty(len(pages), np.uint32)
    one, numbers = np.uint32(1), np.uint32(speaks.shape[1])
    s, n, transitions = np.uint32(0), np.uint32(0), np.uint64(0)
    for i in range(states.size):
        state = np.uint32(states[i])
        while state >= base[s + one]:
            s += one
        rest = np.uint32(state - base[s])
        for p in range(len(pages)):
            ranks[p] = rest // strides[s, p]
            rest -= ranks[p] * strides[s, p]
            pair[p] = firsts[s, p] + ranks[p]
        for p in range(len(pages)):
            row = np.uint32(rows[s, p] + ranks[p])
            transitions += degree[row]
            for k in range(quiet[row], quiet[row + one]):
                to, z = quiet_to[k], quiet_z[k]
                for q in range(len(pages)):
                    if q != p:
                        to += ranks[q] * strides[z, q]
                out[n] = to
                n += one
            for k in range(loud[row], loud[row + one]):
                to, z = loud_to[k], loud_z[k]
                for q in range(len(pages)):
                    if q != p:
                        to += rank[everywhere[loud_what[k], pair[q]]] * strides[z, q]
                out[n] = to
                n += one
        for v in range(exits.size):
            if may_exit[s, v]:
                to = base[s]
                for q in range(len(pages)):
                    to += rank[everywhere[exits[v], pair[q]]] * strides[s, q]
                if to != state:
                    transitions += np.uint64(1)
                    out[n] = to
                    n += one
        for nth in range(user_steps[s]):
            says, code = np.uint32(0), np.uint32(0)
            for q in range(len(pages)):
                says |= speaks[nth, np.uint32(q) % numbers, pair[q]]
            for q in range(len(pages)):
                code += codes[becomes[nth, says, np.uint32(q) % numbers, pair[q]], q]
            z = lookup[code]
            to = base[z]
            for q in range(len(pages)):
                to += rank[becomes[nth, says, np.uint32(q) % numbers, pair[q]]] * strides[z, q]
            transitions += np.uint64(1)
            out[n] = to
            n += one
        ends[i] = n
    return n, transitions
