"""From event to event: what each tells of its page, and whether the model would have done it."""

from __future__ import annotations

from collections.abc import Callable

from kvmbook.model import ALL_BITS, PAGE_SHIFT, PG_LEVEL_4K, Kernel
from kvmbook.real import traced_sptes as words
from kvmbook.real.told import Disagreement, Replay, Step
from kvmbook.real.tracepoints import Traced, Unread

MOST_ROOTS = 16  # of which values are remembered
PFERR_PRESENT, PFERR_WRITE, PFERR_FETCH = 1 << 0, 1 << 1, 1 << 4


class Replayer:
    """Goes through the events with what is known of each entry.

    ``known``: for each gfn and level the values that its entry had last: one for each root that has one. ``made``: in the
    legacy MMU, by an entry's address, its gfn and what was made of it. ``faults``: the last error code of each task, in
    PFERR_* bits. Since the last flush, ``zapped``: line and frame of leaves, ``dropped``: line and gfn of those whose MW
    went. ``owed``: what needed a flush and had none, if the trace tells of flushes at all."""

    def __init__(self, told: Replay, kernel: Kernel, slots: dict[int, int]) -> None:
        self.told, self.kernel, self.slots = told, kernel, slots
        self.fmt = kernel.spte_format(told.hardware.format)
        self.known: dict[tuple[int, int], list[int]] = {}
        self.made: dict[int, tuple[int, int]] = {}
        self.faults: dict[str, int] = {}
        self.rings: dict[int, tuple[int, int]] = {}
        self.zapped: dict[tuple[int, int], tuple[int, int]] = {}
        self.dropped: list[tuple[int, int]] = []
        self.owed: list[Disagreement] = []
        self.flushes = 0
        # or the fast path, where they are software's
        self._hardware_sets = self.fmt.shadow_accessed_mask | self.fmt.shadow_dirty_mask | words.software_bits(self.fmt)
        self._states: dict[tuple[int, int], str] = {}
        self._changes: dict[tuple[int, int, int, bool], str] = {}
        self._broken: dict[tuple[int, int], str] = {}

    def take(self, event: Traced) -> None:
        """One event."""
        self.told.events[event.name] += 1
        HANDLERS[event.name](self, event)

    def tell(
        self,
        event: Traced,
        says: str,
        gfn: int | None = None,
        level: int | None = None,
        old: int | None = None,
        new: int | None = None,
    ) -> None:
        step = Step(event.line, event.time, event.task, event.name, gfn, level, old, new, says)
        self.told.steps.append(step)
        if gfn is not None:
            self.told.pages[gfn].append(step)

    def disagree(self, line: int, gfn: int | None, says: str) -> None:
        self.told.disagreements.append(Disagreement(line, gfn, says))

    # ---- words, each found once -------------------------------------------------------------------------------------

    def state(self, spte: int, level: int) -> str:
        key = words.without_address(spte), level
        if key not in self._states:
            self._states[key] = words.state(self.fmt, spte, level)
        return self._states[key]

    def change(self, old: int, new: int, level: int) -> str:
        moved = words.frame(old) != words.frame(new)
        key = words.without_address(old), words.without_address(new), level, moved
        if key not in self._changes:
            self._changes[key] = words.change(self.fmt, old, new, level)
        return self._changes[key]

    def judge(self, event: Traced, gfn: int, spte: int, level: int) -> None:
        """Whether KVM makes such a value."""
        key = words.without_address(spte), level
        if key not in self._broken:
            self._broken[key] = words.broken_rule(self.fmt, key[0], level)
        if self._broken[key]:
            self.disagree(event.line, gfn, f"no KVM makes {spte:#x}: {self._broken[key]}")

    # ---- the SPTEs' events ------------------------------------------------------------------------------------------

    def kvm_mmu_set_spte(self, event: Traced) -> None:
        gfn, new, rights, level, at = (event.fields[name] for name in ("gfn", "new", "rights", "level", "at"))
        if ("w" in rights) != self.fmt.is_writable_pte(new):
            self.told.events[event.name] -= 1
            self.told.unread.append(Unread(event.line, f"kvm_mmu_set_spte: says ({rights}) of spte {new:#x}"))
            return
        self.judge(event, gfn, new, level)
        says = self.state(new, level)
        if new in self.known.get((gfn, level), ()):  # the TDP MMU has told of the change itself
            self.tell(event, says, gfn, level, None, new)
            return
        last_gfn, last = self.made.get(at, (None, 0))
        was = last if last_gfn == gfn else None
        self.made[at] = gfn, new
        self.tell(event, says + self._between(was, new, self.faults.pop(event.task, None), level), gfn, level, was, new)

    def _between(self, was: int | None, new: int, code: int | None, level: int) -> str:
        """What must have happened to an entry of the legacy MMU since an event said that it was made."""
        fault = "" if code is None else f"{_kind(code)} fault"
        if was is None:
            return f" ({fault})" * bool(fault)
        if words.frame(was) != words.frame(new):
            return f" ({fault or 'another frame'}; it was zapped unseen)"
        if code is None:
            return ", as before" if was == new else f" ({self.change(was, new, level)})"
        unseen = ""
        if not code & PFERR_PRESENT:
            unseen = "; it was zapped or aged unseen" if self.fmt.shadow_acc_track_mask else "; it was zapped unseen"
        elif code & PFERR_WRITE and self.fmt.is_writable_pte(was):
            unseen = "; it was write-protected unseen"
        return f" ({fault}{unseen})"

    def kvm_tdp_mmu_spte_changed(self, event: Traced) -> None:
        fields = event.fields
        gfn, old, new, level = fields["gfn"], fields["old"], fields["new"], fields["level"]
        key = gfn | fields["as_id"] << 60, level
        self.judge(event, gfn, new, level)
        says = self.change(old, new, level)
        self.tell(event, says + self._follows(event, key, gfn, old, new), gfn, level, old, new)
        was_leaf, is_leaf = self._leaves(old, new, level)
        if was_leaf and is_leaf:
            self._same_frame(event, gfn, old, new)
            if self.fmt.is_mmu_writable_spte(old) and not self.fmt.is_mmu_writable_spte(new):
                self.dropped.append((event.line, gfn))
        elif was_leaf and words.is_empty(new):
            self.zapped[key] = event.line, words.frame(old)
        elif is_leaf and key in self.zapped:
            line, frame = self.zapped.pop(key)
            if frame != words.frame(new):
                says = f"another frame than the one that line {line} zapped, and no flush in between"
                self.owed.append(Disagreement(event.line, gfn, says))

    def _leaves(self, old: int, new: int, level: int) -> tuple[bool, bool]:
        """Whether each is a leaf."""
        return words.maps_page(self.fmt, old, level), words.maps_page(self.fmt, new, level)

    def _same_frame(self, event: Traced, gfn: int, old: int, new: int) -> None:
        if words.frame(old) != words.frame(new):
            frames = f"{words.frame(old):#x} -> {words.frame(new):#x}"
            self.disagree(event.line, gfn, f"another frame in place, {frames}: the leaf must be zapped first")

    def _follows(self, event: Traced, key: tuple[int, int], gfn: int, old: int, new: int) -> str:
        """Put ``new`` in the place of ``old`` among the known values; a remark if ``old`` is none of them."""
        values, empty = self.known.setdefault(key, []), words.is_empty(old)
        for place, value in enumerate(values):
            by_hardware = value | self._hardware_sets == old | self._hardware_sets and value & old == value
            if by_hardware or (empty and words.is_empty(value)):
                values[place] = new
                return ""
        present = [value for value in values if not words.is_empty(value)]
        self.known[key] = [*values[-MOST_ROOTS:], new]
        if empty:
            return ""
        self.judge(event, gfn, old, key[1])
        if not present:
            return ""
        return f" (was {self.state(present[-1], key[1])} when last seen: changed unseen, or another root's)"

    def fast_page_fault(self, event: Traced) -> None:
        address, old, new = (event.fields[name] for name in ("address", "old", "new"))
        gfn, kind = address >> PAGE_SHIFT, _kind_of_flags(event.fields["error_code"])
        fixed, spurious = event.fields["fixed"], event.fields["spurious"]
        level = PG_LEVEL_4K + self.fmt.is_large_pte(old)  # or a 1G page: the event does not say
        base = gfn & -(1 << 9 * (level - 1))
        how = "fixed" if fixed else "spurious" if spurious else "left to the slow path"
        says = f"fast {kind} fault, {how}: {self.change(old, new, level) if fixed else self.state(old, level)}"
        if fixed:
            self.judge(event, gfn, new, level)
            says += self._follows(event, (base, level), gfn, old, new)
            self._judge_fast(event, gfn, kind, old, new)
        self.tell(event, says, gfn, level, old, new)

    def _judge_fast(self, event: Traced, gfn: int, kind: str, old: int, new: int) -> None:
        """The model handles the same fault. What differs in A and D, and a page gone since, may be others' work."""
        fmt = self.fmt
        if not fmt.is_shadow_present_pte(old):
            self.disagree(event.line, gfn, f"a fast fault fixed {old:#x}, which maps nothing")
            return
        if not fmt.is_shadow_present_pte(new):
            return
        self._same_frame(event, gfn, old, new)
        if fmt.is_writable_pte(new) and not fmt.is_writable_pte(old) and not fmt.is_mmu_writable_spte(old):
            self.disagree(event.line, gfn, f"a fast fault made {old:#x} writable, which is not MMU-writable")
            return
        try:
            model = words.fast_fault(self.told.hardware, self.kernel, words.without_address(old), kind)
        except AssertionError:  # a word that the model does not have: `judge` has said so
            return
        if model is None:
            self.disagree(event.line, gfn, f"the model has no fast {kind} fault on {old:#x}")
        elif model.spte is None:
            self.disagree(event.line, gfn, f"a fast {kind} fault fixed {old:#x}, of which the model says: {model.said}")
        elif differs := (model.spte ^ words.without_address(new)) & (ALL_BITS ^ self._hardware_sets):
            self.disagree(event.line, gfn, f"the model's fast {kind} fault differs from {new:#x} in {differs:#x}")

    def kvm_mmu_split_huge_page(self, event: Traced) -> None:
        gfn, old, level, error = (event.fields[name] for name in ("gfn", "old", "level", "errno"))
        says = "split into 512" if error == 0 else f"not split: error {error}"
        self.tell(event, f"{self.state(old, level)}: {says}", gfn, level, old)

    # ---- faults and tables ------------------------------------------------------------------------------------------

    def kvm_page_fault(self, event: Traced) -> None:
        """Of an EPT violation, the exit qualification is printed: bit 0 read, 1 write, 2 fetch; 3 to 5 what was allowed."""
        code, address = event.fields["error_code"], event.fields["address"]
        if not self.told.hardware.tdp:
            self.faults[event.task] = code
            self.tell(event, f"{_kind(code)} fault at guest-virtual {address:#x}")
            return
        if self.fmt.shadow_acc_track_mask:
            code = PFERR_PRESENT * (code >> 3 & 7 != 0) | PFERR_WRITE * (code >> 1 & 1) | PFERR_FETCH * (code >> 2 & 1)
        self.faults[event.task] = code
        allowed = "something" if code & PFERR_PRESENT else "nothing"
        self.tell(event, f"{_kind(code)} fault, where {allowed} was allowed", address >> PAGE_SHIFT)

    def kvm_mmu_pagetable_walk(self, event: Traced) -> None:
        """KVM walks the guest's tables: no step of a page, but with shadow paging it tells the fault's error code."""
        if not self.told.hardware.tdp:
            self.faults[event.task] = event.fields["error_code"]

    def kvm_mmu_spte_requested(self, event: Traced) -> None:
        gfn, pfn, level = (event.fields[name] for name in ("gfn", "pfn", "level"))
        self.tell(event, f"a fault asks for frame {pfn:#x} as {words.SIZES.get(level, level)}", gfn, level)

    def mark_mmio_spte(self, event: Traced) -> None:
        self.tell(event, "no memory here: MMIO is remembered", event.fields["gfn"])

    def kvm_mmu_prepare_zap_page(self, event: Traced) -> None:
        """A table goes, and the leaves in it. Which entries were its own cannot be told, so no page's history ends here."""
        gfn = event.fields["gfn"]
        level = event.fields["level"] if "level" in event.fields else event.fields["role"] & 15
        self.tell(event, f"a table of level {level} goes, of gfn {gfn:#x} on")

    def kvm_mmu_zap_all_fast(self, event: Traced) -> None:
        self.forget()
        self.tell(event, "all tables are obsolete")

    # ---- the host, the rings, the flushes ---------------------------------------------------------------------------

    def kvm_age_page(self, event: Traced) -> None:
        self.tell(event, f"aged: it was {event.fields['young'].lower()}", event.fields["gfn"])

    def notifier(self, event: Traced) -> None:
        """The host's ranges are user addresses: which gfns lie there the events do not say."""
        start = event.fields["start"]
        size = max(0, event.fields.get("end", start + (1 << PAGE_SHIFT)) - start) >> PAGE_SHIFT
        self.tell(event, f"{NOTIFIERS[event.name]} {size:,} page(s) from user address {start:#x}")

    def ring(self, event: Traced) -> None:
        ring, dirty, reset, used = (event.fields[name] for name in ("ring", "dirty", "reset", "used"))
        if (dirty - reset) & 0xFFFF_FFFF != used:
            self.disagree(event.line, None, f"ring {ring} from {reset:#x} to {dirty:#x} does not hold {used} entries")
        before, pushed = self.rings.get(ring), event.name == "kvm_dirty_ring_push"
        self.rings[ring] = dirty, reset
        lost = ""
        if before is not None and dirty != (before[0] + pushed) & 0xFFFF_FFFF:
            lost = "; not where it was: pushes are missing in the trace, or it is another VM's"
        if not pushed:
            self.tell(event, f"ring {ring} is reset up to {reset:#x}, {used} left{lost}")
            return
        slot, offset = event.fields["slot"], event.fields["offset"]
        base = self.slots.get(slot)
        says = f"dirty: page {offset:#x} of slot {slot & 0xFFFF} goes to ring {ring}, {used} used{lost}"
        self.tell(event, says, None if base is None else base + offset)

    def kvm_dirty_ring_exit(self, event: Traced) -> None:
        self.tell(event, f"vCPU {event.fields['vcpu']} leaves: its ring is soft-full")

    def kvm_flush_remote_tlbs(self, event: Traced) -> None:
        self.flushes += 1
        self.zapped.clear()
        self.dropped.clear()
        self.tell(event, "all TLBs are flushed")

    def forget(self) -> None:
        """Events are missing, or all tables are new: what was known need not be so any more."""
        for memory in (self.known, self.made, self.rings, self.zapped, self.dropped):
            memory.clear()

    def settle(self) -> None:
        """At the end of the trace: what has not been flushed."""
        says = "it is not MMU-writable any more, and no flush follows"
        self.owed += [Disagreement(line, gfn, says) for line, gfn in self.dropped]
        if self.flushes:
            self.told.disagreements += self.owed
        else:
            self.told.unjudged = len(self.owed)
        self.told.disagreements.sort(key=lambda found: found.line)


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
