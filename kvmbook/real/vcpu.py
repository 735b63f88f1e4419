"""A real vCPU: what its guest does when told, why it left, and its dirty ring."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from typing import TypeVar

from kvmbook.model import PAGE_SIZE
from kvmbook.real import abi, guest
from kvmbook.real.device import ioctl, kvm_run
from kvmbook.real.watchdog import let_through, watchdog

MMIO_DATA = abi.kvm_run.mmio.offset + 8
T = TypeVar("T")
GFN_SIZE = 16  # bytes of a struct kvm_dirty_gfn


class Seen(Enum):
    """How an access went, as far as user space sees: faults and TLB hits leave no trace there. ``DONE``: it retired.
    ``MMIO``: the vCPU left to user space, because there is no memory, or none that may be written; it was answered (reads
    give 0). ``RING_FULL``: the vCPU could not stay in the guest; the access did not retire and was given up."""

    DONE = "done"
    MMIO = "MMIO"
    RING_FULL = "dirty ring full"

    def __str__(self) -> str:
        return self.value


def by_mailbox(todo: list[tuple[T, int]], mailbox: Callable[[list[tuple[T, int]]], list[Seen]]) -> list[Seen]:
    """Do accesses, as many at a time as fit into a mailbox, up to one that does not retire as the ring is full. What is in a
    mailbox is counted in the vCPU's ``value``, whether it retires or not; what is in none, is not."""
    seen: list[Seen] = []
    for first in range(0, len(todo), guest.RECORDS):
        seen += mailbox(todo[first : first + guest.RECORDS])
        if seen[-1] is Seen.RING_FULL:
            break
    return seen + [Seen.RING_FULL] * (len(todo) - len(seen))


class RealDirtyRing:
    """One vCPU's dirty ring of ``size`` entries, in memory that it shares with KVM."""

    def __init__(self, entries: mmap.mmap) -> None:
        self._entries = entries
        self.size = len(entries) // GFN_SIZE
        self.harvest_index = 0

    def harvest(self) -> list[tuple[int, int]]:
        """User space's part: take all dirty entries, oldest first, mark them harvested and return (slot, page number)s.
        Pages are to be copied after KVM_RESET_DIRTY_RINGS, which arms them again."""
        taken: list[tuple[int, int]] = []
        while True:
            at = self.harvest_index % self.size * GFN_SIZE
            if not self._entries[at] & abi.KVM_DIRTY_GFN_F_DIRTY:
                return taken
            entry = abi.kvm_dirty_gfn.from_buffer_copy(self._entries, at)  # after its flags, which KVM sets last
            taken.append((entry.slot, entry.offset))
            self._entries[at : at + 4] = abi.KVM_DIRTY_GFN_F_RESET.to_bytes(4, "little")
            self.harvest_index += 1


