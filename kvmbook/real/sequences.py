"""Sequences of calls, made up at random: what user space, guest and host do to one VM, wrong arguments among it.

The model is asked while a sequence grows, so that most calls are about something that is there. `DIFFERENCES` has what is
known to differ between model and machine, and is not asked.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from kvmbook.model import KVM_USER_MEM_SLOTS, PAGE_SHIFT, PAGE_SIZE, TASK_SIZE_MAX, MemorySlot
from kvmbook.real import guest
from kvmbook.real.calls import Call, perform
from kvmbook.real.modelled import ModelVm
from kvmbook.real.offers import Offers

KINDS = ("bitmap", "manual", "ring")  # manual: a bitmap, with manual protect from the beginning
SIZES = (1, 7, 63, 64, 64, 65, 128, 130, 300)
FIRST, SPAN = 0x100, 0x200  # gfns that slots begin at
LARGE_SIZES, LARGE_BASES = (513, 513, 600, 1100, 64, 300), (0x100, 0x1FF, 0x200, 0x3C1, 0x3FF, 0x400, 0x410)
IDENTITY_MAP = 0xFFFBC  # arch/x86/kvm/vmx/vmx.c: init_rmode_identity_map(); VMX_EPT_IDENTITY_PAGETABLE_ADDR
FAR = 0x8_0000  # gfns that no guest touches
LOG, READONLY, LARGE = 1, 2, 512
NARROWEST, WIDEST = 1 << 36, 1 << 52  # bytes of guest-physical addresses
NOT_ASKED = {"clear_young", "flush_requests"}  # of the calls: few machines let us age; the model counts other requests
SMALL_RING, MANY = 4096, 260  # bytes; accesses that fill such a ring


class Difference(NamedTuple):
    """Something in which model and machine differ, and why that is left as it is. ``meets``: whether a call, at this state
    of the model, would show it; then the generator takes another call."""

    name: str
    why: str
    meets: Callable[[ModelVm, Call], bool]


def _names_own_slot(vm: ModelVm, call: Call) -> bool:
    names = call[0] in ("memory_region", "memory_region_at", "get_dirty_log", "clear_dirty_log")
    return names and vm.own_slot <= call[1] < KVM_USER_MEM_SLOTS


def _asks_a_stale_entry(vm: ModelVm, call: Call) -> bool:
    if call[0] != "run" or not vm.dirty_ring_size:
        return False
    tlb = vm.vcpu[call[1]].tlb
    for kind, gfn in call[2]:
        cached, rights = tlb.lookup("L1", gfn), vm.fmt.hardware_rights(vm.spte(gfn))
        if kind == "write" and cached is not None and not cached.write and rights.write:
            return True
    return False


def _meets_the_identity_map(vm: ModelVm, call: Call) -> bool:
    if not (vm.hardware.tdp and vm.fmt.shadow_acc_track_mask):
        return False
    if call[0] == "run":
        return any(gfn == IDENTITY_MAP for _, gfn in call[2])
    if call[0] not in ("memory_region", "memory_region_at"):
        return False
    pages = PAGE_SIZE if call[0] == "memory_region_at" else 1
    first, size = call[3] // pages, call[4] // pages
    return bool(first <= IDENTITY_MAP < first + size)


def _is_about_the_width(vm: ModelVm, call: Call) -> bool:
    if not vm.hardware.tdp or call[0] not in ("memory_region", "memory_region_at"):
        return False
    _, _, start, size, _ = call[1:]
    end: int = (start + size) << (PAGE_SHIFT if call[0] == "memory_region" else 0)
    return NARROWEST <= end <= WIDEST + LARGE * PAGE_SIZE


DIFFERENCES = (
    Difference(
        "the VM's own slot",
        "The guest's code, its stack and its page tables lie in the last slot, and RealVm keeps user space from changing it. "
        "(Behind it the model has more, where KVM is older than v5.12.)",
        _names_own_slot,
    ),
    Difference(
        "a write that a TLB still forbids, and the SPTE no longer",
        "Another vCPU has made the page writable. If this one remembers that it was not, it faults, and the page goes into "
        "its ring too; a CPU may also have forgotten. The model's remembers, this machine's (kvm_pvm) does not. "
        "Without a ring nobody can tell: the page's bit is set already.",
        _asks_a_stale_entry,
    ),
    Difference(
        "gfn 0xfffbc, with EPT",
        "Where the CPU has no unrestricted guest, KVM keeps a page table there for guests that do not page, in a slot of its "
        "own: a slot of user space is refused with EEXIST, and an access finds memory. The model's KVM has a newer CPU.",
        _meets_the_identity_map,
    ),
    Difference(
        "how wide a guest-physical address is, with EPT or NPT",
        "That is the CPU's width, less what memory encryption takes, and the model has its own. Without TDP it is 52 bits "
        "everywhere, and is asked.",
        _is_about_the_width,
    ),
)


def known_to_differ(vm: ModelVm, call: Call) -> bool:
    """Whether the call would show one of `DIFFERENCES`, at this state of the model."""
    return any(difference.meets(vm, call) for difference in DIFFERENCES)


@dataclass
class Setting:
    """What a sequence is about. ``page_size``: the host's. ``offsets``: the pages of a slot that the guest touches.
    ``sizes``, ``bases``: of slots, in pages. ``ring``: its bytes, or 0. ``manual``: the capability's argument at first."""

    kind: str
    vcpus: int
    page_size: str
    offsets: list[int]
    sizes: tuple[int, ...]
    bases: tuple[int, ...]
    ring: int
    manual: int


