"""The SPTE inspector's tables say what the model says, of any word; so does its view."""

import json
import random
import shutil
import subprocess

import pytest

from kvmbook.model import ALL_BITS
from kvmbook.scenes import (
    HELPERS,
    LEAVES,
    NOT_ASKED,
    OPERATIONS,
    SENTENCES,
    helper_says,
    is_legal,
    named_words,
    operation_does,
    spte_state,
)
from kvmbook.views import (
    PATTERNS,
    SPECIAL,
    SpteInspector,
    decode,
    last_sentence,
    looks_at,
    parse,
    script,
    spte_inspector,
)


@pytest.fixture(scope="module")
def inspector():
    return spte_inspector()


def words_to_try(format, count, seed=3):
    """Random words, near-legal words (a named state with a few bits flipped), and words of few bits."""
    chance, named = random.Random(seed), list(named_words(format).values())
    words = [*SPECIAL, 1, ALL_BITS, *named, *(1 << bit for bit in range(64))]
    while len(words) < count:
        words.append(chance.getrandbits(64))
        near = chance.choice(named)
        for _ in range(chance.randrange(5)):
            near ^= 1 << chance.randrange(64)
        words += [near, chance.getrandbits(64) & chance.getrandbits(64) | 1 << 11]
    return words[:count]


# ---- the tables against the model -------------------------------------------------------------------------------------


def sentence_of_the_model(fmt, spte):
    """All sentences; of a word that no KVM makes only the first that says so."""
    said = [s.replace("{pfn}", f"{fmt.spte_to_pfn(spte):#x}") for ask in SENTENCES if (s := ask(fmt, spte))]
    return " ".join(said if is_legal(fmt, spte) else said[:1])


@pytest.mark.parametrize("format", LEAVES)
def test_the_inspector_says_of_any_word_what_the_model_says(format, inspector):
    fmt = LEAVES[format].fmt
    inspector.choose(format)
    for spte in words_to_try(format, 2500):
        readout = inspector.show(spte) if spte % 8 == 0 else decode(spte, format)
        assert readout == sentence_of_the_model(fmt, spte), f"{spte:016x}"
        if spte % 8:
            continue
        assert inspector.spte == spte and inspector.state == spte_state(fmt, spte)
        for name in HELPERS:
            assert inspector.answers[name] == helper_says(name)(fmt, spte), f"{name}({spte:016x})"
        assert (inspector.answers["is_writable_pte"] == "yes") == bool(spte >> 1 & 1 and spte >> 11 & 1)


@pytest.mark.parametrize("format", LEAVES)
@pytest.mark.parametrize("key", OPERATIONS)
def test_an_operation_does_what_the_model_does(format, key, inspector):
    fmt = LEAVES[format].fmt
    inspector.choose(format)
    for spte in words_to_try(format, 1500):
        flips, said = operation_does(key)(fmt, spte)
        inspector.word = f"{spte:016x}"
        assert inspector.press(key).startswith(said), f"{spte:016x}"
        assert inspector.spte == spte ^ int(flips, 16), f"{spte:016x}"
        inspector.steps = []


def test_the_helpers_answers_are_those_of_the_helpers(inspector):
    """Without the wording in between, for the words of the fact sheet."""
    for format, (fmt, _) in LEAVES.items():
        inspector.choose(format)
        for spte in named_words(format).values():
            inspector.show(spte)
            for name, answer in inspector.answers.items():
                if not name.endswith("_mask"):
                    assert answer == ("yes" if getattr(fmt, name)(spte) else "no") or answer == NOT_ASKED
    inspector.choose("EPT with A/D bits")
    inspector.make("fresh, writable")
    assert inspector.answers["spte_shadow_accessed_mask"] == "bit 8"
    assert inspector.answers["spte_shadow_dirty_mask"] == "bit 9"


def test_what_is_carried_is_small_and_shared(inspector):
    assert len(inspector.tables) == 3  # NPT and shadow paging have the same masks
    carried = inspector.get_state()
    assert len(json.dumps({key: value for key, value in carried.items() if key not in ("_esm", "_css")})) < 60_000


def test_the_order_of_everything_with_a_name_is_carried(inspector):
    """Where a widget's state is stored, keys are sorted: a view without a kernel cannot go by their order."""
    order = inspector.words["order"]
    assert len(set(order)) == len(order)
    shown = [inspector.leaves, inspector.answers, inspector.words["operations"]]
    for names in shown + [leaf["words"] for leaf in inspector.leaves.values()]:
        assert [name for name in order if name in names] == list(names)


def test_looks_at_names_the_bits_of_the_fact_sheet():
    assert looks_at("is_access_track_spte", "EPT with A/D bits") == [0, 1, 2, 11, 52, 53]
    assert looks_at("is_accessed_spte", "NPT") == [5, 11, 52, 53]
    assert looks_at("is_removed_spte", "NPT") == list(range(64))
    with pytest.raises(ValueError, match="a format is one of"):
        looks_at("is_writable_pte", "VAX")


