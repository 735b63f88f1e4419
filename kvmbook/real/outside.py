"""A VM as user space sees it: calls and their answers, and nothing behind them. The same for a real VM and for the model."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from kvmbook.real.modelled import ModelVm
from kvmbook.real.vcpu import Seen
from kvmbook.real.vm import RealVm

Ask = Callable[[str, list[Any]], Any]  # a call's name and arguments; the answer. JSON can hold all of it
FLUSH_REQUESTS = "remote_tlb_flush_requests"


class Said(NamedTuple):
    """A call and its answer."""

    name: str
    arguments: list[Any]
    answer: Any

    def __str__(self) -> str:
        """The call, short, gfns in hexadecimal."""
        shown = [_shown(self.name, place, value) for place, value in enumerate(self.arguments)]
        return f"{self.name}({', '.join(part for part in shown if part)})"


def _shown(name: str, place: int, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(value)
    if name in ("read", "write", "fetch", "value"):
        return hex(value) if place == 1 else f"vCPU {value}"
    if name in ("set_user_memory_region", "clear_young", "invalidate_range") and value > 0x40:
        return hex(value)
    return str(value)


class Outside:
    """The front door of `Vm`, as user space has it: ``ask`` answers each call. ``said``: the calls so far. Use it in
    ``with``, or close it.

    It has no SPTEs, no TLBs and no `missed_dirty`, because KVM shows none of them."""

    def __init__(self, ask: Ask, close: Callable[[], None] = lambda: None, vcpus: int = 1) -> None:
        self._ask, self.close, self.said = ask, close, list[Said]()
        self.vcpu = [OutsideVcpu(self, number) for number in range(vcpus)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def call(self, name: str, *arguments: Any) -> Any:
        """Make a call of `CALLS`, and note it. OSError where it is refused."""
        answer = self._ask(name, list(arguments))
        self.said.append(Said(name, list(arguments), answer))
        if isinstance(answer, dict):
            raise OSError(getattr(errno, answer["errno"]), answer["says"])
        return answer

    def set_user_memory_region(self, slot: int = 0, base_gfn: int = 0, npages: int = 0, **flags: bool) -> None:
        self.call("set_user_memory_region", slot, base_gfn, npages, {name: True for name, on in flags.items() if on})

    def get_dirty_log(self, slot: int = 0) -> np.ndarray:
        """A bool array, one per page of the slot."""
        npages, dirty = self.call("get_dirty_log", slot)
        report = np.zeros(npages, bool)
        report[dirty] = True
        return report

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, bitmap: Sequence[bool] | np.ndarray) -> None:
        self.call("clear_dirty_log", slot, first_page, num_pages, np.flatnonzero(bitmap).tolist())

    def enable_manual_dirty_log_protect(self, initially_set: bool = False) -> None:
        self.enable_cap_manual_dirty_log_protect2(1 | 2 * initially_set)

    def enable_cap_manual_dirty_log_protect2(self, args: int) -> None:
        self.call("enable_cap_manual_dirty_log_protect2", args)

    def enable_dirty_ring(self, size_bytes: int) -> None:
        self.call("enable_dirty_ring", size_bytes)

    def reset_dirty_rings(self) -> int:
        freed: int = self.call("reset_dirty_rings")
        return freed

    def clear_young(self, start: int, end: int) -> bool:
        return bool(self.call("clear_young", start, end))

    def invalidate_range(self, start: int, end: int) -> None:
        self.call("invalidate_range", start, end)

    def value(self, gfn: int, vcpu: int = 0) -> int:
        """What the vCPU's last write left in memory; its n-th write leaves n."""
        found: int = self.call("value", vcpu, gfn)
        return found

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
        return Seen(self._call("read", self._number, gfn))

    def write(self, gfn: int) -> Seen:
        return Seen(self._call("write", self._number, gfn))

    def fetch(self, gfn: int) -> Seen:
        return Seen(self._call("fetch", self._number, gfn))

    @property
    def dirty_ring(self) -> Self:
        return self

    def harvest(self) -> list[tuple[int, int]]:
        """The ring's new entries: (slot, page)s."""
        return [(slot, page) for slot, page in self._call("harvest", self._number)]


# ---- who answers -----------------------------------------------------------------------------------------------------

AnyVm = RealVm | ModelVm


def asking(vm: AnyVm) -> Ask:
    """Have a real VM or the model answer."""

    def ask(name: str, arguments: list[Any]) -> Any:
        try:
            return CALLS[name](vm, *arguments)
        except OSError as refusal:
            return {"errno": errno.errorcode[refusal.errno or 0], "says": refusal.strerror}

    return ask


def _access(kind: str, vm: AnyVm, vcpu: int, gfn: int) -> str:
    return str(getattr(vm.vcpu[vcpu], kind)(gfn))


def _get_dirty_log(vm: AnyVm, slot: int) -> list[Any]:
    report = vm.get_dirty_log(slot)
    return [len(report), np.flatnonzero(report).tolist()]


def _clear_dirty_log(vm: AnyVm, slot: int, first_page: int, num_pages: int, pages: list[int]) -> None:
    bitmap = np.zeros(num_pages, bool)
    bitmap[pages] = True
    vm.clear_dirty_log(slot, first_page, num_pages, bitmap)


def _harvest(vm: AnyVm, vcpu: int) -> list[list[int]]:
    ring = vm.vcpu[vcpu].dirty_ring
    return [list(entry) for entry in ring.harvest()] if ring is not None else []


def _flush_requests(vm: AnyVm) -> int:
    """Requests, not ``remote_tlb_flush``: that one counts only where a vCPU had to be kicked. OSError ENOTTY where the kernel
    does not count them."""
    if isinstance(vm, ModelVm):
        return int(vm.counters.flushes)
    counters = vm.counters
    if FLUSH_REQUESTS not in counters:
        raise OSError(errno.ENOTTY, f"{os.strerror(errno.ENOTTY)}: this kernel does not count {FLUSH_REQUESTS}")
    return counters[FLUSH_REQUESTS]


CALLS: dict[str, Callable[..., Any]] = {
    "set_user_memory_region": lambda vm, slot, gfn, npages, flags: vm.set_user_memory_region(
        slot, gfn, npages, **flags
    ),
    "get_dirty_log": _get_dirty_log,
    "clear_dirty_log": _clear_dirty_log,
    "enable_cap_manual_dirty_log_protect2": lambda vm, args: vm.enable_cap_manual_dirty_log_protect2(args),
    "enable_dirty_ring": lambda vm, size: vm.enable_dirty_ring(size),
    "reset_dirty_rings": lambda vm: vm.reset_dirty_rings(),
    "clear_young": lambda vm, start, end: vm.clear_young(start, end),
    "invalidate_range": lambda vm, start, end: vm.invalidate_range(start, end),
    "read": partial(_access, "read"),
    "write": partial(_access, "write"),
    "fetch": partial(_access, "fetch"),
    "harvest": _harvest,
    "value": lambda vm, vcpu, gfn: vm.value(gfn, vcpu),
    "flush_requests": _flush_requests,
}
