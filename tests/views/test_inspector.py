"""Chapter 03: the inspector's tables say what the model says, of any word; pictures, check cells and questions hold."""

import json
import random
import shutil
import subprocess
import xml.etree.ElementTree as ET

import pytest

from kvmbook import Hardware, Kernel, Vm
from kvmbook.arrays import ALL_BITS
from kvmbook.decoding import HELPERS, NOT_ASKED, OPERATIONS, SENTENCES, helper_says, operation_does
from kvmbook.exercises import ch03
from kvmbook.inspector import PATTERNS, SPECIAL, SpteInspector, decode, last_sentence, looks_at, parse, spte_inspector
from kvmbook.scenes import spte_state
from kvmbook.spte import SpteFormat
from kvmbook.views import script
from kvmbook.word_figures import (
    ADDRESS,
    LEAVES,
    bit_name,
    broken_rule,
    changes,
    fields,
    formats_picture,
    is_legal,
    named_words,
    words_picture,
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


# ---- the tables against the model ------------------------------------------------------------------------------------


def sentence_of_the_model(fmt, spte):
    """All sentences; of a word that no KVM makes only the first that says so."""
    said = [s.replace("{pfn}", f"{fmt.pfn(spte):#x}") for ask in SENTENCES if (s := ask(fmt, spte))]
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
    assert len(json.dumps({key: value for key, value in carried.items() if isinstance(key, str)})) < 80_000


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


# ---- the words of the fact sheet, section (n) ------------------------------------------------------------------------

SHEET = {
    "fresh, writable": (0x0610000004567877, 0x0600000004567B77, 0x0620000004567B77, 0x0000000004567E67),
    "aged": (0x0750000004567870, 0x0600000004567A77, 0x0620000004567A77, 0x0000000004567E47),
    "aged, then read": (0x0610000004567875, 0x0600000004567B77, 0x0620000004567B77, 0x0000000004567E67),
    "write-protected for logging": (0x0610000004567875, 0x0600000004567B75, 0x0620000004567B75, 0x0000000004567E65),
    "D cleared for PML": (None, 0x0600000004567977, None, None),
    "protected for shadow paging": (0x0210000004567875, 0x0200000004567B75, 0x0220000004567B75, 0x0000000004567A65),
    "host read-only": (0x0010000004567875, 0x0000000004567975, 0x0020000004567975, 0x0000000004567825),
    "made again over W=1": (0x0610000004567877, 0x0600000004567977, 0x0620000004567977, 0x0000000004567E27),
}


@pytest.mark.parametrize("state", SHEET)
def test_the_named_words_are_the_fact_sheets(state):
    expected = [*SHEET[state], SHEET[state][3]]  # shadow paging as NPT
    assert [named_words(format).get(state) for format in LEAVES] == expected


@pytest.mark.parametrize(
    ("hardware", "format"),
    [
        (Hardware.ept(ad_bits=False), "EPT without A/D bits"),
        (Hardware.ept(), "EPT with A/D bits"),
        (Hardware.npt(), "NPT"),
        (Hardware.shadow(), "shadow paging"),
    ],
)
def test_a_whole_vm_makes_the_same_words(hardware, format):
    def flags(spte):
        return spte & ~(hardware.format.pfn(ALL_BITS) << 12)

    vm, words = Vm(hardware, Kernel.v5_19, vcpus=2), named_words(format)
    vm.set_user_memory_region(slot=0, base_gfn=0x100, npages=1)
    vm.vcpu[0].read(0x100)
    assert flags(vm.spte(0x100)) == flags(words["fresh, writable"])
    vm.clear_young(0x100, 0x101)
    assert flags(vm.spte(0x100)) == flags(words["aged"])
    vm.vcpu[1].read(0x100)
    assert flags(vm.spte(0x100)) == flags(words["aged, then read"])


def test_no_word_that_the_model_makes_breaks_a_rule():
    for format, (fmt, _) in LEAVES.items():
        for state, spte in named_words(format).items():
            assert broken_rule(fmt, spte) == "", (format, state)


@pytest.mark.parametrize(
    ("format", "word", "said"),
    [
        ("EPT without A/D bits", 0x0610000004567877 ^ 1 << 58, "it has HW=1, MW=0, W=1"),
        ("EPT without A/D bits", 0x0610000004567877 ^ 1 << 57, "it has HW=0, MW=1, W=1"),
        ("EPT without A/D bits", 0x0610000004567877 | 1 << 54, "saved R/X bits in an accessible SPTE"),
        ("EPT with A/D bits", 0x0600000004567B70 | 1 << 54, "HW=1, MW=1"),
        ("EPT with A/D bits", 0x0630000004567B77, "type 3 does not exist"),
        ("EPT without A/D bits", 0x0600000004567877, "each leaf is of type 1"),
        ("NPT", 0x0010000004567E67, "outside EPT the type is always 0"),
        ("EPT with A/D bits", 0x0600000004567B76, "a misconfiguration"),
        ("NPT", 0x0000000004567667, "not MMU-present, but hardware would use it"),
        ("EPT with A/D bits", 0x0600000004567B70, "it grants nothing, and it is not access-tracked"),
        ("EPT, nested (type 2)", 0x0620000004567B70, "it grants nothing"),
        ("NPT", 0x0000000004567E66, "it grants nothing"),
    ],
)
def test_words_that_kvm_never_makes(format, word, said):
    if said == "HW=1, MW=1":  # saved bits where there is an A bit
        said = "saved R/X bits in an SPTE that has A/D bits"
    assert said in broken_rule(LEAVES[format].fmt, word)
    assert decode(word, format).startswith("KVM never makes this word: ")
    for illegal in (word, word | 1 << 62):
        said = decode(illegal, format)
        assert said.count("KVM never makes this word: ") == 1 and "page" not in said
        assert not is_legal(LEAVES[format].fmt, illegal)


@pytest.mark.parametrize("format", LEAVES)
def test_free_bits_stay_clear(format):
    for spte in named_words(format).values():
        if spte >> 11 & 1:
            assert is_legal(LEAVES[format].fmt, spte) and "free bits" not in decode(spte, format)
            assert decode(spte | 1 << 61, format) == "KVM never makes this word: it leaves free bits at 0."


# ---- the panel by its methods ----------------------------------------------------------------------------------------


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


# ---- the view looks up what Python looks up --------------------------------------------------------------------------

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


# ---- names and pictures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", LEAVES)
def test_each_bit_has_one_name(format):
    fmt, taken = LEAVES[format].fmt, 0
    for field in fields(fmt):
        assert taken & field.mask == 0 and field.mask == ((1 << field.width) - 1) << field.low
        taken |= field.mask
    assert taken == ALL_BITS
    assert (
        bit_name(fmt, 1) == "write" and bit_name(fmt, 11) == "MMU-present" and bit_name(fmt, 12) == "address, its bit 0"
    )
    assert bit_name(fmt, fmt.shadow_mmu_writable_mask.bit_length() - 1) == "MMU-writable"
    with pytest.raises(ValueError, match=r"0 \.\. 63"):
        bit_name(fmt, 64)


def test_changes_are_named():
    fmt, words = LEAVES["EPT without A/D bits"].fmt, named_words("EPT without A/D bits")
    assert changes(fmt, words["fresh, writable"], words["aged"]) == "clears R, W and X and sets saved R and saved X"
    assert changes(fmt, 7, 7) == "changes nothing"


@pytest.mark.parametrize("format", LEAVES)
def test_pictures_of_words_are_deterministic_and_say_what_they_show(format):
    fmt, words = LEAVES[format].fmt, named_words(format)
    picture = words_picture(fmt, words)
    assert picture.svg == words_picture(fmt, words).svg
    root = ET.fromstring(picture.svg)
    assert root.get("role") == "img" and root[0].tag.endswith("title")
    for state, word in words.items():
        assert f"{state}: {word:016x}, {spte_state(fmt, word)}" in repr(picture)
    texts = [element for element in root.iter() if element.tag.endswith("text")]
    assert all(float(element.get("font-size", 14)) >= 13 for element in texts)
    bits = [element.text for element in texts if element.text in ("0", "1") and element.get("font-size") == "17"]
    shown = [field for field in fields(fmt) if field.kind != ADDRESS]
    assert len(bits) == 24 * len(words) and sum(field.width for field in shown) == 24
    flips = sum(
        ((a ^ b) & (ALL_BITS ^ fmt.pfn(ALL_BITS) << 12)).bit_count()
        for a, b in zip(list(words.values()), list(words.values())[1:], strict=False)
    )
    assert picture.svg.count(">▲<") == flips and "▲ differs from the word above" in picture.svg


def test_a_picture_can_compare_with_its_first_word():
    fmt, words = LEAVES["NPT"].fmt, {"none": 0, "one bit": 1, "another": 2, "both": 3}
    drawn = words_picture(fmt, words, against_first=True).svg
    assert drawn.count(">▲<") == 4 and "▲ differs from the first word" in drawn
    assert words_picture(fmt, dict(list(words.items())[:3])).svg.count(">▲<") == 1 + 2


def test_the_picture_of_the_formats_names_every_field():
    formats = {name: leaf.fmt for name, leaf in LEAVES.items()}
    picture = formats_picture(formats)
    for text in ("0 read", "0 present", "58 MMU-writable", "10 MMU-writable", "63 no execute"):
        assert text in picture.alt
    assert ET.fromstring(picture.svg)[0].text == picture.alt


# ---- check cells and questions ---------------------------------------------------------------------------------------


def decoded(seed):
    format, spte = ch03.found_word(seed)
    fmt = LEAVES[format].fmt
    return {
        "pfn": spte >> 12 & 2**40 - 1, "type": spte >> 52 & 3, "W": spte >> 1 & 1,
        "MW": spte >> (58 if "EPT" in format else 10) & 1, "young": bool(fmt.is_accessed_spte(spte)),
        "state": spte_state(fmt, spte),
    }  # fmt: skip


def test_decoding_any_fresh_word(capsys):
    assert {ch03.found_word(seed).format for seed in range(40)} == set(LEAVES)
    states = {decoded(seed)["state"] for seed in range(40)}
    assert states == {"writable", "clean", "write-protected", "access-tracked", "read-only"}
    for seed in range(40):
        right = decoded(seed)
        ch03.check_03_1(right, seed=seed)
        assert capsys.readouterr().out == "Yes.\n"
        wrong = random.Random(seed).choice(list(right))
        ch03.check_03_1({**right, wrong: -1 if wrong == "pfn" else "?"}, seed=seed)
        hint = capsys.readouterr().out
        assert hint.startswith(f"No: '{wrong}' is another; look at:") and repr(right[wrong]) not in hint.split(";")[0]


def test_building_any_word(capsys):
    right = {1: "060000091c758a77", 2: "0750000178219870", 3: "020000097c750b75"}
    one = "one bit is wrong, one that"
    hints = {12: "the frame is another"}
    hints |= {1: f"{one} hardware reads", 58: f"{one} only KVM reads", 62: f"{one} nobody reads"}
    for seed, word in right.items():
        for answer in (word, int(word, 16), f"0x{word}"):
            ch03.check_03_2(answer, seed=seed)
            assert capsys.readouterr().out == "Yes.\n"
        for bit, said in hints.items():
            ch03.check_03_2(int(word, 16) ^ 1 << bit, seed=seed)
            assert capsys.readouterr().out.startswith(f"No: {said}")


def origins(fmt, spte):
    if fmt.is_accessed_spte(spte):
        return []
    if fmt.spte_ad_enabled(spte):
        return [spte, spte | fmt.shadow_accessed_mask]
    opened = fmt.restore_acc_track_spte(spte)
    return [spte, opened] + [opened | 2] * bool(fmt.is_mmu_writable_spte(spte))


@pytest.mark.parametrize(
    ("check", "answer", "said"),
    [
        ("check_03_1", {"pfn": 1}, "No: give a dict with the keys pfn, type, W, MW, young, state"),
        ("check_03_1", 5, "No: give a dict"),
        ("check_03_1", {**decoded(1), "pfn": "c2c954"}, "No: give pfn as a number, 0x..."),
        ("check_03_2", 0x060000091C758A77 ^ 3, "No: 2 bits are wrong, among them one that hardware reads\n"),
        ("check_03_2", 0x060000091C758A77 ^ 1, "No: one bit is wrong, one that hardware reads; besides, KVM never"),
        ("check_03_2", "seven", "No: your answer raised ValueError: A word is 1 to 16 hexadecimal digits"),
        (
            "check_03_2",
            "060000091c758277",
            "No: one bit is wrong, one that only KVM reads; besides, KVM never",
        ),
        ("check_03_3", origins, "Yes."),
        ("check_03_3", lambda fmt, spte: [f"{word:016x}" for word in origins(fmt, spte)], "Yes."),
        ("check_03_3", lambda fmt, spte: ["none"], "No: your answer raised ValueError: A word is 1 to 16"),
        ("check_03_3", lambda fmt, spte: [spte], "No: EPT without A/D bits, 0610000004567877: you name 1 that"),
        (
            "check_03_3",
            lambda fmt, spte: origins(fmt, spte)[:2],
            "No: EPT without A/D bits, 0750000004567870: 1 more lead",
        ),
        ("check_03_3", lambda fmt, spte: [*origins(fmt, spte), spte ^ 1 << 53], "No: EPT without A/D bits"),
        ("check_03_3", lambda fmt: [], "No: your answer raised TypeError"),
        (
            "check_03_3",
            lambda fmt, spte: [w | 2 * (w & 1 and not fmt.spte_ad_enabled(w)) for w in origins(fmt, spte)],
            "No: EPT without A/D bits, 0750000004567870: 1 more",
        ),
    ],
)
def test_check_cells_answer_wrong_answers_with_a_hint(check, answer, said, capsys):
    getattr(ch03, check)(answer)
    assert capsys.readouterr().out.startswith(said)
    getattr(ch03, check)(None)
    assert capsys.readouterr().out == "Not yet: there is no answer to check.\n"


@pytest.mark.parametrize(
    ("quiz", "answer"),
    [
        ("quiz_03_1", "yes, at once: a TLB entry may be left"),
        ("quiz_03_2", "by W"),
        ("quiz_03_3", "yes: MW is 1, so a TLB may still let the guest write"),
        ("quiz_03_4", "R and X"),
        ("quiz_03_5", "it is a word that KVM never makes"),
    ],
)
def test_the_model_answers_the_questions(quiz, answer):
    asked = getattr(ch03, quiz)()
    assert asked.answer == answer and asked.asked.endswith("?") and asked.because.endswith(".")


def test_the_backwards_search_is_as_wide_as_the_model():
    """No other bit than those that the check flips is ever changed by ageing."""
    chance = random.Random(1)
    for format, (fmt, _) in LEAVES.items():
        for spte in named_words(format).values():
            if fmt.is_shadow_present_pte(spte):
                found = ch03._origins(fmt, spte)
                for _ in range(300):
                    near = spte ^ 1 << chance.randrange(64) ^ chance.choice([0, 1 << chance.randrange(64)])
                    if not broken_rule(fmt, near) and fmt.is_shadow_present_pte(near):
                        assert (fmt.mmu_spte_age(near).spte == spte) == (near in found), (format, f"{near:016x}")


def test_the_format_without_exec_only_is_read_the_same_way():
    """An old CPU's EPT sets bit 0 always; the fields are the same."""
    old = SpteFormat.ept(ad_bits=False, exec_only=False)
    assert fields(old) == fields(LEAVES["EPT without A/D bits"].fmt)
