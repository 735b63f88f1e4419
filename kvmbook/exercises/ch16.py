"""Exercises and questions of chapter 16."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

from kvmbook.exercises.mechanism import Answer, checker, question
from kvmbook.model import Hardware, Kernel, Vm
from kvmbook.scenes import BORDER, HUGE, WORD, lost_by_model, up
from kvmbook.search import loses, read_litmus

# ---- questions -------------------------------------------------------------------------------------------------------

TODAY, GFN, RING_BYTES = Kernel.v6_18, 0x100, 1 << 16
LOGGED: dict[str, Any] = {"slot": 0, "base_gfn": GFN, "npages": 64, "log_dirty_pages": True}


def _with_ring(manual: int) -> Vm:
    vm = Vm(Hardware.npt(), TODAY)
    vm.enable_dirty_ring(RING_BYTES)
    vm.enable_cap_manual_dirty_log_protect2(manual)
    return vm


def _harvest(vm: Vm) -> None:
    for vcpu in vm.vcpu:
        assert vcpu.dirty_ring is not None
        vcpu.dirty_ring.harvest()
    vm.reset_dirty_rings()


@question("none", "page 0", "pages 0 and 1", "all three")
def quiz_16_1() -> Answer:
    """A ring, and manual protect 3. Before logging is enabled, the guest has written page 0 and read page 1; page 2 it has
    never used. After, it writes all three. Whose write is lost?"""
    vm = _with_ring(3)
    vm.set_user_memory_region(slot=0, base_gfn=GFN, npages=64)
    vm.vcpu[0].write(GFN)
    vm.vcpu[0].read(GFN + 1)
    vm.set_user_memory_region(**LOGGED)
    for page in range(3):
        vm.vcpu[0].write(GFN + page)
    lost = [int(gfn) - GFN for gfn in vm.missed_dirty(0)]
    because = (
        "A read too maps a page writable, where no log is on: that saves a fault. Page 2 faults, and the fault puts it into "
        "the ring. So the more of its memory a guest has used, the more it can lose."
    )
    said = {(): "none", (0,): "page 0", (0, 1): "pages 0 and 1", (0, 1, 2): "all three"}
    return Answer(said[tuple(lost)], because)


@question("yes", "no")
def quiz_16_2() -> Answer:
    """Somebody adds one line to the ring mode of dirty_log_test: enable manual protect 3 too. The test's slot logs from the
    moment it is created. Does the test now see a write lost?"""
    vm = _with_ring(3)
    vm.set_user_memory_region(**LOGGED)
    for _ in range(2):
        vm.vcpu[0].write(GFN)
        _harvest(vm)
    vm.vcpu[0].write(GFN)
    because = (
        "Nothing is mapped when logging begins, so the first write to each page faults, and has its entry; RESET protects "
        "the page again. It takes a second line: let the guest write before logging is enabled."
    )
    return Answer("yes" if len(vm.missed_dirty(0)) else "no", because)


ROUNDED = """
kernel: Linux v6.0
hardware: EPT with A/D bits
nested: none
eager_page_split: Y
manual: CLEAR clears, initially set
ring: bitmap
vcpus: 1
slot: 513 pages from gfn 0x3ff, the host's of 2M; runs are about 0, 1
run:
  vCPU0 writes page 1
  user space enables logging
  user space clears 0, 1 of the dirty log
  vCPU0 writes page 1
