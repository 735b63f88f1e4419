"""The names of bits and the words of states are those of the fact sheets; pictures of them say what they show."""

import xml.etree.ElementTree as ET

import pytest

from kvmbook import Hardware, Kernel, Vm
from kvmbook.model import ALL_BITS
from kvmbook.scenes import (
    ADDRESS,
    LEAVES,
    bit_name,
    broken_rule,
    changes,
    fields,
    is_legal,
    named_words,
    spte_state,
)
from kvmbook.views import (
    decode,
    formats_picture,
    words_picture,
)

# ---- the words of the fact sheet, section (n) -------------------------------------------------------------------------

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
        return spte & ~(hardware.format.spte_to_pfn(ALL_BITS) << 12)

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


# ---- names and pictures -----------------------------------------------------------------------------------------------


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
        ((a ^ b) & (ALL_BITS ^ fmt.spte_to_pfn(ALL_BITS) << 12)).bit_count()
        for a, b in zip(list(words.values()), list(words.values())[1:], strict=False)
    )
    assert picture.svg.count(">▲<") == flips and "▲ differs from the word above" in picture.svg


def test_the_picture_of_the_formats_names_every_field():
    formats = {name: leaf.fmt for name, leaf in LEAVES.items()}
    picture = formats_picture(formats)
    for text in ("0 read", "0 present", "58 MMU-writable", "10 MMU-writable", "63 no execute"):
        assert text in picture.alt
    assert ET.fromstring(picture.svg)[0].text == picture.alt
