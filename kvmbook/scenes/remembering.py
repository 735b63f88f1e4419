"""What vCPUs remember of one page while its SPTE changes, and which of it matters: the runs of chapter 04."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from kvmbook.model import PG_LEVEL_4K, Hardware, Kernel, Operation, Outcome, TlbEntry, Vm
from kvmbook.scenes.enabling import ANSWERED, BASE_GFN, spte_rights, spte_state, tlb_state
from kvmbook.scenes.words import named_words
from kvmbook.search import AnyNumber, Cells, Grain

REMEMBERING = {"off": Hardware.ept(ad_bits=False), "on, with PML": Hardware.ept(pml=True)}
PAGES = 64

# ---- one access, one entry, one SPTE ---------------------------------------------------------------------------------

# Entries of a 4K page, as a TLB is printed.
ENTRIES = {
    "R-X": TlbEntry(0x4567, PG_LEVEL_4K, read=True, write=False, execute=True, dirty=False),
    "RWX, clean": TlbEntry(0x4567, PG_LEVEL_4K, read=True, write=True, execute=True, dirty=False),
    "RWX": TlbEntry(0x4567, PG_LEVEL_4K, read=True, write=True, execute=True, dirty=True),
}


class Reach(NamedTuple):
    """How far an access goes: ``answered`` by "TLB", "SPTE" (a walk) or "KVM" (a fault), and the SPTE afterwards."""

    answered: str
    spte: int


def reach(hardware: Hardware, kind: str, entry: TlbEntry | None, spte: int) -> Reach:
    """Let a vCPU that remembers ``entry`` of a page try one access to it, while the SPTE says ``spte``."""
    vm = Vm(hardware, Kernel.v6_0)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=1)
    vm.vcpu[0].read(BASE_GFN)
    vm.vcpu[0].evict(BASE_GFN)
    found = vm.page_tables.walk(vm.l1_root, BASE_GFN)
    assert found is not None
    vm.page_tables.write(found.sptep, spte)
    if entry is not None:
        vm.vcpu[0].tlb.fill("L1", BASE_GFN, entry)
    return Reach(ANSWERED.get(vm.vcpu[0].attempt(kind, BASE_GFN), "KVM"), vm.spte(BASE_GFN))


def escapes(hardware: Hardware, entry: TlbEntry, spte: int) -> bool:
    """Whether a write through ``entry`` passes unseen where, without the entry, the SPTE would stop it or note it in D."""
    if reach(hardware, "write", entry, spte).answered != "TLB":
        return False
    without = reach(hardware, "write", None, spte)
    dirty = Kernel.v6_0.spte_format(hardware.format).shadow_dirty_mask
    return without.answered == "KVM" or (without.spte ^ spte) & dirty != 0


def verdict(hardware: Hardware, entry: TlbEntry | None, spte: int) -> str:
    """What a TLB entry is beside the SPTE of now: "stale, matters", "stale, harmless", "allows less", or "" if they agree.

    Stale: it allows more. Harmless: a write through it is still seen."""
    if entry is None:
        return ""
    fmt = Kernel.v6_0.spte_format(hardware.format)
    dirty = fmt.is_writable_pte(spte) and fmt.is_dirty_spte(spte)
    pairs = [*zip(entry[2:5], fmt.hardware_rights(spte), strict=True), (entry.dirty, dirty)]
    if any(remembered and not now for remembered, now in pairs):
        return "stale, matters" if escapes(hardware, entry, spte) else "stale, harmless"
    return "allows less" if any(now and not remembered for remembered, now in pairs) else ""


@cache
def pairs_met(hardware: Hardware) -> tuple[tuple[TlbEntry, int], ...]:
    """Every pair of a TLB entry and a present SPTE that some run brings together, with any number of vCPUs."""
    everything = AnyNumber(Cells(hardware, Kernel.v6_0, 1, Grain.FAULT)).search()
    fmt = Kernel.v6_0.spte_format(hardware.format)
    met = {(view.tlb, node[1].spte) for node in everything.found for view in everything.kinds_at(node)}
    return tuple(sorted((tlb, spte) for tlb, spte in met if tlb is not None and fmt.is_shadow_present_pte(spte)))


def met_beside(hardware: Hardware) -> dict[str, list[str]]:
    """`pairs_met` in words: beside each entry, as a TLB is printed, the SPTEs of `spte_state`; ✕: a write passes unseen."""
    fmt = Kernel.v6_0.spte_format(hardware.format)
    met: dict[str, list[str]] = {}
    for entry, spte in pairs_met(hardware):
        said, states = spte_state(fmt, spte) + " ✕" * escapes(hardware, entry, spte), met.setdefault(str(entry), [])
        states += [said] if said not in states else []
    return met


STATES = {
    "with A/D bits": (Hardware.ept(), "EPT with A/D bits", "D cleared for PML"),
    "without": (Hardware.ept(ad_bits=False), "EPT without A/D bits", "aged"),
}


def who_answers(ad_bits: str) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: for each entry of `ENTRIES` who answers a write over each of three SPTEs; ✕: it passes unseen.
    ``ad_bits`` is a key of `STATES`; without A/D bits no entry is clean."""
    hardware, leaves, lowered = STATES[ad_bits]
    states = ["fresh, writable", lowered, "write-protected for logging"]
    words = [named_words(leaves)[state] for state in states]
    rows = []
    for said, entry in ENTRIES.items():
        if entry.write == entry.dirty or ad_bits == "with A/D bits":
            ends = [reach(hardware, "write", entry, word).answered for word in words]
            rows.append([said, *(end + " ✕" * escapes(hardware, entry, w) for end, w in zip(ends, words, strict=True))])
    return ["TLB entry", *states], rows