"""


@question("neither", "the comparison's only", "the split's only", "either, alone")
def quiz_16_3() -> Answer:
    """Linux v6.0, EPT, eager splitting as by default: the run of this chapter's second loss loses its write. Two places are
    wrong there: the comparison, and the end of the split. Which repair is enough?"""
    litmus = read_litmus(ROUNDED)
    cured = [
        not loses(litmus.configuration.with_(kernel=litmus.configuration.kernel.with_(**{switch: False})), litmus.run)
        for switch in ("clear_compares_rounded_up", "clear_split_forgets_last")
    ]
    because = (
        "Each mechanism would catch what the other leaves: two faults, one loss, and each repair hides the other fault. v6.8 "
        "repaired the split, and so the loss went from the default; its message says that there was none."
    )
    options = {(False, False): "neither", (True, False): "the comparison's only", (False, True): "the split's only"}
    return Answer(options.get((cured[0], cured[1]), "either, alone"), because)


# ---- 1: which word loses? --------------------------------------------------------------------------------------------


class Word(NamedTuple):
    """A word of a CLEAR: its first gfn, and the gfns that it names."""

    begins: int
    named: tuple[int, ...]

    def __str__(self) -> str:
        return f"from {self.begins:#x}, names {', '.join(f'{gfn:#x}' for gfn in self.named)}"


def words_16_1(seed: int = 16) -> list[Word]:
    """Six words around gfn 0x800, with which a 2M page begins: two lose a write, four do not."""
    chance = random.Random(seed)
    kinds = ("loses", "loses", "its first alone", "behind it", "aligned", "before it")
    words = []
    for kind, border in zip(kinds, chance.sample(range(3, WORD - 3), len(kinds)), strict=True):
        lower = set(chance.sample(range(border), chance.choice((1, 2))))
        bits = {
            "loses": {border, *lower},
            "its first alone": {border},
            "behind it": {border + chance.choice((1, 2)), *lower},
            "aligned": {0, border},
            "before it": {border - 1, *lower},
        }[kind]
        begins = BORDER - border * (kind != "aligned")
        words.append(Word(begins, tuple(begins + bit for bit in sorted(bits))))
    chance.shuffle(words)
    return words


@checker
def check_16_1(answer: Sequence[int | None], seed: int = 16) -> str:
    """For each word the gfn whose write is lost, or None."""
    words = words_16_1(seed)
    if isinstance(answer, str) or len(answer) != len(words):
        return f"give a list of {len(words)}: a gfn, or None"
    for number, (word, said) in enumerate(zip(words, answer, strict=True), 1):
        border = BORDER - word.begins
        lost = lost_by_model(border, [gfn - word.begins for gfn in word.named])
        right = word.begins + lost[0] if lost else None
        if said == right:
            continue
        if right is None:
            return f"word {number}: {_why_not_lost(word)}"
        return f"word {number}: round its first gfn and its last up to a multiple of 512: what does KVM think?"
    return ""


def _why_not_lost(word: Word) -> str:
    if word.begins == BORDER:
        return "all of its gfns lie in one 2M page, and KVM looks at the first of them"
    if len(word.named) == 1:
        return "KVM always looks at the first gfn that is named, and here it is the only one"
    if word.named[-1] != BORDER:
        return f"its last gfn, {word.named[-1]:#x}, does not begin a 2M page; round both up"
    return "round its first and its last gfn up"


# ---- 2: prove it or break it -----------------------------------------------------------------------------------------


class Proposal(NamedTuple):
    """A condition under which KVM also looks at ``last``, given the first and the last gfn of a word; as text, and as a
    function."""

    says: str
    asks: Callable[[int, int], bool]

    def misses(self, first: int, last: int) -> bool:
        return not self.asks(first, last) and first // HUGE != last // HUGE


PROPOSALS = (
    Proposal("up(first) != up(last + 1)", lambda first, last: up(first) != up(last + 1)),
    Proposal("(first ^ last) > 511", lambda first, last: (first ^ last) > 511),
    Proposal("last - first > 511", lambda first, last: last - first > 511),
    Proposal("last % 512 < first % 512", lambda first, last: last % HUGE < first % HUGE),
    Proposal("last % 512 != 0 and up(first) != up(last)", lambda f, last: last % HUGE != 0 and up(f) != up(last)),
)


@checker
def check_16_2(answer: Sequence[tuple[int, int] | None]) -> str:
    """For each proposal None, if it misses nothing, or a pair (first, last) of one word that it misses."""
    if isinstance(answer, str) or len(answer) != len(PROPOSALS):
        return f"give a list of {len(PROPOSALS)}: a pair (first, last), or None"
    for number, (proposal, said) in enumerate(zip(PROPOSALS, answer, strict=True), 1):
        if hint := _judged(proposal, said):
            return f"proposal {number}: {hint}"
    return ""


def _judged(proposal: Proposal, said: tuple[int, int] | None) -> str:
    if said is None:
        missed = any(proposal.misses(first, first + more) for first in range(HUGE) for more in range(WORD))
        return "it misses a word; where could its two gfns lie on both sides of a border?" if missed else ""
    first, last = said
    if not 0 <= first <= last < first + WORD:
        return "first and last are gfns of one word of 64, in this order"
    if first // HUGE == last // HUGE:
        return f"{first:#x} and {last:#x} lie in one 2M page: there is nothing to miss"
    if proposal.asks(first, last):
        return f"of {first:#x} and {last:#x} it says yes, so KVM looks at both"
    return ""


# ---- 3: a host that you cannot patch ---------------------------------------------------------------------------------

SLOT: dict[str, Any] = {"slot": 0, "base_gfn": 0x400, "npages": HUGE}


@checker
def check_16_3(begin: Callable[[Vm], Any]) -> str:
    """A function that begins logging on a VM with a ring and manual protect 3 and loses no write, whatever was mapped."""
    if not callable(begin):
        return "give a function of one VM"
    for hardware, page_size in product((Hardware.npt(), Hardware.ept(pml=True), Hardware.shadow()), ("4K", "2M")):
        where = f"{hardware.name}, the host's pages of {page_size}: "
        vm = Vm(hardware, TODAY, vcpus=2, page_size=page_size)
        vm.enable_dirty_ring(RING_BYTES)
        vm.enable_cap_manual_dirty_log_protect2(3)
        vm.set_user_memory_region(**SLOT)
        vm.vcpu[0].write(PAGES[0])
        vm.vcpu[1].read(PAGES[1])
        vm.vcpu[1].write(PAGES[2])
        begin(vm)
        if hint := _why_not_begun(vm):
            return where + hint
    return ""


PAGES = (0x400, 0x401, 0x5FF)


def _why_not_begun(vm: Vm) -> str:
    """What is wrong after ``begin``: the slot is another, or a write is lost, at once or after a harvest."""
    slot = vm.memslots.find(0, 1)
    if slot is None or (slot.base_gfn, slot.npages) != (SLOT["base_gfn"], SLOT["npages"]):
        return "slot 0 must be there at the end, as it was: 512 pages from gfn 0x400"
    if not slot.logs_dirty:
        return "slot 0 does not log at the end"
    if not vm.initially_set or not vm.dirty_ring_size:
        return "the ring and manual protect stay as they were"
    for _ in range(2):
        for vcpu, gfn in zip((0, 1, 1), PAGES, strict=True):
            vm.vcpu[vcpu].write(gfn)
        if len(missed := vm.missed_dirty(0)):
            return f"the write to gfn {int(missed[0]):#x} is lost; what still has W, and which ioctl makes KVM drop it?"
        _harvest(vm)
    return ""
