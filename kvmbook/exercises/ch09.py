"""Exercises and questions of chapter 09."""

import random
from collections.abc import Callable, Collection, Sequence
from typing import Any

from kvmbook.exercises.mechanism import Answer, Run, checker, question
from kvmbook.exercises.vms import PAGES, lost_under_always
from kvmbook.model import FlushPolicy, Hardware, Kernel, Operation, Outcome, SpteFormat, TrackGuestPageTable, Vm
from kvmbook.scenes import BASE_GFN, LEAVES, PFN, REASONS, page_with, reasons_of

# ---- quiz ------------------------------------------------------------------------------------------------------------


@question("1, dirty logging", "4, access tracking", "1 and 4", "none: W is 1 again")
def quiz_09_1() -> Answer:
    """Without A/D bits: dirty logging has write-protected a page, and then the host has aged it. Now the guest reads it.
    Which reasons does its SPTE show after that?"""
    vm = page_with({1, 4})
    vm.vcpu[1].read(BASE_GFN)
    left = reasons_of(vm.fmt, vm.spte(BASE_GFN))
    because = (
        "The read gives R and X back and ends the access tracking. W must stay 0: the next write has to fault, so that it is "
        "marked."
    )
    both = "none: W is 1 again" if not left else "1 and 4"
    return Answer(f"{min(left)}, {REASONS[min(left)]}" if len(left) == 1 else both, because)


@question("no: W is 0 already", "no: no TLB holds the page", "yes")
def quiz_09_2() -> Answer:
    """Linux v6.0 has enabled dirty logging and flushed; nobody has used the page since, so W is 0, and no TLB has the page.
    Now KVM begins to guard it as a page table. Does KVM flush?"""
    vm = page_with({1})
    assert not any(list(vcpu.tlb.writable()) for vcpu in vm.vcpus)
    before = vm.counters.flushes
    vm.track_guest_page_table(BASE_GFN)
    because = (
        "MMU-writable is 1, and that says that a TLB may hold a writable entry, not that one does. KVM cannot look into "
        "TLBs. It may flush once too often; it must not flush once too rarely."
    )
    return Answer("yes" if vm.counters.flushes > before else "no: W is 0 already", because)


@question("it was given back at once", "by a fast fault", "by a slow fault", "never: the write is emulated")
def quiz_09_3() -> Answer:
    """The guest no longer uses the page as a page table, and KVM stops guarding it. How does the guest get W back?"""
    vm = page_with({2})
    vm.untrack_guest_page_table(BASE_GFN)
    if vm.fmt.is_writable_pte(vm.spte(BASE_GFN)):
        return Answer("it was given back at once", "")
    how = vm.vcpu[0].write(BASE_GFN)
    because = (
        "MMU-writable is still 0, so the fast path refuses. The slow path takes mmu_lock, finds that nobody guards the "
        "page, and makes the SPTE anew, with MMU-writable and W."
    )
    said = {Outcome.FAST_FAULT: "by a fast fault", Outcome.SLOW_FAULT: "by a slow fault"}
    return Answer(said.get(how, "never: the write is emulated"), because)


# ---- 1: eight words --------------------------------------------------------------------------------------------------

History = tuple[Callable[[SpteFormat, int], int], ...]


def _logged(fmt: SpteFormat, spte: int) -> int:
    return fmt.spte_write_protect(spte).spte


def _guarded(fmt: SpteFormat, spte: int) -> int:
    return fmt.tdp_write_protect(spte).spte


def _aged(fmt: SpteFormat, spte: int) -> int:
    return fmt.mmu_spte_age(spte).spte


HISTORIES: tuple[History, ...] = (
    (_logged,), (_guarded,), (), (_aged, _logged), (_guarded, _aged), (_logged, _aged), (_aged,), (_logged, _guarded),
)  # fmt: skip


def words_09_1(seed: int = 1) -> list[tuple[str, int]]:
    """Eight leaves, each as (format, word), drawn for this seed: what befell it is another for each, one is read-only in the
    host. All have W=0."""
    draw, words = random.Random(seed), []
    for history in HISTORIES:
        writable = bool(history)
        name = draw.choice(list(LEAVES)) if history != (_aged,) else "EPT without A/D bits"
        fmt, ad_type = LEAVES[name]
        pfn = PFN + draw.randrange(1 << 16)
        spte = fmt.make_spte(pfn, ad_type=ad_type, host_writable=writable).spte
        if not writable and draw.random() < 0.5:
            spte = _aged(fmt, spte)
        for befalls in history:
            spte = befalls(fmt, spte)
        words.append((name, spte))
    draw.shuffle(words)
    return words


def _first_wrong(name: str, spte: int, given: set[int], right: set[int]) -> str:
    """What to look at, where an answer is not right."""
    if (4 in given) != (4 in right):
        if LEAVES[name].fmt.is_access_track_spte(spte):
            return "look at R and X: has anybody taken them?"
        return "look at R and X, and at the type: which formats can be access-tracked at all?"
    if LEAVES[name].fmt.is_mmu_writable_spte(spte):
        return "look at MMU-writable: what does it say that KVM may do?"
    return "MMU-writable is 0; what does host-writable say?" if 1 not in given else "look at MMU-writable once more"


