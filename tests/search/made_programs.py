"""Runs that become C programs, and what each must say on this machine's KVM: for the tests that compile them and that run
them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvmbook import FlushPolicy, Hardware, Kernel, Vm
from kvmbook.real import clear_reports, ring_reports
from kvmbook.search import Action, Grain, Recorder, Script, act, explore, script_of, smallest_vm

SHADOW, NO_AD = Hardware.shadow(), Hardware.ept(ad_bits=False)
LOST, KEPT, CANNOT = 1, 0, 4


class Made(NamedTuple):
    """``says``: the exit codes that are right on a good kernel, or, for a loss of today, where `Claim` says that it is."""

    script: Script
    says: tuple[int, ...] = (KEPT,)
    claim: str | None = None


def found(hardware, kernel, **bounds):
    result = explore(hardware, kernel, **bounds)
    return script_of(hardware, kernel, result.pages, result.vcpus, result.grain, result.trace)


def recorded(run, page_size="4K", vcpus=1, **options):
    recorder = Recorder(Vm(SHADOW, Kernel.v6_0, vcpus, page_size=page_size))
    run(recorder, **options)
    return recorder.script


def fault_across_enabling():
    """A write fault that began before enabling, and maps its page after it: what the grace period is there to prevent."""
    begins = ["enables", "kvm_swap_active_memslots", "synchronize_srcu", "kvm_arch_commit_memory_region"]
    enabling = [*begins, "write_protect_rmap", "flush_always", "return_to_user_space"]
    trace = [
        Action("vCPU0", "writes", 0),
        Action("KVM for vCPU0", "kvm_faultin_pfn"),
        *(Action("user space", step) for step in enabling),
        Action("KVM for vCPU0", "make_spte"),
        Action("KVM for vCPU0", "set_spte"),
        Action("vCPU0", "writes", 0),
    ]
    return script_of(SHADOW, Kernel.v6_0.with_(srcu_grace_period=False), 1, 1, Grain.STEP, trace)


def by_hand(hardware, kernel, pages, vcpus, wishes, amid=None):
    """A run cut by access, in which each ioctl is taken to its end. ``amid``: what comes between, after which step."""
    grain, trace = Grain.ACCESS, []
    vm = smallest_vm(hardware, kernel, pages, vcpus, grain)

    def do(who, what, page=None):
        trace.append(Action(who, what, page))
        act(vm, trace[-1], grain)
        if what in (amid or {}):
            do(*amid[what])

    for wish in wishes:
        do(*wish)
        while vm.in_flight:
            do("user space", vm.in_flight[0].todo[0])
    return script_of(hardware, kernel, pages, vcpus, grain, trace)


def two_vcpus_by_hand():
    """User space's calls on a bitmap that GET clears, accesses of two vCPUs, and what cannot be played."""
    wishes = [(f"vCPU{vcpu}", kind, page) for vcpu in (0, 1) for kind in ("reads", "writes") for page in (0, 1)]
    wishes += [("vCPU1", "forgets", 1), ("user space", "enables"), ("vCPU1", "writes", 1), ("user space", "gets")]
    wishes += [("vCPU0", "writes", 1), ("vCPU0", "exits"), ("user space", "disables"), ("vCPU0", "writes", 0)]
    wishes += [("user space", "enables"), ("vCPU1", "writes", 0)]
    return by_hand(Hardware.ept(pml=True), Kernel.v6_0, 2, 2, wishes)


def aged_amid_enabling():
    wishes = [("vCPU0", "reads", 0), ("host", "ages and flushes", 0), ("vCPU0", "reads", 0)]
    wishes += [("user space", "enables"), ("vCPU0", "writes", 0)]
    return by_hand(NO_AD, Kernel.v5_19, 1, 1, wishes, amid={"synchronize_srcu": ("host", "ages", 0)})


def cleared_by_hand(vm):
    slot = {"base_gfn": 0x100, "npages": 130}
    vm.enable_manual_dirty_log_protect(initially_set=True)
    vm.set_user_memory_region(**slot)
    for gfn in (0x100, 0x110, 0x181):
        vm.vcpu[0].write(gfn)
    vm.set_user_memory_region(**slot, log_dirty_pages=True)
    vm.vcpu[1].write(0x110)
    vm.get_dirty_log(0)
    vm.clear_dirty_log(0, 64, 66, np.arange(66) > 1)
    vm.vcpu[1].write(0x181)
    vm.get_dirty_log(0)
    vm.clear_dirty_log(0, 0, 64, np.ones(64, bool))
    vm.vcpu[0].write(0x110)


def ring_harvested_twice(vm):
    vm.enable_dirty_ring(1 << 16)
    vm.set_user_memory_region(base_gfn=0x100, npages=4)
    vm.vcpu[0].read(0x100)
    vm.set_user_memory_region(base_gfn=0x100, npages=4, log_dirty_pages=True)
    for _ in range(2):
        vm.vcpu[0].write(0x100)
        vm.vcpu[1].write(0x101)
        vm.vcpu[0].dirty_ring.harvest()
        vm.vcpu[1].dirty_ring.harvest()
        vm.reset_dirty_rings()
    vm.vcpu[1].write(0x100)


def programs():
    """By name. The search of those that it finds takes a moment."""
    never = Kernel.v5_19.with_(flush=FlushPolicy.NEVER)
    ring, clear = "lost today: a ring, and initially set", "lost today: CLEAR and a 2M page"
    return {
        "seed": Made(found(NO_AD, Kernel.v5_19), (KEPT, CANNOT)),
        "never_flushed": Made(found(SHADOW, never, without=("ages", "ages and flushes"))),
        "aged_amid_enabling": Made(aged_amid_enabling(), (KEPT, CANNOT)),
        "fast_path_marks_first": Made(found(NO_AD, Kernel.v6_0.with_(fast_path_marks_first=True))),
        "fault_across_enabling": Made(fault_across_enabling()),
        "two_vcpus_by_hand": Made(two_vcpus_by_hand()),
        "cleared_by_hand": Made(recorded(cleared_by_hand, vcpus=2)),
        "ring_harvested_twice": Made(recorded(ring_harvested_twice, vcpus=2)),
        "ring_lost": Made(recorded(ring_reports), (LOST,), ring),
        "ring_manual_1": Made(recorded(ring_reports, manual=1)),
        "ring_manual_0": Made(recorded(ring_reports, manual=0)),
        "clear_lost": Made(recorded(clear_reports, "2M"), (LOST,), clear),
        "clear_second_alone": Made(recorded(clear_reports, "2M", cleared=[0x400])),
        "clear_on_4k": Made(recorded(clear_reports)),
        "clear_not_initially_set": Made(recorded(clear_reports, "2M", manual=1)),
    }
