"""The guest: fifty bytes of code that do what a mailbox says, and the page tables below them.

It runs in 64-bit mode at CPL 3, as a process would: there a KVM without hardware virtualization too lets it run on the CPU
itself, through SPTEs. At CPL 0 that one would emulate each instruction, and reach the page without SPTE or TLB.

All of it lies in a private memslot from `PRIVATE`. Guest addresses up to 4 GiB are guest-physical ones: gfn g is at g << 12.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from functools import cache

from kvmbook.model import PAGE_SHIFT, PAGE_SIZE

REACH = 1 << 20  # gfns below this one have an address in the guest
PRIVATE = 0xF000_0000  # guest address of the private memslot
STOP = 0xF800_0000  # an address without memory: writing there leaves the guest
OWN_GFNS = range(PRIVATE >> PAGE_SHIFT, (STOP >> PAGE_SHIFT) + 1)

# Registers: rsi the record, rdi the mailbox, r8 STOP. A record is a u32 (what), a u32 (address) and a u64 (value).
# The bytes, and what they say.
LISTING = """
8b06      next:   mov  (%rsi),%eax        # what
8b5e04            mov  4(%rsi),%ebx       # where
488b4e08          mov  8(%rsi),%rcx       # the value
83f802            cmp  $2,%eax
740f              je   write
7712              ja   other
85c0              test %eax,%eax
7417              je   stop
488b0b    read:   mov  (%rbx),%rcx
4883c610  done:   add  $16,%rsi           # only now is it counted
ebe3              jmp  next
48890b    write:  mov  %rcx,(%rbx)
ebf5              jmp  done
83f803    other:  cmp  $3,%eax
750c              jne  spin
ffd3      fetch:  call *%rbx              # a `ret` lies there
ebec              jmp  done
4889fe    stop:   mov  %rdi,%rsi          # the next time from the mailbox's beginning
418900            mov  %eax,(%r8)         # KVM_EXIT_MMIO
ebcd              jmp  next
ebfe      spin:   jmp  spin               # never leaves: for the watchdog's test
"""
CODE = b"".join(bytes.fromhex(line.split()[0]) for line in LISTING.split("\n") if line)
RET = 0xC3
RET_AT = PAGE_SIZE - 1  # where in a page the `ret` lies that a fetch calls; writes go to the page's beginning
MOST_VCPUS = RET_AT // 8  # each writes to its own eight bytes of a page
STOPS, READ, WRITE, FETCH, SPIN = range(5)
WHAT = {"read": READ, "write": WRITE, "fetch": FETCH}

RECORD = struct.Struct("<IIQ")
BOX_PAGES = 16
RECORDS = BOX_PAGES * PAGE_SIZE // RECORD.size - 1  # that fit into a mailbox, with the record that stops behind them

# The private memslot, in pages: code, PML4, PDPT, four page directories; then for each vCPU a stack and a mailbox.
TABLES = 1
PER_VCPU = 1 + BOX_PAGES
_FIRST_VCPU = 7
_TABLE, _LARGE = 0x27, 0xE7  # present, writable, user, accessed; for 2M leaves also dirty and page size


def private_pages(vcpus: int) -> int:
    return _FIRST_VCPU + vcpus * PER_VCPU


def mailbox(vcpu: int) -> int:
    """The guest address of a vCPU's mailbox. Its stack ends there."""
    return PRIVATE + (_FIRST_VCPU + vcpu * PER_VCPU + 1) * PAGE_SIZE


@cache
def image() -> bytes:
    """The private memslot's first pages: the code, and page tables that map 4 GiB one to one by 2M pages. Accessed and dirty
    are set in all entries, so that no walk writes to them."""
    at = [PRIVATE + number * PAGE_SIZE for number in range(_FIRST_VCPU)]
    tables = [
        struct.pack("<Q", at[2] | _TABLE),
        struct.pack("<4Q", *(address | _TABLE for address in at[3:])),
        struct.pack("<2048Q", *(number << 21 | _LARGE for number in range(2048))),
    ]
    return b"".join(part.ljust(PAGE_SIZE, b"\0") for part in (CODE, *tables))


def records(accesses: Iterable[tuple[int, int]], vcpu: int, value: int) -> bytes:
    """The mailbox for (what, gfn) accesses of a vCPU, with the record that stops. Writes carry ``value``, value + 1, ... to
    the vCPU's own eight bytes of the page."""
    packed = []
    for what, gfn in accesses:
        packed.append(RECORD.pack(what, (gfn << PAGE_SHIFT) + (RET_AT if what == FETCH else 8 * vcpu), value))
        value += what == WRITE
    return b"".join(packed) + RECORD.pack(STOPS, 0, 0)


def counted(rsi: int, vcpu: int) -> int:
    """How many records the guest has counted as done. An access that leaves for MMIO is not among them, not even a write,
    which KVM takes as done when it leaves."""
    return (rsi - mailbox(vcpu)) // RECORD.size


def retired(rsi: int, rip: int, vcpu: int) -> int:
    """How many records are done."""
    return counted(rsi, vcpu) + (rip - PRIVATE in _NOT_YET_COUNTED)


_NOT_YET_COUNTED = (0x17, 0x20, 0x29)  # at `done`, and at the two jumps there
