"""Exercises and questions of chapter 02."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from kvmbook.exercises.mechanism import Answer, checker, question
from kvmbook.model import ClearDirtyLog, GetDirtyLog, Hardware, Kernel, MemoryRegion, Outcome, Vm
from kvmbook.scenes import BASE_GFN, ProtectFirst, errno_of, harvest, logged_vm, region

# ---- questions -------------------------------------------------------------------------------------------------------


@question(
    "in this report", "in the next report", "in both", "in neither: it came too late for one, too early for the other"
)
def quiz_02_1() -> Answer:
    """Page 1 was written. GET takes its bit. Now, before GET takes W from the page's SPTE, the guest writes the page again.
    In which report is this second write?"""
    seen = harvest("GET clears", "page 1", "bits read")
    now, later = 1 in seen.now, 1 in seen.next
    option = "in both" if now and later else "in this report" if now else "in the next report"
    if seen.missed:
        option = "in neither: it came too late for one, too early for the other"
    because = (
        "The write sets no bit, and needs none: the page is in this report already, and user space reads the page after "
        "GET returns, so what it reads has both writes."
    )
    return Answer(option, because)


@question("no page: nothing was written", "page 1", "all pages of the slot")
def quiz_02_2() -> Answer:
    """Slot 0 logs. The guest writes page 1 of it, and a GET reports that page. User space deletes slot 1, elsewhere in guest
    memory. Then the guest reads page 1. What does the next GET of slot 0 report?"""
    vm = logged_vm()
    vm.set_user_memory_region(slot=1, base_gfn=0x1000, npages=64)
    vm.vcpu[0].write(BASE_GFN + 1)
    vm.get_dirty_log(0)
    vm.set_user_memory_region(slot=1)
    vm.vcpu[0].read(BASE_GFN + 1)
    report = np.flatnonzero(vm.get_dirty_log(0)).tolist()
    because = (
        "The deletion zaps all SPTEs of the VM, also slot 0's. So page 1 is not mapped when it is read; KVM maps it "
        "writable, and sets the bit. The log names too much, as it may."
    )
    options = {(): "no page: nothing was written", (1,): "page 1"}
    return Answer(options.get(tuple(report), "all pages of the slot"), because)


@question(
    "the call is refused with EINVAL",
    "all 64 pages are write-protected again",
    "one page is cleared and protected, the others are left alone",
)
def quiz_02_3() -> Answer:
    """One page of 64 is dirty. User space calls CLEAR with all 64 bits set. What happens?"""
    vm = logged_vm("manual protect", npages=64)
    vm.vcpu[0].write(BASE_GFN + 1)
    clear = ClearDirtyLog(0, 0, 64, np.ones(64, bool))
    if errno_of(lambda: vm.run(clear)) != "0":
        return Answer("the call is refused with EINVAL", "")
    alone = "one page is cleared and protected, the others are left alone"
    option = alone if clear.taken.tolist() == [1 << 1] else "all 64 pages are write-protected again"
    because = (
        "CLEAR takes only bits that are asked for and set. Why not to ask for all is the last of the six questions."
    )
    return Answer(option, because)


# ---- 1: predict errno ------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """One call to KVM, to be put to `vm_02_1`: the ioctl's name and its argument's fields."""

    ioctl: str
    fields: dict[str, int]

    def put_to(self, vm: Vm) -> None:
        """Make the call. CLEAR asks for all pages that it speaks of. OSError if it is refused."""
        if self.ioctl == "SET_USER_MEMORY_REGION":
            vm.kvm_set_user_memory_region(**self.fields)
        elif self.ioctl == "GET_DIRTY_LOG":
            vm.get_dirty_log(**self.fields)
        else:
            vm.clear_dirty_log(**self.fields, bitmap=np.ones(self.fields["num_pages"], bool))

    def __str__(self) -> str:
        said = (f"{name}={value:#x}" if value > 0xFFFF else f"{name}={value}" for name, value in self.fields.items())
        return f"{self.ioctl}({', '.join(said)})"


def vm_02_1() -> Vm:
    """Slot 0: 128 pages from gfn 0x100, not logging. Slot 1: 100 pages from gfn 0x200, logging."""
    vm = Vm(Hardware.ept(ad_bits=False), Kernel.v6_0)
    vm.set_user_memory_region(slot=0, base_gfn=0x100, npages=128)
    vm.set_user_memory_region(slot=1, base_gfn=0x200, npages=100, log_dirty_pages=True)
    return vm


def _set(call: MemoryRegion) -> Call:
    return Call("SET_USER_MEMORY_REGION", call._asdict())


def _clear(slot: int, first_page: int, num_pages: int) -> Call:
    return Call("CLEAR_DIRTY_LOG", {"slot": slot, "first_page": first_page, "num_pages": num_pages})


def errno_02_1(call: Call) -> str:
    """The errno that a fresh `vm_02_1` answers ``call`` with, by name; "0" if it succeeds."""
    vm = vm_02_1()
    return errno_of(lambda: call.put_to(vm))


def calls_02_1(seed: int = 1) -> list[Call]:
    """Six calls for exercise 1, others for each ``seed``, with four different answers among them."""
    draw = random.Random(seed)
    calls = _draw_calls(draw)
    while len({errno_02_1(call) for call in calls}) < 4:
        calls = _draw_calls(draw)
    return calls


def _draw_calls(draw: random.Random) -> list[Call]:
    """One call of each pair, with numbers drawn, in drawn order."""
    free, pages, odd = draw.randrange(2, 10), draw.choice((16, 32, 48)), draw.randrange(1, 4096)
    pairs = [
        (_set(region(free, 0, 0x200 - pages, pages)), _set(region(free, 0, 0x200 - pages, pages + 1))),
        (_set(region(free, 4, 0x200, pages)), _set(region(free, 1, 0x200 + odd / 4096, pages))),
        (_set(region(0, 0, 0x200, 128, 0x7F00_0010_0000)), _set(region(0, 2, 0x100, 128))),
        (_set(region(free, 0, 0x100, 0)), _set(region(1, 0, 0x200, 100))),
        (Call("GET_DIRTY_LOG", {"slot": draw.choice((0, free))}), Call("GET_DIRTY_LOG", {"slot": 40000 + free})),
        (_clear(1, 64, 36), _clear(draw.choice((1, free)), 32, 36)),
    ]
    calls = [draw.choice(pair) for pair in pairs]
    draw.shuffle(calls)
    return calls


@checker
def check_02_1(answer: Sequence[str], seed: int = 1) -> str:
    """Each call's errno by name, or "0"; every call is put to a fresh VM."""
    calls = calls_02_1(seed)
    if isinstance(answer, str) or len(answer) != len(calls):
        return f'give a list of {len(calls)} names, one for each call, like ["0", "EINVAL", ...]'
    for number, (given, call) in enumerate(zip(answer, calls, strict=True), 1):
        if not isinstance(given, str):
            return f'write the names as strings, also "0"; the answer to call {number} is {given!r}'
        if given not in ("0", "EINVAL", "EEXIST", "ENOENT", "ENXIO"):
            return f'{given!r} is none of "0", "EINVAL", "EEXIST", "ENOENT", "ENXIO"'
        if given != errno_02_1(call):
            return f"call {number} is not answered with {given}; go down its checks in order and stop at the first that fails"
    return ""


