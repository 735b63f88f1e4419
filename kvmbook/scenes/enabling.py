"""The runs that the chapters tell: pure functions from a few settings to a result, which figures and panels draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from kvmbook.model import (
    KVM_MEM_LOG_DIRTY_PAGES,
    Change,
    FlushPolicy,
    FlushRule,
    Hardware,
    Kernel,
    Outcome,
    SpteFormat,
    TlbEntry,
    Vm,
    kvm_mmu_slot_apply_flags,
)

BASE_GFN = 0x200
HARDWARE = {
    "off": Hardware.ept(ad_bits=False),
    "on": Hardware.ept(ad_bits=True),
    "on, with PML": Hardware.ept(ad_bits=True, pml=True),
}
TOUCHES = {"nobody": None, "vCPU 1 reads page 0": "read", "vCPU 1 writes page 0": "write"}


@dataclass(frozen=True)
class Moment:
    """One column of a page's timeline: who did what, and how the page's SPTE and the TLB of vCPU 0 look after it.

    ``spte`` and ``tlb`` are states in words (see `spte_state`), with the rights beside them ("-" for one of R W X A D that
    is 0); ``stale``: the TLB allows more than the SPTE; ``flushed``: a TLB flush was part of it; ``kvm``: what KVM did or
    saw; ``answered``: of an access, where it was: "TLB", "SPTE" (a walk), or "KVM" (a fault).
    """

    actor: str
    action: str
    spte: str
    spte_rights: str
    tlb: str
    tlb_rights: str
    stale: bool
    flushed: bool
    kvm: str
    answered: str


@dataclass(frozen=True)
class Scene:
    """A whole run: ``moments`` of the page ``followed``, and for each page what became of its write: "reported" or
    "missed"."""

    followed: int
    moments: tuple[Moment, ...]
    pages: tuple[str, ...]
    flushes: int

    @property
    def missed(self) -> int:
        """How many pages were written and not reported."""
        return self.pages.count("missed")


def spte_state(fmt: SpteFormat, spte: int) -> str:
    """One present leaf in words: writable, clean (writable, D=0), write-protected, access-tracked, or read-only."""
    if not fmt.is_shadow_present_pte(spte):
        return "not mapped"
    if fmt.is_access_track_spte(spte):
        return "access-tracked"
    if not fmt.is_writable_pte(spte):
        return "write-protected" if fmt.is_mmu_writable_spte(spte) else "read-only"
    return "writable" if fmt.is_dirty_spte(spte) else "clean"


def tlb_state(entry: TlbEntry | None) -> str:
    """One TLB entry in the same words, or "empty"."""
    if entry is None:
        return "empty"
    if not entry.write:
        return "write-protected"
    return "writable" if entry.dirty else "clean"


def spte_rights(fmt: SpteFormat, spte: int) -> str:
    """R, W, X, then A and D if the SPTE has them ("-": 0), then MW if it is set: "R-X MW"."""
    rights = "".join(c if on else "-" for c, on in zip("RWX", fmt.hardware_rights(spte), strict=True))
    noted = {"A": fmt.spte_shadow_accessed_mask(spte), "D": fmt.spte_shadow_dirty_mask(spte)}
    words = [rights, *(name if spte & mask else "-" for name, mask in noted.items() if mask)]
    return " ".join([*words, *["MW"] * bool(fmt.is_mmu_writable_spte(spte))])


def is_stale(spte: str, tlb: str) -> bool:
    """Whether the entry lets a write pass that the SPTE would stop or note, both in the words above."""
    return tlb == "writable" and spte != "writable"


ANSWERED = {Outcome.HIT: "TLB", Outcome.WALK: "SPTE"}  # by whom; KVM answers all others


def moment_of(
    vm: Vm, gfn: int, actor: str, action: str, kvm: str, *, flushed: bool = False, outcome: Outcome | None = None
) -> Moment:
    """How ``gfn``'s SPTE and the TLB of vCPU 0 look now, as a moment. ``outcome``: how the access went that it is about."""
    fmt, spte, entry = vm.fmt, vm.spte(gfn), vm.vcpu[0].tlb.lookup("L1", gfn)
    says, remembers = spte_state(fmt, spte), tlb_state(entry)
    return Moment(
        actor=actor,
        action=action,
        spte=says,
        spte_rights=spte_rights(fmt, spte),
        tlb=remembers,
        tlb_rights="" if entry is None else str(entry)[:3] + " D" * (entry.dirty and fmt.kvm_ad_enabled),
        stale=is_stale(says, remembers),
        flushed=flushed,
        kvm=kvm,
        answered="" if outcome is None else ANSWERED.get(outcome, "KVM"),
    )


