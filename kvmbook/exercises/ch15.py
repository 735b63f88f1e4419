"""Exercises and questions of chapter 15."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvmbook.exercises.mechanism import Answer, checker, question
from kvmbook.model import KVM_MEM_LOG_DIRTY_PAGES, Hardware, Kernel
from kvmbook.real import BASE, RING_GFN, ModelVm, Outside, Said, asking, clear_reports, recorded
from kvmbook.scenes import CPUS, reproduces

PAGES = 64
MACHINE = recorded()
MODEL = MACHINE.model()

# ---- questions -------------------------------------------------------------------------------------------------------


OPENING = {
    "unpatched alone": "that its kernel is not patched, and no more",
    "both": "that its kernel is not patched, and its CPU has no A/D bits",
    "neither": "nothing about its kernel",
}


@question(*OPENING.values())
def quiz_15_1() -> Answer:
    """Somebody runs chapter 1's ten lines on a machine of which you know nothing, and the write is lost. If chapter 1's bug
    is to blame, what have you learned?"""
    found = {(cpu, kernel.name) for cpu in CPUS for kernel in (Kernel.v5_19, Kernel.v6_0) if reproduces(cpu, kernel)}
    because = (
        "A pass says nothing, a loss says much: one cell of the chapter's first table says True, so all of its conditions "
        "held, the ageing too."
    )
    if any(kernel == Kernel.v6_0.name for _, kernel in found):
        return Answer(OPENING["neither"], because)
    without = all("without A/D bits" in cpu for cpu, _ in found)
    return Answer(OPENING["both" if without else "unpatched alone"], because)


@question("1", "2", "3")
def quiz_15_2() -> Answer:
    """Manual protect is off, and the slot logs. The guest writes three pages; then user space says GET, and GET again. By
    how much do these two raise remote_tlb_flush_requests?"""
    with MODEL.vm() as vm:
        _logged(vm)
        for page in range(3):
            vm.vcpu[0].write(BASE + page)
        before = vm.flush_requests
        vm.get_dirty_log(0)
        vm.get_dirty_log(0)
        rise = vm.flush_requests - before
    because = (
        "One request is for all TLBs and all pages: the first GET protects three pages, and asks once. The second finds no "
        "bit, so nothing to protect, and does not ask: GET is not enabling, which since v6.0 always asks."
    )
    return Answer(str(rise), because)


@question("no entry", "one entry", "two entries")
def quiz_15_3() -> Answer:
    """A ring, and manual protect 3. The guest has written a page; logging is enabled, and the guest writes the page again.
    Then the host takes the page away, and the guest writes it once more. What does the ring have now?"""
    with MODEL.vm() as vm:
        _write_log_write(vm, manual=3)
        vm.invalidate_range(RING_GFN, RING_GFN + 1)
        vm.vcpu[0].write(RING_GFN)
        entries = vm.vcpu[0].dirty_ring.harvest()
    because = (
        "The host's page takes the SPTE with it, so the third write faults, and the fault marks the page. The second write "
        "found W, as before, and nobody saw it. This is how such a loss hides on a busy host."
    )
    return Answer({0: "no entry", 1: "one entry"}.get(len(entries), "two entries"), because)


def _write_log_write(vm: Outside, manual: int) -> None:
    vm.enable_dirty_ring(1 << 16)
    vm.enable_cap_manual_dirty_log_protect2(manual)
    vm.set_user_memory_region(slot=0, base_gfn=RING_GFN, npages=PAGES)
    vm.vcpu[0].write(RING_GFN)
    vm.set_user_memory_region(slot=0, base_gfn=RING_GFN, npages=PAGES, log_dirty_pages=True)
    vm.vcpu[0].write(RING_GFN)


# ---- 1: who can tell? ------------------------------------------------------------------------------------------------

CHANNELS = ("flush requests", "bitmap", "ring", "memory")


@dataclass(frozen=True)
class Claim:
    """Something that is so or not so, and a VM in which it is, and one in which it is not, but for that alike."""

    says: str
    run: Callable[[Any, bool], None]
    kernels: tuple[Kernel, Kernel] = (Kernel.v6_0, Kernel.v6_0)
    ring: bool = False
    hardware: Hardware = CPUS["EPT without A/D bits"]

    def seen(self, so: bool) -> dict[str, Any]:
        """What user space finds in each of `CHANNELS` at the end, if the claim holds or does not."""
        vm = ModelVm(self.hardware, self.kernels[not so])
        with Outside(asking(vm)) as outside:
            if self.ring:
                outside.enable_dirty_ring(1 << 16)
            before = outside.flush_requests
            self.run((outside, vm.vm), so)
            return {
                "flush requests": outside.flush_requests - before,
                "memory": [outside.value(BASE + page) for page in range(4)],
                "ring": outside.vcpu[0].dirty_ring.harvest() if self.ring else [],
                "bitmap": [] if self.ring else outside.get_dirty_log(0).tolist(),
            }

    @property
    def told_by(self) -> set[str | None]:
        """The channels that differ; None alone, if there is none."""
        yes, no = self.seen(True), self.seen(False)
        return {channel for channel in CHANNELS if yes[channel] != no[channel]} or {None}


def _logged(vm: Outside) -> None:
    """A slot that logs, whose first four pages are mapped."""
    slot: dict[str, Any] = {"slot": 0, "base_gfn": BASE, "npages": PAGES}
    vm.set_user_memory_region(**slot)
    for page in range(4):
        vm.vcpu[0].write(BASE + page)
    vm.set_user_memory_region(**slot, log_dirty_pages=True)


def _second_flush(both: tuple[Outside, Any], so: bool) -> None:
    vm, _ = both
    _logged(vm)
    vm.set_user_memory_region(slot=0, base_gfn=BASE, npages=PAGES)
    vm.set_user_memory_region(slot=0, base_gfn=BASE, npages=PAGES, log_dirty_pages=True)


def _forgotten(both: tuple[Outside, Any], so: bool) -> None:
    vm, model = both
    _logged(vm)
    vm.vcpu[0].write(BASE)
    if not so:
        model.vcpu[0].evict(BASE)


def _read(both: tuple[Outside, Any], so: bool) -> None:
    vm, _ = both
    _logged(vm)
    vm.vcpu[0].read(BASE + (8 if so else 2))


def _order(both: tuple[Outside, Any], so: bool) -> None:
    vm, _ = both
    _logged(vm)
    for page in (1, 2) if so else (2, 1):
        vm.vcpu[0].write(BASE + page)


def _twice(both: tuple[Outside, Any], so: bool) -> None:
    vm, _ = both
    _logged(vm)
    vm.vcpu[0].write(BASE)
    if so:
        vm.vcpu[0].write(BASE)
    else:
        vm.vcpu[0].read(BASE)


def _tracked(both: tuple[Outside, Any], so: bool) -> None:
    vm, _ = both
    _logged(vm)
    if so:
        vm.clear_young(BASE, BASE + 1)


CLAIMS = (
    Claim(
        "A second enabling flushes, though all pages are protected already.", _second_flush, (Kernel.v6_0, Kernel.v5_19)
    ),
    Claim("The vCPU's TLB still has an entry for page 0.", _forgotten),
    Claim("A read has marked a page.", _read),
    Claim("The guest has written page 1 before page 2.", _order, ring=True),
    Claim("Between two reports the guest has written page 0 twice, not once.", _twice),
    Claim("The SPTE of page 0 is access-tracked, not only write-protected.", _tracked),
)


def claims_15_1() -> list[str]:
    """The six claims of exercise 1."""
    return [f"{number}. {claim.says}" + " (The VM has a ring.)" * claim.ring for number, claim in enumerate(CLAIMS, 1)]


@checker
def check_15_1(answer: Sequence[str | None]) -> str:
    """For each claim the channel by which user space can tell, or None."""
    if isinstance(answer, str) or len(answer) != len(CLAIMS):
        return f"give a list of {len(CLAIMS)}, each one of {', '.join(map(repr, CHANNELS))} or None"
    for number, (given, claim) in enumerate(zip(answer, CLAIMS, strict=True), 1):
        if given is not None and given not in CHANNELS:
            return f"claim {number}: {given!r} is none of {', '.join(CHANNELS)}, and not None"
        told = claim.told_by
        if given in told:
            continue
        if None in told:
            return f"claim {number}: if it holds or not, {given} is the same; who else knows?"
        if given is None:
            return f"claim {number}: user space can tell; make the claim false, and look what changes"
        return f"claim {number}: {given} is the same whether it holds or not"
    return ""


# ---- 2: which kernel? ------------------------------------------------------------------------------------------------

HOSTS = {name: CPUS[name] for name in ("EPT with A/D bits", "NPT", "shadow paging")}


@checker
def check_15_2(run: Callable[[Outside], Any]) -> str:
    """A run whose answer is another under v5.19 than under v6.0, wherever A/D bits are."""
    if not callable(run) or len(inspect.signature(run).parameters) != 1:
        return "give a function of one VM"
    for cpu, hardware in HOSTS.items():
        answers = []
        for kernel in (Kernel.v5_19, Kernel.v6_0, Kernel.v6_0):
            with MACHINE.model(hardware, kernel).vm() as vm:
                answers.append(repr(run(vm)))
                if not vm.said:
                    return "your run makes no call; how can it know where it is?"
        old, new, again = answers
        if new != again:
            return "two machines that are alike give two answers; your run must depend on its VM alone"
        if old == new:
            return f"{cpu}: both kernels answer {old}; {_why_alike(vm.said)}"
    return ""


def _why_alike(said: Sequence[Said]) -> str:
    """What a run that tells no kernels apart has not asked for."""
    made, logging = set[int](), False
    for one in said:
        if one.name == "manual_protect" and one.arguments[0] & 2:
            return "with INITIALLY_SET nothing is protected, so neither asks for a flush"
        if one.name == "memory_region":
            slot, flags, *_ = one.arguments
            if flags & KVM_MEM_LOG_DIRTY_PAGES and slot not in made:
                return "the slot is made with the log on: enabling is a change of the flags of one that is there"
            made.add(slot)
            logging |= bool(flags & KVM_MEM_LOG_DIRTY_PAGES)
    if not logging:
        return "the patch is about enabling the log, and your run never does"
    if not any(one.name == "flush_requests" for one in said):
        return "no report and no errno differs; what does the patch do that can be counted?"
    return "what does v6.0 do when a pass finds nothing to do?"


# ---- 3: controls -----------------------------------------------------------------------------------------------------

LOSING: dict[str, Any] = {"cleared": (0x3FF, 0x400), "written": 0x400, "manual": 3, "page_size": "2M"}


def _reported(run: Mapping[str, Any]) -> bool:
    arguments = dict(run)
    with MODEL.vm(page_size=arguments.pop("page_size")) as vm:
        return clear_reports(vm, **arguments)


@checker
def check_15_3(controls: Sequence[Mapping[str, Any]]) -> str:
    """Three runs, each with one thing other than in `LOSING`, whose write is reported and could have been lost."""
    if isinstance(controls, Mapping) or len(controls) != 3:
        return "give a list of three dicts"
    changed = set()
    for number, control in enumerate(controls, 1):
        if hint := _why_no_control(control):
            return f"control {number}: {hint}"
        changed |= set(control)
    if len(changed) < 3:
        return "two of your controls change the same thing; a third condition of the loss is untested"
    return ""


def _why_no_control(control: Mapping[str, Any]) -> str:
    if set(control) - set(LOSING):
        return f"a run has {', '.join(LOSING)}, and no {', '.join(sorted(set(control) - set(LOSING)))}"
    if len(control) != 1:
        return f"it changes {len(control)} things; if it comes out otherwise, which of them was it?"
    run = {**LOSING, **control}
    if run == LOSING:
        return "that is the losing run itself"
    if run["written"] not in run["cleared"]:
        return "the page that is written was not cleared, so its bit is still set: it is reported whatever KVM does"
    if not all(gfn in range(0x3FF, 0x3FF + 64) for gfn in run["cleared"]):
        return "the CLEAR is of 64 pages, from 0x3ff"
    if run["page_size"] not in ("4K", "2M") or run["manual"] not in (0, 1, 3):
        return "page_size is 4K or 2M, manual 0, 1 or 3"
    return "" if _reported(run) else "the write is still lost"
