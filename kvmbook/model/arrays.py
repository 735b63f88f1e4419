"""A helper of one SPTE, asked of a million: the array form of each is derived here, by running it.

Nobody needs to read this room to understand SPTEs. SPTEs are of few *kinds*: they differ in their addresses, seldom in
anything else. So a helper runs once for each kind that is met, and what it flips there is flipped in every word of that
kind. Where numba is installed, a large array goes through the helper's own source instead, compiled (`compiled`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from kvmbook.model import compiled

ALL_BITS = 2**64 - 1
SPTE_BASE_ADDR_MASK = 0x000F_FFFF_FFFF_F000
FLAG_BITS = ALL_BITS ^ SPTE_BASE_ADDR_MASK

FEW_WORDS = 16  # as many are quicker asked one by one
BLOCK = 1 << 18  # words that are worked at a time (measured: benchmarks/spte_arrays.py)
FEW_KINDS = 8
SAMPLE = 64
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


def _one_kind(learn: Learn, block: np.ndarray, parts: list[np.ndarray]) -> bool:
    """Fill ``parts`` if all words of ``block`` are of one kind; False if they are not."""
    kind = int(block[0]) & FLAG_BITS
    if (block[:SAMPLE] & FLAG_BITS != kind).any():
        return False
    others = np.bitwise_xor(block, kind, out=parts[0] if parts[0].dtype == block.dtype else None)
    if int(np.bitwise_or.reduce(others)) & FLAG_BITS:
        return False
    for part, said in zip(parts, learn(kind), strict=True):
        if isinstance(said, bool):
            part[:] = said
        else:
            np.bitwise_xor(others, kind ^ said, out=part)
    return True


def _few_kinds(learn: Learn, block: np.ndarray, parts: list[np.ndarray]) -> bool:
    """Fill ``parts`` kind by kind; False if there are more than FEW_KINDS."""
    flags, left = block & FLAG_BITS, np.ones(block.size, bool)
    for part in parts:
        part[:] = False if part.dtype == bool else block
    for _ in range(FEW_KINDS):
        kind = int(flags[left.argmax()])
        found = flags == kind
        for part, said in zip(parts, learn(kind), strict=True):
            if said is True:
                part |= found
            elif said:
                part ^= np.multiply(found, np.uint64(said))
        left ^= found
        if not left.any():
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
