"""SPTE helpers over an array of 2^20 words, as multiples of numpy.copyto of the same array, timed in turns.

"one kind": the SPTEs differ in their addresses only, as after a pass over a slot. "three kinds": fresh, aged and
write-protected ones in random order. "noise": more kinds in a block than are looked up one by one. Compiled by numba where
it is installed, and by kind, as where it is not.
"""

from collections.abc import Callable
from unittest.mock import patch

import numpy as np

from benchmarks import report
from benchmarks.report import timed
from kvmbook import SpteFormat
from kvmbook.model import SPTE_TDP_AD_DISABLED_MASK, SPTE_TDP_AD_ENABLED_MASK, each, numba_is_there

WORDS, ROUNDS = 1 << 20, 41


def arrays(fmt: SpteFormat) -> dict[str, np.ndarray]:
    ad_type = SPTE_TDP_AD_ENABLED_MASK if fmt.kvm_ad_enabled else SPTE_TDP_AD_DISABLED_MASK
    fresh = fmt.make_spte(0, ad_type=ad_type).spte
    kinds = [fresh, fmt.mark_spte_for_access_track(fresh), fmt.spte_write_protect(fresh).spte]
    rng = np.random.default_rng(1)
    pfns = rng.integers(0, 1 << 36, WORDS, dtype=np.uint64) << np.uint64(12)
    bits = rng.integers(0, 1 << 6, WORDS, dtype=np.uint64) << np.uint64(59)
    mixed = pfns | rng.choice(np.array(kinds, np.uint64), WORDS)
    return {"one kind": pfns | np.uint64(fresh), "three kinds": mixed, "noise": mixed | bits}


def ratio(helper: Callable[..., object], words: np.ndarray) -> float:
    copy = np.empty_like(words)
    each(helper, words)  # compiles
    pairs = [(timed(lambda: each(helper, words)), timed(lambda: np.copyto(copy, words))) for _ in range(ROUNDS)]
    return report.ratio(pairs)


def measure() -> str:
    """A table of ratios, in Markdown."""
    ways = ["with numba", "without"] if numba_is_there() else ["without"]
    head = [
        "helper, as a multiple of copyto",
        *(f"{way}: {kinds}" for way in ways for kinds in ("one kind", "three", "noise")),
    ]
    rows = []
    for fmt in (SpteFormat.ept(ad_bits=False), SpteFormat.ept()):
        clear = fmt.spte_clear_dirty if fmt.kvm_ad_enabled else fmt.spte_wrprot_for_clear_dirty
        aged = fmt.mark_spte_for_access_track, fmt.restore_acc_track_spte, fmt.mmu_spte_age
        for helper in (*aged, fmt.spte_write_protect, clear):
            report.progress(f"{helper.__name__}, {fmt.name}")
            row = [f"`{helper.__name__}`, {fmt.name}"]
            for way in ways:
                with patch("kvmbook.model.compiled.numba_is_there", lambda way=way: way == "with numba"):
                    row += [f"{ratio(helper, words):.1f}" for words in arrays(fmt).values()]
            rows.append(row)
    return report.table(head, rows)


if __name__ == "__main__":
    print(measure())
