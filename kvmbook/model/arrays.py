"""One formula, one word or a million: how the functions of `kvmbook.model.spte` take arrays.

`by_word` is the book's first fast engine, and follows the house rule: it is derived from the readable formula by
running it. Nobody needs to read this module to understand SPTEs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

Spte: TypeAlias = Any  # one int, or a uint64 array of any shape
Truth: TypeAlias = Any  # one bool, or a bool array of the same shape

ALL_BITS = 2**64 - 1
SPTE_BASE_ADDR_MASK = 0x000F_FFFF_FFFF_F000
FLAG_BITS = ALL_BITS ^ SPTE_BASE_ADDR_MASK
SPTES_PER_TABLE = 512

BLOCK = 1 << 18  # words of a large array that are worked at a time (measured: benchmarks/spte.py)
MANY_KINDS = 8
SAMPLE = 64


def where(condition: Truth, yes: Spte, no: Spte) -> Spte:
    """Choose ``yes`` or ``no``, word by word: numpy's ``where`` that leaves one int an int."""
    if isinstance(condition, np.ndarray):
        return np.where(condition, yes, no)
    return yes if condition else no


def by_word(formula: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method that transforms one SPTE, and leaves its address alone, take a large array too.

    The SPTEs of a slot are of few kinds: they differ in their addresses, seldom in anything else. So the formula runs
    once for each kind, and what it flips there is flipped in every word of that kind. A block of too many kinds goes
    through the formula as an array. Small arrays always do.
    Raises TypeError for an array that is not uint64 and ValueError for an int outside 0 .. 2**64 - 1.
    """

    @functools.wraps(formula)
    def method(self: Any, spte: Spte, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(spte, np.ndarray):
            if not 0 <= spte <= ALL_BITS:
                raise ValueError(f"an SPTE is 64 bits wide, 0 .. 2**64 - 1; got {spte}")
            return formula(self, spte, *args, **kwargs)
        if spte.dtype != np.uint64:
            raise TypeError(f"an array of SPTEs has dtype uint64; got {spte.dtype}")
        if spte.size <= SPTES_PER_TABLE:
            return formula(self, spte, *args, **kwargs)
        words = spte.reshape(-1)
        once = functools.cache(lambda kind: formula(self, kind, *args, **kwargs))
        shape = once(0)  # what an answer looks like: a word, or a named tuple of a word and truths
        outs = [np.empty(words.size, np.uint64), *(np.empty(words.size, bool) for _ in columns(shape)[1:])]
        for start in range(0, words.size, BLOCK):
            block, parts = words[start : start + BLOCK], [out[start : start + BLOCK] for out in outs]
            if not (_one_kind(block, parts, once) or _few_kinds(block, parts, once)):
                for part, column in zip(parts, columns(formula(self, block, *args, **kwargs)), strict=True):
                    part[:] = column
        shaped = [out.reshape(spte.shape) for out in outs]
        return type(shape)(*shaped) if isinstance(shape, tuple) else shaped[0]

    return method


def _one_kind(block: Spte, parts: list[Spte], once: Callable[[int], Any]) -> bool:
    """Fill ``parts`` if all words of ``block`` are of one kind; False if they are not."""
    kind = int(block[0]) & FLAG_BITS
    if (block[:SAMPLE] & FLAG_BITS != kind).any():
        return False
    rest = np.bitwise_xor(block, kind, out=parts[0])
    if int(np.bitwise_or.reduce(rest)) & FLAG_BITS:
        return False
    new, *truths = columns(once(kind))
    np.bitwise_xor(rest, new, out=rest)
    for part, truth in zip(parts[1:], truths, strict=True):
        part[:] = truth
    return True


def _few_kinds(block: Spte, parts: list[Spte], once: Callable[[int], Any]) -> bool:
    """Fill ``parts`` kind by kind; False if there are more than MANY_KINDS."""
    flags, left = block & FLAG_BITS, np.ones(block.size, bool)
    parts[0][:] = block
    for part in parts[1:]:
        part[:] = False
    for _ in range(MANY_KINDS):
        kind = int(flags[left.argmax()])
        found = flags == kind
        new, *truths = columns(once(kind))
        if new != kind:
            parts[0] ^= np.multiply(found, np.uint64(new ^ kind))
        for part, truth in zip(parts[1:], truths, strict=True):
            if truth:
                part |= found
        left ^= found
        if not left.any():
            return True
    return False


def columns(answer: Any) -> tuple[Any, ...]:
    """A helper's answer as a tuple: the new SPTE first, then what it says about it."""
    return answer if isinstance(answer, tuple) else (answer,)