class _Told:
    """A run while it happens. Each method lets somebody do something, and notes how one page looks after it."""

    def __init__(self, vm: Vm, followed: int = 0) -> None:
        self.vm, self.moments, self.flushes = vm, list[Moment](), vm.counters.flushes
        self.followed = followed

    def then(self, actor: str, action: str, kvm: str, outcome: Outcome | None = None) -> None:
        """Note a moment. ``outcome``: how the access went that it is about."""
        flushed = self.vm.counters.flushes > self.flushes
        gfn = BASE_GFN + self.followed
        self.moments.append(moment_of(self.vm, gfn, actor, action, kvm, flushed=flushed, outcome=outcome))
        self.flushes = self.vm.counters.flushes

    def reads(self, gfns: range) -> None:
        """vCPU 0 reads all pages."""
        outcome = [self.vm.vcpu[0].read(gfn) for gfn in gfns][self.followed]
        self.then("vCPU 0", "reads", str(outcome), outcome)

    def ages(self, gfns: range) -> None:
        """The host ages pages."""
        self.vm.clear_young(gfns.start, gfns.stop)
        self.then("host", "ages", "no flush")

    def enables(self, gfns: range) -> int:
        """User space enables logging of slot 0, which has these pages. Returns the flushes that this took."""
        before = self.vm.counters.flushes
        self.vm.set_user_memory_region(slot=0, base_gfn=gfns.start, npages=len(gfns), log_dirty_pages=True)
        flushes = self.vm.counters.flushes - before
        self.then("user space", "enables logging", "⟳ TLB flush" if flushes else "no flush")
        return flushes

    def writes_and_harvests(self, gfns: range) -> tuple[str, ...]:
        """vCPU 0 writes all pages, then user space gets the dirty log. Returns the fate of each page."""
        outcome = [self.vm.vcpu[0].write(gfn) for gfn in gfns][self.followed]
        lost = gfns[self.followed] in self.vm.missed_dirty(0)
        seen = "✓ PML notes it" if outcome in ANSWERED else f"✓ {outcome}"
        self.then("vCPU 0", "writes", "✕ sees nothing" if lost else seen, outcome)
        report = self.vm.get_dirty_log(0)
        said = f"reports page {self.followed}" if report[self.followed] else "not reported"
        self.then("user space", "harvests", said)
        missed = set(self.vm.missed_dirty(0).tolist())
        found = zip(gfns, report.tolist(), strict=True)
        return tuple("missed" if gfn in missed else "reported" if bit else "untouched" for gfn, bit in found)


def write_after_enabling(
    ad_bits: str = "off", flush: FlushRule = FlushPolicy.IF_CHANGED, touched: str = "nobody", pages: int = 16
) -> Scene:
    """The seed's scene: vCPU 0 reads all pages, the host ages them, perhaps vCPU 1 touches page 0, user space enables
    dirty logging, vCPU 0 writes all pages, user space harvests. Followed is page 1, which vCPU 1 never touches, if there is
    one.

    ``ad_bits`` is a key of `HARDWARE`, ``touched`` a key of `TOUCHES`. Raises KeyError for others.
    """
    vm = Vm(HARDWARE[ad_bits], Kernel.v5_19.with_(flush=flush), vcpus=2)
    gfns = range(BASE_GFN, BASE_GFN + pages)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=pages)
    told = _Told(vm, followed=min(1, pages - 1))
    told.reads(gfns)
    told.ages(gfns)
    if kind := TOUCHES[touched]:
        outcome = vm.vcpu[1].complete(kind, BASE_GFN)
        told.then("vCPU 1", f"{kind}s page 0", str(outcome), None if told.followed else outcome)  # of another page
    flushes = told.enables(gfns)
    fates = told.writes_and_harvests(gfns)
    return Scene(told.followed, tuple(told.moments), fates, flushes)


def made_twice(flush: FlushRule = FlushPolicy.IF_CHANGED) -> Scene:
    """The loss of chapter 09: with PML, two vCPUs fault on one page. The second makes the SPTE again over the first one's,
    and so leaves it W=1 with D=0, while vCPU 0's TLB says that D is set."""
    vm = Vm(HARDWARE["on, with PML"], Kernel.v5_19.with_(flush=flush), vcpus=2)
    gfns = range(BASE_GFN, BASE_GFN + 1)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=1)
    told = _Told(vm)
    outcome, _ = [vcpu.attempt("read", BASE_GFN) for vcpu in vm.vcpu]
    told.then("both vCPUs", "read", str(outcome), outcome)
    vm.run(vm.vcpu[0].fault)
    vm.vcpu[0].read(BASE_GFN)
    told.then("KVM for vCPU 0", "maps", "maps page 0")
    vm.run(vm.vcpu[1].fault)
    told.then("KVM for vCPU 1", "maps again", "maps page 0, over it")
    flushes = told.enables(gfns)
    fates = told.writes_and_harvests(gfns)
    return Scene(told.followed, tuple(told.moments), fates, flushes)