class Generator:
    """Makes up one call after the other for the model ``vm``, always the same for the same ``rng``: a seeded one, or one
    whose choices somebody else makes."""

    def __init__(self, rng: random.Random, machine: Offers, kind: str | None = None) -> None:
        self.rng = rng
        large = rng.random() < 0.15 and machine.huge_pages
        kind = kind or rng.choices(KINDS, (2, 5, 1) if large else (5, 3, 2))[0]
        self.setting = setting = _setting(rng, kind, large)
        self.vm = ModelVm.of(machine, setting.vcpus, page_size=setting.page_size)
        self.slots = (0, 1, 2, 5, self.vm.own_slot - 1)
        self.planned = self._opening()

    def _opening(self) -> list[Call]:
        """The first calls: capabilities, a slot, and in some sequences what fills a ring, or large pages to begin with."""
        rng, setting = self.rng, self.setting
        calls: list[Call] = [("enable_dirty_ring", setting.ring)] if setting.ring else []
        if setting.manual or rng.random() < 0.1:
            calls.append(("manual_protect", setting.manual))
        base, large = setting.bases[0], setting.page_size == "2M"
        size = rng.choice((64, 130, 300, 300) if setting.ring and not large else setting.sizes)
        calls.append(("memory_region", 0, rng.choice((0, LOG, LOG)), base, size, base))
        if setting.ring == SMALL_RING and rng.random() < 0.4:
            many = min(size, rng.choice((150, MANY)))
            calls.append(("run", 0, [["write", base + page] for page in range(many)]))
        if large and rng.random() < 0.6:
            border = base + -base % LARGE
            calls[-1] = ("memory_region", 0, 0, base, max(size, LARGE + 1), base)
            calls.append(("run", 0, [["write", base], ["write", border], ["write", border + 1]]))
            calls.append(("memory_region", 0, LOG, base, max(size, LARGE + 1), base))
        return calls

    def next(self) -> Call:
        """The next call."""
        if self.planned:
            return self.planned.pop(0)
        while True:
            call = self._any()
            if not known_to_differ(self.vm, call):
                return call

    def _any(self) -> Call:
        ring = 6 if self.setting.ring else 0
        makers = {
            self._run: 30, self._flags: 8, self._create: 4, self._move: 3, self._delete: 1.5, self._wrong_region: 2,
            self._get: 12 if not ring else 1, self._clear: 10 if self.setting.kind == "manual" else 1, self._discard: 5,
            self._values: 3, self._capability: 1, self._harvest: ring, self._reset: ring / 2 or 0.3, self._sweep: ring / 2,
        }  # fmt: skip
        (maker,) = self.rng.choices(list(makers), list(makers.values()))
        return maker()

    # ---- what the guest and the host do ------------------------------------------------------------------------------

    def _run(self) -> Call:
        rng = self.rng
        kinds = rng.choices(("read", "write", "fetch"), (5, 5, 1), k=rng.choice((1, 2, 4, 8)))
        return "run", self._vcpu(), [[kind, self._gfn()] for kind in kinds]

    def _sweep(self) -> Call:
        """Many accesses on end, that fill a ring."""
        slot, kind = self._slot(), self.rng.choice(("write", "write", "read"))
        start = FIRST if slot is None else slot.base_gfn
        return "run", self._vcpu(), [[kind, gfn] for gfn in range(start, start + self.rng.choice((10, 100, MANY)))]

    def _discard(self) -> Call:
        return "discard", self._gfn()

    def _values(self) -> Call:
        return "values", [self._gfn() for _ in range(6)], self.setting.vcpus

    # ---- memory slots ------------------------------------------------------------------------------------------------

    def _flags(self) -> Call:
        slot = self._slot()
        if slot is None:
            return self._create()
        flags = slot.flags ^ self.rng.choice((LOG, LOG, LOG, LOG, 0, READONLY))
        return self._region(slot, flags=flags)

    def _create(self) -> Call:
        """A slot more, or one that is there with other pages, memory or flags."""
        rng, base = self.rng, self._base()
        flags, behind = rng.choice((0, 0, LOG, LOG, READONLY, 3)), rng.choice((base, base, base, FIRST))
        return "memory_region", rng.choice(self.slots), flags, base, rng.choice(self.setting.sizes), behind

    def _move(self) -> Call:
        slot = self._slot()
        return self._create() if slot is None else self._region(slot, base_gfn=self._base())

    def _delete(self) -> Call:
        slot = self._slot()
        return (
            ("memory_region", self.rng.choice(self.slots), 0, 0, 0, 0) if slot is None else self._region(slot, npages=0)
        )

    def _region(self, slot: MemorySlot, **changes: int) -> Call:
        """The slot as it is, but for ``changes``."""
        now = {"flags": slot.flags, "base_gfn": slot.base_gfn, "npages": slot.npages} | changes
        behind = (slot.userspace_addr - self.vm.user_base) // PAGE_SIZE
        return "memory_region", slot.id, now["flags"], now["base_gfn"], now["npages"], behind

    def _wrong_region(self) -> Call:
        """What is refused, or is so at the border of being refused."""
        rng, slot, size = self.rng, self._slot(), 64 * PAGE_SIZE
        number, off = rng.choice(self.slots), rng.choice((-1, 0, 1))
        if slot is not None and rng.random() < 0.3:
            return self._region(slot, base_gfn=(1 << 40) + off - rng.choice((0, slot.npages)))
        address, user = FAR + rng.randrange(64) << PAGE_SHIFT, TASK_SIZE_MAX - size
        return "memory_region_at", *rng.choice((
            (number, rng.choice((4, 8, 0x8000_0000)), address, size, user),
            (number, 0, address + rng.choice((1, 0x800)), size, user),
            (number, 0, address, size + rng.choice((-1, 512)), user),
            (number, 0, address, size, user + off * PAGE_SIZE),
            (number, 0, address, size, rng.choice((1 << 47, 1 << 63, (1 << 64) - PAGE_SIZE))),
            (rng.choice((self.vm.own_slot + 1, 0xFFFF, 1 << 16, 1 << 31)), 0, address, size, user),
            (number, 0, (1 << 64) - rng.choice((1, 64, 65)) * PAGE_SIZE, size, user),
            (number, 0, (1 << 52) + off * PAGE_SIZE - rng.choice((0, size)), size, user),
            (number, 0, address, (1 << 43) + rng.choice((0, PAGE_SIZE)), 0),
            (number, 0, guest.PRIVATE + rng.choice((-size, -size + PAGE_SIZE, 0)), size, user),
        ))  # fmt: skip

    # ---- the dirty log -----------------------------------------------------------------------------------------------

    def _get(self) -> Call:
        return "get_dirty_log", self._number()

    def _clear(self) -> Call:
        rng, slot = self.rng, self._slot()
        if slot is not None and self.setting.page_size == "2M" and rng.random() < 0.7:
            return self._clear_at_a_border(slot)
        npages = slot.npages if slot is not None else 64
        first = rng.choice((0, 0, 0, 64, npages & ~63, rng.randrange(npages + 2)))
        count = max(0, rng.choice((npages - first, npages - first, 64, 128, npages - first + 1, rng.randrange(130))))
        pages = [page for page in range(count) if rng.random() < rng.choice((0.1, 0.9))]
        return "clear_dirty_log", self._number(slot), first, count, [-1] if count and rng.random() < 0.05 else pages

    def _clear_at_a_border(self, slot: MemorySlot) -> Call:
        """A few pages of one word, around the place in it where a 2M page begins, if there is one; often the last is then
        written."""
        rng, border = self.rng, -slot.base_gfn % LARGE
        first = (border if border < slot.npages else rng.randrange(slot.npages)) & ~63
        count = min(64, slot.npages - first)
        near = (border - first - 1, border - first, border - first + 1, 0, count - 1, rng.randrange(count))
        pages = sorted({page for page in rng.choices(near, k=rng.choice((1, 2, 2, 3))) if 0 <= page < count})
        if pages and not self.setting.ring and rng.random() < 0.7:
            write = ["write", slot.base_gfn + first + pages[-1]]
            self.planned = [("run", self._vcpu(), [write]), ("get_dirty_log", slot.number)]
        return "clear_dirty_log", slot.number, first, count, pages

    def _capability(self) -> Call:
        if self.rng.random() < 0.3:
            return "enable_dirty_ring", self.rng.choice((0, 64, 4096, 4097, 1 << 20, 1 << 21, 1 << 32))
        return "manual_protect", self.rng.choice((0, 1, 2, 3, 4, 1 << 32))

    def _harvest(self) -> Call:
        return "harvest", self._vcpu()

    def _reset(self) -> Call:
        return ("reset_dirty_rings",)

    # ---- choices -----------------------------------------------------------------------------------------------------

    def _vcpu(self) -> int:
        return self.rng.randrange(self.setting.vcpus)

    def _gfn(self) -> int:
        """Most often one of few pages of a slot, so that they meet again."""
        slot = self._slot()
        if slot is None or self.rng.random() < 0.1:
            return FIRST + self.rng.randrange(SPAN)
        return slot.base_gfn + self.rng.choice(self.setting.offsets) % slot.npages

    def _base(self) -> int:
        if self.setting.page_size == "2M":
            return self.rng.choice(self.setting.bases)
        return FIRST + self.rng.randrange(0, SPAN, self.rng.choice((1, 16, 64)))

    def _slot(self) -> MemorySlot | None:
        """One that is there and that the guest touches."""
        there = [slot for slot in self.vm.memslots.slots.values() if slot.base_gfn < FAR]
        return self.rng.choice(there) if there else None

    def _number(self, slot: MemorySlot | None = None) -> int:
        slot = slot or self._slot()
        if slot is None or self.rng.random() < 0.05:
            return self.rng.choice((*self.slots, 9, self.vm.own_slot + 1, 0xFFFF, 1 << 16, 1 << 31))
        return slot.number


