"""What must hold in a VM, stated once. The property tests assert all of it after every step.

`check` names the first broken promise. The last three concern the log, and only for slots whose log user space relies on;
they are what the seed bug breaks. While an operation is in flight, only what no kernel may break for a moment is asked.
"""

from __future__ import annotations

from collections.abc import Callable

from kvmbook.model.machine import Machine
from kvmbook.model.memslots import MemorySlot
from kvmbook.model.spte import (
    EPT_RWX_MASK,
    PG_LEVEL_4K,
    PT_WRITABLE_MASK,
    READ_MASK,
    SHADOW_ACC_TRACK_SAVED_MASK,
    SPTE_TDP_AD_DISABLED_MASK,
    SPTE_TDP_AD_MASK,
    SpteFormat,
    pages_per_level,
)


def check_leaf(fmt: SpteFormat, gfn: int, spte: int) -> None:
    """W needs MMU-writable, and MMU-writable needs host-writable. Saved R and X bits are found only in a type-1 SPTE with
    R = W = X = 0."""
    fmt.check_spte_writable_invariants(spte)
    if fmt.shadow_acc_track_mask and spte & SHADOW_ACC_TRACK_SAVED_MASK:
        assert not fmt.spte_ad_enabled(spte), f"gfn {gfn:#x}: saved R/X bits in an SPTE that has A/D bits"
        assert not spte & EPT_RWX_MASK, f"gfn {gfn:#x}: saved R/X bits in an accessible SPTE"


def rule_against(fmt: SpteFormat, spte: int) -> str:
    """The first rule that a leaf, or what is not present, breaks, so that no KVM makes it; "" if there is none."""
    if not fmt.is_shadow_present_pte(spte):
        walked = any(fmt.hardware_rights(spte)) and not fmt.is_mmio_spte(spte)
        return "it is not MMU-present, but hardware would use it" if walked else ""
    try:
        check_leaf(fmt, 0, spte)
    except AssertionError as error:
        return str(error).removeprefix("gfn 0x0: ")
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


def leaves_are_legal(m: Machine) -> None:
    """See `check_leaf`."""
    for _, _, gfn, spte in m.page_tables.every_leaf():
        check_leaf(m.fmt, gfn, spte)


def key_invariant(m: Machine) -> None:
    """If some TLB lets a CPU write a gfn, the gfn's SPTE is MMU-writable, or its zapper has yet to flush."""
    owed = any(op.lock == "write" or op.needs_slots_lock for op in m.in_flight)
    for vcpu in m.vcpus if not owed else ():
        for root, gfn, entry in vcpu.tlb.writable():
            pages, mapped = pages_per_level(entry.level), 0
            for _, table, first, spte in m.page_tables.every_leaf(gfn, gfn + pages):
                if table.root.name == root:
                    mapped += min(pages, pages_per_level(table.level))
                    assert m.fmt.is_mmu_writable_spte(spte), (
                        f"{vcpu.name} may write gfn {first:#x}, but its SPTE {spte:#018x} is not MMU-writable"
                    )
            assert mapped == pages, f"{vcpu.name} may write gfn {gfn:#x}, but it was zapped: no flush"


def no_write_is_lost(m: Machine) -> None:
    """Every page written since its last report is in a bitmap, a ring or a PML buffer."""
    for slot in logged_slots(m):
        for gfn in sorted(m.written):
            if gfn in slot:
                assert m.knows_of_write(slot, gfn), f"gfn {gfn:#x} was written, and no report will ever say so"


def writable_means_marked(m: Machine) -> None:
    """In a slot that logs, a leaf that lets the guest write without a trace is marked: W=1 where W tells, D=1 where D does.
    Of a writable leaf above 4K each page is marked, as enabling leaves it with INITIALLY_SET."""
    for slot in logged_slots(m):
        for _, table, gfn, spte in m.page_tables.every_leaf(slot.base_gfn, slot.end_gfn):
            by_d = m.hardware.pml_entries and not m.fmt.spte_ad_need_write_protect(spte) and table.level == PG_LEVEL_4K
            if m.fmt.is_writable_pte(spte) and (not by_d or spte & m.fmt.shadow_dirty_mask):
                pages = range(gfn, gfn + pages_per_level(table.level))
                unseen = next((page for page in pages if page in slot and not m.knows_of_write(slot, page)), None)
                assert unseen is None, f"gfn {unseen:#x}: SPTE {spte:#018x} allows writes, and it is not marked"


def no_tlb_writes_unseen(m: Machine) -> None:
    """In a slot that logs, no TLB entry lets a CPU write a page that is not marked."""
    for slot in logged_slots(m):
        for vcpu in m.vcpus:
            for _, gfn, entry in vcpu.tlb.writable():
                for page in range(max(gfn, slot.base_gfn), min(gfn + pages_per_level(entry.level), slot.end_gfn)):
                    assert not entry.dirty or m.knows_of_write(slot, page), (
                        f"{vcpu.name}'s TLB lets it write gfn {page:#x}, and no report will say so"
                    )


def logged_slots(m: Machine) -> list[MemorySlot]:
    """The slots of the vCPUs' address space whose log user space relies on; none while a slot or log operation is under
    way."""
    if any(op.needs_slots_lock for op in m.in_flight):
        return []
    return [m.memslots.slots[key] for key in sorted(m.watched) if key[0] == 0]


INVARIANTS: tuple[Callable[[Machine], None], ...] = (
    leaves_are_legal,
    key_invariant,
    writable_means_marked,
    no_tlb_writes_unseen,
    no_write_is_lost,
)


def check(m: Machine) -> None:
    """Raise AssertionError if an invariant does not hold; the message says which, where and why."""
    for invariant in INVARIANTS:
        invariant(m)
