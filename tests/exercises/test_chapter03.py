"""Chapter 03's questions and check cells."""

import random

import pytest

from kvmbook import Hardware, Kernel, Vm
from kvmbook.exercises import ch03
from kvmbook.model import SpteFormat
from kvmbook.scenes import (
    LEAVES,
    after_read,
    broken_rule,
    fields,
    named_words,
    spte_state,
)

# ---- check cells and questions ----------------------------------------------------------------------------------------


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
        assert (
            hint.startswith(f"No: your answer for '{wrong}' is wrong; ")
            and repr(right[wrong]) not in hint.split(";")[0]
        )


def test_a_history_is_what_happens_to_a_page_whose_reader_remembers_nothing():
    """Exercise 2's read is another vCPU's: whoever remembers the page hits its TLB, and then no word changes."""
    vm = Vm(Hardware.ept(), Kernel.v5_19, vcpus=2)
    vm.set_user_memory_region(slot=0, base_gfn=0x200, npages=1)
    vm.vcpu[0].write(0x200)
    vm.clear_young(0x200, 0x201)
    aged = vm.spte(0x200)
    vm.vcpu[0].read(0x200)
    assert vm.spte(0x200) == aged
    vm.vcpu[1].read(0x200)
    assert vm.spte(0x200) == after_read(vm.fmt, aged) != aged
    assert any("another vCPU, which remembers nothing, reads it" in str(ch03.history(seed)) for seed in range(9))


def test_building_any_word(capsys):
    right = {1: "060000091c758a77", 2: "0750000178219870", 3: "020000097c750b75"}
    one = "one bit is wrong, one that"
    hints = {12: "the frame is wrong"}
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


YOUNG, OLD = (f"No: EPT without A/D bits, {word}" for word in ("0610000004567877", "0750000004567870"))


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
        (
            "check_03_3",
            lambda fmt, spte: [spte],
            f"{YOUNG}: you name 0610000004567877, which ageing turns into 0750000004567870\n",
        ),
        (
            "check_03_3",
            lambda fmt, spte: [w for w in origins(fmt, spte) if w != spte],
            f"{OLD}: you miss one word; what does",
        ),
        (
            "check_03_3",
            lambda fmt, spte: origins(fmt, spte) if fmt.spte_ad_enabled(spte) else [],
            f"{OLD}: it has 3 words as origins, and you name none; is it young, and what is its type?\n",
        ),
        (
            "check_03_3",
            lambda fmt, spte: origins(fmt, spte)[:1],
            f"{OLD}: you miss 2 words; two of R, W and X were saved",
        ),
        (
            "check_03_3",
            lambda fmt, spte: origins(fmt, spte)[:2],
            f"{OLD}: you miss one word; two of R, W and X were saved",
        ),
        (
            "check_03_3",
            lambda fmt, spte: origins(fmt, spte)[: 1 if fmt.spte_ad_enabled(spte) else 3],
            "No: EPT with A/D bits, 0600000004567a77: you miss one word; which one bit does ageing clear",
        ),
        (
            "check_03_3",
            lambda fmt, spte: [*origins(fmt, spte), spte ^ 1 << 53],
            f"{YOUNG}: you name 0630000004567877, a word that KVM never makes: type 3 does not exist\n",
        ),
        (
            "check_03_3",
            lambda fmt, spte: [*origins(fmt, spte), *([spte ^ 1 << 54] if not fmt.is_accessed_spte(spte) else [])],
            f"{OLD}: you name 0710000004567870, which is not young, so ageing leaves it as it is\n",
        ),
        ("check_03_3", lambda fmt: [], "No: your answer raised TypeError"),
        (
            "check_03_3",
            lambda fmt, spte: [w | 2 * (w & 1 and not fmt.spte_ad_enabled(w)) for w in origins(fmt, spte)],
            "No: EPT without A/D bits, 0750000004567870: you miss one word",
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
        ("quiz_03_1", "by W"),
        ("quiz_03_2", "R, W and X"),
        ("quiz_03_3", "a word that KVM never makes"),
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