class RealVcpu:
    """One vCPU of a `RealVm`. One thread at a time may use it.

    ``value``: what its last write carried; each carries one more. ``dirty_ring``: None if the VM has none."""

    def __init__(
        self,
        number: int,
        fd: int,
        sizes: tuple[int, int],
        mailboxes: mmap.mmap,
        reach: Callable[[int], None],
        time_limit: float,
        closing: ExitStack,
    ) -> None:
        """``fd``: from KVM_CREATE_VCPU. ``sizes``: of the shared page and of the dirty ring (or 0), in bytes. ``mailboxes``:
        the private memslot. ``reach`` refuses a gfn that the guest cannot touch."""
        self.number, self._fd, self._mailboxes, self._reach, self._limit = number, fd, mailboxes, reach, time_limit
        self._busy, self._closed = threading.RLock(), False  # of a thread twice: a signal's handler may close the VM
        self._shared = mmap.mmap(fd, sizes[0])
        closing.callback(self._shared.close)
        self.dirty_ring: RealDirtyRing | None = None
        if sizes[1]:
            entries = mmap.mmap(fd, sizes[1], offset=abi.KVM_DIRTY_LOG_PAGE_OFFSET * PAGE_SIZE)
            closing.callback(entries.close)
            self.dirty_ring = RealDirtyRing(entries)
        self.value = 0
        self._call(abi.KVM_SET_SIGNAL_MASK, let_through(), "KVM_SET_SIGNAL_MASK")
        self._enter_user_mode()
        self._restart()

    def read(self, gfn: int) -> Seen:
        """Read a page, and return how it went."""
        return self.run([("read", gfn)])[0]

    def write(self, gfn: int) -> Seen:
        """Write a page, and return how it went."""
        return self.run([("write", gfn)])[0]

    def fetch(self, gfn: int) -> Seen:
        """Execute the `ret` that user space has laid into the page. OSError EFAULT where there is no memory: KVM fetches no
        instruction from elsewhere."""
        return self.run([("fetch", gfn)])[0]

    def run(self, accesses: Iterable[tuple[str, int]]) -> list[Seen]:
        """Do ("read" | "write" | "fetch", gfn) accesses in the guest, one after the other, without leaving it in between
        unless KVM makes it; return how each went. Behind a RING_FULL, none is tried.

        ValueError for other accesses and for gfns the guest cannot reach, OSError for what KVM_RUN refuses (EBADF: another
        thread closes the VM), TimeoutError if the guest does not come back."""
        todo = []
        with self._in_use():
            for kind, gfn in accesses:
                if kind not in guest.WHAT:
                    raise ValueError(f"an access is one of {', '.join(guest.WHAT)}; got {kind!r}")
                self._reach(gfn)
                todo.append((guest.WHAT[kind], gfn))
            return by_mailbox(todo, self._mailbox)

    def spin(self) -> None:
        """Never come back: the guest loops until the time is up. TimeoutError."""
        with self._in_use():
            self._mailbox([(guest.SPIN, 0)])

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """`close` waits for what is done in here. OSError EBADF if the VM is closed already."""
        with self._busy:
            if self._closed:
                raise self._is_closed()
            yield

    def close(self) -> None:
        """Have the vCPU leave the guest, whoever runs it, and never enter it again. Waits until it has left."""
        self._closed = True
        watchdog.call_back(self._shared)
        with self._busy:
            self._fd = -1  # this number may soon be another's

    def _mailbox(self, todo: list[tuple[int, int]]) -> list[Seen]:
        """Let the guest do what fits into its mailbox."""
        box, packed = guest.mailbox(self.number) - guest.PRIVATE, guest.records(todo, self.number, self.value + 1)
        self._mailboxes[box : box + len(packed)] = packed
        self.value += sum(what == guest.WRITE for what, _ in todo)
        seen = [Seen.DONE] * len(todo)
        try:
            while (left := self._enter()).exit_reason == abi.KVM_EXIT_MMIO:
                if left.mmio.phys_addr == guest.STOP:
                    return seen
                seen[guest.counted(self._regs().rsi, self.number)] = Seen.MMIO
                self._shared[MMIO_DATA : MMIO_DATA + 8] = bytes(8)
            regs = self._regs()
            retired = guest.retired(regs.rsi, regs.rip, self.number)
            if left.exit_reason != abi.KVM_EXIT_DIRTY_RING_FULL:
                raise self._failed(left, todo[min(retired, len(todo) - 1)])
        except BaseException:
            if not self._closed:
                self._enter_user_mode()  # KVM on AMD takes a vCPU that shuts down back to real mode
                self._restart()
            raise
        self._restart()
        return seen[:retired] + [Seen.RING_FULL] * (len(todo) - retired)

    def _enter(self) -> abi.kvm_run:
        """KVM_RUN, until the vCPU leaves for user space. TimeoutError if it does not, OSError EBADF if the VM is closed."""
        with watchdog.watch(self._shared, self._limit) as guard:
            while not guard.called_back and not self._closed:
                try:
                    kvm_run(self._fd, told=f"KVM_RUN of vCPU {self.number}")
                except InterruptedError:  # a signal: ours, or one whose handler runs now
                    continue
                return abi.kvm_run.from_buffer_copy(self._shared)
        if self._closed:
            raise self._is_closed()
        why = f"vCPU {self.number} was in KVM_RUN for {self._limit:g} s and was called back"
        raise TimeoutError(errno.ETIMEDOUT, f"{os.strerror(errno.ETIMEDOUT)}: {why}")

    def _is_closed(self) -> OSError:
        return OSError(errno.EBADF, f"{os.strerror(errno.EBADF)}: KVM_RUN of vCPU {self.number}: the VM is closed")

    def _failed(self, left: abi.kvm_run, doing: tuple[int, int]) -> OSError:
        name = abi.EXIT_NAMES.get(left.exit_reason, f"exit reason {left.exit_reason}")
        what = next((kind for kind, number in guest.WHAT.items() if number == doing[0]), "its loop")
        why = f"KVM_RUN of vCPU {self.number} left with {name} at {what} of gfn {doing[1]:#x}"
        return OSError(errno.EFAULT, f"{os.strerror(errno.EFAULT)}: {why}")

    # ---- registers --------------------------------------------------------------------------------------------------

    def _call(self, number: int, argument: object, name: str) -> None:
        ioctl(self._fd, number, argument, told=f"{name} of vCPU {self.number}")

    def _regs(self) -> abi.kvm_regs:
        regs = abi.kvm_regs()
        self._call(abi.KVM_GET_REGS, regs, "KVM_GET_REGS")
        return regs

    def _restart(self) -> None:
        """Put the guest at the beginning of its code and of its mailbox, whatever it was about."""
        box = guest.mailbox(self.number)
        regs = abi.kvm_regs(rsi=box, rdi=box, r8=guest.STOP, rsp=box, rip=guest.PRIVATE, rflags=2)
        self._call(abi.KVM_SET_REGS, regs, "KVM_SET_REGS")

    def _enter_user_mode(self) -> None:
        """64-bit mode, CPL 3, the private page tables; no interrupt table, so that an exception shuts the vCPU down and
        touches no page."""
        sregs = abi.kvm_sregs()
        self._call(abi.KVM_GET_SREGS, sregs, "KVM_GET_SREGS")
        flat = {"base": 0, "limit": 0xFFFF_FFFF, "present": 1, "dpl": 3, "s": 1, "g": 1}
        sregs.cs = abi.kvm_segment(selector=0x33, type=11, l=1, **flat)  # code, readable, accessed
        for name in ("ds", "es", "fs", "gs", "ss"):
            setattr(sregs, name, abi.kvm_segment(selector=0x2B, type=3, db=1, **flat))  # data, writable, accessed
        sregs.idt = abi.kvm_dtable()
        sregs.cr0 = 0x8001_0033  # PG WP NE ET MP PE
        sregs.cr3 = guest.PRIVATE + guest.TABLES * PAGE_SIZE
        sregs.cr4 = 0x20  # PAE
        sregs.efer = 0x500  # LME LMA
        self._call(abi.KVM_SET_SREGS, sregs, "KVM_SET_SREGS")
