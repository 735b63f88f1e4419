"""SPTEs in words: the words of their well-known states, made by the model's helpers, and which words no KVM makes."""

from __future__ import annotations

import re
from typing import NamedTuple

from kvmbook.model import (
    REMOVED_SPTE,
    SPTE_TDP_AD_DISABLED_MASK,
    SPTE_TDP_AD_ENABLED_MASK,
    SPTE_TDP_AD_WRPROT_ONLY_MASK,
    SpteFormat,
    free_bits,
    rule_against,
)

PFN, HUGE_PFN = 0x4567, 0x40000


class Leaf(NamedTuple):
    """One kind of leaf: the masks of its host, and the type bits that KVM gives it there."""

    fmt: SpteFormat
    ad_type: int


LEAVES = {
    "EPT without A/D bits": Leaf(SpteFormat.ept(ad_bits=False), SPTE_TDP_AD_DISABLED_MASK),
    "EPT with A/D bits": Leaf(SpteFormat.ept(), SPTE_TDP_AD_ENABLED_MASK),
    "EPT, nested (type 2)": Leaf(SpteFormat.ept(), SPTE_TDP_AD_WRPROT_ONLY_MASK),
    "NPT": Leaf(SpteFormat.npt(), SPTE_TDP_AD_ENABLED_MASK),
    "shadow paging": Leaf(SpteFormat.shadow(), SPTE_TDP_AD_ENABLED_MASK),
}

# ---- well-known words ------------------------------------------------------------------------------------------------


def after_read(fmt: SpteFormat, spte: int) -> int:
    """The SPTE after a read: a tracked one faults and is restored, in another the CPU sets A."""
    if fmt.is_access_track_spte(spte):
        return int(fmt.restore_acc_track_spte(spte))
    return spte | int(fmt.spte_shadow_accessed_mask(spte))


def named_words(leaf: str) -> dict[str, int]:
    """The words of the states that a leaf is met in, made by the model. ``leaf`` is a key of `LEAVES`."""
    fmt, ad_type = LEAVES[leaf]
    fresh = fmt.make_spte(PFN, ad_type=ad_type).spte
    aged = fmt.mmu_spte_age(fresh).spte
    words = {
        "fresh, writable": fresh,
        "aged": aged,
        "aged, then read": after_read(fmt, aged),
        "write-protected for logging": fmt.spte_write_protect(fresh).spte,
        "protected for shadow paging": fmt.spte_write_protect(fresh, pt_protect=True).spte,
        "host read-only": fmt.make_spte(PFN, ad_type=ad_type, host_writable=False).spte,
        "made again over W=1": fmt.make_spte(PFN, ad_type=ad_type, old_spte=fresh).spte,
        "2M page": fmt.make_spte(HUGE_PFN, level=2, ad_type=ad_type).spte,
        "MMIO": fmt.shadow_mmio_value,
        "frozen": REMOVED_SPTE,
        "nothing": 0,
    }
    if fmt.shadow_acc_track_mask and not fmt.spte_ad_need_write_protect(fresh):  # where there can be PML
        words["D cleared for PML"] = fmt.tdp_clear_dirty(fresh).spte
    return words


# ---- what no KVM makes -----------------------------------------------------------------------------------------------


def broken_rule(fmt: SpteFormat, spte: int) -> str:
    """The first rule that the word breaks, so that no KVM makes it; "" if there is none."""
    return without_word(rule_against(fmt, spte))


def legality(fmt: SpteFormat, spte: int) -> str:
    """A sentence if no KVM makes the word, else "". It does not look at free bits."""
    return f"KVM never makes this word: {broken}." if (broken := broken_rule(fmt, spte)) else ""


def stray_bits(fmt: SpteFormat, spte: int) -> str:
    """A sentence if a present SPTE has free bits set, else ""."""
    stray = fmt.is_shadow_present_pte(spte) and spte & free_bits(fmt)
    return "KVM never makes this word: it leaves free bits at 0." if stray else ""


def is_legal(fmt: SpteFormat, spte: int) -> bool:
    """Whether KVM makes such words: no rule is broken, and free bits are 0."""
    return not legality(fmt, spte) and not stray_bits(fmt, spte)


def without_word(said: str) -> str:
    """A model's message without the word, the format and the gfn, which the inspector shows anyway."""
    said = re.sub(r"^gfn 0x0: ", "", said)
    return re.sub(r"SPTE 0x[0-9a-f]{16} \(.*?\) has", "it has", said)
