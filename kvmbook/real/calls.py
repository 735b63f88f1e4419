"""Calls as data: how each is made, what it answers, and a VM of which calls and answers are all that there is.

The same on a real VM and on the model. Calls, arguments and answers are what JSON can hold, so that they can be compared,
kept, and asked again.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from kvmbook.model import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, PAGE_SIZE
from kvmbook.real.modelled import ModelVm
from kvmbook.real.vcpu import Seen
from kvmbook.real.vm import RealVm

AnyVm = RealVm | ModelVm
Call = tuple[Any, ...]  # a name of `CALLS`, and its arguments
FLAGS = {"log_dirty_pages": KVM_MEM_LOG_DIRTY_PAGES, "readonly": KVM_MEM_READONLY}


class Said(NamedTuple):
    """A call and its answer; where that is text, the call was refused: ``answer`` is the errno's name, ``says`` the sentence.
    ``counters``: by how much KVM's own changed meanwhile, if somebody looked."""

    name: str
    arguments: list[Any]
    answer: Any
    says: str = ""
    counters: dict[str, int] = {}

    @property
    def call(self) -> Call:
        return self.name, *self.arguments

    @property
    def refused(self) -> bool:
        return isinstance(self.answer, str)

    def __str__(self) -> str:
        """The call, short, gfns in hexadecimal."""
        if self.name == "run":
            vcpu, accesses = self.arguments
            return f"vCPU {vcpu}: {', '.join(f'{kind} {gfn:#x}' for kind, gfn in accesses)}"
        shown = [hex(one) if isinstance(one, int) and one > 0x40 else str(one) for one in self.arguments]
        return f"{self.name}({', '.join(shown)})"


def ask(vm: AnyVm, name: str, *arguments: Any) -> Said:
    """Make the call. What is not the kernel's to refuse is an answer too, as text, so that it is compared."""
    try:
        return Said(name, list(arguments), CALLS[name](vm, *arguments))
    except OSError as refusal:
        code = errno.errorcode.get(refusal.errno or 0, repr(refusal))
        return Said(name, list(arguments), code, refusal.strerror or str(refusal))
    except (AssertionError, ValueError) as wrong:
        return Said(name, list(arguments), repr(wrong), str(wrong))


def perform(vm: AnyVm, name: str, *arguments: Any) -> Any:
    """Make the call. Returns the answer alone: the errno's name where it was refused."""
    return ask(vm, name, *arguments).answer


# ---- what there is to call -------------------------------------------------------------------------------------------


def memory_region(vm: AnyVm, slot: int, flags: int, gfn: int, npages: int, behind: int) -> None:
    """The ioctl in pages, ``behind``: where in the VM's user memory the slot begins."""
    vm.kvm_set_user_memory_region(slot, flags, gfn * PAGE_SIZE, npages * PAGE_SIZE, vm.user_base + behind * PAGE_SIZE)


def memory_region_at(vm: AnyVm, slot: int, flags: int, address: int, size: int, user_address: int) -> None:
    """The ioctl in bytes, at any user address: for what is to be refused."""
    vm.kvm_set_user_memory_region(slot, flags, address, size, user_address)


def run(vm: AnyVm, vcpu: int, accesses: list[tuple[str, int]]) -> list[str]:
    return [seen.value for seen in vm.vcpu[vcpu].run([(kind, gfn) for kind, gfn in accesses])]


def get_dirty_log(vm: AnyVm, slot: int) -> list[Any]:
    """How many pages the slot has, and which are set."""
    report = vm.get_dirty_log(slot)
    return [len(report), np.flatnonzero(report).tolist()]


def clear_dirty_log(vm: AnyVm, slot: int, first_page: int, num_pages: int, pages: list[int]) -> None:
    """``pages``: those that are set, of ``num_pages``; one at -1 makes the bitmap too short to be read."""
    bitmap = np.zeros(max(num_pages, 1) - 1 if pages == [-1] else num_pages, bool)
    bitmap[[page for page in pages if page >= 0]] = True
    vm.clear_dirty_log(slot, first_page, num_pages, bitmap)


def harvest(vm: AnyVm, vcpu: int) -> list[list[int]] | None:
    ring = vm.vcpu[vcpu].dirty_ring
    return None if ring is None else [list(entry) for entry in ring.harvest()]


def values(vm: AnyVm, gfns: list[int], vcpus: int) -> list[list[int] | None]:
    """What each vCPU's last write left in the pages; None where there is no memory."""
    return [None if vm.hva(gfn) is None else [vm.value(gfn, vcpu) for vcpu in range(vcpus)] for gfn in gfns]


def discard(vm: AnyVm, gfn: int) -> None:
    if vm.hva(gfn) is not None:
        vm.invalidate_range(gfn, gfn + 1)


