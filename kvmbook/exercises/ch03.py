"""Exercises and questions of chapter 03."""

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from kvmbook.exercises.mechanism import Answer, checker, question
from kvmbook.exercises.vms import aged, enable
from kvmbook.model import (
    PT_WRITABLE_MASK,
    READ_MASK,
    SHADOW_ACC_TRACK_SAVED_MASK,
    SPTE_TDP_AD_MASK,
    SPTE_TDP_AD_WRPROT_ONLY_MASK,
    Hardware,
    Kernel,
    SpteFormat,
)
from kvmbook.scenes import BASE_GFN, FREE, KVM_READS, LEAVES, PFN, after_read, broken_rule, fields, spte_state
from kvmbook.views import parse

# ---- quiz ------------------------------------------------------------------------------------------------------------


@question("by D: spte_ad_enabled() says yes", "by W", "by D and W")
def quiz_03_1() -> Answer:
    """A leaf has type 2. By which of its bits does dirty logging notice a write to the page?"""
    fmt = SpteFormat.ept()
    fresh = fmt.make_spte(PFN, ad_type=SPTE_TDP_AD_WRPROT_ONLY_MASK).spte
    cleared = fresh ^ fmt.rmap_clear_dirty(fresh).spte
    how = [name for name, mask in (("D", fmt.shadow_dirty_mask), ("W", PT_WRITABLE_MASK)) if cleared & mask]
    option = {"W": "by W", "D": "by D: spte_ad_enabled() says yes"}.get("".join(how), "by D and W")
    because = (
        "The A and D bits of such a leaf are real, so spte_ad_enabled() says yes. But logging asks "
        "spte_ad_need_write_protect(), and that says yes, too."
    )
    return Answer(option, because)


@question("R, W and X", "R and X", "only R")
def quiz_03_2() -> Answer:
    """A page was readable, writable and executable. It is aged on a CPU without A/D bits, and dirty logging is switched on.
    Then another vCPU writes the page. Which rights does the SPTE have now?"""
    vm = aged(Hardware.ept(ad_bits=False), Kernel.v5_19, pages=1)
    enable(vm)
    vm.vcpu[1].write(BASE_GFN)
    rights = "".join(c for c, on in zip("RWX", vm.fmt.hardware_rights(vm.spte(BASE_GFN)), strict=True) if on)
    because = (
        "R and X were saved, and both come back. W was not saved, but MW = 1 says that it may come back, and this is a write "
        "fault: KVM sets W, and the page's bit in the log. After a read, W would be 0."
    )
    return Answer({"RWX": "R, W and X", "RX": "R and X"}.get(rights, "only R"), because)


@question("the same: a fresh, writable SPTE", "a read-only SPTE", "a word that KVM never makes")
def quiz_03_3() -> Answer:
    """0000000004567e67 is the SPTE of a fresh, writable page on an AMD host. What is the same word
    to KVM on an Intel host with A/D bits?"""
    fresh = SpteFormat.npt().make_spte(PFN).spte
    fmt = SpteFormat.ept()
    because = "On AMD, HW and MW are bits 9 and 10. In EPT they are bits 57 and 58, and here both are 0 while W is 1."
    if broken_rule(fmt, fresh):
        return Answer("a word that KVM never makes", because)
    same = fmt.is_writable_pte(fresh)
    return Answer("the same: a fresh, writable SPTE" if same else "a read-only SPTE", because)


# ---- exercise 1: decode ----------------------------------------------------------------------------------------------

