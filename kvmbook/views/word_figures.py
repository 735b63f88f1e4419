"""An SPTE as a picture: what each of its 64 bits is called, in any format, the words of its well-known states, and which
words no KVM makes.

Positions come from the format's masks, words from the model's helpers; only the names stand here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import NamedTuple, cast

from kvmbook.arrays import ALL_BITS, SPTE_BASE_ADDR_MASK
from kvmbook.figures import INK, LOOK, LOST, Picture, box, listed, svg, text
from kvmbook.invariants import saved_bits, writable_chain
from kvmbook.machine import Machine
from kvmbook.scenes import spte_state
from kvmbook.spte import (
    PT_PAGE_SIZE_MASK,
    PT_WRITABLE_MASK,
    READ_MASK,
    REMOVED_SPTE,
    SHADOW_ACC_TRACK_SAVED_BITS_SHIFT,
    SHADOW_ACC_TRACK_SAVED_MASK,
    SPTE_MMU_PRESENT_MASK,
    SPTE_TDP_AD_DISABLED_MASK,
    SPTE_TDP_AD_ENABLED_MASK,
    SPTE_TDP_AD_MASK,
    SPTE_TDP_AD_WRPROT_ONLY_MASK,
    SpteFormat,
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
KINDS = {HARDWARE_READS: "#f0e442", KVM_READS: "#b9a7e0", ADDRESS: "none", FREE: "none"}
ABOUT_KINDS = {HARDWARE_READS: "read by hardware", KVM_READS: "read by KVM only", ADDRESS: "the frame", FREE: "free"}


class Field(NamedTuple):
    """Some bits of an SPTE: a long name, a short one, the mask, and who reads them (a key of `KINDS`)."""

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
    if not fmt.is_shadow_present_pte(spte):
        walked = any(fmt.hardware_rights(spte)) and not fmt.is_mmio_spte(spte)
        return "it is not MMU-present, but hardware would use it" if walked else ""
    leaf = SimpleNamespace(fmt=fmt, page_tables=SimpleNamespace(leaves=lambda: [(None, 0, 1, spte)]))
    for invariant in (writable_chain, saved_bits):
        try:
            invariant(cast(Machine, leaf))
        except AssertionError as error:
            return without_word(str(error))
    ad_type = spte & SPTE_TDP_AD_MASK
    if ad_type == SPTE_TDP_AD_MASK:
        return "type 3 does not exist"
    if not fmt.shadow_acc_track_mask and spte & (SPTE_TDP_AD_MASK | SHADOW_ACC_TRACK_SAVED_MASK):
        return "outside EPT the type is always 0, and nothing is ever saved"
    if fmt.shadow_acc_track_mask and not fmt.kvm_ad_enabled and ad_type != SPTE_TDP_AD_DISABLED_MASK:
        return "where KVM has no A/D bits each leaf is of type 1"
    if fmt.shadow_acc_track_mask and spte & (READ_MASK | PT_WRITABLE_MASK) == PT_WRITABLE_MASK:
        return "EPT with W but not R is a misconfiguration"
    if not any(fmt.hardware_rights(spte)) and not fmt.is_access_track_spte(spte):
        return "it grants nothing, and it is not access-tracked"
    return ""


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


# ---- pictures --------------------------------------------------------------------------------------------------------

CELL, LEFT, FRAME_WIDTH = 27, 6, 220
WIDTH = LEFT + 24 * CELL + FRAME_WIDTH + LEFT


def _x(bit: int) -> float:
    """The left edge of a bit's cell. The frame's forty bits, 51 to 12, share one wide box."""
    if bit >= 52:
        return LEFT + (63 - bit) * CELL
    return LEFT + 12 * CELL + FRAME_WIDTH * (bit < 12) + (11 - min(bit, 11)) * CELL


def _cell(field: Field, bit: int, word: int, before: int, y: float) -> list[str]:
    on, flipped = word >> bit & 1, (word ^ before) >> bit & 1
    fill = KINDS[field.kind] if on else "none"
    frame = f' stroke-width="{3 if flipped else 1}"' + ' stroke-dasharray="2 3"' * (field.kind == FREE and not flipped)
    ink = INK if fill != "none" else ""
    return [
        box(_x(bit) + 1, y, CELL - 2, 28, fill, stroke=LOST if flipped else "currentColor", extra=frame),
        text(_x(bit) + CELL / 2, y + 20, str(on), size=17, bold=bool(on), fill=ink),
        *([text(_x(bit) + CELL / 2, y + 42, "▲", size=13, fill=LOST)] if flipped else []),
    ]


def _hex_parts(word: int, y: float) -> list[str]:
    """The sixteen hex digits, each over its four bits; the frame's ten over their box."""
    digits, parts = f"{word:016x}", []
    for number in (0, 1, 2, 13, 14, 15):
        high, middle = 63 - 4 * number, _x(63 - 4 * number) + 2 * CELL
        parts += [
            text(middle, y, digits[number], size=18, bold=True),
            f'<path d="M{_x(high) + 3:g} {y + 11:g}v-5h{4 * CELL - 6:g}v5" fill="none" stroke="currentColor"/>',
        ]
    return [*parts, text(_x(51) + FRAME_WIDTH / 2, y, " ".join(digits[3:13]), size=18, bold=True)]


