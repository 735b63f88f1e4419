"""From event to event: what each tells of its page, with what is known of it from those before."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kvmbook.model import PAGE_SHIFT, PG_LEVEL_4K, Hardware, Kernel
from kvmbook.real import traced_sptes as words
from kvmbook.real.judging import RING_INDEX, Disagreement, Flushes, Judge, ring_sum
from kvmbook.real.tracepoints import Traced, Unread

MOST_ROOTS = 16  # of which values are remembered
PFERR_PRESENT, PFERR_WRITE, PFERR_FETCH = 1 << 0, 1 << 1, 1 << 4


class Step(NamedTuple):
    """What one line tells. ``gfn`` is None where the event does not say it; ``level``, ``old`` and ``new`` where it is
    about no SPTE, or does not tell."""

    line: int
    time: float
    task: str
    event: str
    gfn: int | None
    level: int | None
    old: int | None
    new: int | None
    says: str


# ---- what is known of entries ----------------------------------------------------------------------------------------


class Entries:
    """The values that entries had last. In the TDP MMU, by gfn and level: one for each root that has one. In the legacy MMU,
    by the entry's address: its gfn and what was made of it."""

    def __init__(self, not_kvms: int) -> None:
        """``not_kvms``: bits that may be set without an event."""
        self._not_kvms = not_kvms
        self._known: dict[tuple[int, int], list[int]] = {}
        self._made: dict[int, tuple[int, int]] = {}

    def forget(self) -> None:
        self._known.clear()
        self._made.clear()

    def has(self, entry: tuple[int, int], spte: int) -> bool:
        return spte in self._known.get(entry, ())

    def make(self, at: int, gfn: int, spte: int) -> int | None:
        """Note what was made of the legacy MMU's entry ``at``; what it was for the same gfn, None if that is not known."""
        last_gfn, last = self._made.get(at, (None, 0))
        self._made[at] = gfn, spte
        return last if last_gfn == gfn else None

    def follow(self, entry: tuple[int, int], old: int, new: int) -> list[int] | None:
        """Put ``new`` in the place of ``old`` among the known values. None if ``old`` was one of them; else those that map
        something."""
        values, empty = self._known.setdefault(entry, []), words.is_empty(old)
        for place, value in enumerate(values):
            by_hardware = value | self._not_kvms == old | self._not_kvms and value & old == value
            if by_hardware or (empty and words.is_empty(value)):
                values[place] = new
                return None
        self._known[entry] = [*values[-MOST_ROOTS:], new]
        return [value for value in values if not words.is_empty(value)]


# ---- event by event --------------------------------------------------------------------------------------------------