READ_ANEW = "another vCPU, which remembers nothing, reads it"  # who remembers the page may hit, and then A stays 0
MADE_AGAIN = "a second fault makes it again"  # over W = 1: without D, where there is a D bit
STEPS: dict[str, Callable[[SpteFormat, int], int]] = {
    "the host ages it": lambda fmt, spte: int(fmt.mmu_spte_age(spte).spte),
    READ_ANEW: after_read,
    "it is write-protected for logging": lambda fmt, spte: int(fmt.spte_write_protect(spte).spte),
    "it is protected for shadow paging": lambda fmt, spte: int(fmt.spte_write_protect(spte, pt_protect=True).spte),
    MADE_AGAIN: lambda fmt, spte: make_again(fmt, spte),
}
SKETCHES = (
    ("the host ages it",),
    ("the host ages it", READ_ANEW),
    ("it is write-protected for logging", "the host ages it"),
    ("it is protected for shadow paging", "the host ages it"),
    ("it is protected for shadow paging", "the host ages it", READ_ANEW),
)


def make_again(fmt: SpteFormat, spte: int) -> int:
    """The SPTE after a second fault on the same page, by a vCPU that was late."""
    again = fmt.make_spte(int(fmt.spte_to_pfn(spte)), ad_type=spte & SPTE_TDP_AD_MASK, old_spte=spte)
    return int(again.spte)


class Found(NamedTuple):
    """A word to decode: its format, a key of `kvmbook.scenes.words.LEAVES`, and the word."""

    format: str
    word: int

    def __str__(self) -> str:
        return f"{self.format}: {self.word:016x}"


