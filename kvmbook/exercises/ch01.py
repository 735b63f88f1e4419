"""Exercises and questions of chapter 01."""

from kvmbook.exercises.mechanism import Answer, Run, checker, question
from kvmbook.exercises.vms import PAGES, WatchedVm, aged, enable, slot_was_touched
from kvmbook.model import ACCESSES, Hardware, Kernel, MemorySlot, Operation, Outcome, Vm
from kvmbook.scenes import BASE_GFN

REPLACED = "you have replaced the VM's kernel; stay with v5.19"
BY_HAND = "you reach into the model, past the guest, user space and the host; which calls of theirs make KVM flush?"


@question("the one to page 0", "the one to page 1", "both", "neither")
def quiz_01_1() -> Answer:
    """v5.19, no A/D bits. vCPU 0 has only read page 0, but has written page 1. The host ages both, and logging is enabled.
    Then vCPU 0 writes both. Which of these two writes is lost?"""
    vm = Vm(Hardware.ept(ad_bits=False), Kernel.v5_19)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES)
    first, second = BASE_GFN, BASE_GFN + 1
    _ = vm.vcpu[0].read(first), vm.vcpu[0].write(second)
    vm.clear_young(first, second + 1)
    enable(vm)
    _ = vm.vcpu[0].write(first), vm.vcpu[0].write(second)
    lost = [int(gfn) - BASE_GFN for gfn in vm.missed_dirty(0)]
    options = {(0,): "the one to page 0", (1,): "the one to page 1", (0, 1): "both"}
    because = (
        "KVM maps a page writable if the host allows it, whether the access is a read or a write, and the TLB copies all "
        "rights. It copies rights, not history, and ageing takes W from both SPTEs, so enabling finds nothing to change."
    )
    return Answer(options.get(tuple(lost), "neither"), because)


@question("yes", "no")
def quiz_01_2() -> Answer:
    """In the chapter's ten lines, let the host age the page as ordinary reclaim does, with clear_flush_young() instead of
    clear_young(). Is the guest's write still lost under v5.19?"""
    vm = Vm(Hardware.ept(ad_bits=False), Kernel.v5_19)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES)
    vm.vcpu[0].read(BASE_GFN)
    vm.clear_flush_young(BASE_GFN, BASE_GFN + PAGES)
    enable(vm)
    vm.vcpu[0].write(BASE_GFN)
    return Answer(
        "yes" if len(vm.missed_dirty(0)) else "no",
        "That call flushes if a page was young (until v6.12): no stale copy is left.",
    )


@question("it is lost too", "it is logged, and the lost one with it", "it is logged, and the lost one stays lost")
def quiz_01_3() -> Answer:
    """A write of vCPU 0 was lost. Then vCPU 0 moves to another physical CPU, whose TLB is empty. What becomes of its next
    write, to another page?"""
    vm = aged(Hardware.ept(ad_bits=False), Kernel.v5_19)
    enable(vm)
    vm.vcpu[0].write(BASE_GFN)
    for gfn in range(BASE_GFN, BASE_GFN + PAGES):
        vm.vcpu[0].evict(gfn)
    vm.vcpu[0].write(BASE_GFN + 1)
    report = vm.get_dirty_log(0)
    logged = "the lost one with it" if report[0] else "the lost one stays lost"
    because = (
        "The TLB is empty, so the write faults, and KVM sees it. The page of the lost write is reported only if the guest "
        "happens to write that page again."
    )
    return Answer(f"it is logged, and {logged}" if report[1] else "it is lost too", because)


def _forgot_by_hand(vm: WatchedVm, logged: int) -> bool:
    """Whether vCPU 0 has forgotten a page of those that it had read, and neither a flush nor an event of its own is why."""
    known = {gfn for _, gfn, _ in vm.vcpu[0].tlb.writable()} | {e.gfn for e in vm.log[logged:] if e.actor == "vCPU0"}
    return not vm.was_flushed and not known.issuperset(range(BASE_GFN, BASE_GFN + PAGES))


def _reach(calls: list[Operation], slot: MemorySlot) -> bool:
    """Whether one of the host's calls is about pages of ``slot``, perhaps among others."""
    ranges = [gfns for call in calls for gfns in getattr(call, "ranges", ())]
    return any(start < slot.end_gfn and slot.base_gfn < end for start, end in ranges)