class Replayer:
    """Goes through the events. ``steps``: what they tell, in the trace's order; ``disagreements``; ``torn``: events that
    contradict themselves. ``slots``: the base_gfn of each memslot id. `take` each, then `settle`."""

    def __init__(self, hardware: Hardware, kernel: Kernel, slots: dict[int, int]) -> None:
        self.steps: list[Step] = []
        self.disagreements: list[Disagreement] = []
        self.torn: list[Unread] = []
        self._hardware, self._slots = hardware, slots
        self._judge, self._flushes = Judge(hardware, kernel), Flushes()
        self._fmt = self._judge.fmt
        self._words, self._entries = words.Words(self._fmt), Entries(self._judge.not_kvms)
        self._faults: dict[str, int] = {}  # the last error code of each task, in PFERR_* bits
        self._rings: dict[int, int] = {}  # where each ring's next entry goes

    def take(self, event: Traced) -> None:
        """One event."""
        HANDLERS[event.name](self, event)

    def forget(self) -> None:
        """Events are missing, or all tables are new: what was known need not be so any more."""
        self._entries.forget()
        self._flushes.forget()
        self._rings.clear()

    def settle(self) -> int:
        """At the end of the trace: disagree with what has had no flush. Returns how many changes need one, in a trace that
        tells of none."""
        unpaid = self._flushes.unpaid()
        self.disagreements += unpaid if self._flushes.seen else []
        self.disagreements.sort(key=lambda found: found.line)
        return 0 if self._flushes.seen else len(unpaid)

    def _tell(
        self,
        event: Traced,
        says: str,
        gfn: int | None = None,
        level: int | None = None,
        old: int | None = None,
        new: int | None = None,
    ) -> None:
        self.steps.append(Step(event.line, event.time, event.task, event.name, gfn, level, old, new, says))

    def _disagree(self, event: Traced, gfn: int | None, *all_said: str) -> None:
        """With what is said, if anything is."""
        self.disagreements += [Disagreement(event.line, gfn, said) for said in all_said if said]

    # ---- the SPTEs' events ------------------------------------------------------------------------------------------

    def kvm_mmu_set_spte(self, event: Traced) -> None:
        gfn, new, rights, level, at = (event.fields[name] for name in ("gfn", "new", "rights", "level", "at"))
        if ("w" in rights) != self._fmt.is_writable_pte(new):
            self.torn.append(Unread(event.line, f"kvm_mmu_set_spte: says ({rights}) of spte {new:#x}"))
            return
        self._disagree(event, gfn, self._judge.word(new, level))
        says = self._words.state(new, level)
        if self._entries.has((gfn, level), new):  # the TDP MMU has told of the change itself
            self._tell(event, says, gfn, level, None, new)
            return
        was = self._entries.make(at, gfn, new)
        between = self._between(was, new, self._faults.pop(event.task, None), level)
        self._tell(event, says + between, gfn, level, was, new)

    def _between(self, was: int | None, new: int, code: int | None, level: int) -> str:
        """What must have happened to an entry of the legacy MMU since an event said that it was made."""
        fault = "" if code is None else f"{_kind(code)} fault"
        if was is None:
            return f" ({fault})" * bool(fault)
        if words.frame(was) != words.frame(new):
            return f" ({fault or 'another frame'}; it was zapped unseen)"
        if code is None:
            return ", as before" if was == new else f" ({self._words.change(was, new, level)})"
        unseen = ""
        if not code & PFERR_PRESENT:
            unseen = "; it was zapped or aged unseen" if self._fmt.shadow_acc_track_mask else "; it was zapped unseen"
        elif code & PFERR_WRITE and self._fmt.is_writable_pte(was):
            unseen = "; it was write-protected unseen"
        return f" ({fault}{unseen})"

    def kvm_tdp_mmu_spte_changed(self, event: Traced) -> None:
        fields = event.fields
        gfn, old, new, level = fields["gfn"], fields["old"], fields["new"], fields["level"]
        entry = gfn | fields["as_id"] << 60, level
        self._disagree(event, gfn, self._judge.word(new, level))
        says = self._words.change(old, new, level)
        self._tell(event, says + self._follows(event, entry, gfn, old, new), gfn, level, old, new)
        was_leaf, is_leaf = (words.maps_page(self._fmt, spte, level) for spte in (old, new))
        if was_leaf and is_leaf:
            self._disagree(event, gfn, self._judge.in_place(old, new))
            if self._fmt.is_mmu_writable_spte(old) and not self._fmt.is_mmu_writable_spte(new):
                self._flushes.drop(event.line, gfn)
        elif was_leaf and words.is_empty(new):
            self._flushes.zap(event.line, entry, old)
        elif is_leaf:
            self._flushes.map(event.line, entry, gfn, new)

    def _follows(self, event: Traced, entry: tuple[int, int], gfn: int, old: int, new: int) -> str:
        """A remark if ``old`` is no value that the entry is known to have had."""
        known = self._entries.follow(entry, old, new)
        if known is None or words.is_empty(old):
            return ""
        self._disagree(event, gfn, self._judge.word(old, entry[1]))
        if not known:
            return ""
        return f" (was {self._words.state(known[-1], entry[1])} when last seen: changed unseen, or another root's)"

    def fast_page_fault(self, event: Traced) -> None:
        address, old, new = (event.fields[name] for name in ("address", "old", "new"))
        gfn, kind = address >> PAGE_SHIFT, _kind_of_flags(event.fields["error_code"])
        fixed, spurious = event.fields["fixed"], event.fields["spurious"]
        level = PG_LEVEL_4K + self._fmt.is_large_pte(old)  # or a 1G page: the event does not say
        base = gfn & -(1 << 9 * (level - 1))
        how = "fixed" if fixed else "spurious" if spurious else "left to the slow path"
        says = f"fast {kind} fault, {how}: {self._words.change(old, new, level) if fixed else self._words.state(old, level)}"
        if fixed:
            self._disagree(event, gfn, self._judge.word(new, level))
            says += self._follows(event, (base, level), gfn, old, new)
            if self._fmt.is_shadow_present_pte(old) and self._fmt.is_shadow_present_pte(new):
                self._disagree(event, gfn, self._judge.in_place(old, new))
            self._disagree(event, gfn, self._judge.fast_fault(kind, old, new))
        self._tell(event, says, gfn, level, old, new)

    def kvm_mmu_split_huge_page(self, event: Traced) -> None:
        gfn, old, level, error = (event.fields[name] for name in ("gfn", "old", "level", "errno"))
        says = "split into 512" if error == 0 else f"not split: error {error}"
        self._tell(event, f"{self._words.state(old, level)}: {says}", gfn, level, old)

    # ---- faults and tables ------------------------------------------------------------------------------------------

    def kvm_page_fault(self, event: Traced) -> None:
        """Of an EPT violation, the exit qualification is printed: bit 0 read, 1 write, 2 fetch; 3 to 5 what was allowed."""
        code, address = event.fields["error_code"], event.fields["address"]
        if not self._hardware.tdp:
            self._faults[event.task] = code
            self._tell(event, f"{_kind(code)} fault at guest-virtual {address:#x}")
            return
        if self._fmt.shadow_acc_track_mask:
            code = PFERR_PRESENT * (code >> 3 & 7 != 0) | PFERR_WRITE * (code >> 1 & 1) | PFERR_FETCH * (code >> 2 & 1)
        self._faults[event.task] = code
        allowed = "something" if code & PFERR_PRESENT else "nothing"
        self._tell(event, f"{_kind(code)} fault, where {allowed} was allowed", address >> PAGE_SHIFT)

    def kvm_mmu_pagetable_walk(self, event: Traced) -> None:
        """KVM walks the guest's tables: no step of a page, but with shadow paging it tells the fault's error code."""
        if not self._hardware.tdp:
            self._faults[event.task] = event.fields["error_code"]

    def kvm_mmu_spte_requested(self, event: Traced) -> None:
        gfn, pfn, level = (event.fields[name] for name in ("gfn", "pfn", "level"))
        self._tell(event, f"a fault asks for frame {pfn:#x} as {words.SIZES.get(level, level)}", gfn, level)

    def mark_mmio_spte(self, event: Traced) -> None:
        self._tell(event, "no memory here: MMIO is remembered", event.fields["gfn"])

    def kvm_mmu_prepare_zap_page(self, event: Traced) -> None:
        """A table goes, and the leaves in it. Which entries were its own cannot be told, so no page's history ends here."""
        gfn = event.fields["gfn"]
        level = event.fields["level"] if "level" in event.fields else event.fields["role"] & 15
        self._tell(event, f"a table of level {level} goes, of gfn {gfn:#x} on")

    def kvm_mmu_zap_all_fast(self, event: Traced) -> None:
        self.forget()
        self._tell(event, "all tables are obsolete")

    # ---- the host, the rings, the flushes ---------------------------------------------------------------------------

    def kvm_age_page(self, event: Traced) -> None:
        self._tell(event, f"aged: it was {event.fields['young'].lower()}", event.fields["gfn"])

    def notifier(self, event: Traced) -> None:
        """The host's ranges are user addresses: which gfns lie there the events do not say."""
        start = event.fields["start"]
        size = max(0, event.fields.get("end", start + (1 << PAGE_SHIFT)) - start) >> PAGE_SHIFT
        self._tell(event, f"{NOTIFIERS[event.name]} {size:,} page(s) from user address {start:#x}")

    def ring(self, event: Traced) -> None:
        ring, dirty, reset, used = (event.fields[name] for name in ("ring", "dirty", "reset", "used"))
        self._disagree(event, None, ring_sum(ring, dirty, reset, used))
        before, pushed = self._rings.get(ring), event.name == "kvm_dirty_ring_push"
        self._rings[ring] = dirty
        lost = ""
        if before is not None and dirty != (before + pushed) & RING_INDEX:
            lost = "; not where it was: pushes are missing in the trace, or it is another VM's"
        if not pushed:
            self._tell(event, f"ring {ring} is reset up to {reset:#x}, {used} left{lost}")
            return
        slot, offset = event.fields["slot"], event.fields["offset"]
        base = self._slots.get(slot)
        says = f"dirty: page {offset:#x} of slot {slot & 0xFFFF} goes to ring {ring}, {used} used{lost}"
        self._tell(event, says, None if base is None else base + offset)

    def kvm_dirty_ring_exit(self, event: Traced) -> None:
        self._tell(event, f"vCPU {event.fields['vcpu']} leaves: its ring is soft-full")

    def kvm_flush_remote_tlbs(self, event: Traced) -> None:
        self._flushes.flush()
        self._tell(event, "all TLBs are flushed")


