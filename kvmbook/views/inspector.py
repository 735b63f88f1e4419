"""The SPTE inspector: any 64-bit word, in any format, in words.

The view is JavaScript and knows no rule. What it needs is carried as *decisions*: what the model answers to each pattern
of those few bits on which the answer depends, found by running the model. So the inspector says of each word what the
model says, with a kernel behind it or without.
"""

from __future__ import annotations

import functools
import random
import re
import string
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import traitlets

from kvmbook.model import (
    ALL_BITS,
    EPT_RWX_MASK,
    PT_PAGE_SIZE_MASK,
    REMOVED_SPTE,
    SHADOW_ACC_TRACK_SAVED_MASK,
    SPTE_MMU_PRESENT_MASK,
    SPTE_TDP_AD_MASK,
    SpteFormat,
)
from kvmbook.scenes import (
    ABOUT_KINDS,
    ADDRESS,
    HELPERS,
    LEAVES,
    OPERATIONS,
    SENTENCES,
    VERDICTS,
    Says,
    bit_name,
    fields,
    free_bits,
    helper_says,
    named_words,
    operation_does,
    spte_state,
)
from kvmbook.views.drawing import INK, LOOK, LOST, Picture, framed
from kvmbook.views.scripts import script, style
from kvmbook.views.widget import Widget
from kvmbook.views.word_figures import KINDS, words_picture

PATTERNS = string.digits + string.ascii_letters  # one letter says which answer a pattern gets
SAMPLE = 1600  # words that are asked to find the bits that matter
SPECIAL = (0, REMOVED_SPTE)  # known by all their 64 bits: too many for a table
ORDINARY = 1 << 12  # a bit of the address, so that a word is none of those
UNDO = 40

# ---- decisions: the answers, by pattern ------------------------------------------------------------------------------


def _flags(fmt: SpteFormat) -> list[int]:
    """The numbers of all bits that an answer may depend on: the address and the memory type are left out."""
    mask = fmt.shadow_user_mask | fmt.shadow_x_mask | fmt.shadow_nx_mask | fmt.shadow_mmio_mask
    mask |= fmt.shadow_accessed_mask | fmt.shadow_dirty_mask | SHADOW_ACC_TRACK_SAVED_MASK | EPT_RWX_MASK
    mask |= fmt.shadow_host_writable_mask | fmt.shadow_mmu_writable_mask | SPTE_MMU_PRESENT_MASK
    mask |= SPTE_TDP_AD_MASK | PT_PAGE_SIZE_MASK | free_bits(fmt)
    return [bit for bit in range(64) if mask >> bit & 1]


def _word(bits: Sequence[int], pattern: int) -> int:
    """The word whose bits ``bits`` read as the number ``pattern``, the first one lowest. All other bits are 0."""
    return sum((pattern >> number & 1) << bit for number, bit in enumerate(bits))


def decision(fmt: SpteFormat, ask: Says) -> dict[str, Any]:
    """An answer as a table: the ``bits`` that it depends on, for each pattern of those one letter in ``at`` (of
    `PATTERNS`), and what the letters say.

    Found by asking. If a word gets another answer than the word that agrees with it in all bits known to matter, then
    on the way from one to the other the answer changes, and the bit that is flipped there matters too.
    Holds for all words but those in `SPECIAL`.
    """
    ask_once = functools.cache(functools.partial(ask, fmt))
    flags, bits = _flags(fmt), list[int]()
    for spte in _sample(fmt, flags):
        known = sum(spte & 1 << bit for bit in bits) | ORDINARY
        while ask_once(known) != ask_once(spte):
            step = known
            for bit in flags:
                if (step ^ spte) >> bit & 1:
                    before, step = step, step ^ 1 << bit
                    if ask_once(step) != ask_once(before):
                        bits.append(bit)
                        known |= 1 << bit
                        break
    bits.sort()
    answers = [ask_once(_word(bits, pattern) | ORDINARY) for pattern in range(1 << len(bits))]
    says = list(dict.fromkeys(answers))
    return {"bits": bits, "at": "".join(PATTERNS[says.index(answer)] for answer in answers), "says": says}


def _sample(fmt: SpteFormat, flags: Sequence[int]) -> list[int]:
    """Words at random, half of them present; one in four has a free bit set."""
    rare = free_bits(fmt) & (ALL_BITS ^ SHADOW_ACC_TRACK_SAVED_MASK)
    chance, strays = random.Random(3), [1 << bit for bit in flags if rare >> bit & 1]
    words = [_word(flags, chance.getrandbits(len(flags))) & (ALL_BITS ^ rare) | ORDINARY for _ in range(SAMPLE)]
    return [
        spte | SPTE_MMU_PRESENT_MASK * (n % 2) | chance.choice(strays) * (n % 4 == 3) for n, spte in enumerate(words)
    ]