# ---- the panel by its methods -----------------------------------------------------------------------------------------


def test_the_puzzle_both_ways_lead_to_one_word():
    panel = SpteInspector()
    panel.press("write-protect for logging")
    logged = panel.word
    assert "asks for a flush" in panel.readout and panel.undo() == SpteInspector().readout
    assert "nobody has flushed" in panel.press("age")
    assert "changes nothing; asks for no flush" in panel.press("protect")  # the hole
    panel.press("restore")
    assert panel.word == logged == "0610000004567875" and "the word does not tell" in panel.readout
    for _ in range(9):
        panel.undo()
    assert panel.steps == [] and panel.word == "0610000004567877" and repr(panel) == repr(SpteInspector())


@pytest.mark.parametrize("word", [0x0350000004567870, 0x0150000004567870])
def test_an_aged_page_may_have_another_reason_as_well(word):
    said = decode(word)
    assert "MW=0: no TLB may hold" in said and "; also reason 4, access tracking. " in said
    assert ("reason 2: KVM does not let this page be written" in said) == bool(word >> 57 & 1)
    assert "also reason 4" not in decode(word & ~(0b101 << 54) | 0b101)


def test_the_last_sentence_is_about_tlbs_if_the_word_is_not_writable():
    for state, spte in named_words("EPT without A/D bits").items():
        said = last_sentence(spte)
        assert decode(spte).endswith(said), state
        assert said.startswith("MW=") == (0 < spte & 1 << 11 and not spte & 2), state
    with pytest.raises(ValueError, match="a format is one of"):
        last_sentence(0, "VAX")


def test_bad_input_changes_nothing():
    panel = SpteInspector("0x0610_0000_0456_7875", "NPT")
    before = (panel.word, panel.format, panel.steps)
    for bad in ("", "xyz", "0x", "1" * 17, "-1", "0.5"):
        with pytest.raises(ValueError, match="1 to 16 hexadecimal digits"):
            panel.show(bad)
    for wrong in (-1, 1 << 64):
        with pytest.raises(ValueError, match="64 bits wide"):
            panel.show(wrong)
    for call in (
        lambda: panel.choose("VAX"), lambda: panel.press("wash"), lambda: panel.make("D cleared for PML"),
        lambda: panel.toggle(64), lambda: SpteInspector(format="VAX"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"one of|bits 0"):
            call()
    assert (panel.word, panel.format, panel.steps) == before
    panel.choose("NPT")  # what it was
    assert panel.steps == []


def test_bits_flip_and_words_are_read_in_any_spelling():
    panel = SpteInspector("0x7")
    assert panel.word == "0000000000000007" and parse(" 0X0_7 ") == 7
    panel.toggle(11)
    panel.toggle(63)
    assert panel.word == "8000000000000807" and [step[0] for step in panel.steps] == ["", ""]
    panel.choose("NPT")
    assert "HW=0, MW=0, W=1" in panel.readout
    assert "may read and write." in panel.show(0x8000000000000E67)  # no execute
    panel.undo()
    panel.undo()
    assert panel.format == "EPT without A/D bits"


# ---- the view looks up what Python looks up ---------------------------------------------------------------------------

NODE = """
import { readFileSync } from "node:fs";
import { reading, pressed, parsed } from %s;
const { tables, patterns, asked, spelled } = JSON.parse(readFileSync(0));
const said = asked.map(([table, word, steps, key]) =>
  ({ ...reading(tables[table], patterns, word, steps), then: pressed(tables[table], patterns, word, key) }));
console.log(JSON.stringify({ said, parsed: spelled.map(parsed) }));
"""


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_the_view_says_what_python_says(inspector, tmp_path):
    module = tmp_path / "inspector.mjs"
    module.write_text(script("inspector"))
    chance, asked, expected = random.Random(9), [], []
    for format in LEAVES:
        for spte in words_to_try(format, 400, seed=4):
            key, before = chance.choice(list(OPERATIONS)), chance.getrandbits(64)
            steps = [[chance.choice(["", *OPERATIONS]), f"{before:016x}", format]]
            inspector.format, inspector.word, inspector.steps = format, f"{spte:016x}", steps
            asked.append([inspector.leaves[format]["table"], inspector.word, steps, key])
            expected.append({"state": inspector.state, "answers": inspector.answers, "readout": inspector.readout})
            inspector.press(key)
            expected[-1]["then"] = inspector.word
    spelled = ["0x0610_0000", " 7 ", "0XAB", "", "g", "0x", "1" * 17]
    given = {"tables": inspector.tables, "patterns": PATTERNS, "asked": asked, "spelled": spelled}
    done = subprocess.run(
        ["node", "--input-type=module", "-e", NODE % json.dumps(str(module))],
        input=json.dumps(given), capture_output=True, text=True, check=True,
    )  # fmt: skip
    answer = json.loads(done.stdout)
    assert answer["said"] == expected
    assert answer["parsed"] == [f"{0x6100000:016x}", f"{7:016x}", f"{0xAB:016x}", None, None, None, None]
