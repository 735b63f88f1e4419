"""What the SPTEs of a trace say: the state of one and the change between two, in the words of the model's helpers; and in
which format they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

from kvmbook.model import (
    ALL_BITS,
    PAGE_SHIFT,
    PG_LEVEL_4K,
    PT_WRITABLE_MASK,
    REMOVED_SPTE,
    SPTE_BASE_ADDR_MASK,
    SPTE_TDP_AD_DISABLED_MASK,
    SPTE_TDP_AD_MASK,
    Hardware,
    SpteFormat,
    changes,
    free_bits,
    rule_against,
)

SUPPRESS_VE = 1 << 63  # since v6.10 set in what maps nothing
SIZES = {1: "4K", 2: "2M", 3: "1G"}
FORMATS = (SpteFormat.ept(ad_bits=False), SpteFormat.ept(), SpteFormat.npt(), SpteFormat.shadow())


# ---- one SPTE --------------------------------------------------------------------------------------------------------


def maps_page(fmt: SpteFormat, spte: int, level: int) -> bool:
    """Whether it is a leaf: not nothing, and no table."""
    return fmt.is_shadow_present_pte(spte) and fmt.is_last_spte(spte, level)


def is_empty(spte: int) -> bool:
    """Whether it maps nothing and says nothing, or is frozen, which is written over with nothing without an event."""
    return spte & (ALL_BITS ^ SUPPRESS_VE) in (0, REMOVED_SPTE)


def state(fmt: SpteFormat, spte: int, level: int) -> str:
    """What the entry is: "writable", "write-protected", "access-tracked", ..."""
    if not fmt.is_shadow_present_pte(spte):
        bare = spte & (ALL_BITS ^ SUPPRESS_VE)
        return {0: "nothing", REMOVED_SPTE: "frozen"}.get(bare) or ("MMIO" if fmt.is_mmio_spte(spte) else "not present")
    if not fmt.is_last_spte(spte, level):
        return "table"
    said = []
    if fmt.is_access_track_spte(spte):
        said += ["access-tracked"] + ["not MMU-writable"] * (not fmt.is_mmu_writable_spte(spte))
    elif fmt.is_writable_pte(spte):
        said += ["writable"] + ["clean"] * (not fmt.is_dirty_spte(spte))
    elif fmt.is_mmu_writable_spte(spte):
        said += ["write-protected"]
    else:
        said += ["not MMU-writable" if spte & fmt.shadow_host_writable_mask else "host read-only"]
    if fmt.spte_ad_enabled(spte) and not fmt.is_accessed_spte(spte):
        said += ["old"]
    return ", ".join(said + [SIZES.get(level, f"level {level}")] * (level > PG_LEVEL_4K))


def without_address(spte: int) -> int:
    """The bits outside the address, on which every answer here depends."""
    return spte & (ALL_BITS ^ SPTE_BASE_ADDR_MASK)


def frame(spte: int) -> int:
    """Its host frame's number."""
    return (spte & SPTE_BASE_ADDR_MASK) >> PAGE_SHIFT


def broken_rule(fmt: SpteFormat, spte: int, level: int = PG_LEVEL_4K) -> str:
    """The first rule that a leaf, or what is not present, breaks, so that no KVM makes it; "" if there is none, or if it is
    a table."""
    is_table = fmt.is_shadow_present_pte(spte) and not fmt.is_last_spte(spte, level)
    return "" if is_table else rule_against(fmt, spte)


def software_bits(fmt: SpteFormat) -> int:
    """Bits 8 and 9 on EPT: what KVM has since v6.13 for A and D where the CPU has none."""
    return 3 << 8 if fmt.shadow_acc_track_mask else 0


# ---- a change --------------------------------------------------------------------------------------------------------


def kvm_helpers(fmt: SpteFormat) -> dict[str, Callable[[int], int]]:
    """What KVM and hardware do to a present leaf, by name, as the model has it."""
    writable, accessed, dirty = PT_WRITABLE_MASK, fmt.spte_shadow_accessed_mask, fmt.spte_shadow_dirty_mask

    def gives_w(spte: int) -> int:
        assert fmt.is_mmu_writable_spte(spte)
        return spte | writable

    def restores(spte: int) -> int:
        assert fmt.is_access_track_spte(spte)
        return fmt.restore_acc_track_spte(spte)

    return {
        "write-protected for logging": lambda spte: fmt.spte_write_protect(spte).spte,
        "write-protected for shadow paging": lambda spte: fmt.spte_write_protect(spte, pt_protect=True).spte,
        "aged": lambda spte: fmt.mmu_spte_age(spte).spte,
        "D cleared": lambda spte: fmt.spte_clear_dirty(spte).spte,
        "restored": restores,
        "restored, and W given back": lambda spte: gives_w(restores(spte)),
        "W given back": gives_w,
        "W given back, dirty": lambda spte: gives_w(spte) | dirty(spte),
        "A set": lambda spte: spte | accessed(spte),
        "D set": lambda spte: spte | dirty(spte),
        "A and D set": lambda spte: spte | accessed(spte) | dirty(spte),
    }