def _word_parts(fmt: SpteFormat, label: str, word: int, before: int, y: float) -> list[str]:
    """One word: its label and state, its hex digits, and its bits; those that differ from ``before`` are framed."""
    state = spte_state(fmt, word)
    fill, wide = LOOK[state][0], 24 + 8.2 * len(state)
    parts = [
        text(LEFT, y + 17, label, size=15, bold=True, anchor="start"),
        box(WIDTH - LEFT - wide, y, wide, 23, fill),
        text(WIDTH - LEFT - wide / 2, y + 16, state, bold=True, fill=INK if fill != "none" else ""),
        *_hex_parts(word, y + 40),
    ]
    for field in fields(fmt):
        for bit in range(field.low, field.low + field.width):
            if field.kind != ADDRESS:
                parts += _cell(field, bit, word, before, y + 54)
    said = f"pfn {fmt.pfn(word):#x}"
    return [*parts, box(_x(51) + 1, y + 54, FRAME_WIDTH - 2, 28, "none"), text(_x(51) + FRAME_WIDTH / 2, y + 73, said)]


def _names_parts(fmt: SpteFormat, y: float) -> list[str]:
    """Bit numbers, and under them the short names with a bar in the kind's colour."""
    parts = [text(_x(51) + FRAME_WIDTH / 2, y + 12, "51 … 12", size=13)]
    for field in fields(fmt):
        left = _x(field.low + field.width - 1)
        width = FRAME_WIDTH if field.kind == ADDRESS else field.width * CELL
        if field.kind != ADDRESS:
            parts += [
                text(_x(bit) + CELL / 2, y + 12, str(bit), size=13) for bit in range(field.low, field.low + field.width)
            ]
        if field.kind in (HARDWARE_READS, KVM_READS):
            parts.append(box(left + 1, y + 18, width - 2, 22, KINDS[field.kind]))
        said = "address of the page" if field.kind == ADDRESS else field.short
        said = field.name if field.kind != ADDRESS and 8 * len(field.name) < width else said
        ink = INK if field.kind in (HARDWARE_READS, KVM_READS) else ""
        parts.append(text(left + width / 2, y + 34, said, size=13, bold=len(said) != 2, fill=ink))
    return parts


def _legend(y: float, differs_from: str) -> list[str]:
    parts, x = [], float(LEFT)
    for kind in (HARDWARE_READS, KVM_READS):
        parts += [box(x, y, 18, 18, KINDS[kind]), text(x + 26, y + 14, ABOUT_KINDS[kind], anchor="start")]
        x += 190
    if differs_from:
        parts += [box(x, y, 18, 18, "none", stroke=LOST, extra=' stroke-width="3"')]
        parts.append(text(x + 26, y + 14, f"▲ differs from {differs_from}", anchor="start"))
    return parts


def words_picture(fmt: SpteFormat, words: Mapping[str, int], against_first: bool = False) -> Picture:
    """Words under each other, each under its label: hex digits over bits, names at the foot. What differs from the word above
    is framed, or with ``against_first`` what differs from the first."""
    parts: list[str] = []
    before = next(iter(words.values()))
    for number, (label, word) in enumerate(words.items()):
        parts += _word_parts(fmt, label, word, before, 4 + 106 * number)
        before = before if against_first else word
    foot = 106 * len(words) - (2 if len(words) == 1 else -4)
    against = "the first word" if against_first else "the word above"
    parts += [*_names_parts(fmt, foot), *_legend(foot + 50, against * (len(words) > 1))]
    told = [f"{label}: {word:016x}, {spte_state(fmt, word)}" for label, word in words.items()]
    alt = f"{fmt.name}. {'; '.join(told)}"
    return Picture(svg(WIDTH, foot + 74, alt, parts), alt)


def formats_picture(formats: Mapping[str, SpteFormat]) -> Picture:
    """The names of the bits in several formats, under each other."""
    parts: list[str] = []
    for number, (label, fmt) in enumerate(formats.items()):
        parts.append(text(LEFT, 20 + 78 * number, label, size=15, bold=True, anchor="start"))
        parts += _names_parts(fmt, 26 + 78 * number)
    told = []
    for label, fmt in formats.items():
        names = [f"{f.low} {f.name}" for f in reversed(fields(fmt)) if f.kind in (HARDWARE_READS, KVM_READS)]
        told.append(f"{label}: {', '.join(names)}")
    alt = f"Lowest bit and name of each field. {'. '.join(told)}"
    height = 78 * len(formats) + 8
    return Picture(svg(WIDTH, height + 22, alt, [*parts, *_legend(height, "")]), alt)
