"""SPTE helpers over an array of 2^20 words, as multiples of numpy.copyto of the same array, timed in turns.

"one kind": the SPTEs differ in their addresses only, as after a pass over a slot. "three kinds": fresh, aged and
write-protected ones in random order. "noise": more kinds in a block than are looked up, so the formula runs on the array.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np

from kvmbook import SpteFormat
from kvmbook.model import SPTE_TDP_AD_DISABLED_MASK, SPTE_TDP_AD_ENABLED_MASK

WORDS, ROUNDS = 1 << 20, 41


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def arrays(fmt: SpteFormat) -> dict[str, np.ndarray]:
    ad_type = SPTE_TDP_AD_ENABLED_MASK if fmt.kvm_ad_enabled else SPTE_TDP_AD_DISABLED_MASK
    fresh = fmt.make_spte(0, ad_type=ad_type).spte
    kinds = [fresh, fmt.mark_spte_for_access_track(fresh), fmt.spte_write_protect(fresh).spte]
    rng = np.random.default_rng(1)
    pfns = rng.integers(0, 1 << 36, WORDS, dtype=np.uint64) << np.uint64(12)
    noise = rng.choice(kinds, WORDS).astype(np.uint64) | rng.integers(0, 1 << 6, WORDS, dtype=np.uint64) << np.uint64(
        59
    )
    return {
        "one kind": pfns | fresh,
        "three kinds": pfns | rng.choice(kinds, WORDS).astype(np.uint64),
        "noise": pfns | noise,
    }


def main() -> None:
    print(f"{'helper / copyto':34}{'one kind':>12}{'three kinds':>14}{'noise':>10}")
    for fmt in (SpteFormat.ept(ad_bits=False), SpteFormat.ept()):
        clear = fmt.spte_clear_dirty if fmt.kvm_ad_enabled else fmt.spte_wrprot_for_clear_dirty
        helpers = {
            "mark_spte_for_access_track": fmt.mark_spte_for_access_track,
            "restore_acc_track_spte": fmt.restore_acc_track_spte,
            "spte_write_protect": fmt.spte_write_protect,
            clear.__name__: clear,
        }
        print(fmt.name)
        for name, helper in helpers.items():
            ratios = []
            for words in arrays(fmt).values():
                copy = np.empty_like(words)
                pairs = [
                    (timed(lambda h=helper, w=words: h(w)), timed(lambda c=copy, w=words: np.copyto(c, w)))
                    for _ in range(ROUNDS)
                ]
                ratios.append(statistics.median(a for a, _ in pairs) / statistics.median(b for _, b in pairs))
            print(f"  {name:32}{ratios[0]:12.1f}{ratios[1]:14.1f}{ratios[2]:10.1f}")


if __name__ == "__main__":
    main()