# ---- 2: user space's loop --------------------------------------------------------------------------------------------

SLOT_PAGES = 200
Loop = Callable[[Vm, Callable[[int], None]], Any]


class BusyVm(Vm):
    """A VM whose guest goes on writing while user space talks to KVM, and whose every page has a version: ``here`` the
    guest's, ``there`` the one that was sent last. ``longest``: the most pages that one CLEAR spoke of. ``named``: the pages
    that a report has named since they were sent last; ``unasked``: how many were sent without. ``turns``: how often the
    guest goes on before it rests, so that a loop which waits for an empty report ends.

    For the hints: ``news``, the pages that a report has named since a CLEAR took their bits last; ``blind``, those whose
    bits a CLEAR took last without a report having named them; ``cleared`` and ``copied``, when each page was last, counted
    in calls."""

    def __init__(self) -> None:
        super().__init__(Hardware.ept(ad_bits=False), Kernel.v6_0)
        self.enable_manual_dirty_log_protect()
        self.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=SLOT_PAGES, log_dirty_pages=True)
        self.here, self.there = [0] * SLOT_PAGES, [0] * SLOT_PAGES
        self.draw, self.turns, self.longest, self.sent = random.Random(2), 0, 0, 0
        self.named, self.unasked = set[int](), 0
        self.news, self.blind = set[int](), set[int]()
        self.calls, self.cleared, self.copied = 0, [0] * SLOT_PAGES, [0] * SLOT_PAGES

    def guest_writes(self, pages: Sequence[int]) -> None:
        for page in pages:
            self.vcpu[0].write(BASE_GFN + page)
            self.here[page] += 1

    def guest_goes_on(self) -> None:
        """Meanwhile: pages that are dirty already, and pages that are not."""
        if self.turns:
            self.turns -= 1
            dirty = np.flatnonzero(self.dirty_bitmap()).tolist()
            again = self.draw.sample(dirty, min(2, len(dirty)))
            self.guest_writes([*again, *self.draw.sample(range(SLOT_PAGES), 2)])

    def get_dirty_log(self, slot: int = 0) -> np.ndarray:
        report = super().get_dirty_log(slot)
        self.guest_goes_on()
        reported = set(np.flatnonzero(report).tolist())
        self.named |= reported
        self.news |= reported
        return report

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, bitmap: np.ndarray) -> None:
        self.guest_goes_on()
        dirty = set(np.flatnonzero(self.dirty_bitmap()).tolist())
        super().clear_dirty_log(slot, first_page, num_pages, bitmap)
        self.calls += 1
        for page in dirty - set(np.flatnonzero(self.dirty_bitmap()).tolist()):
            self.cleared[page] = self.calls
            (self.blind.discard if page in self.news else self.blind.add)(page)
            self.news.discard(page)
        self.longest = max(self.longest, num_pages)
        self.guest_goes_on()

    def send(self, page: int) -> None:
        """User space's part: copy a page to the destination."""
        if not 0 <= page < SLOT_PAGES:
            raise ValueError(f"page {page} is not in the slot: send() takes page numbers from 0 to {SLOT_PAGES - 1}")
        self.unasked += page not in self.named
        self.named.discard(page)
        self.calls += 1
        self.there[page], self.copied[page] = self.here[page], self.calls
        self.sent += 1
        if page % 8 == 0:
            self.guest_goes_on()