def missed_against_aged(flush: FlushRule, aged: int, pages: int = 64, ad_bits: str = "off") -> int:
    """How many writes are missed if the guest has written ``pages`` pages, the host ages the first ``aged`` of them,
    logging is enabled, and the guest writes them all again."""
    vm = Vm(HARDWARE[ad_bits], Kernel.v5_19.with_(flush=flush))
    gfns = range(BASE_GFN, BASE_GFN + pages)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=pages)
    for gfn in gfns:
        vm.vcpu[0].write(gfn)
    if aged:
        vm.clear_young(BASE_GFN, BASE_GFN + aged)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=pages, log_dirty_pages=True)
    for gfn in gfns:
        vm.vcpu[0].write(gfn)
    vm.get_dirty_log(0)
    return len(vm.missed_dirty(0))


def missed_per_harvest(flush: FlushRule, rounds: int = 8, touched: int = 4, pages: int = 16) -> list[int]:
    """How many pages are missed after each of ``rounds`` harvests, if vCPU 0 writes all pages before each one, and vCPU 1
    writes page 0 before harvest number ``touched`` (from 0). Without A/D bits; all pages aged before logging."""
    vm = Vm(HARDWARE["off"], Kernel.v5_19.with_(flush=flush), vcpus=2)
    gfns = range(BASE_GFN, BASE_GFN + pages)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=pages)
    for gfn in gfns:
        vm.vcpu[0].read(gfn)
    vm.clear_young(gfns.start, gfns.stop)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=pages, log_dirty_pages=True)
    missed = []
    for harvest in range(rounds):
        for gfn in gfns:
            vm.vcpu[0].write(gfn)
        if harvest == touched:
            vm.vcpu[1].write(BASE_GFN)
        vm.get_dirty_log(0)
        missed.append(len(vm.missed_dirty(0)))
    return missed


def _writes(vm: Vm) -> None:
    vm.vcpu[0].write(BASE_GFN)


def _writes_and_is_aged(vm: Vm) -> None:
    _writes(vm)
    vm.clear_young(BASE_GFN, BASE_GFN + 1)


def _was_logged_before(vm: Vm) -> None:
    _writes(vm)
    for logs in (True, False):
        vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=64, log_dirty_pages=logs)


# What has happened to page 0 before logging is enabled; all else is unmapped.
SITUATIONS: dict[str, Callable[[Vm], None]] = {
    "nothing mapped": lambda vm: None,
    "page written": _writes,
    "written, then aged": _writes_and_is_aged,
    "logged before": _was_logged_before,
}


def price_of_enabling(flush: FlushRule, situation: str) -> tuple[int, int]:
    """The flushes that enabling makes, and the writes to page 0 that are missed after it; without A/D bits. ``situation`` is
    a key of `SITUATIONS`."""
    vm = Vm(HARDWARE["off"], Kernel.v5_19.with_(flush=flush))
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=64)
    SITUATIONS[situation](vm)
    before = vm.counters.flushes
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=64, log_dirty_pages=True)
    flushes = vm.counters.flushes - before
    vm.vcpu[0].write(BASE_GFN)
    return flushes, len(vm.missed_dirty(0))


CHANGES = {
    "off to on": (Change.FLAGS_ONLY, 0, 1),
    "on to off": (Change.FLAGS_ONLY, 1, 0),
    "create, on": (Change.CREATE, None, 1),
}


def enabling_plan(
    ad_bits: str = "off",
    kernel: Kernel = Kernel.v5_19,
    change: str = "off to on",
    initially_set: bool = False,
    nested: bool = False,
) -> list[str]:
    """What kvm_mmu_slot_apply_flags() is going to do after a memslot change: the names of its steps, in order.

    ``change`` is a key of `CHANGES`: how LOG_DIRTY_PAGES changes. ``nested``: a nested guest has run before, so the rmap side
    is in use beside the TDP side. Asked of the model, not written down.
    """
    vm = Vm(HARDWARE[ad_bits], kernel, nested="ept")
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=64)
    if nested:
        vm.vcpu[0].read(BASE_GFN, l2=True)
    vm.initially_set = initially_set
    kind, before, after = CHANGES[change]
    slot = vm.memslots.slots[0, 0]
    old = None if before is None else replace(slot, flags=before * KVM_MEM_LOG_DIRTY_PAGES)
    return kvm_mmu_slot_apply_flags(vm, kind, old, replace(slot, flags=after * KVM_MEM_LOG_DIRTY_PAGES))