@functools.cache
def _tables(masks: SpteFormat) -> dict[str, Any]:
    return {
        "helpers": {name: decision(masks, helper_says(name)) for name in HELPERS},
        "sentences": [decision(masks, sentence) for sentence in SENTENCES],
        "verdicts": len(VERDICTS),
        "state": decision(masks, spte_state),
        "operations": {key: decision(masks, operation_does(key)) for key in OPERATIONS},
        "special": {
            f"{spte:016x}": {
                "helpers": {name: helper_says(name)(masks, spte) for name in HELPERS},
                "sentences": [sentence(masks, spte) for sentence in SENTENCES],
            }
            for spte in SPECIAL
        },
        "names": [bit_name(masks, bit) for bit in range(64)],
        "fields": [[f.short, f.low, f.width, f.kind] for f in fields(masks)],
    }


def decide(table: dict[str, Any], spte: int) -> Any:
    """What a decision says of a word: gather the bits, look up the letter."""
    pattern = sum((spte >> bit & 1) << number for number, bit in enumerate(table["bits"]))
    return table["says"][PATTERNS.index(table["at"][pattern])]


# ---- without a widget -------------------------------------------------------------------------------------------------


@functools.cache
def _tables_of(format: str) -> dict[str, Any]:
    if format not in LEAVES:
        raise ValueError(f"a format is one of {', '.join(LEAVES)}; got {format!r}")
    return _tables(replace(LEAVES[format].fmt, name=""))


def looks_at(helper: str, format: str) -> list[int]:
    """The bits on which the answer of a helper depends, lowest first; all of them if there is no table (see `SPECIAL`).
    Bit 11 is among them wherever a helper is asked of present SPTEs only.
    KeyError for a helper that is not in `HELPERS`, ValueError for an unknown format."""
    bits: list[int] = _tables_of(format)["helpers"][helper]["bits"]
    return list(bits) or list(range(64))


def _answers(table: dict[str, Any], spte: int) -> dict[str, str]:
    special = table["special"].get(f"{spte:016x}")
    return dict(special["helpers"]) if special else {n: decide(t, spte) for n, t in table["helpers"].items()}


def _sentences(table: dict[str, Any], spte: int) -> list[str]:
    special = table["special"].get(f"{spte:016x}")
    said = special["sentences"] if special else [decide(one, spte) for one in table["sentences"]]
    said = [*filter(None, said[: table["verdicts"]])][:1] or said
    low, width = next(field[1:3] for field in table["fields"] if field[3] == ADDRESS)
    frame = f"{spte >> low & (1 << width) - 1:#x}"
    return [sentence.replace("{pfn}", frame) for sentence in said if sentence]


def decode(word: str | int, format: str = "EPT without A/D bits") -> str:
    """What the inspector says of a word, in one sentence or more. ValueError for no word, or an unknown format."""
    return " ".join(_sentences(_tables_of(format), parse(word)))


def last_sentence(word: str | int, format: str = "EPT without A/D bits") -> str:
    """The last thing that `decode` says of a word; of one that is not writable, what TLBs may hold."""
    return _sentences(_tables_of(format), parse(word))[-1]


# ---- the widget ------------------------------------------------------------------------------------------------------

BAD_WORD = "A word is 1 to 16 hexadecimal digits, with or without 0x; nothing is changed."


def parse(said: str | int) -> int:
    """A word from hexadecimal digits (0x, spaces and _ may be among them) or a number. ValueError if it is none."""
    if isinstance(said, str):
        digits = re.sub(r"[\s_]", "", said).lower().removeprefix("0x")
        if not re.fullmatch("[0-9a-f]{1,16}", digits):
            raise ValueError(f"{BAD_WORD} Got {said!r}.")
        return int(digits, 16)
    if not 0 <= int(said) <= ALL_BITS:
        raise ValueError(f"an SPTE is 64 bits wide, 0 .. 2**64 - 1; got {said}")
    return int(said)