CALLS: dict[str, Callable[..., Any]] = {
    "memory_region": memory_region,
    "memory_region_at": memory_region_at,
    "run": run,
    "get_dirty_log": get_dirty_log,
    "clear_dirty_log": clear_dirty_log,
    "harvest": harvest,
    "values": values,
    "discard": discard,
    "reset_dirty_rings": lambda vm: vm.reset_dirty_rings(),
    "manual_protect": lambda vm, args: vm.enable_cap_manual_dirty_log_protect2(args),
    "enable_dirty_ring": lambda vm, size: vm.enable_dirty_ring(size),
    "clear_young": lambda vm, start, end: bool(vm.clear_young(start, end)),
    "flush_requests": lambda vm: vm.flush_requests,
}

# ---- a VM as user space sees it --------------------------------------------------------------------------------------

Ask = Callable[..., Said]  # a call's name and arguments; what was said


def asking(vm: AnyVm) -> Ask:
    """Have a real VM or the model answer."""
    return lambda name, *arguments: ask(vm, name, *arguments)


class Outside:
    """The front door of `Vm`, as user space has it: ``ask`` answers each call. ``said``: the calls so far. Use it in
    ``with``, or close it.

    It has no SPTEs, no TLBs and no `missed_dirty`, because KVM shows none of them."""

    def __init__(self, ask: Ask, close: Callable[[], None] = lambda: None, vcpus: int = 1) -> None:
        self._ask, self.close, self.said = ask, close, list[Said]()
        self._behind: dict[int, int] = {}  # where in user memory each slot begins, in pages
        self.vcpu = [OutsideVcpu(self, number) for number in range(vcpus)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def ask(self, name: str, *arguments: Any) -> Said:
        """Make a call of `CALLS`, and note it, also where it is refused."""
        self.said.append(self._ask(name, *arguments))
        return self.said[-1]

    def call(self, name: str, *arguments: Any) -> Any:
        """The answer to a call. OSError where it is refused; ValueError for what is not the kernel's to refuse."""
        said = self.ask(name, *arguments)
        if not said.refused:
            return said.answer
        if said.answer in errno.errorcode.values():
            raise OSError(getattr(errno, said.answer), said.says)
        raise ValueError(said.says)

    def set_user_memory_region(self, slot: int = 0, base_gfn: int = 0, npages: int = 0, **flags: bool) -> None:
        behind = self._behind.get(slot, base_gfn)
        bits = sum(FLAGS[name] for name, on in flags.items() if on)
        self.call("memory_region", slot, bits, base_gfn, npages, behind)
        self._behind[slot] = behind
        if not npages:
            del self._behind[slot]

    def get_dirty_log(self, slot: int = 0) -> np.ndarray:
        """A bool array, one per page of the slot."""
        npages, dirty = self.call("get_dirty_log", slot)
        report = np.zeros(npages, bool)
        report[dirty] = True
        return report

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, bitmap: Sequence[bool] | np.ndarray) -> None:
        pages = np.flatnonzero(bitmap).tolist() if len(bitmap) == num_pages else [-1]
        self.call("clear_dirty_log", slot, first_page, num_pages, pages)

    def enable_manual_dirty_log_protect(self, initially_set: bool = False) -> None:
        self.enable_cap_manual_dirty_log_protect2(1 | 2 * initially_set)

    def enable_cap_manual_dirty_log_protect2(self, args: int) -> None:
        self.call("manual_protect", args)

    def enable_dirty_ring(self, size_bytes: int) -> None:
        self.call("enable_dirty_ring", size_bytes)

    def reset_dirty_rings(self) -> int:
        freed: int = self.call("reset_dirty_rings")
        return freed

    def clear_young(self, start: int, end: int) -> bool:
        return bool(self.call("clear_young", start, end))

    def invalidate_range(self, start: int, end: int) -> None:
        """The host takes the pages of [start, end) away, those that are in a slot."""
        for gfn in range(start, end):
            self.call("discard", gfn)

    def value(self, gfn: int, vcpu: int = 0) -> int:
        """What the vCPU's last write left in memory; its n-th write leaves n. ValueError if ``gfn`` is in no slot."""
        (found,) = self.call("values", [gfn], vcpu + 1)
        if found is None:
            raise ValueError(f"gfn {gfn:#x} is in no slot")
        return int(found[vcpu])

    @property
    def flush_requests(self) -> int:
        """How often KVM has asked for a flush of all TLBs so far. Only differences tell."""
        asked: int = self.call("flush_requests")
        return asked


class OutsideVcpu:
    """A vCPU as user space sees it: whether an access retired, and no more."""

    def __init__(self, vm: Outside, number: int) -> None:
        self._call, self._number = vm.call, number

    def read(self, gfn: int) -> Seen:
        return self._access("read", gfn)

    def write(self, gfn: int) -> Seen:
        return self._access("write", gfn)

    def fetch(self, gfn: int) -> Seen:
        return self._access("fetch", gfn)

    def _access(self, kind: str, gfn: int) -> Seen:
        (seen,) = self._call("run", self._number, [[kind, gfn]])
        return Seen(seen)

    @property
    def dirty_ring(self) -> Self:
        return self

    def harvest(self) -> list[tuple[int, int]]:
        """The ring's new entries, (slot, page)s; none if there is no ring."""
        return [(slot, page) for slot, page in self._call("harvest", self._number) or ()]
