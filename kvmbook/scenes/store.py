"""A guest with something to lose: a key-value store with a log, an index, and a page for each record.

The store knows its memory by two calls, ``read(page)`` and ``write(page, content)``. So it runs on a guest's vCPU, and once
more on the memory that has arrived elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

LOG, INDEX, RECORDS = 0, 1, 2  # the log's page, the index's, and the first record's
DELETED = "deleted"


class Memory(Protocol):
    """Pages of bytes, by number."""

    def read(self, page: int) -> bytes: ...

    def write(self, page: int, content: bytes) -> None: ...


class AtRest:
    """Memory that no guest runs on: pages as they have arrived."""

    def __init__(self, pages: Sequence[bytes]) -> None:
        self.pages = list(pages)

    def read(self, page: int) -> bytes:
        return self.pages[page]

    def write(self, page: int, content: bytes) -> None:
        self.pages[page] = content


class Request(NamedTuple):
    """What a client asks of the store: "put", "get" or "delete" a ``key``; the ``value`` of a put."""

    kind: str
    key: str
    value: str = ""


class Store:
    """The store in ``memory``, whose ``pages`` are all its own. Every page is text, a line a key: in the log what was done to
    the key last, in the index the page of its record, in a record its value. Nothing is kept outside of the pages."""

    def __init__(self, memory: Memory, pages: int) -> None:
        self.memory, self.pages = memory, pages

    def get(self, key: str) -> str | None:
        """The value of ``key``, or None. It asks the index and the record, as a client does, and not the log."""
        place = self.page(INDEX).get(key)
        return None if place is None else self.page(int(place)).get(key)

    def put(self, key: str, value: str) -> None:
        """Store a value: log, record, for a new key index. ValueError if all pages are taken, and for what is no word."""
        if key.split() != [key] or value.split() != [value] or value == DELETED:
            raise ValueError(f"a key and a value are words, the value not {DELETED!r}; got {key!r}, {value!r}")
        index = self.page(INDEX)
        taken = {int(place) for place in index.values()}
        place = int(index[key]) if key in index else next((p for p in range(RECORDS, self.pages) if p not in taken), 0)
        if not place:
            raise ValueError(f"no room for {key!r}: {len(taken)} records, a page each")
        self._log(key, value)
        self._write(place, {key: value})
        if key not in index:
            self._write(INDEX, {**index, key: str(place)})

    def delete(self, key: str) -> None:
        """Log it, and take the key out of the index. The record's page is free; what is in it stays. A key that is not there
        changes nothing."""
        index = self.page(INDEX)
        if index.pop(key, None) is not None:
            self._log(key, DELETED)
            self._write(INDEX, index)

    def do(self, request: Request) -> str | None:
        """Do what a client asks; returns the value of a get."""
        if request.kind == "put":
            self.put(request.key, request.value)
        elif request.kind == "delete":
            self.delete(request.key)
        else:
            return self.get(request.key)
        return None

    def disagreements(self) -> list[str]:
        """The log against index and records: a sentence for each key about which they do not agree."""
        log, index, found = self.page(LOG), self.page(INDEX), list[str]()
        for key in sorted(log.keys() | index.keys()):
            logged, has = log.get(key), self.get(key)
            if logged is None:
                found.append(f"{key} is there ({has}); the log has never heard of it")
            elif logged == DELETED and key in index:
                found.append(f"{key} is back ({has}); the log says: deleted")
            elif logged != DELETED and key not in index:
                found.append(f"{key} is gone; the log says: {logged}")
            elif logged not in (DELETED, has):
                found.append(f"{key} is {has or 'not where the index says'}; the log says: {logged}")
        return found

    def page(self, number: int) -> dict[str, str]:
        """One page, by key."""
        return dict(line.split(" ") for line in self.memory.read(number).decode().splitlines())

    def _write(self, number: int, lines: Mapping[str, str]) -> None:
        self.memory.write(number, "".join(f"{key} {said}\n" for key, said in lines.items()).encode())

    def _log(self, key: str, said: str) -> None:
        """Append; an older line of the same key is dropped."""
        log = self.page(LOG)
        log.pop(key, None)
        self._write(LOG, {**log, key: said})


# ---- clients ---------------------------------------------------------------------------------------------------------


class Clients(Protocol):
    """Whoever uses the store: what is asked of it in a tick. The same tick always gets the same answer."""

    def requests(self, tick: int) -> Sequence[Request]: ...


@dataclass(frozen=True)
class Script:
    """Clients that do what is written down: requests by tick."""

    by_tick: Mapping[int, Sequence[Request]] = field(hash=False)

    def requests(self, tick: int) -> Sequence[Request]:
        return self.by_tick.get(tick, ())


@dataclass(frozen=True)
class Workload:
    """Random clients: all keys are put in tick 0; later a tick is ``idle`` with that probability, and otherwise has
    ``rate`` requests: six gets of ten, three puts, one delete, of keys of which the first are the favourites."""

    seed: int
    idle: float = 0.0
    rate: int = 2
    keys: int = 16

    def requests(self, tick: int) -> Sequence[Request]:
        if tick == 0:
            return [Request("put", f"key{n}", "v0") for n in range(self.keys)]
        rng = random.Random(self.seed * 1_000_003 + tick)
        return [] if rng.random() < self.idle else [self._one(rng, f"v{tick}") for _ in range(self.rate)]

    def _one(self, rng: random.Random, value: str) -> Request:
        key, kind = f"key{int(self.keys * rng.random() ** 2)}", rng.random()
        if kind < 0.6:
            return Request("get", key)
        return Request("put", key, value) if kind < 0.9 else Request("delete", key)