def _setting(rng: random.Random, kind: str, large: bool) -> Setting:
    step, start = rng.choice((1, 1, 8, 21)), rng.choice((0, 0, 3, 60))
    offsets = [start + step * number for number in range(rng.randrange(2, 7))] + [rng.randrange(130)]
    bases: tuple[int, ...] = (FIRST,)
    if large:
        offsets, first = [0, 1, 2, LARGE - 1, LARGE, LARGE + 1, rng.randrange(LARGE)], rng.choice((0x3FF, 0x3C1, 0x200))
        bases = (first, *LARGE_BASES)
    return Setting(
        kind=kind,
        vcpus=rng.choices((1, 2), (2, 1))[0],
        page_size="2M" if large else "4K",
        offsets=offsets,
        sizes=LARGE_SIZES if large else SIZES,
        bases=bases,
        ring=rng.choice((SMALL_RING, SMALL_RING, 8192, 1 << 20)) if kind == "ring" else 0,
        manual={"bitmap": 0, "manual": rng.choice((1, 3, 3)), "ring": rng.choice((0, 0, 1, 3))}[kind],
    )


def sequence(seed: int, machine: Offers, calls: int, kind: str | None = None) -> tuple[Setting, list[Call], list[Any]]:
    """The sequence of this seed: what it is about, its calls, and the model's answers."""
    generator = Generator(random.Random(seed), machine, kind)
    made, answers = [], []
    for _ in range(calls):
        made.append(generator.next())
        answers.append(perform(generator.vm, *made[-1]))
    return generator.setting, made, answers
