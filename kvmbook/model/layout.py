"""An SPTE's 64 bits by name, in any format: what each is called, who reads it, and what differs between two words.

Positions come from the format's masks; only the names stand here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from kvmbook.model.arrays import ALL_BITS, SPTE_BASE_ADDR_MASK
from kvmbook.model.spte import (
    PT_PAGE_SIZE_MASK,
    PT_WRITABLE_MASK,
    READ_MASK,
    SHADOW_ACC_TRACK_SAVED_BITS_SHIFT,
    SPTE_MMU_PRESENT_MASK,
    SPTE_TDP_AD_MASK,
    SpteFormat,
)

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