# ---- who remembers what, moment by moment ----------------------------------------------------------------------------


class Remembered(NamedTuple):
    """What one vCPU has of the page: ``state`` in words, the rights, and the `verdict` on it."""

    state: str
    rights: str
    verdict: str


@dataclass(frozen=True)
class Recall:
    """One moment. ``who`` did ``what``, and ``came`` of it; the SPTE's state and rights, and what each vCPU remembers after
    it; ``answered`` an access: "TLB", "SPTE", "KVM", or "" if it was none; ``flushed``: all TLBs."""

    who: str
    what: str
    came: str
    spte: str
    rights: str
    tlbs: tuple[Remembered, ...]
    answered: str
    flushed: bool


def enable_up_to_the_flush(vm: Vm) -> Operation:
    """Enable logging of slot 0, all but the last two steps: the flush, and the return to user space."""
    slot = vm.memslots.slots[0, 0]
    ioctl = vm.user_memory_region(slot=0, base_gfn=slot.base_gfn, npages=slot.npages, log_dirty_pages=True)
    enabling = vm.start(ioctl)
    while enabling.todo[0] != "flush_always":
        vm.step(enabling)
    return enabling


class _Recalling:
    """A run of two vCPUs and one page while it happens."""

    def __init__(self, hardware: Hardware) -> None:
        """Logging was switched on and off again: the page's next write has to be noted, in W or in D."""
        self.vm, self.hardware, self.moments = Vm(hardware, Kernel.v6_0, vcpus=2), hardware, list[Recall]()
        self.enabling: Operation | None = None
        self.region(False)
        self.vm.vcpu[0].read(BASE_GFN)
        for logs in (True, False):
            self.region(logs)

    def region(self, logs: bool) -> None:
        self.vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES, log_dirty_pages=logs)

    def note(self, who: str, what: str, came: str, answered: str = "", flushed: bool = False) -> None:
        vm, spte = self.vm, self.vm.spte(BASE_GFN)
        tlbs = []
        for vcpu in vm.vcpu:
            entry = vcpu.tlb.lookup("L1", BASE_GFN)
            rights = "" if entry is None else str(entry)
            tlbs.append(Remembered(tlb_state(entry), rights, verdict(self.hardware, entry, spte)))
        state, rights = spte_state(vm.fmt, spte), spte_rights(vm.fmt, spte)
        self.moments.append(Recall(who, what, came, state, rights, tuple(tlbs), answered, flushed))

    def access(self, vcpu: int, kind: str) -> None:
        outcome = self.vm.vcpu[vcpu].complete(kind, BASE_GFN)
        self.note(f"vCPU {vcpu}", f"{kind}s", str(outcome), ANSWERED.get(outcome, "KVM"))

    def ages(self) -> None:
        self.vm.clear_young(BASE_GFN, BASE_GFN + 1)
        self.note("the host", "ages the page", "no flush")

    def enables(self) -> None:
        self.enabling = enable_up_to_the_flush(self.vm)
        self.note("user space", "enables logging", "not flushed yet")

    def faults_elsewhere(self) -> None:
        outcome = self.vm.vcpu[0].write(BASE_GFN + 1)
        self.note("vCPU 0", "writes another", str(outcome))

    def flushes(self) -> None:
        if self.enabling is not None:
            self.vm.step(self.enabling)
        else:
            self.vm.kvm_flush_remote_tlbs()
        self.note("KVM", "flushes", "⟳ TLB flush", flushed=True)


FIRST = {"written it": "write", "read it": "read"}
LOWERED: dict[str, Callable[[_Recalling], None]] = {
    "the host ages it": _Recalling.ages,
    "logging is enabled": _Recalling.enables,
}
NEXT: dict[str, Callable[[_Recalling], None]] = {
    "nothing": lambda run: None,
    "vCPU 0 faults elsewhere": _Recalling.faults_elsewhere,
    "vCPU 1 writes it": lambda run: run.access(1, "write"),
    "KVM flushes": _Recalling.flushes,
}


def who_remembers(
    ad_bits: str = "off", first: str = "written it", lowered: str = "the host ages it", then: str = "nothing"
) -> tuple[Recall, ...]:
    """vCPU 1 reads a page, vCPU 0 reads or writes it, the SPTE is lowered, something else happens, vCPU 0 writes.

    The arguments are keys of `REMEMBERING`, `FIRST`, `LOWERED` and `NEXT`; KeyError for others."""
    run = _Recalling(REMEMBERING[ad_bits])
    run.access(1, "read")
    run.access(0, FIRST[first])
    LOWERED[lowered](run)
    NEXT[then](run)
    run.access(0, "write")
    return tuple(run.moments)


CUT_OFF = ("cut off", "cut off and frozen", "cut off and flushed")


def read_below(how: str) -> tuple[Outcome, Outcome]:
    """KVM cuts a table off, as one of `CUT_OFF` says, and then each of two vCPUs reads a page below it that it has not read
    before. vCPU 0 has read the page beside it, and so remembers where the table is."""
    vm = Vm(Hardware.ept(), Kernel.v6_0, vcpus=2)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES)
    for gfn in (BASE_GFN, BASE_GFN + 1):
        vm.vcpu[1].read(gfn)
    vm.kvm_flush_remote_tlbs()
    vm.vcpu[0].read(BASE_GFN)
    place = vm.page_tables.entry_at(vm.l1_root, BASE_GFN, PG_LEVEL_4K + 1)
    if how == "cut off and frozen":
        vm.page_tables.unlink(place)
    else:
        vm.page_tables.write(place, 0)
    if how == "cut off and flushed":
        vm.kvm_flush_remote_tlbs()
    first, second = (vcpu.attempt("read", BASE_GFN + 1) for vcpu in vm.vcpu)
    return first, second
