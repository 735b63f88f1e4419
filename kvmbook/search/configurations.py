"""What a hunt goes over: hardware, module parameters, how user space logs, and a slot with its borders.

A `Configuration` is one VM as user space sets it up, before its guest has done anything. `OPTIONS` has the values of each
field that a hunt enumerates, the simplest first; `every` combines them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

from kvmbook.model import Hardware, Kernel, Vm, pages_per_level

RING_BYTES = 1 << 14  # the least power of two that every CPU takes: with PML, 64 + 512 entries are kept back
BORDER = 0x400  # a gfn with which a 2M page begins, and so a word of 64 gfns
HUGE = pages_per_level(2)


class Slot(NamedTuple):
    """A slot, on host pages of ``page_size``, and the ``pages`` of it that runs are about."""

    base_gfn: int
    npages: int
    pages: tuple[int, ...]
    page_size: str = "4K"

    def __str__(self) -> str:
        pages = ", ".join(map(str, self.pages))
        return (
            f"{self.npages} pages from gfn {self.base_gfn:#x}, the host's of {self.page_size}; runs are about {pages}"
        )


SMALL = (
    Slot(BORDER, 2, (0, 1)),
    Slot(BORDER, 65, (63, 64)),  # on both sides of a word's border
)
LARGE = (
    Slot(BORDER, HUGE, (0, HUGE - 1), "2M"),
    Slot(BORDER - 1, 1 + HUGE, (0, 1), "2M"),  # the 2M page begins within a word
    Slot(BORDER - 64, 64 + HUGE, (63, 64), "2M"),  # it begins with a word
    Slot(BORDER - 1, 2 + HUGE, (HUGE, HUGE + 1), "2M"),  # it ends within a word
)


@dataclass(frozen=True)
class Configuration:
    """One VM. ``manual``: the argument of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0 if it is left alone; ``ring``: it logs to
    dirty rings; the other fields are `Vm`'s."""

    kernel: Kernel
    hardware: Hardware
    nested: str | None = None
    eager_page_split: bool = True
    manual: int = 0
    ring: bool = False
    vcpus: int = 1
    slot: Slot = SMALL[0]

    def bare(self) -> Vm:
        """The model's VM before user space has called anything. ValueError for what no CPU can do."""
        return Vm(
            self.hardware,
            self.kernel,
            self.vcpus,
            page_size=self.slot.page_size,
            eager_page_split=self.eager_page_split,
            nested=self.nested,
        )

    def prepare(self, vm: Any) -> None:
        """User space's first calls, on a new VM that has `Vm`'s front door: slot 0 does not log yet."""
        if self.ring:
            vm.enable_dirty_ring(RING_BYTES)
        if self.manual:
            vm.enable_cap_manual_dirty_log_protect2(self.manual)
        vm.set_user_memory_region(slot=0, base_gfn=self.slot.base_gfn, npages=self.slot.npages)

    @property
    def makes_sense(self) -> bool:
        """Whether it is a VM of its own: not what no CPU can do, and not the same as one with a simpler value."""
        can_split = self.slot.page_size != "4K" and self.hardware.tdp_mmu
        return (
            self.nested in nestings(self.hardware)
            and (self.eager_page_split or can_split)
            and not (self.ring and self.manual == 1)  # which is about GET and CLEAR, and those are refused
        )

    def with_(self, **changes: Any) -> Configuration:
        """The same but for ``changes``."""
        return replace(self, **changes)

    @property
    def words(self) -> dict[str, str]:
        """Each field in words."""
        return {
            "kernel": self.kernel.name,
            "hardware": self.hardware.name,
            "nested": self.nested or "none",
            "eager_page_split": "Y" if self.eager_page_split else "N",
            "manual": ("GET clears", "CLEAR clears", "", "CLEAR clears, initially set")[self.manual],
            "ring": "dirty rings" if self.ring else "bitmap",
            "vcpus": str(self.vcpus),
            "slot": str(self.slot),
        }


def nestings(hardware: Hardware) -> tuple[str | None, ...]:
    """How a nested guest can run on it, none first; once each."""
    if not hardware.tdp:
        return (None,)
    if not hardware.format.shadow_acc_track_mask:
        return None, "tdp", "npt"
    return (None, "tdp", "ept") + ("ept without A/D",) * hardware.format.kvm_ad_enabled


HARDWARE = (
    *(
        hardware.with_(tdp_mmu=tdp_mmu)
        for tdp_mmu in (True, False)
        for hardware in (Hardware.npt(), Hardware.ept(ad_bits=False), Hardware.ept(), Hardware.ept(pml=True))
    ),
    Hardware.shadow(),
)

OPTIONS: dict[str, tuple[Any, ...]] = {
    "vcpus": (1, 2),
    "nested": (None, "tdp", "ept", "npt", "ept without A/D"),
    "ring": (False, True),
    "manual": (0, 1, 3),
    "hardware": HARDWARE,
    "slot": SMALL + LARGE,
    "eager_page_split": (True, False),
}


def every(kernel: Kernel) -> Iterator[Configuration]:
    """Each configuration that makes sense, over `OPTIONS`."""
    for values in product(*OPTIONS.values()):
        made = Configuration(kernel, **dict(zip(OPTIONS, values, strict=True)))
        if made.makes_sense:
            yield made
