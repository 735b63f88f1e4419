"""A helper of one SPTE, asked of a million: the array form of each is derived here, by running it.

Nobody needs to read this room to understand SPTEs. SPTEs are of few *kinds*: they differ in their addresses, seldom in
anything else. So a helper runs once for each kind that is met, and what it flips there is flipped in every word of that
kind. Where numba is installed, a large array goes through the helper's own source instead, compiled (`compiled`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from kvmbook.model import compiled

ALL_BITS = 2**64 - 1
SPTE_BASE_ADDR_MASK = 0x000F_FFFF_FFFF_F000
FLAG_BITS = ALL_BITS ^ SPTE_BASE_ADDR_MASK
PAGE = 1 << 12
MASKS = tuple(np.uint64(bits) for bits in (FLAG_BITS, compiled.KNOWN, compiled.TRUE, PAGE))

FEW_WORDS = 16  # as many are quicker asked one by one
BLOCK = 1 << 16  # words that are worked at a time (measured: benchmarks/spte_arrays.py)
FEW_KINDS = 8
MANY = 32  # if fewer than one of so many words are meant, they are better taken out
LARGE = 1 << 16  # words from which on compiling pays

Learn = Callable[[int], tuple[int | bool, ...]]  # of a kind: what an SPTE is to be flipped by, and truths


def each(helper: Callable[..., Any], sptes: np.ndarray, *how: Any) -> Any:
    """What ``helper(spte, *how)`` says to each word of a uint64 array of any shape: an array of that shape, or a named
    tuple of arrays.

    The helper answers by bits outside the address, and leaves the address alone: with an SPTE, with a bool, or with a named
    tuple of an SPTE and bools. Raises TypeError for an array that is not uint64, and what the helper raises.
    """
    if sptes.dtype != np.uint64:
        raise TypeError(f"an array of SPTEs has dtype uint64; got {sptes.dtype}")
    words = sptes.reshape(-1)
    sample = helper(int(words[0]) if words.size else 0, *how)
    outs = [np.empty(words.size, bool if isinstance(said, bool) else np.uint64) for said in columns(sample)]
    if words.size >= LARGE and inspect.ismethod(helper) and compiled.numba_is_there():
        compiled.fill(helper, words, outs, how)
    else:
        _by_kind(lambda word: columns(helper(word, *how)), words, outs)
    shaped = [out.reshape(sptes.shape) for out in outs]
    return type(sample)(*shaped) if isinstance(sample, tuple) else shaped[0]


Visit = Callable[[int], tuple[int, bool]]


class Rewritten(NamedTuple):
    """What became of words: they themselves (copies, where few were meant: these alone), the bools that were said of them
    (good until the next words are rewritten), and whether their addresses follow each other, page by page."""

    words: np.ndarray
    said: np.ndarray
    in_a_row: bool


def rewrite(visit: Visit, words: np.ndarray, where: np.ndarray | None = None) -> Rewritten:
    """Put the SPTE that ``visit`` makes of each word in its place; it says a bool beside. ``where``: a bool array, of the
    words that are meant; of others it is False. ``visit`` is asked of each kind that is meant (and perhaps of 0), once."""
    if where is not None and (count := np.count_nonzero(where)) < words.size:
        if count < words.size // MANY or not _compiles(words):
            pages = np.flatnonzero(where)
            some = rewrite(visit, words[pages])
            words[pages] = some.words
            return some
    else:
        where = None
    if not _compiles(words):
        said = np.zeros(words.size, bool)
        _by_kind(visit, words, [words, said])
        apart = _differ(words - _addresses(words.size)) if words.size > FEW_WORDS and said.any() else ALL_BITS
        return Rewritten(words, said, not apart & SPTE_BASE_ADDR_MASK)
    return _rewrite_compiled(visit, words, where)


def _compiles(words: np.ndarray) -> bool:
    return words.size >= LARGE and compiled.numba_is_there()


def _rewrite_compiled(visit: Visit, words: np.ndarray, where: np.ndarray | None) -> Rewritten:
    """Let the loop go on from where it met kinds that it did not know, until it is through."""
    said, meant = _room(words.size), where if where is None else where.view(np.uint8)
    flips: dict[int, int] = {}
    at, apart = 0, 0
    while at < words.size:
        part = words[at : at + compiled.PART]
        for kind in _kinds(part if meant is None else part * meant[at : at + compiled.PART]):
            spte, yes = visit(kind)
            flips[kind] = spte ^ kind | compiled.KNOWN | compiled.TRUE * yes
        few = [*flips] + [*flips][-1:] * (-len(flips) % 4)  # so that few lengths are compiled
        kinds, marks = (tuple(np.uint64(bits) for bits in row) for row in (few, [flips[kind] for kind in few]))
        at, found = compiled.by_kind()(words, said.view(np.uint8), meant, at, kinds, marks, *MASKS)
        apart |= int(found)
        if len(flips) > FEW_KINDS:
            flips.clear()
    return Rewritten(words, said, not apart & SPTE_BASE_ADDR_MASK)


@functools.lru_cache(maxsize=4)  # passes have few sizes; what is kept is as large as the slot's part
def _room(size: int) -> np.ndarray:
    """An array to use again and again: fresh memory costs more than the work."""
    return np.empty(size, bool)


@functools.lru_cache(maxsize=4)
def _addresses(size: int) -> np.ndarray:
    return np.arange(size, dtype=np.uint64) * np.uint64(PAGE)


def any_of(question: Callable[[int], bool], words: np.ndarray) -> bool:
    """Whether the answer is yes for one of the words. Each kind is asked once, and none after the first yes."""
    if words.size <= FEW_WORDS:
        return any(question(word) for word in words.tolist())
    ask = functools.cache(question)
    return any(ask(kind) for start in range(0, words.size, BLOCK) for kind in _kinds(words[start : start + BLOCK]))


def _differ(words: np.ndarray) -> int:
    """The bits in which they differ."""
    return int(np.bitwise_or.reduce(words) ^ np.bitwise_and.reduce(words))


def columns(answer: Any) -> tuple[Any, ...]:
    """A helper's answer as a tuple."""
    return answer if isinstance(answer, tuple) else (answer,)


