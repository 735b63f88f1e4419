"""What the SPTEs of a trace say: the state of one and the change between two, in the words of the model's helpers; which
no KVM makes; in which format they are; and what the model's fast path makes of one.

Every answer is about the bits outside the address, so it is found once for each pattern of them, and kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

from kvmbook.model import (
    ALL_BITS,
    PAGE_SHIFT,
    PG_LEVEL_4K,
    PT_PAGE_SIZE_MASK,
    PT_WRITABLE_MASK,
    READ_MASK,
    REMOVED_SPTE,
    SHADOW_ACC_TRACK_SAVED_MASK,
    SPTE_BASE_ADDR_MASK,
    SPTE_MMU_PRESENT_MASK,
    SPTE_TDP_AD_DISABLED_MASK,
    SPTE_TDP_AD_MASK,
    Hardware,
    Kernel,
    SpteFormat,
    Vm,
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


def broken_rule(fmt: SpteFormat, spte: int, level: int = PG_LEVEL_4K) -> str:
    """The first rule that a leaf, or what is not present, breaks, so that no KVM makes it; "" if there is none, or if it is
    a table."""
    is_table = fmt.is_shadow_present_pte(spte) and not fmt.is_last_spte(spte, level)
    return "" if is_table else rule_against(fmt, spte)


def software_bits(fmt: SpteFormat) -> int:
    """Bits 8 and 9 on EPT: what KVM has since v6.13 for A and D where the CPU has none."""
    return 3 << 8 if fmt.shadow_acc_track_mask else 0


def free_bits(fmt: SpteFormat) -> int:
    """The bits that neither hardware nor KVM reads in a leaf."""
    taken = READ_MASK | PT_WRITABLE_MASK | PT_PAGE_SIZE_MASK | SPTE_MMU_PRESENT_MASK | SPTE_BASE_ADDR_MASK | SUPPRESS_VE
    taken |= fmt.shadow_x_mask | fmt.shadow_user_mask | fmt.shadow_accessed_mask | fmt.shadow_dirty_mask
    taken |= fmt.shadow_host_writable_mask | fmt.shadow_mmu_writable_mask | 7 << 3  # 3 to 5: memory type, WT, CD and A
    if fmt.shadow_acc_track_mask:
        taken |= software_bits(fmt) | SPTE_TDP_AD_MASK | SHADOW_ACC_TRACK_SAVED_MASK | fmt.shadow_memtype_mask
    return ALL_BITS ^ taken


def guess_format(patterns: Iterable[int], tdp: bool) -> SpteFormat:
    """The format in which most leaves are legal and fewest free bits are set. ``tdp`` tells NPT from shadow paging, which
    look alike. Without a leaf, NPT or shadow paging."""
    leaves = list(patterns)

    def fits(fmt: SpteFormat) -> tuple[int, int, int]:
        legal = sum(not broken_rule(fmt, spte) for spte in leaves)
        stray = sum((spte & free_bits(fmt)).bit_count() for spte in leaves)
        typed = all(spte & SPTE_TDP_AD_MASK == SPTE_TDP_AD_DISABLED_MASK for spte in leaves)
        return legal, -stray, int(bool(leaves) and typed and not fmt.kvm_ad_enabled)

    choices = FORMATS[:3] if tdp else FORMATS[:2] + FORMATS[3:]
    best: SpteFormat = max(choices[::-1], key=fits)
    return best


def likely_hardware(fmt: SpteFormat, tdp_mmu: bool) -> Hardware:
    """A CPU with this format."""
    return Hardware(fmt, tdp=fmt.name != SpteFormat.shadow().name, tdp_mmu=tdp_mmu)


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


def bits_changed(fmt: SpteFormat, old: int, new: int) -> str:
    """The difference by names: "clears W, sets A and D"."""
    names = {
        "R": READ_MASK, "W": PT_WRITABLE_MASK, "X": fmt.shadow_x_mask, "NX": fmt.shadow_nx_mask,
        "A": fmt.shadow_accessed_mask, "D": fmt.shadow_dirty_mask, "HW": fmt.shadow_host_writable_mask,
        "MW": fmt.shadow_mmu_writable_mask, "saved rights": SHADOW_ACC_TRACK_SAVED_MASK, "the type": SPTE_TDP_AD_MASK,
        "the frame": SPTE_BASE_ADDR_MASK,
    }  # fmt: skip
    said = []
    for verb, bits in (("clears", old & (ALL_BITS ^ new)), ("sets", new & (ALL_BITS ^ old))):
        named = [name for name, mask in names.items() if mask & bits and name != "the frame"]
        said += [f"{verb} {' and '.join(named)}"] * bool(named)
    return ", ".join(said + ["another frame"] * bool((old ^ new) & SPTE_BASE_ADDR_MASK)) or "changes nothing"


def change(fmt: SpteFormat, old: int, new: int, level: int) -> str:
    """What happened between two values of an entry, in words."""
    was, now = state(fmt, old, level), state(fmt, new, level)
    if old == new:
        return f"{now}, as before"
    if maps_page(fmt, old, level) and maps_page(fmt, new, level):
        what = explained(fmt, old, new)
        return f"{now}: {what or bits_changed(fmt, old, new)}"
    if maps_page(fmt, old, level):
        return {"nothing": f"zapped, was {was}", "frozen": f"zapped and frozen, was {was}"}.get(
            now, f"{was}, now {now}"
        )
    return now if is_empty(old) else f"{was}, now {now}"


# ---- the model's fast path -------------------------------------------------------------------------------------------

PROBE_GFN = 0x100


class FastFault(NamedTuple):
    """``said``: what the model's fast path says of the SPTE; ``spte``: what it makes of it, None if the slow path has to."""

    said: str
    spte: int | None


@functools.lru_cache(maxsize=4096)
def fast_fault(hardware: Hardware, kernel: Kernel, spte: int, kind: str) -> FastFault | None:
    """Let the model's own KVM handle a fault of ``kind`` on a page whose SPTE has the bits of ``spte``, frame 0 for its
    address, in a slot that does not log. None if the access does not fault there, or is none for the fast path."""
    vm = Vm(hardware if hardware.tdp else hardware.with_(tdp=True), kernel)  # without TDP: a guest that does not page
    vm.set_user_memory_region(slot=0, base_gfn=PROBE_GFN, npages=1)
    vm.vcpu[0].read(PROBE_GFN)
    vm.vcpu[0].evict(PROBE_GFN)
    found = vm.page_tables.walk(vm.root(False), PROBE_GFN)
    assert found is not None, "the probed page was just read"
    address = found.spte & SPTE_BASE_ADDR_MASK
    vm.page_tables.write(found.sptep, spte & (ALL_BITS ^ PT_PAGE_SIZE_MASK) | address)
    vm.vcpu[0].attempt(kind, PROBE_GFN)
    fault = vm.vcpu[0].fault
    if fault is None or fault.todo[0] != "fast_page_fault":
        return None
    said = fault.fast_page_fault(vm)
    if fault.todo and fault.todo[0] == "kvm_faultin_pfn":
        return FastFault(said, None)
    return FastFault(said, fault.new_spte ^ address | spte & PT_PAGE_SIZE_MASK)


def without_address(spte: int) -> int:
    """The bits that a `fast_fault` is asked about."""
    return spte & (ALL_BITS ^ SPTE_BASE_ADDR_MASK)


def frame(spte: int) -> int:
    """Its host frame's number."""
    return (spte & SPTE_BASE_ADDR_MASK) >> PAGE_SHIFT
