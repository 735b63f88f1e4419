"""The cheat sheet: bits, helpers, who flushes when, and errnos on one page, all of it asked of the model.

Usage: cheat_sheet.py OUT.md
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kvmbook import Hardware, Kernel, SpteFormat, Vm  # noqa: E402
from kvmbook.model import (  # noqa: E402
    ClearDirtyLog,
    ClearFlushYoung,
    ClearYoung,
    GetDirtyLog,
    InvalidateRange,
    Operation,
    TestYoung,
    TrackGuestPageTable,
)
from kvmbook.scenes import BASE_GFN, HELPERS, LEAVES, NOT_ASKED, errno_of, fields, helper_says, named_words, refusals  # noqa: E402
from tools.function_map import code, table  # noqa: E402

INTRODUCTION = "Made when the book is built, by asking the model. The [glossary](glossary.md) explains the words."

# ---- bits ------------------------------------------------------------------------------------------------------------

FORMATS = {"EPT": SpteFormat.ept(), "EPT, no A/D": SpteFormat.ept(ad_bits=False), "NPT": SpteFormat.npt()}
FORMATS["shadow"] = SpteFormat.shadow()


def bits() -> Iterator[tuple[str, ...]]:
    """A row for each field that KVM's rules look at: its short name, its long one, where it is in each format."""
    where: dict[tuple[str, str], dict[str, str]] = {}
    for name, fmt in FORMATS.items():
        for field in fields(fmt):
            if field.short not in ("", "MT", "IP", "VE", "WT", "CD", "G"):
                high = field.low + field.width - 1
                place = str(field.low) if field.width == 1 else f"{high}:{field.low}"
                where.setdefault((field.short, field.name), {})[name] = place
    for (short, long), places in where.items():
        yield f"**{short}**", long, *(places.get(name, "–") for name in FORMATS)


# ---- helpers ---------------------------------------------------------------------------------------------------------

LEAF = "EPT without A/D bits"
WORDS = ["fresh, writable", "write-protected for logging", "aged", "aged, then read", "protected for shadow paging"]
WORDS.append("host read-only")


def helpers() -> Iterator[tuple[str, ...]]:
    """A row for each helper that says yes of one of these words and no of another."""
    fmt, words = LEAVES[LEAF].fmt, named_words(LEAF)
    for helper in HELPERS:
        said = [helper_says(helper)(fmt, words[name]) for name in WORDS]
        if {"yes", "no"} <= set(said) and NOT_ASKED not in said:
            yield code(f"{helper}()"), *said


def words() -> tuple[str, ...]:
    """The words themselves."""
    return ("the word", *(code(f"{named_words(LEAF)[name]:016x}") for name in WORDS))


# ---- who flushes when ------------------------------------------------------------------------------------------------

PAGES = 16
MACHINES = {
    "no A/D, written": (Hardware.ept(ad_bits=False), False),
    "no A/D, aged": (Hardware.ept(ad_bits=False), True),
    "A/D, written": (Hardware.ept(), False),
    "A/D, aged": (Hardware.ept(), True),
    "PML, written": (Hardware.ept(pml=True), False),
}  # fmt: skip


Prepared = Callable[[Vm], Operation]  # what is done before the call, and the call
RANGE = (BASE_GFN, BASE_GFN + 1)


def region(vm: Vm, on: bool = True, npages: int = PAGES) -> Operation:
    """Slot 0 is to log, or not, or (``npages`` 0) to go."""
    return vm.user_memory_region(slot=0, base_gfn=BASE_GFN, npages=npages, log_dirty_pages=on)


def while_logging(call: Prepared, write: bool = False) -> Prepared:
    """The same call, while the slot logs; ``write``: and the page was written once more, and the vCPU has left the guest."""

    def prepared(vm: Vm) -> Operation:
        vm.run(region(vm))
        if write:
            vm.vcpu[0].write(BASE_GFN)
            vm.vcpu[0].exit()
        return call(vm)

    return prepared


def manual(call: Prepared, initially_set: bool = False) -> Prepared:
    """The same call, with manual protect."""

    def prepared(vm: Vm) -> Operation:
        vm.enable_manual_dirty_log_protect(initially_set)
        return call(vm)

    return prepared


def get(vm: Vm) -> Operation:
    """The harvest."""
    return GetDirtyLog(0)


def clear(vm: Vm) -> Operation:
    """CLEAR of what GET names."""
    return ClearDirtyLog(0, 0, PAGES, vm.get_dirty_log(0))


NO_FLUSH = Kernel.v6_0.with_(clear_flush_young_flushes=False)
CALLS: dict[str, tuple[Kernel, Prepared]] = {
    "enable logging, up to v5.19": (Kernel.v5_19, region),
    "enable logging, since v6.0": (Kernel.v6_0, region),
    "enable with INITIALLY_SET": (Kernel.v6_0, manual(region, initially_set=True)),
    "disable logging": (Kernel.v6_0, while_logging(partial(region, on=False))),
    "GET, the page was written": (Kernel.v6_0, while_logging(get, write=True)),
    "GET, no page was written": (Kernel.v6_0, while_logging(get)),
    "GET with manual protect": (Kernel.v6_0, manual(while_logging(get, write=True))),
    "CLEAR, the page was written": (Kernel.v6_0, manual(while_logging(clear, write=True))),
    "test_young": (Kernel.v6_0, lambda vm: TestYoung(*RANGE)),
    "clear_young": (Kernel.v6_0, lambda vm: ClearYoung(*RANGE)),
    "clear_flush_young, up to v6.12": (Kernel.v6_0, lambda vm: ClearFlushYoung(*RANGE)),
    "clear_flush_young, since v6.13": (NO_FLUSH, lambda vm: ClearFlushYoung(*RANGE)),
    "invalidate_range": (Kernel.v6_0, lambda vm: InvalidateRange(*RANGE)),
    "shadow a guest page table": (Kernel.v6_0, lambda vm: TrackGuestPageTable(BASE_GFN)),
    "delete the slot": (Kernel.v6_0, partial(region, npages=0)),
}


