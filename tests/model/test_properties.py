"""Random operations, whole and step by step, on every kind of hardware: all invariants after each step.

`Kernel.v6_0` and `Kernel.v6_18` keep all of them. `Kernel.v5_19` on EPT without A/D bits does not: the last test says that
the same search finds a lost write there, so that it could have found one here.
"""

from contextlib import suppress

import pytest
from conftest import BASE, HARDWARE
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvmbook import FlushPolicy, Kernel, Vm
from kvmbook.model import (
    USER_BASE,
    ClearDirtyLog,
    ClearFlushYoung,
    ClearYoung,
    GetDirtyLog,
    InvalidateRange,
    MemoryRegion,
    PageFault,
    ResetDirtyRings,
    SetUserMemoryRegion,
    TrackGuestPageTable,
    check,
    to_bits,
)

VCPUS = 2
PAGES = 1024 + 64 + 5
SPOTS = [0, 0, 0, 1, 64, 512, PAGES - 1]  # few, and one of them hot, so that actors meet
spots = st.sampled_from(SPOTS).map(lambda page: BASE + page)
cpus = st.integers(0, VCPUS - 1)
kinds = st.sampled_from(["read", "write", "write", "fetch"])


class AnyVm(RuleBasedStateMachine):
    """Two vCPUs, one slot of 2M + 2M + 69 pages, and everybody who can touch it."""

    kernel = Kernel.v6_0
    hardware_names = tuple(HARDWARE)

    @initialize(data=st.data())
    def build(self, data):
        hardware = HARDWARE[data.draw(st.sampled_from(self.hardware_names))]
        pml = {"pml_entries": 3} if hardware.pml_entries else {}
        guests = {True: [None, "ept", "ept without A/D", "tdp"], False: [None, "npt", "tdp"]}
        nested = data.draw(st.sampled_from(guests["EPT" in hardware.name] if hardware.tdp else [None]))
        self.vm = Vm(
            hardware.with_(**pml),
            self.kernel,
            VCPUS,
            page_size=data.draw(st.sampled_from(["4K", "2M"])),
            eager_page_split=data.draw(st.booleans()),
            nx_huge_pages=data.draw(st.booleans()),
            nested=nested,
        )
        self.vm.pages_per_step = data.draw(st.sampled_from([None, 512]))
        log_kind = data.draw(st.sampled_from(["bitmap", "bitmap", "manual", "initially set", "ring"]))
        if log_kind == "ring":
            self.vm.enable_dirty_ring(4096)
        elif log_kind != "bitmap":
            self.vm.enable_manual_dirty_log_protect(initially_set=log_kind == "initially set")
        self.vm.run(self.region(0, BASE))
        self.roots = [False, True] if nested else [False]
        self.cow = data.draw(st.booleans())
        if self.cow and self.vm.host.level == 1:
            self.vm.write_protect_host_page(BASE)

    def region(self, flags, where):
        """An ioctl that creates or changes the slot, moves it far away, or (None) deletes it."""
        pages, base = (0, BASE) if where is None else (PAGES, where)
        return SetUserMemoryRegion(MemoryRegion(0, flags, base << 12, pages << 12, USER_BASE + (BASE << 12)))

    # ---- whole operations. A call may be refused, as the slot comes and goes; a refused call changes nothing.

    @rule(cpu=cpus, kind=kinds, gfn=spots, data=st.data())
    def access(self, cpu, kind, gfn, data):
        if self.vm.vcpu[cpu].fault is None:
            self.vm.vcpu[cpu].complete(kind, gfn, data.draw(st.sampled_from(self.roots)))

    @rule(on=st.sampled_from([1, 1, 0]))
    def enable_or_disable(self, on):
        with suppress(OSError):
            self.vm.run(self.region(on, BASE))

    @rule(on=st.sampled_from([1, 0]), where=st.sampled_from([None, BASE, BASE + 0x10000]))
    def delete_move_or_create(self, on, where):
        with suppress(OSError):
            self.vm.run(self.region(on, where))

    @rule(first=spots, second=spots)
    def clear_young(self, first, second):
        self.vm.clear_young(min(first, second), max(first, second) + 1)

    @rule()
    def age_all(self):
        self.vm.clear_young(BASE, BASE + PAGES)

    @rule(gfn=spots)
    def invalidate(self, gfn):
        self.vm.invalidate_range(gfn, gfn + 1)

    @precondition(lambda self: self.vm.host.level == 1)
    @rule(gfn=spots, writable=st.booleans())
    def change_pte(self, gfn, writable):
        if self.vm.memslots.gfn_to_memslot(gfn):
            self.vm.change_pte(gfn, writable)

    @rule(cpu=cpus, gfn=spots)
    def evict(self, cpu, gfn):
        self.vm.vcpu[cpu].evict(gfn)

    @rule(cpu=cpus)
    def exit(self, cpu):
        self.vm.vcpu[cpu].exit()

    @rule()
    def harvest(self):
        with suppress(OSError):
            if self.vm.dirty_ring_size:
                for vcpu in self.vm.vcpu:
                    vcpu.dirty_ring.harvest()
                self.vm.reset_dirty_rings()
            else:
                report = self.vm.get_dirty_log(0)
                if self.vm.manual_protect:
                    self.vm.clear_dirty_log(0, 0, PAGES, report)

    @rule(cpu=cpus)
    def harvest_ring_only(self, cpu):
        if self.vm.dirty_ring_size:
            self.vm.vcpu[cpu].dirty_ring.harvest()

    @rule(gfn=spots)
    def track(self, gfn):
        if self.vm.memslots.gfn_to_memslot(gfn):
            self.vm.track_guest_page_table(gfn)

    @rule(cpu=cpus, gfn=spots)
    def host_writes(self, cpu, gfn):
        ring = self.vm.vcpu[cpu].dirty_ring
        if self.vm.memslots.gfn_to_memslot(gfn) and (ring is None or not ring.soft_full):
            with suppress(OSError):
                self.vm.kvm_write_guest(gfn, cpu)

    @rule(gfn=spots)
    def untrack(self, gfn):
        self.vm.untrack_guest_page_table(gfn)

    # ---- the same in steps

    @rule(cpu=cpus, kind=kinds, gfn=spots, data=st.data())
    def attempt(self, cpu, kind, gfn, data):
        if self.vm.vcpu[cpu].fault is None:
            self.vm.vcpu[cpu].attempt(kind, gfn, data.draw(st.sampled_from(self.roots)))

    @precondition(lambda self: len(self.vm.in_flight) < 5)
    @rule(data=st.data(), gfn=spots, pages=st.sampled_from([1, 1, 512]))
    def start(self, data, gfn, pages):
        choices = [ClearYoung(gfn, gfn + pages), ClearFlushYoung(gfn, gfn + pages), InvalidateRange(gfn, gfn + pages)]
        if self.vm.memslots.gfn_to_memslot(gfn):
            choices.append(TrackGuestPageTable(gfn))
        choices += [self.region(flags, BASE) for flags in (0, 1, 1)] + [
            self.region(1, BASE + 0x10000),
            self.region(0, None),
        ]
        if self.vm.dirty_ring_size:
            choices.append(ResetDirtyRings())
        else:
            choices.append(GetDirtyLog(0))
            if 0 in self.vm.told and not any(op.needs_slots_lock for op in self.vm.in_flight):
                told = to_bits(self.vm.told[0], PAGES)  # user space clears only what it was told of
                choices += [ClearDirtyLog(0, 0, PAGES, told), ClearDirtyLog(0, 512, 64, told[512:576])]
        with suppress(OSError):
            self.vm.start(data.draw(st.sampled_from(choices)))

    @precondition(lambda self: self.vm.in_flight)
    @rule(data=st.data())
    def step(self, data):
        vm = self.vm
        ready = [op for op in vm.in_flight if not op.waits_for(vm, op.todo[0])]
        assert ready, "everybody waits for somebody: a deadlock"
        with suppress(OSError):
            vm.step(data.draw(st.sampled_from(ready)))

    @precondition(lambda self: self.vm.in_flight)
    @rule(data=st.data())
    def finish(self, data):
        with suppress(OSError):
            self.vm.run(data.draw(st.sampled_from(self.vm.in_flight)))

    @precondition(lambda self: self.vm.in_flight)
    @rule()
    def finish_all(self):
        while self.vm.in_flight:
            with suppress(OSError):
                self.vm.run(self.vm.in_flight[0])

    @invariant()
    def all_invariants(self):
        if hasattr(self, "vm"):
            check(self.vm)
            for vcpu in self.vm.vcpus:
                assert vcpu.fault is None or isinstance(vcpu.fault, PageFault)


QUICK = settings(
    max_examples=150,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("kernel", [Kernel.v6_0, Kernel.v6_18], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("name", HARDWARE)
def test_v6_0_and_v6_18_never_lose_a_write(name, kernel):
    machine = type(f"On_{name}", (AnyVm,), {"hardware_names": (name,), "kernel": kernel})
    run_state_machine_as_test(machine, settings=QUICK)


@pytest.mark.parametrize(
    ("name", "policy"),
    [("ept_no_ad", FlushPolicy.IF_CHANGED), ("ept_no_ad_legacy", FlushPolicy.IF_CHANGED), ("npt", FlushPolicy.NEVER)],
)
def test_the_same_search_finds_the_lost_write(name, policy):
    kernel = Kernel.v5_19.with_(flush=policy)
    machine = type(f"Losing_{name}", (AnyVm,), {"hardware_names": (name,), "kernel": kernel})
    with pytest.raises(AssertionError, match=r"no report will (ever )?say so"):
        run_state_machine_as_test(machine, settings=settings(QUICK, max_examples=4000, phases=[Phase.generate]))
