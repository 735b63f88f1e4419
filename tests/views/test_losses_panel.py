"""Chapter 16's panel: the picture says what the scene says, and the sentence asks the model."""

from itertools import product

import pytest
from drawn import carries_all, overlapping, texts_of

from kvmbook.scenes import BORDER, COMPARISONS, NAMED, lost_by_model, named_bits, overlooked, retell_litmus
from kvmbook.search import read_litmus
from kvmbook.views import trace_picture, which_word_loses, word_picture

BORDERS = (1, 32, 63, 0)
CASES = list(product(BORDERS, NAMED))


def test_every_combination_is_carried_and_agrees_with_a_live_answer():
    carries_all(which_word_loses(), len(CASES))


@pytest.mark.parametrize("narrow", [False, True], ids=["wide", "narrow"])
def test_nothing_overlaps_and_nothing_leaves_the_picture(narrow):
    for border, named in CASES:
        assert not overlapping(word_picture(border, named_bits(border, named)), narrow), (border, named)


@pytest.mark.parametrize(("border", "named"), CASES)
def test_the_picture_says_which_comparison_overlooks_a_huge_page(border, named):
    bits = named_bits(border, named)
    picture = word_picture(border, bits)
    gfns = [BORDER - border + bit for bit in bits]
    missed = sum(len(overlooked(rule, gfns)) for rule in COMPARISONS)
    said = texts_of(picture)
    assert said.count("✕ still writable") == missed == picture.svg.count("stroke-dasharray") / 2  # in both forms
    assert said.count("write-protected") == len(COMPARISONS) * len({gfn // 512 for gfn in gfns}) - missed
    assert f"{len(bits)} look{'s' * (len(bits) > 1)}" in said
    dots = picture.svg.count("h0") / 2
    assert dots == len(bits)


def test_the_sentence_is_the_models():
    panel = which_word_loses()
    for begins, named in panel.combinations():
        border = int(begins.split(",")[0])
        lost = lost_by_model(border, named_bits(border, named))
        said = panel.choose(a_2M_page_begins_at_bit=begins, CLEAR_names=named)
        assert said.endswith(f"loses the write to page {lost[0]} of the word." if lost else "the model loses no write.")
        assert said.startswith("Overlooked by: rounded up (since v5.14)." if lost else "No rule overlooks")


def test_what_the_text_promises():
    panel = which_word_loses()
    assert "page 1" in panel.readout
    assert "page 63" in panel.choose(a_2M_page_begins_at_bit="63", CLEAR_names="all 64 pages")
    for named in NAMED:
        assert "no write" in panel.choose(a_2M_page_begins_at_bit="0, as the word does", CLEAR_names=named)


RUN = """
kernel: Linux v6.18
hardware: NPT
nested: none
eager_page_split: Y
manual: CLEAR clears, initially set
ring: dirty rings
vcpus: 1
slot: 65 pages from gfn 0x400, the host's of 4K; runs are about 63, 64
run:
  vCPU0 writes page 64
  user space enables logging
  vCPU0 writes page 64
"""


@pytest.mark.parametrize(("numbers", "heads"), [([64], {"page 64", "vCPU0"}), ([], {"page 63", "vCPU0, page 64"})])
def test_a_run_of_some_pages_names_them_by_their_numbers_and_the_log_by_its_kind(numbers, heads):
    picture = trace_picture(retell_litmus(read_litmus(RUN), numbers=numbers))
    said = texts_of(picture)
    assert heads | {"ring", "✕ lost: nobody will know", "lets it pass"} <= set(said) and "log" not in said
    assert not overlapping(picture) and not overlapping(picture, narrow=True)
