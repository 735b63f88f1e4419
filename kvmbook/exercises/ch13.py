"""Exercises and questions of chapter 13."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

from kvmbook.exercises.mechanism import Answer, checker, question
from kvmbook.model import FlushPolicy, Hardware, Outcome, Vm
from kvmbook.scenes import exhibit, hidden_rooms, with_repair
from kvmbook.search import EXHIBITS

# ---- questions -------------------------------------------------------------------------------------------------------


@question("yes", "no")
def quiz_13_1() -> Answer:
    """Room 3's bad kernel guards page tables by asking for W. It runs on a CPU with EPT, under the TDP MMU. Does it do harm
    there?"""
    because = (
        "Its helper is the legacy MMU's; the TDP MMU has one of its own, which asks right. It was room 9 that made the same "
        "mistake there: a rule that is written down twice can be wrong twice."
    )
    return Answer("no" if exhibit(3).look(elsewhere=True).run is None else "yes", because)


@question("yes", "no")
def quiz_13_2() -> Answer:
    """Give room 10's bad kernel, which ages by a plain store, the seed's repair: enabling always flushes. Is the write still
    lost?"""
    room = with_repair(10, FlushPolicy.ALWAYS)
    because = (
        "The plain store still leaves W=0 beside a writable TLB entry, but the flush of enabling does not ask what the pass "
        "met. The seed's repair covers room 10 as well, and room 4."
    )
    return Answer("no" if room.look().run is None else "yes", because)


@question("yes", "no")
def quiz_13_3() -> Answer:
    """Room 7's repair makes the split go up to the last page. On shadow paging, where KVM splits nothing here, is the write
    still lost?"""
    because = (
        "The repair is of the split; what the split leaves, the write protection should catch, and it overlooks the same "
        "page. That half is in KVM today: chapter 16."
    )
    return Answer("no" if exhibit(7).look(fixed=True, elsewhere=True).run is None else "yes", because)


# ---- 1: two rooms, one kernel ----------------------------------------------------------------------------------------


@checker
def check_13_1(answer: Sequence[tuple[int, int]]) -> str:
    """The pairs of rooms that have one and the same bad kernel."""
    if isinstance(answer, str) or not all(len(pair) == 2 for pair in answer):
        return "give a list of pairs of rooms, such as [(1, 2)]"
    wanted = {frozenset((one.number, other.number)) for one, other in combinations(EXHIBITS, 2) if one.bad == other.bad}
    said = {frozenset(pair) for pair in answer}
    for pair in answer:
        if frozenset(pair) not in wanted:
            return f"rooms {pair[0]} and {pair[1]}: ask exhibit({pair[0]}).bad.differs_from(exhibit({pair[1]}).bad)"
    return "" if said == wanted else f"{len(said)} found; there are more"


# ---- 2: between the pass and its flush -------------------------------------------------------------------------------

GFN = 0x200


@checker
def check_13_2(run: Callable[[Vm], Any]) -> str:
    """A run that writes a guarded page table unseen on room 1's bad kernel, and on no good one."""
    if not callable(run):
        return "give a function of one VM"
    first, third = exhibit(1), exhibit(3)
    for kernel, wanted in ((first.bad, True), (first.good, False), (third.good, False)):
        vm = Vm(Hardware.shadow(), kernel)
        vm.set_user_memory_region(slot=0, base_gfn=GFN, npages=1, log_dirty_pages=True)
        vm.vcpu[0].write(GFN)
        run(vm)
        if GFN not in vm.write_tracked:
            return f"gfn {GFN:#x} is not guarded at the end: vm.track_guest_page_table({GFN:#x})"
        how = vm.vcpu[0].write(GFN)
        unseen = how in (Outcome.HIT, Outcome.WALK)
        if wanted and not unseen:
            return f"the check's last write ends as {how}: KVM sees it. Does a TLB still hold W when the guard comes?"
        if unseen and not wanted:
            return "it does harm on a good kernel too"
    return ""


# ---- 3: kernels without names ----------------------------------------------------------------------------------------


@checker
def check_13_3(answer: Sequence[int], seed: int = 13) -> str:
    """The rooms of the three kernels without names."""
    rooms = hidden_rooms(seed)
    if isinstance(answer, str) or len(answer) != len(rooms):
        return f"give a list of {len(rooms)} rooms"
    shows = {
        2: "stop a fast fault before its last step, and look at the SPTE and the bitmap",
        5: "let an aged page be guarded, and read it",
        9: "guard a page that is write-protected for logging, and look at its word",
        11: "age the only page, enable, and write through the old TLB entry",
        12: "let a nested guest on the TDP MMU read a page, enable, and let it write",
    }
    for number, (said, room) in enumerate(zip(answer, rooms, strict=True), 1):
        if said != room:
            would = f"room {said} would show it so: {shows[said]}" if said in shows else "it is one of the five rooms"
            return f"kernel {number}: {would}"
    return ""