@checker
def check_09_1(reasons: Sequence[Collection[int]], seed: int = 1) -> str:
    """The reasons that eight words show, as `words_09_1(seed)` has them."""
    words = words_09_1(seed)
    if isinstance(reasons, str) or len(reasons) != len(words):
        return f"give a list of {len(words)} sets, one for each word"
    for number, ((name, spte), given) in enumerate(zip(words, reasons, strict=True), 1):
        if not isinstance(given, Collection) or isinstance(given, str) or not set(given) <= set(REASONS):
            return f"word {number}: give a set of numbers from 1 to 4, such as {{1, 3}}"
        if set(given) != (right := reasons_of(LEAVES[name].fmt, spte)):
            return f"word {number} ({name}): {_first_wrong(name, spte, set(given), right)}"
    return ""


# ---- 2: aged, then guarded -------------------------------------------------------------------------------------------


def aged_page(late: bool = False) -> Vm:
    """Two vCPUs and one page that vCPU 0 has read and the host has aged; ``late``: a KVM that drops mmu_lock before the flush
    of its guard."""
    return page_with({4}, Kernel.v6_0.with_(guard_flushes_before_unlock=False) if late else Kernel.v6_0)


@checker
def check_09_2(prediction: Sequence[int], run: Callable[[Vm, Operation], Any] | None = None) -> str:
    """The word and the flushes of guarding an aged page; and a run in which a late flush lets a write of the page table
    pass."""
    vm = aged_page()
    before = vm.counters.flushes
    vm.track_guest_page_table(BASE_GFN)
    try:
        word, flushes = prediction
    except (TypeError, ValueError):
        return "give a pair first: the word, and the number of flushes"
    if hint := _wrong_prediction(vm, word, flushes, vm.counters.flushes - before):
        return hint
    if run is None:
        return "word and flushes are right; now the run"
    vm = aged_page(late=True)
    kernel, guard = vm.kernel, vm.start(TrackGuestPageTable(BASE_GFN))
    logged = len(vm.log)
    run(vm, guard)
    if vm.kernel is not kernel:
        return "your run has replaced the VM's kernel; keep the one that you are given"
    if guard.todo:
        return f"the guard is not done: its next step is {guard.todo[0]}"
    return _unseen_write(vm, logged)


def _wrong_prediction(vm: Vm, word: int, flushes: int, right: int) -> str:
    spte, fmt = vm.spte(BASE_GFN), vm.fmt
    if not isinstance(word, int):
        return "give the word as a number, 0x..."
    if fmt.is_mmu_writable_spte(word):
        return "guarding takes more than W: which note of KVM's goes, so that nobody gives W back?"
    if fmt.is_access_track_spte(word) != fmt.is_access_track_spte(spte) or (word ^ spte) & 0b101 << 54:
        return "guarding gives no right back: R, W and X, and the saved R and X, are as ageing left them"
    if word != spte:
        return "your word differs from the model's in other bits; begin with that of the aged page"
    return "" if flushes == right else "the word is right; the flushes are not. Ask MMU-writable, not W"


def _unseen_write(vm: Vm, logged: int) -> str:
    """A hint unless a guest's write has passed between the guard's first step and its flush."""
    steps = [(event.actor, event.step, event.note) for event in vm.log[logged:]]
    names = [step for _, step, _ in steps]
    first, last = names.index("kvm_mmu_slot_gfn_write_protect"), names.index("kvm_flush_remote_tlbs")
    passed = {Outcome.HIT.value, Outcome.WALK.value}
    written = [n for n, (_, step, note) in enumerate(steps) if step == "write" and note in passed]
    if any(first < n < last for n in written):
        return ""
    if any(n < first for n in written):
        return "that write came before the guard; KVM has not read the table yet"
    if "write" not in names:
        return "nobody writes the page"
    if any(first < n < last for n, name in enumerate(names) if name == "write"):
        return "that write faults, so KVM sees it: which vCPU's TLB still has the page?"
    return "your write comes after the flush, and is emulated: KVM sees it"


# ---- 3: against the alternative --------------------------------------------------------------------------------------


def _all_written(kernel: Kernel) -> Vm:
    """Two vCPUs with PML, and a slot of which vCPU 0 has written every page."""
    vm = Vm(Hardware.ept(pml=True), kernel, vcpus=2)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES)
    for gfn in range(BASE_GFN, BASE_GFN + PAGES):
        vm.vcpu[0].write(gfn)
    return vm


@checker
def check_09_3(run: Run) -> str:
    """Lose a write with PML although the MMU-writable test decides about the flush, and every page has been written."""
    kernel = Kernel.v5_19.with_(flush=FlushPolicy.IF_MMU_WRITABLE)
    vm = _all_written(kernel)
    logged = len(vm.log)
    run(vm)
    if vm.kernel is not kernel:
        return "your run has replaced the VM's kernel; keep the one that you are given"
    if vm.in_flight:
        return f"{vm.in_flight[0].who} has not finished: its next step is {vm.in_flight[0].todo[0]}; finish every operation"
    if (0, 0) not in vm.memslots.slots or not vm.memslots.slots[0, 0].logs_dirty:
        return "your run must leave dirty logging enabled"
    if len(vm.missed_dirty(0)):
        return lost_under_always(_all_written, run)
    events = vm.log[logged:]
    enabled = max(n for n, event in enumerate(events) if event.step == "return_to_user_space")
    if not any(event.step == "write" for event in events[enabled:]):
        return "nobody writes after logging is enabled"
    if any((event.step, event.note) == ("flush_if_owed", "flush") for event in events):
        return "no write is missed: enabling has flushed. Which SPTEs of the slot have D = 1 when the pass comes?"
    return "no write is missed; look at D in the SPTE and in vCPU 0's TLB before you enable logging"