def _why_old(vm: BusyVm, page: int) -> str:
    """What a loop did to a page of which the destination has an old version."""
    if page in vm.blind:
        return "a CLEAR took its bit, and no report of yours had named the page; which bits do you ask CLEAR for?"
    if vm.copied[page] < vm.cleared[page] and not vm.dirty_bitmap()[page]:
        return "you copied it, and then you had its bit cleared; what may the guest have done between the two?"
    if page in vm.named:
        return "a report has named it, and you have not sent it; do you go through all of the slot?"
    return "no report has named it since the guest wrote it; do you ask for a report in each round?"


@checker
def check_02_2(loop: Loop) -> str:
    """Four harvests while the guest writes, one after it stopped, one more that must find nothing."""
    vm = BusyVm()
    for _ in range(4):
        vm.guest_writes([0, 63, 64, 127, 192, 199, *vm.draw.sample(range(SLOT_PAGES), 8)])
        vm.turns = 100
        loop(vm, vm.send)
    if vm.longest > 64:
        return f"one CLEAR spans {vm.longest} pages; let no CLEAR span more than 64"
    vm.turns = 0
    loop(vm, vm.send)
    old = [page for page in range(SLOT_PAGES) if vm.here[page] != vm.there[page]]
    if old:
        why = _why_old(vm, old[0])
        return f"the guest has stopped, and {len(old)} pages of the destination are old. One is page {old[0]}: {why}"
    if vm.unasked:
        return f"{vm.unasked} times you send a page that no report has named since you sent it last"
    sent = vm.sent
    loop(vm, vm.send)
    if vm.sent > sent:
        return f"the guest has written nothing more, and you send {vm.sent - sent} pages again; which call takes their bits?"
    writable = [page for page in range(SLOT_PAGES) if vm.fmt.is_writable_pte(vm.spte(BASE_GFN + page))]
    return f"page {writable[0]} is still writable, though you sent it: it was never armed again" if writable else ""


# ---- 3: another order ------------------------------------------------------------------------------------------------


@checker
def check_02_3(run: Callable[[Vm, GetDirtyLog], Any]) -> str:
    """Lose a write by a GET that protects first and takes the bit afterwards."""
    kernel = Kernel.v6_0
    vm = Vm(Hardware.ept(ad_bits=False), kernel, vcpus=2)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=64, log_dirty_pages=True)
    vm.vcpu[0].write(BASE_GFN)
    get = ProtectFirst(0)
    logged = len(vm.log)
    run(vm, get)
    if vm.kernel is not kernel or vm.memslots.slots[0, 0].base_gfn != BASE_GFN:
        return "your run has replaced the VM's kernel or its slot; keep those that you are given"
    if not get.started:
        return "begin the harvest that you are given with vm.start(get), and do its steps with vm.step(get)"
    if vm.in_flight:
        return f"{vm.in_flight[0].who} has not finished: its next step is {vm.in_flight[0].todo[0]}; finish every operation"
    if len(vm.missed_dirty(0)):
        return ""
    steps = [event.step for event in vm.log[logged:]]
    during = vm.log[logged + steps.index("find_words") : logged + steps.index("copy_to_user")]
    writes = [event for event in during if event.step == "write"]
    if not writes:
        return "nobody writes while the harvest runs"
    if all(event.note == Outcome.HIT.value for event in writes):
        return (
            "your write in the middle is a TLB hit, which leaves the SPTE alone; whose TLB has no entry for the page?"
        )
    return "no write is missed; when is the SPTE writable while the bit is clear, and which vCPU could write then?"