NOTIFIERS = {
    "kvm_age_hva": "the host ages",
    "kvm_test_age_hva": "the host asks for the age of",
    "kvm_unmap_hva_range": "the host takes away",
    "kvm_set_spte_hva": "the host changes the frame of",
}
HANDLERS: dict[str, Callable[[Replayer, Traced], None]] = {
    **{name: Replayer.notifier for name in NOTIFIERS},
    "kvm_dirty_ring_push": Replayer.ring,
    "kvm_dirty_ring_reset": Replayer.ring,
    **{
        handler.__name__: handler
        for handler in (
            Replayer.kvm_mmu_set_spte, Replayer.kvm_tdp_mmu_spte_changed, Replayer.fast_page_fault,
            Replayer.kvm_mmu_split_huge_page, Replayer.kvm_page_fault, Replayer.kvm_mmu_pagetable_walk,
            Replayer.kvm_mmu_spte_requested, Replayer.mark_mmio_spte, Replayer.kvm_mmu_prepare_zap_page,
            Replayer.kvm_mmu_zap_all_fast, Replayer.kvm_age_page, Replayer.kvm_dirty_ring_exit,
            Replayer.kvm_flush_remote_tlbs,
        )
    },
}  # fmt: skip


def _kind(code: int) -> str:
    """What an error code of PFERR_* bits says was tried."""
    return "write" if code & PFERR_WRITE else "fetch" if code & PFERR_FETCH else "read"


def _kind_of_flags(flags: str) -> str:
    """The same, of one that is printed as "P|W|U"."""
    named = flags.split("|")
    return "write" if "W" in named else "fetch" if "F" in named else "read"