@checker
def check_01_1(touch: Run) -> str:
    """One access between ageing and enabling, and no write is missed."""
    kernel = Kernel.v5_19
    vm = aged(Hardware.ept(ad_bits=False), kernel)
    slot, logged = vm.memslots.slots[0, 0], len(vm.log)
    touch(vm)
    events = [e for e in vm.log[logged:] if e.step in ACCESSES]
    if len({(e.actor, e.gfn) for e in events}) != 1 or vm.counters.flushes:
        return "exactly one vCPU must touch exactly one page, and nothing else may happen"
    if slot_was_touched(vm, slot):
        return "your function changes slot 0; leave that to the check, which enables logging after your access"
    if events[-1].gfn not in range(slot.base_gfn, slot.end_gfn):
        return "the page that you touch is in no slot"
    if events[-1].note == Outcome.HIT.value:
        return "your access never reached KVM, because it was a TLB hit; whose TLB is stale?"
    if vm.kernel is not kernel:
        return REPLACED
    if _forgot_by_hand(vm, logged):
        return BY_HAND
    enable(vm)
    for gfn in range(BASE_GFN, BASE_GFN + PAGES):
        vm.vcpu[0].write(gfn)
    missed = len(vm.missed_dirty(0))
    return f"{missed} writes are still missed; which access makes an SPTE writable again?" if missed else ""


@checker
def check_01_2(run: Run) -> str:
    """Exactly five of sixteen pages missed, on v5.19 without A/D bits."""
    kernel = Kernel.v5_19
    vm = WatchedVm(Hardware.ept(ad_bits=False), kernel, vcpus=2)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES)
    run(vm)
    if vm.kernel is not kernel:
        return REPLACED
    if (0, 0) not in vm.memslots.slots or not vm.memslots.slots[0, 0].logs_dirty:
        return "your run must leave dirty logging enabled"
    enabled = max(i for i, e in enumerate(vm.log) if (e.step, e.note) == ("return_to_user_space", "slot 0"))
    retired, slot = (Outcome.HIT.value, Outcome.WALK.value), vm.memslots.slots[0, 0]
    written = {e.gfn for e in vm.log[enabled:] if e.step == "write" and e.note in retired and e.gfn in slot}
    if len(written) != PAGES:
        return (
            f"{len(written)} pages of the slot are written after logging is enabled; all {PAGES} must be written then"
        )
    if vm.was_flushed_by_hand:
        return BY_HAND
    missed = len(vm.missed_dirty(0))
    if not missed and vm.enabling_flushed:
        return "no write is missed: enabling flushed. Which SPTE was still writable then?"
    entries = "for how many pages has a TLB a writable entry when logging is enabled?"
    return "" if missed == 5 else f"{missed} writes are missed, not 5; {entries}"


@checker
def check_01_3(rescue: Run) -> str:
    """Save the write without coming near slot 0."""
    kernel = Kernel.v5_19
    vm = aged(Hardware.ept(ad_bits=False), kernel)
    vm.set_user_memory_region(slot=1, base_gfn=0x1000, npages=8)
    vm.vcpu[1].write(0x1000)
    slot, logged, spte = vm.memslots.slots[0, 0], len(vm.log), vm.spte(BASE_GFN)
    before = set(vm.flushes_of)
    rescue(vm)
    if vm.kernel is not kernel:
        return REPLACED
    events, calls = vm.log[logged:], [op for op in vm.flushes_of if op not in before]
    zapped_all = any(e.step == "kvm_mmu_zap_all_fast" for e in events)  # deleting slot 1 does, and is a fair answer
    changed = vm.spte(BASE_GFN) != spte and not zapped_all
    if changed or slot_was_touched(vm, slot) or any(e.gfn in slot for e in events) or _reach(calls, slot):
        return "your rescue touches slot 0 or its pages; stay away from them"
    if vm.was_flushed_by_hand or _forgot_by_hand(vm, logged):
        return BY_HAND
    enable(vm)
    vm.vcpu[0].write(BASE_GFN)
    return "the write is missed; what else flushes the whole VM's TLBs?" if len(vm.missed_dirty(0)) else ""