def flushes(hardware: Hardware, aged: bool, kernel: Kernel, call: Prepared) -> tuple[int, str]:
    """How many flushes a call makes if the page was written, or written and then aged; and whether mmu_lock is still held
    then: "under the lock", "after the lock", or "" if there is no flush."""
    vm, where = Vm(hardware, kernel), ""
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES)
    vm.vcpu[0].write(BASE_GFN)
    if aged:
        vm.clear_young(*RANGE)
    operation = call(vm)
    before = vm.counters.flushes
    vm.start(operation)
    while operation.todo:
        count, locked = vm.counters.flushes, operation.wants_lock(operation.todo[0]) is not None
        vm.step(operation)
        if vm.counters.flushes > count:
            where = "under the lock" if locked else "after the lock"
    return vm.counters.flushes - before, where


def who_flushes() -> Iterator[tuple[str, ...]]:
    """A row for each call: its flushes on each machine, and where they are."""
    for name, (kernel, call) in CALLS.items():
        found = [flushes(*machine, kernel, call) for machine in MACHINES.values()]
        where = sorted({place for _, place in found if place})
        assert len(where) <= 1, f"{name} flushes in two places"
        yield name, *(str(count) for count, _ in found), (where or ["–"])[0]


# ---- errnos ----------------------------------------------------------------------------------------------------------


def vm_of(*, rings: int = 0, log: bool = True, vcpus: bool = False) -> Vm:
    """A VM with slot 0, which logs; ``rings``: with dirty rings of so many bytes; ``vcpus``: these exist already."""
    vm = Vm(Hardware.ept(), Kernel.v6_0)
    if rings:
        vm.enable_dirty_ring(rings)
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=100, log_dirty_pages=log)
    if vcpus:
        assert vm.vcpu
    return vm


REFUSED: dict[str, Callable[[], object]] = {
    "GET, CLEAR: the VM has dirty rings": lambda: vm_of(rings=4096).get_dirty_log(0),
    "GET, CLEAR: the slot id is too large": lambda: vm_of().get_dirty_log(32764),
    "GET, CLEAR: the slot does not log, or is not there": lambda: vm_of(log=False).get_dirty_log(0),
    "CLEAR: first_page is no multiple of 64": lambda: vm_of().clear_dirty_log(0, 1, 64, np.zeros(64, bool)),
    "CLEAR: num_pages is none, nor the rest": lambda: vm_of().clear_dirty_log(0, 0, 65, np.zeros(65, bool)),
    "CLEAR: pages beyond the slot": lambda: vm_of().clear_dirty_log(0, 64, 64, np.zeros(64, bool)),
    "CLEAR: the bitmap cannot be read": lambda: vm_of().clear_dirty_log(0, 0, 64, np.zeros(1, bool)),
    "manual protect: INITIALLY_SET alone": lambda: vm_of().enable_cap_manual_dirty_log_protect2(2),
    "rings: the size is no power of two": lambda: vm_of().enable_dirty_ring(5000),
    "rings: the size is too large": lambda: vm_of().enable_dirty_ring(1 << 21),
    "rings: there are some, or vCPUs, already": lambda: vm_of(vcpus=True).enable_dirty_ring(4096),
    "reset: the VM has no rings": lambda: vm_of().reset_dirty_rings(),
}


def errnos() -> Iterator[tuple[str, ...]]:
    """A row for each check of KVM_SET_USER_MEMORY_REGION, in the kernel's order."""
    for number, (rule, answer) in enumerate(refusals(), 1):
        yield str(number), rule.asks, answer.error


def other_errnos() -> Iterator[tuple[str, ...]]:
    """A row for each other refusal."""
    for why, call in REFUSED.items():
        yield why, errno_of(call)


# ---- the page --------------------------------------------------------------------------------------------------------


def markdown() -> str:
    """The page."""
    return "\n".join(
        [
            "# Cheat sheet",
            "",
            INTRODUCTION,
            "",
            "## Bits",
            "",
            *table(("field", "what it is", *FORMATS), bits()),
            "",
            "## Who says yes",
            "",
            f"To leaves of {LEAF}; R, W and X are bits 0 to 2.",
            "",
            *table(("helper", *WORDS), chain([words()], helpers())),
            "",
            "## Who flushes when",
            "",
            "Flushes of one call, if the guest has written the page, or it was aged since. *The lock* is mmu_lock.",
            "",
            *table(("call", *MACHINES, "where"), who_flushes()),
            "",
            "## KVM_SET_USER_MEMORY_REGION: which errno first",
            "",
            *table(("no.", "the call must obey", "or else"), errnos()),
            "",
            "## Other calls",
            "",
            *table(("refused if", "with"), other_errnos()),
            "",
        ]
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    pathlib.Path(sys.argv[1]).write_text(markdown())
