"""Exercises and questions of chapter 01."""

from kvmbook.exercises.mechanism import Answer, Run, checker, question
from kvmbook.exercises.vms import PAGES, aged, enable, slot_was_touched
from kvmbook.model import ACCESSES, FlushPolicy, Hardware, Kernel, Outcome, Vm
from kvmbook.scenes import BASE_GFN, write_after_enabling


@question("yes", "no")
def quiz_01_1() -> Answer:
    """The CPU has no A/D bits, and the guest had only read a page when the host aged it. Can a write to that page, after
    logging was enabled, be lost under v5.19?"""
    lost = write_after_enabling("off", FlushPolicy.IF_CHANGED).missed  # that guest only reads first
    because = (
        "A read is enough: KVM maps the page writable if the host allows it, and the TLB copies all rights of the SPTE."
    )
    return Answer("yes" if lost else "no", because)


@question("yes", "no")
def quiz_01_2() -> Answer:
    """In the chapter's ten lines, let the host age the page with clear_flush_young() instead of clear_young(). Is the guest's
    write still lost under v5.19?"""
    vm = Vm(Hardware.ept(ad_bits=False), Kernel.v5_19)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES)
    vm.vcpu[0].read(BASE_GFN)
    vm.clear_flush_young(BASE_GFN, BASE_GFN + PAGES)
    enable(vm)
    vm.vcpu[0].write(BASE_GFN)
    return Answer("yes" if len(vm.missed_dirty(0)) else "no", "That call flushes, so no stale copy is left.")


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


@checker
def check_01_1(touch: Run) -> str:
    """One access between ageing and enabling, and no write is missed."""
    vm = aged(Hardware.ept(ad_bits=False), Kernel.v5_19)
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
    enable(vm)
    for gfn in range(BASE_GFN, BASE_GFN + PAGES):
        vm.vcpu[0].write(gfn)
    missed = len(vm.missed_dirty(0))
    return f"{missed} writes are still missed; which access makes an SPTE writable again?" if missed else ""


@checker
def check_01_2(run: Run) -> str:
    """Exactly five of sixteen pages missed, on v5.19 without A/D bits."""
    kernel = Kernel.v5_19
    vm = Vm(Hardware.ept(ad_bits=False), kernel, vcpus=2)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES)
    run(vm)
    if vm.kernel is not kernel:
        return "your run has replaced the VM's kernel; stay with v5.19"
    if (0, 0) not in vm.memslots.slots or not vm.memslots.slots[0, 0].logs_dirty:
        return "your run must leave dirty logging enabled"
    enabled = max(i for i, e in enumerate(vm.log) if (e.step, e.note) == ("return_to_user_space", "slot 0"))
    retired, slot = (Outcome.HIT.value, Outcome.WALK.value), vm.memslots.slots[0, 0]
    written = {e.gfn for e in vm.log[enabled:] if e.step == "write" and e.note in retired and e.gfn in slot}
    if len(written) != PAGES:
        return (
            f"{len(written)} pages of the slot are written after logging is enabled; all {PAGES} must be written then"
        )
    missed = len(vm.missed_dirty(0))
    return (
        "" if missed == 5 else f"{missed} writes are missed, not 5; for how many pages does a TLB have an entry then?"
    )


@checker
def check_01_3(rescue: Run) -> str:
    """Save the write without coming near slot 0."""
    vm = aged(Hardware.ept(ad_bits=False), Kernel.v5_19)
    vm.set_user_memory_region(slot=1, base_gfn=0x1000, npages=8)
    vm.vcpu[1].write(0x1000)
    slot, logged, spte = vm.memslots.slots[0, 0], len(vm.log), vm.spte(BASE_GFN)
    rescue(vm)
    events = vm.log[logged:]
    zapped_all = any(e.step == "kvm_mmu_zap_all_fast" for e in events)  # deleting slot 1 does, and is a fair answer
    changed = vm.spte(BASE_GFN) != spte and not zapped_all
    if changed or slot_was_touched(vm, slot) or any(e.gfn in slot for e in events):
        return "your rescue touches slot 0 or its pages; stay away from them"
    enable(vm)
    vm.vcpu[0].write(BASE_GFN)
    return "the write is missed; what else flushes the whole VM's TLBs?" if len(vm.missed_dirty(0)) else ""