class SpteInspector(Widget):
    """64 bits to click, and what the model says about the word that they make.

    ``word``: 16 hexadecimal digits; ``format``: a key of `LEAVES`; ``steps``: what was done, oldest first, each as
    (key of `OPERATIONS` or "", word before, format before). The buttons do what the methods do.
    """

    _esm = script("inspector")
    _css = style("inspector")
    title = traitlets.Unicode().tag(sync=True)
    word = traitlets.Unicode().tag(sync=True)
    format = traitlets.Unicode().tag(sync=True)
    steps: Any = traitlets.List().tag(sync=True)
    leaves = traitlets.Dict().tag(sync=True)
    tables: Any = traitlets.List().tag(sync=True)
    words = traitlets.Dict().tag(sync=True)

    def __init__(self, word: str | int | None = None, format: str = "EPT without A/D bits") -> None:
        _tables_of(format)  # it must be known
        tables: list[dict[str, Any]] = []  # formats with the same masks share one
        for name in LEAVES:
            tables += [_tables_of(name)] * (_tables_of(name) not in tables)
        leaves = {
            name: {
                "table": tables.index(_tables_of(name)),
                "words": {state: f"{spte:016x}" for state, spte in named_words(name).items()},
            }
            for name in LEAVES
        }
        states = dict.fromkeys(state for name in LEAVES for state in named_words(name))
        start = next(iter(named_words(format).values())) if word is None else parse(word)
        super().__init__(
            title="The SPTE inspector",
            word=f"{start:016x}",
            format=format,
            leaves=leaves,
            tables=tables,
            words={
                "bad": BAD_WORD,
                "undo": UNDO,
                "patterns": PATTERNS,
                "operations": {key: said for key, (said, _, _) in OPERATIONS.items()},
                "order": [*LEAVES, *HELPERS, *OPERATIONS, *states],  # where a widget's state is stored keys are sorted
                "look": {state: fill for state, (fill, _) in LOOK.items()},
                "kinds": {kind: [KINDS[kind], ABOUT_KINDS[kind]] for kind in KINDS},
                "ink": INK,
                "changed": LOST,
            },
        )

    # ---- what a reader can do ---------------------------------------------------------------------------------------

    def show(self, word: str | int) -> str:
        """Show a word, as a number or in hexadecimal, and return the sentence. ValueError if it is none."""
        return self._go(parse(word))

    def choose(self, format: str) -> str:
        """Read the same word in another format, a key of `LEAVES`. ValueError for others."""
        _tables_of(format)  # it must be known
        return self._go(self.spte, format=format)

    def make(self, state: str) -> str:
        """Show the word of a named state. ValueError for a state that this format's leaves are never in."""
        words = self.leaves[self.format]["words"]
        if state not in words:
            raise ValueError(f"a state of {self.format} is one of {', '.join(words)}; got {state!r}")
        return self._go(int(words[state], 16))

    def press(self, operation: str) -> str:
        """Do an operation of `OPERATIONS`, named by its key or by what its button says. ValueError for others."""
        named = {said: key for key, (said, _, _) in OPERATIONS.items()}
        key = named.get(operation, operation)
        if key not in OPERATIONS:
            raise ValueError(f"an operation is one of {', '.join(OPERATIONS)}; got {operation!r}")
        flips, _ = decide(self._table["operations"][key], self.spte)
        return self._go(self.spte ^ int(flips, 16), key)

    def toggle(self, bit: int) -> str:
        """Flip one bit, 0 to 63. ValueError for others."""
        if not 0 <= bit <= 63:
            raise ValueError(f"a word has bits 0 .. 63; got {bit}")
        return self._go(self.spte ^ 1 << bit)

    def undo(self) -> str:
        """Take the last step back, if there is one."""
        if self.steps:
            _, word, format = self.steps[-1]
            with self.hold_sync():
                self.word, self.format, self.steps = word, format, self.steps[:-1]
        return self.readout

    def _go(self, spte: int, key: str = "", format: str | None = None) -> str:
        before = [key, self.word, self.format]
        if key or f"{spte:016x}" != self.word or format not in (None, self.format):
            with self.hold_sync():
                self.steps = [*self.steps, before][-UNDO:]
                self.word, self.format = f"{spte:016x}", format or self.format
        return self.readout

    # ---- what is said -----------------------------------------------------------------------------------------------

    @property
    def spte(self) -> int:
        """The word as a number."""
        return int(self.word, 16)

    @property
    def _table(self) -> Any:
        return self.tables[self.leaves[self.format]["table"]]

    @property
    def state(self) -> str:
        """The state in one of the book's words, as `kvmbook.scenes.spte_state` says it."""
        said: str = decide(self._table["state"], self.spte)
        return said

    @property
    def answers(self) -> dict[str, str]:
        """What each helper answers: "yes", "no", a bit, or "not asked"."""
        return _answers(self._table, self.spte)

    @property
    def readout(self) -> str:
        """What the last operation did, if the last step was one, and the word in sentences."""
        key, before, _ = self.steps[-1] if self.steps else ("", "", "")
        done = decide(self._table["operations"][key], int(before, 16))[1] if key else ""
        return " ".join(filter(None, [done, *_sentences(self._table, self.spte)]))

    def still(self) -> Picture:
        picture = words_picture(LEAVES[self.format].fmt, {"the word": self.spte})
        return framed(f"{self.title}. {picture.alt} {self.readout}", self.title, [self.format], self.readout, picture)

    def __repr__(self) -> str:
        yes = [name for name, answer in self.answers.items() if answer == "yes"]
        return (
            f"{self.title} [{self.format}]\n{self.word}  {self.state}\n{self.readout}\nyes: {', '.join(yes) or 'none'}"
        )


def spte_inspector(word: str | int | None = None, format: str = "EPT without A/D bits") -> SpteInspector:
    """Chapter 03: decode any SPTE. Starts with a fresh, writable one unless ``word`` is given."""
    return SpteInspector(word, format)