def _by_kind(ask: Callable[[int], tuple[Any, ...]], words: np.ndarray, outs: list[np.ndarray]) -> None:
    if words.size <= FEW_WORDS:
        for number, word in enumerate(words.tolist()):
            for out, said in zip(outs, ask(word), strict=True):
                out[number] = said
        return

    @functools.cache
    def learn(kind: int) -> tuple[int | bool, ...]:
        return tuple(said if isinstance(said, bool) else said ^ kind for said in ask(kind))

    for start in range(0, words.size, BLOCK):
        block, parts = words[start : start + BLOCK], [out[start : start + BLOCK] for out in outs]
        _one_kind(learn, block, parts) or _few_kinds(learn, block, parts) or _many_kinds(learn, block, parts)


def _kinds(words: np.ndarray) -> Iterator[int]:
    """Yield each kind that is among them, once."""
    yield (kind := int(words[0]) & FLAG_BITS)
    left = words & FLAG_BITS if _differ(words) & FLAG_BITS else words[:0]
    while (left := left[left != kind]).size:
        yield (kind := int(left[0]))


def _one_kind(learn: Learn, block: np.ndarray, parts: list[np.ndarray]) -> bool:
    """Fill ``parts`` if all words of ``block`` are of one kind; False if they are not."""
    if _differ(block) & FLAG_BITS:
        return False
    for part, said in zip(parts, learn(int(block[0]) & FLAG_BITS), strict=True):
        if isinstance(said, bool):
            part[:] = said
        else:
            np.bitwise_xor(block, said, out=part)
    return True


def _few_kinds(learn: Learn, block: np.ndarray, parts: list[np.ndarray]) -> bool:
    """Fill ``parts`` kind by kind; False if there are more than FEW_KINDS."""
    flags, left = block & FLAG_BITS, np.ones(block.size, bool)
    flips = [np.zeros(part.size, part.dtype) for part in parts]
    for _ in range(FEW_KINDS):
        kind = int(flags[left.argmax()])
        found = flags == kind
        for flip, said in zip(flips, learn(kind), strict=True):
            if said is True:
                flip |= found
            elif said:
                flip ^= np.multiply(found, np.uint64(said))
        left ^= found
        if not left.any():
            for part, flip in zip(parts, flips, strict=True):
                part[:] = flip if part.dtype == bool else block ^ flip
            return True
    return False


def _many_kinds(learn: Learn, block: np.ndarray, parts: list[np.ndarray]) -> bool:
    """Fill ``parts`` by a table of all kinds in ``block``."""
    kinds, which = np.unique(((block >> 52 << 12) | (block & 0xFFF)).astype(np.uint32), return_inverse=True)
    said_of = [learn(kind >> 12 << 52 | kind & 0xFFF) for kind in kinds.tolist()]
    for part, said in zip(parts, zip(*said_of, strict=True), strict=True):
        chosen = np.array(said, part.dtype)[which]
        part[:] = chosen if part.dtype == bool else block ^ chosen
    return True