def explained(fmt: SpteFormat, old: int, new: int) -> str:
    """Which helper of the model makes ``new`` of the present leaf ``old``; "" if none does: then a leaf was made anew, or
    more than one thing happened."""
    ignored = 0 if fmt.kvm_ad_enabled else software_bits(fmt)
    for name, helper in kvm_helpers(fmt).items():
        try:
            if helper(old) | ignored == new | ignored:
                return name
        except AssertionError:
            continue
    return ""


def _bits_changed(fmt: SpteFormat, old: int, new: int) -> str:
    """The difference by names: "clears W and sets A"; of the address, whether it is another."""
    moved, said = frame(old) != frame(new), changes(fmt, without_address(old), without_address(new))
    if moved:
        return "another frame" if without_address(old) == without_address(new) else f"{said}, another frame"
    return said


def change(fmt: SpteFormat, old: int, new: int, level: int) -> str:
    """What happened between two values of an entry, in words."""
    was, now = state(fmt, old, level), state(fmt, new, level)
    if old == new:
        return f"{now}, as before"
    if maps_page(fmt, old, level) and maps_page(fmt, new, level):
        what = explained(fmt, old, new)
        return f"{now}: {what or _bits_changed(fmt, old, new)}"
    if maps_page(fmt, old, level):
        return {"nothing": f"zapped, was {was}", "frozen": f"zapped and frozen, was {was}"}.get(
            now, f"{was}, now {now}"
        )
    return now if is_empty(old) else f"{was}, now {now}"


class Words:
    """`state` and `change` for one format, each found once for each pattern of bits outside the address."""

    def __init__(self, fmt: SpteFormat) -> None:
        self._state = functools.cache(functools.partial(state, fmt))
        self._change = functools.cache(functools.partial(change, fmt))

    def state(self, spte: int, level: int) -> str:
        return self._state(_pattern(spte), level)

    def change(self, old: int, new: int, level: int) -> str:
        moved = frame(old) != frame(new) and not is_empty(old) and not is_empty(new)
        return self._change(_pattern(old), _pattern(new) | moved << PAGE_SHIFT, level)


def _pattern(spte: int) -> int:
    """The bits that the words depend on: of a frozen entry also those where others have an address."""
    return spte if is_empty(spte) else without_address(spte)


# ---- the format ------------------------------------------------------------------------------------------------------


def guess_format(patterns: Iterable[int], tdp: bool) -> SpteFormat:
    """The format in which most leaves are legal and fewest free bits are set. ``tdp`` tells NPT from shadow paging, which
    look alike. Without a leaf, NPT or shadow paging."""
    leaves = list(patterns)

    def fits(fmt: SpteFormat) -> tuple[int, int, int]:
        legal = sum(not broken_rule(fmt, spte) for spte in leaves)
        stray = sum((spte & _stray(fmt)).bit_count() for spte in leaves)
        typed = all(spte & SPTE_TDP_AD_MASK == SPTE_TDP_AD_DISABLED_MASK for spte in leaves)
        return legal, -stray, int(bool(leaves) and typed and not fmt.kvm_ad_enabled)

    choices = FORMATS[:3] if tdp else FORMATS[:2] + FORMATS[3:]
    best: SpteFormat = max(choices[::-1], key=fits)
    return best


def _stray(fmt: SpteFormat) -> int:
    """The bits that nobody reads, but for those that releases have for themselves."""
    return free_bits(fmt) & (ALL_BITS ^ SUPPRESS_VE ^ software_bits(fmt))


def likely_hardware(fmt: SpteFormat, tdp_mmu: bool) -> Hardware:
    """A CPU with this format."""
    return Hardware(fmt, tdp=fmt.name != SpteFormat.shadow().name, tdp_mmu=tdp_mmu)
