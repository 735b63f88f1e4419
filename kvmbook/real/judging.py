"""What the model disagrees with: an SPTE that no KVM makes, a fast fault that the model would handle otherwise, a flush that
is missing, a ring that does not add up.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from kvmbook.model import (
    ALL_BITS,
    PT_PAGE_SIZE_MASK,
    SPTE_BASE_ADDR_MASK,
    Hardware,
    Kernel,
    Vm,
)
from kvmbook.real.traced_sptes import broken_rule, frame, software_bits, without_address


class Disagreement(NamedTuple):
    """What the model would not do, or no KVM should: the line, the page, and the rule that is broken."""

    line: int
    gfn: int | None
    says: str


# ---- one SPTE, one change --------------------------------------------------------------------------------------------


class Judge:
    """Whether the model of this hardware and kernel would have done it: each answer is what it would not, "" if it would.

    ``not_kvms``: the bits that hardware sets; or the fast path, where they are software's."""

    def __init__(self, hardware: Hardware, kernel: Kernel) -> None:
        self.hardware, self.kernel = hardware, kernel
        self.fmt = kernel.spte_format(hardware.format)
        self.not_kvms = self.fmt.shadow_accessed_mask | self.fmt.shadow_dirty_mask | software_bits(self.fmt)
        self._broken = functools.cache(functools.partial(broken_rule, self.fmt))

    def word(self, spte: int, level: int) -> str:
        """Whether KVM makes such a value."""
        broken = self._broken(without_address(spte), level)
        return f"no KVM makes {spte:#x}: {broken}" if broken else ""

    def in_place(self, old: int, new: int) -> str:
        """Whether a leaf may take the place of a leaf."""
        if frame(old) == frame(new):
            return ""
        return f"another frame in place, {frame(old):#x} -> {frame(new):#x}: the leaf must be zapped first"

    def fast_fault(self, kind: str, old: int, new: int) -> str:
        """Whether the model handles the same fault so. What differs in A and D, and a page gone since, may be others' work;
        what `word` and `in_place` say of it is not said again."""
        fmt = self.fmt
        if not fmt.is_shadow_present_pte(old):
            return f"a fast fault fixed {old:#x}, which maps nothing"
        if not fmt.is_shadow_present_pte(new):
            return ""
        if fmt.is_writable_pte(new) and not fmt.is_writable_pte(old) and not fmt.is_mmu_writable_spte(old):
            return f"a fast fault made {old:#x} writable, which is not MMU-writable"
        try:
            model = fast_fault(self.hardware, self.kernel, without_address(old), kind)
        except AssertionError:  # a word that the model does not have: `word` has said so
            return ""
        if model is None:
            return f"the model has no fast {kind} fault on {old:#x}"
        if model.spte is None:
            return f"a fast {kind} fault fixed {old:#x}, of which the model says: {model.said}"
        differs = (model.spte ^ without_address(new)) & (ALL_BITS ^ self.not_kvms)
        return f"the model's fast {kind} fault differs from {new:#x} in {differs:#x}" if differs else ""


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


# ---- flushes ---------------------------------------------------------------------------------------------------------


class Flushes:
    """What needs a flush, and whether it had one. Since the last: ``zapped``, line and frame of leaves by their entry,
    ``dropped``, line and gfn of those whose MMU-writable went. ``owed``: what had none."""

    def __init__(self) -> None:
        self.zapped: dict[tuple[int, int], tuple[int, int]] = {}
        self.dropped: list[tuple[int, int]] = []
        self.owed: list[Disagreement] = []
        self.seen = 0

    def flush(self) -> None:
        self.seen += 1
        self.forget()

    def forget(self) -> None:
        """What was before need not be owed any more."""
        self.zapped.clear()
        self.dropped.clear()

    def zap(self, line: int, entry: tuple[int, int], spte: int) -> None:
        self.zapped[entry] = line, frame(spte)

    def drop(self, line: int, gfn: int) -> None:
        """A leaf is not MMU-writable any more."""
        self.dropped.append((line, gfn))

    def map(self, line: int, entry: tuple[int, int], gfn: int, spte: int) -> None:
        """A leaf comes where there was nothing."""
        before, zapped = self.zapped.pop(entry, (0, frame(spte)))
        if zapped != frame(spte):
            says = f"another frame than the one that line {before} zapped, and no flush in between"
            self.owed.append(Disagreement(line, gfn, says))

    def unpaid(self) -> list[Disagreement]:
        """At the end of the trace: what has not been flushed."""
        says = "it is not MMU-writable any more, and no flush follows"
        return self.owed + [Disagreement(line, gfn, says) for line, gfn in self.dropped]


# ---- rings -----------------------------------------------------------------------------------------------------------

RING_INDEX = 0xFFFF_FFFF  # indices are 32 bits wide


def ring_sum(ring: int, dirty: int, reset: int, used: int) -> str:
    """Whether a ring's indices add up."""
    if (dirty - reset) & RING_INDEX == used:
        return ""
    return f"ring {ring} from {reset:#x} to {dirty:#x} does not hold {used} entries"
