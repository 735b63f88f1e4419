"""What can be asked of an SPTE, and done to it, in words: each helper's answer, what the entry is, and the operations.

Every answer is a function of a format and one word, and runs the model; the inspector makes tables of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvmbook.model import SPTE_TDP_AD_MASK, SPTE_TDP_AD_WRPROT_ONLY_MASK, SpteFormat, changes
from kvmbook.scenes.words import legality, stray_bits, without_word

Says = Callable[[SpteFormat, int], Any]
Operate = Callable[[SpteFormat, int], tuple[int, str]]  # the new word, and what else is to be said

# ---- what is asked ---------------------------------------------------------------------------------------------------

NOT_ASKED = "not asked"
ANY_WORD = ("is_shadow_present_pte", "is_removed_spte", "is_mmio_spte")  # the others take a present SPTE for granted
HELPERS = (
    *ANY_WORD,
    "is_writable_pte",
    "is_mmu_writable_spte",
    "is_executable_pte",
    "is_large_pte",
    "spte_ad_enabled",
    "spte_ad_need_write_protect",
    "is_access_track_spte",
    "is_accessed_spte",
    "is_dirty_spte",
    "spte_has_volatile_bits",
    "spte_shadow_accessed_mask",
    "spte_shadow_dirty_mask",
)


def helper_says(name: str) -> Says:
    """What the helper ``name`` answers: "yes", "no", a mask, or "not asked" of an SPTE that is not present."""

    def ask(fmt: SpteFormat, spte: int) -> str:
        if name not in ANY_WORD and not fmt.is_shadow_present_pte(spte):
            return NOT_ASKED
        answer = getattr(fmt, name)(spte)
        if name.endswith("_mask"):
            return f"bit {answer.bit_length() - 1}" if answer else "none"
        return "yes" if answer else "no"

    return ask


def what_it_is(fmt: SpteFormat, spte: int) -> str:
    """What the entry maps, if anything."""
    if spte == 0:
        return "Nothing is mapped here."
    if fmt.is_removed_spte(spte):
        return "REMOVED_SPTE: the TDP MMU has frozen the entry; other threads keep their hands off."
    if fmt.is_mmio_spte(spte):
        return "An MMIO SPTE: KVM remembers that there is no memory here. It is not MMU-present."
    if not fmt.is_shadow_present_pte(spte):
        return "Not MMU-present: it maps nothing."
    if fmt.is_large_pte(spte):
        return "A large page (2M or 1G), frame {pfn}."
    return "A 4K page (above level 1: a table), frame {pfn}."


def type_in_words(fmt: SpteFormat, spte: int) -> str:
    """What the type bits say about A and D."""
    if not fmt.is_shadow_present_pte(spte):
        return ""
    ad_type = spte & SPTE_TDP_AD_MASK
    if not fmt.spte_ad_enabled(spte):
        return "Type 1: no A/D bits."
    return "Type 2: A/D bits, but logging by W." if ad_type == SPTE_TDP_AD_WRPROT_ONLY_MASK else "Type 0: A/D bits."


def rights_in_words(fmt: SpteFormat, spte: int) -> str:
    """What the guest may do, and whether the page counts as young."""
    if not fmt.is_shadow_present_pte(spte):
        return ""
    names = [name for name, on in zip(("read", "write", "execute"), fmt.hardware_rights(spte), strict=True) if on]
    may = [", ".join(names[:-1]), names[-1]] if names[1:] else names or ["do nothing"]
    return f"The guest may {' and '.join(may)}."


def age_in_words(fmt: SpteFormat, spte: int) -> str:
    """Young or not, dirty or not; "clean" only of a writable one with a D bit: a write would set D first."""
    if not fmt.is_shadow_present_pte(spte):
        return ""
    young = "Young" if fmt.is_accessed_spte(spte) else "Not young"
    clean = fmt.is_writable_pte(spte) and not fmt.is_dirty_spte(spte)
    return (
        f"{young}, {'clean: the first write sets D' if clean else 'dirty' if fmt.is_dirty_spte(spte) else 'not dirty'}."
    )


def why_not_writable(fmt: SpteFormat, spte: int) -> str:
    """Which of the four reasons hold."""
    if not fmt.is_shadow_present_pte(spte) or fmt.is_writable_pte(spte):
        return ""
    if not fmt.is_mmu_writable_spte(spte):
        if spte & fmt.shadow_host_writable_mask:
            reason = "reason 2: KVM does not let this page be written, as a rule for shadow paging or write tracking"
        else:
            reason = "reason 3, the host or the slot is read-only"
        reason += "; also reason 4, access tracking" * bool(fmt.is_access_track_spte(spte))
    elif fmt.is_access_track_spte(spte):
        reason = "reason 4, access tracking; perhaps also 1, dirty logging"
    elif not fmt.spte_ad_enabled(spte):
        reason = "reason 1, dirty logging; or it was aged, then read: the word does not tell"
    else:
        reason = "reason 1, dirty logging"
    return f"Not writable: {reason}."


def what_tlbs_hold(fmt: SpteFormat, spte: int) -> str:
    """What a word that is not writable tells about TLBs."""
    if not fmt.is_shadow_present_pte(spte) or fmt.is_writable_pte(spte):
        return ""
    may = fmt.is_mmu_writable_spte(spte)
    return "MW=1: a TLB may still hold a writable copy." if may else "MW=0: no TLB may hold a writable copy."


VERDICTS = (legality, stray_bits)  # what there is to say of a word that no KVM makes, and all that is said of it
SENTENCES = (*VERDICTS, what_it_is, type_in_words, rights_in_words, age_in_words, why_not_writable, what_tlbs_hold)


# ---- what is done ----------------------------------------------------------------------------------------------------


def _asks(helper: str, **how: bool) -> Operate:
    """An operation whose helper returns a new word and whether it asks for a flush."""

    def operate(fmt: SpteFormat, spte: int) -> tuple[int, str]:
        new, flush = getattr(fmt, helper)(spte, **how)
        return new, "asks for a flush" if flush else "asks for no flush"

    return operate


def _age(fmt: SpteFormat, spte: int) -> tuple[int, str]:
    new, young, pfn_dirty = fmt.mmu_spte_age(spte)
    told = "; it tells the host that the page is dirty" * bool(pfn_dirty)
    return new, f"{'it was young' if young else 'it was not young'}{told}; nobody has flushed"


def _restore(fmt: SpteFormat, spte: int) -> tuple[int, str]:
    if not fmt.is_access_track_spte(spte):
        return spte, "there is nothing to restore: it is not access-tracked"
    return fmt.restore_acc_track_spte(spte), "no flush is needed to give rights back"


# key: (what the button says, the kernel's function, what it does)
OPERATIONS: dict[str, tuple[str, str, Operate]] = {
    "age": ("age it", "mmu_spte_age()", _age),
    "restore": ("restore it (a read faults)", "restore_acc_track_spte()", _restore),
    "protect": ("write-protect for logging", "spte_write_protect(pt_protect=false)", _asks("spte_write_protect")),
    "guard": (
        "write-protect for shadow paging",
        "spte_write_protect(pt_protect=true)",
        _asks("spte_write_protect", pt_protect=True),
    ),
    "clean": ("clear dirty", "__rmap_clear_dirty()", _asks("rmap_clear_dirty")),
}


def operation_does(key: str) -> Says:
    """What the operation flips (a hexadecimal word) and a sentence; nothing if it is refused."""
    _, function, operate = OPERATIONS[key]

    def ask(fmt: SpteFormat, spte: int) -> tuple[str, str]:
        if not fmt.is_shadow_present_pte(spte):
            return "0", f"Refused: {function} is for present leaves."
        try:
            new, said = operate(fmt, spte)
        except AssertionError as error:
            return "0", f"Refused: {without_word(str(error))}."
        return f"{spte ^ new:x}", f"{function} {changes(fmt, spte, new)}; {said}."

    return ask
