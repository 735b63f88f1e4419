"""An SPTE in names: what each of its 64 bits is called, in any format, the words of its well-known states, and which words
no KVM makes.

Positions come from the format's masks, words from the model's helpers; only the names stand here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

from kvmbook.model import (
    ALL_BITS,
    PT_PAGE_SIZE_MASK,
    PT_WRITABLE_MASK,
    READ_MASK,
    REMOVED_SPTE,
    SHADOW_ACC_TRACK_SAVED_BITS_SHIFT,
    SPTE_BASE_ADDR_MASK,
    SPTE_MMU_PRESENT_MASK,
    SPTE_TDP_AD_DISABLED_MASK,
    SPTE_TDP_AD_ENABLED_MASK,
    SPTE_TDP_AD_MASK,
    SPTE_TDP_AD_WRPROT_ONLY_MASK,
    SpteFormat,
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

# ---- names -----------------------------------------------------------------------------------------------------------

HARDWARE_READS, KVM_READS, ADDRESS, FREE = "hardware", "KVM", "address", "free"
ABOUT_KINDS = {HARDWARE_READS: "read by hardware", KVM_READS: "read by KVM only", ADDRESS: "the frame", FREE: "free"}


class Field(NamedTuple):
    """Some bits of an SPTE: a long name, a short one, the mask, and who reads them (a key of `ABOUT_KINDS`)."""

    name: str
    short: str
    mask: int
    kind: str

    @property
    def low(self) -> int:
        """The lowest bit's number."""
        return (self.mask & -self.mask).bit_length() - 1

    @property
    def width(self) -> int:
        """How many bits."""
        return self.mask.bit_count()


def _rights(fmt: SpteFormat) -> list[Field]:
    if fmt.shadow_acc_track_mask:
        return [
            Field("read", "R", READ_MASK, HARDWARE_READS),
            Field("write", "W", PT_WRITABLE_MASK, HARDWARE_READS),
            Field("execute", "X", fmt.shadow_x_mask, HARDWARE_READS),
            Field("memory type", "MT", 7 << 3, HARDWARE_READS),
            Field("ignore the guest's memory type", "IP", 1 << 6, HARDWARE_READS),
            Field("suppress #VE", "VE", 1 << 63, HARDWARE_READS),
            Field("saved R", "sR", READ_MASK << SHADOW_ACC_TRACK_SAVED_BITS_SHIFT, KVM_READS),
            Field("saved X", "sX", fmt.shadow_x_mask << SHADOW_ACC_TRACK_SAVED_BITS_SHIFT, KVM_READS),
        ]
    return [
        Field("present", "P", READ_MASK, HARDWARE_READS),
        Field("write", "W", PT_WRITABLE_MASK, HARDWARE_READS),
        Field("user", "U", fmt.shadow_user_mask, HARDWARE_READS),
        Field("write-through", "WT", 1 << 3, HARDWARE_READS),
        Field("cache disable", "CD", 1 << 4, HARDWARE_READS),
        Field("global", "G", 1 << 8, HARDWARE_READS),
        Field("no execute", "NX", fmt.shadow_nx_mask, HARDWARE_READS),
    ]


@functools.cache
def fields(fmt: SpteFormat) -> tuple[Field, ...]:
    """The fields of a format, highest bits first. Each of the 64 bits is in exactly one of them."""
    named = [
        *_rights(fmt),
        Field("page size: large", "PS", PT_PAGE_SIZE_MASK, HARDWARE_READS),
        Field("accessed", "A", fmt.shadow_accessed_mask, HARDWARE_READS),
        Field("dirty", "D", fmt.shadow_dirty_mask, HARDWARE_READS),
        Field("MMU-present", "MP", SPTE_MMU_PRESENT_MASK, KVM_READS),
        Field("address", "pfn", SPTE_BASE_ADDR_MASK, ADDRESS),
        Field("type", "type", SPTE_TDP_AD_MASK, KVM_READS),
        Field("host-writable", "HW", fmt.shadow_host_writable_mask, KVM_READS),
        Field("MMU-writable", "MW", fmt.shadow_mmu_writable_mask, KVM_READS),
    ]
    taken = 0
    for field in named:
        if taken & field.mask:
            raise AssertionError(f"{fmt.name}: {field.name} lies on bits that another field has")
        taken |= field.mask
    free = [Field("free", "", 1 << bit, FREE) for bit in range(64) if (ALL_BITS ^ taken) >> bit & 1]
    return tuple(sorted([field for field in named if field.mask] + free, key=lambda field: -field.low))


@functools.cache
def free_bits(fmt: SpteFormat) -> int:
    """The bits that nobody reads, as one mask."""
    return sum(field.mask for field in fields(fmt) if field.kind == FREE)


def bit_name(fmt: SpteFormat, bit: int) -> str:
    """What bit ``bit`` is called. ValueError outside 0 .. 63."""
    if not 0 <= bit <= 63:
        raise ValueError(f"a word has bits 0 .. 63; got {bit}")
    field = next(field for field in fields(fmt) if field.mask >> bit & 1)
    return field.name if field.width == 1 else f"{field.name}, its bit {bit - field.low}"


def listed(names: Sequence[str]) -> str:
    """Names in words: "a", "a and b", "a, b and c"; "" if there are none."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def changes(fmt: SpteFormat, old: int, new: int) -> str:
    """What differs between two words, by name: "clears R and W, sets saved R"; "changes nothing" if nothing does."""
    said = []
    for verb, bits in (("clears", old & (ALL_BITS ^ new)), ("sets", new & (ALL_BITS ^ old))):
        names = [f.short if f.kind == HARDWARE_READS else f.name for f in reversed(fields(fmt)) if f.mask & bits]
        if names:
            said.append(f"{verb} {listed(names)}")
    return " and ".join(said) or "changes nothing"


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