class History(NamedTuple):
    """A word to build: its format, its frame, and what happened to it after it was mapped writable."""

    format: str
    pfn: int
    steps: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.format}, frame {self.pfn:#x}: mapped fresh and writable; then {'; then '.join(self.steps)}"


def history(seed: int) -> History:
    """A history for exercise 2, another for each seed."""
    return _drawn(seed, SKETCHES)


def _drawn(seed: int, sketches: Sequence[tuple[str, ...]]) -> History:
    chance = random.Random(seed)
    return History(chance.choice(list(LEAVES)), chance.randrange(0x1000, 0x1000000), chance.choice(sketches))


def found_word(seed: int) -> Found:
    """A word for exercise 1, another for each seed."""
    past = _drawn(seed + 1000, (*SKETCHES, (MADE_AGAIN,)))
    return Found(past.format, _after(past))


def _after(past: History) -> int:
    fmt, ad_type = LEAVES[past.format]
    spte = fmt.make_spte(past.pfn, ad_type=ad_type).spte
    for step in past.steps:
        spte = STEPS[step](fmt, spte)
    return spte


WHERE = {
    "pfn": "it is the ten hexadecimal digits in the middle",
    "type": "it is in bits 53 and 52, in the third digit from the left",
    "W": "it is bit 1",
    "MW": "it is one of KVM's own bits; where does that stand in this format?",
    "young": "if there is an A bit, it says so; if there is none, ask whether the word is access-tracked",
    "state": "go down the list in the exercise, from its top, and stop at the first that fits",
}


@checker
def check_03_1(decoded: Mapping[str, Any], seed: int = 1) -> str:
    """All six facts about the word of `found_word(seed)`."""
    format, spte = found_word(seed)
    fmt = LEAVES[format].fmt
    facts: dict[str, Any] = {
        "pfn": fmt.spte_to_pfn(spte),
        "type": (spte & SPTE_TDP_AD_MASK) // (SPTE_TDP_AD_MASK & -SPTE_TDP_AD_MASK),
        "W": int(fmt.is_writable_pte(spte)),
        "MW": int(fmt.is_mmu_writable_spte(spte)),
        "young": bool(fmt.is_accessed_spte(spte)),
        "state": spte_state(fmt, spte),
    }
    if not isinstance(decoded, Mapping) or set(decoded) != set(facts):
        return f"give a dict with the keys {', '.join(facts)}"
    if isinstance(decoded["pfn"], str):
        return "give pfn as a number, 0x..."
    wrong = next((name for name, value in facts.items() if decoded[name] != value), None)
    return f"your answer for {wrong!r} is wrong; {WHERE[wrong]}" if wrong else ""


# ---- exercise 2: build -----------------------------------------------------------------------------------------------


@checker
def check_03_2(word: str | int, seed: int = 1) -> str:
    """The word after `history(seed)`, in hexadecimal or as a number."""
    past = history(seed)
    fmt, spte = LEAVES[past.format].fmt, parse(word)
    wrong = spte ^ _after(past)
    if not wrong:
        return ""
    if fmt.spte_to_pfn(wrong):
        return "the frame is wrong; it is the ten hexadecimal digits in the middle"
    kinds = {field.kind for field in fields(fmt) if field.mask & wrong}
    who = "that nobody reads"
    if kinds != {FREE}:
        who = "that only KVM reads" if KVM_READS in kinds else "that hardware reads"
    many = wrong.bit_count()
    said = "one bit is wrong, one" if many == 1 else f"{many} bits are wrong, among them one"
    tail = f"; besides, KVM never makes your word: {broken}" if (broken := broken_rule(fmt, spte)) else ""
    return f"{said} {who}{tail}"


# ---- exercise 3: backwards -------------------------------------------------------------------------------------------


def _origins(fmt: SpteFormat, spte: int) -> set[int]:
    """All words that ageing turns into ``spte``, by trying: ageing touches R, W, X, A and the saved bits only."""
    touched = READ_MASK | PT_WRITABLE_MASK | fmt.shadow_x_mask | fmt.shadow_accessed_mask | fmt.shadow_acc_track_mask
    touched |= SHADOW_ACC_TRACK_SAVED_MASK if fmt.shadow_acc_track_mask else 0
    bits = [1 << bit for bit in range(64) if touched >> bit & 1]
    found = set()
    for flips in product((0, 1), repeat=len(bits)):
        word = spte ^ sum(bit for bit, flip in zip(bits, flips, strict=True) if flip)
        if not broken_rule(fmt, word) and fmt.mmu_spte_age(word).spte == spte:
            found.add(word)
    return found


@checker
def check_03_3(origins: Callable[[SpteFormat, int], Collection[str | int]]) -> str:
    """All words from which one ageing leads to a given one, for leaves of all formats, young and old."""
    for format, (fmt, ad_type) in LEAVES.items():
        fresh = fmt.make_spte(PFN, ad_type=ad_type).spte
        protected, guarded = (int(fmt.spte_write_protect(fresh, pt_protect=pt).spte) for pt in (False, True))
        for spte in (fresh, protected, *(int(fmt.mmu_spte_age(s).spte) for s in (fresh, protected, guarded))):
            said, right = {parse(word) for word in origins(fmt, spte)}, _origins(fmt, spte)
            where = f"{format}, {spte:016x}"
            if said - right:
                return f"{where}: {_why_no_origin(fmt, min(said - right), spte)}"
            if right - said:
                return f"{where}: {_what_is_missing(fmt, spte, said, len(right - said))}"
    return ""


def _words(many: int) -> str:
    return "one word" if many == 1 else f"{many} words"


def _why_no_origin(fmt: SpteFormat, word: int, spte: int) -> str:
    """What is wrong with a word that a reader calls an origin of ``spte``."""
    if broken := broken_rule(fmt, word):
        return f"you name {word:016x}, a word that KVM never makes: {broken}"
    aged = fmt.mmu_spte_age(word).spte
    if aged == word:
        return f"you name {word:016x}, which is not young, so ageing leaves it as it is"
    return f"you name {word:016x}, which ageing turns into {aged:016x}"


def _what_is_missing(fmt: SpteFormat, spte: int, said: Collection[int], many: int) -> str:
    """Where to look for origins of ``spte`` that a reader has not named."""
    if not said:
        return f"it has {_words(many)} as origins, and you name none; is it young, and what is its type?"
    if spte not in said:
        return f"you miss {_words(many)}; what does ageing do to a word that is not young?"
    if fmt.spte_ad_enabled(spte):
        return f"you miss {_words(many)}; which one bit does ageing clear, if the type says that there is an A bit?"
    return f"you miss {_words(many)}; two of R, W and X were saved: which bit says whether the third may have been set?"
