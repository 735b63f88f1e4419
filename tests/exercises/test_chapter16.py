"""Chapter 16: the checks take right answers, and give wrong and lazy ones a hint that helps."""

import pytest

from kvmbook import Kernel
from kvmbook.exercises.ch16 import (
    PROPOSALS,
    SLOT,
    check_16_1,
    check_16_2,
    check_16_3,
    quiz_16_1,
    quiz_16_2,
    quiz_16_3,
    words_16_1,
)
from kvmbook.scenes import BORDER, lost_by_model

RIGHT = [None, 0x800, 0x800, None, None, None]
SOUND = [None, None, (0x3FF, 0x400), None, (0x3FF, 0x400)]


def says(check, answer, capsys, **variant):
    check(answer, **variant)
    return capsys.readouterr().out.strip()


def test_the_answers_of_the_questions():
    assert [quiz().answer for quiz in (quiz_16_1, quiz_16_2, quiz_16_3)] == ["pages 0 and 1", "no", "either, alone"]


def test_what_quiz_3_is_about_is_in_v6_0_alone_by_its_switches():
    assert Kernel.v6_0.clear_split_forgets_last and not Kernel.v6_8.clear_split_forgets_last


# ---- 1: which word loses? --------------------------------------------------------------------------------------------


def by_model(word):
    lost = lost_by_model(BORDER - word.begins, [gfn - word.begins for gfn in word.named])
    return word.begins + lost[0] if lost else None


def test_the_words_of_the_chapter(capsys):
    assert [by_model(word) for word in words_16_1()] == RIGHT
    assert says(check_16_1, RIGHT, capsys) == "Yes."


@pytest.mark.parametrize("seed", range(1, 12))
def test_every_seed_gives_two_words_that_lose_and_a_check_that_knows(seed, capsys):
    words = words_16_1(seed)
    answer = [by_model(word) for word in words]
    assert answer.count(0x800) == 2 and answer.count(None) == 4
    assert says(check_16_1, answer, capsys, seed=seed) == "Yes."
    assert all(word.begins <= word.named[0] and word.named[-1] < word.begins + 64 for word in words)


def test_seeds_1_to_300_give_different_words():
    assert len({str(words_16_1(seed)) for seed in range(1, 301)}) == 300


@pytest.mark.parametrize(
    ("place", "wrong", "hint"),
    [
        (0, 0x800, "word 1: all of its gfns lie in one 2M page"),
        (1, None, "word 2: round its first gfn and its last up"),
        (1, 0x7ED, "word 2: round its first gfn and its last up"),
        (3, 0x800, "word 4: KVM always looks at the first gfn that is named"),
        (4, 0x7FF, "word 5: its last gfn, 0x7ff, does not begin a 2M page"),
        (5, 0x802, "word 6: its last gfn, 0x802, does not begin a 2M page"),
    ],
)
def test_a_wrong_word_is_told_so(place, wrong, hint, capsys):
    assert hint in says(check_16_1, [*RIGHT[:place], wrong, *RIGHT[place + 1 :]], capsys)


@pytest.mark.parametrize("answer", ["0x800", [], RIGHT[:5]])
def test_it_takes_six_answers(answer, capsys):
    assert "give a list of 6" in says(check_16_1, answer, capsys)


# ---- 2: prove it or break it -----------------------------------------------------------------------------------------


def test_what_is_sound_is_sound_and_what_is_not_has_a_counterexample(capsys):
    assert says(check_16_2, SOUND, capsys) == "Yes."
    for proposal, pair in zip(PROPOSALS, SOUND, strict=True):
        missed = [(f, f + more) for f in range(512) for more in range(64) if proposal.misses(f, f + more)]
        assert bool(missed) == (pair is not None), proposal.says
        assert pair is None or proposal.misses(*pair)


@pytest.mark.parametrize(
    ("place", "wrong", "hint"),
    [
        (0, (0x3FF, 0x400), "proposal 1: of 0x3ff and 0x400 it says yes"),
        (2, None, "proposal 3: it misses a word"),
        (2, (0x400, 0x401), "proposal 3: 0x400 and 0x401 lie in one 2M page"),
        (2, (0x3FF, 0x5FF), "proposal 3: first and last are gfns of one word"),
        (4, (0x3FF, 0x401), "proposal 5: of 0x3ff and 0x401 it says yes"),
        (4, None, "proposal 5: it misses a word"),
    ],
)
def test_a_wrong_verdict_is_told_so(place, wrong, hint, capsys):
    assert hint in says(check_16_2, [*SOUND[:place], wrong, *SOUND[place + 1 :]], capsys)


@pytest.mark.parametrize("answer", ["all", SOUND[:4]])
def test_it_takes_five_verdicts(answer, capsys):
    assert "give a list of 5" in says(check_16_2, answer, capsys)


# ---- 3: a host that you cannot patch ---------------------------------------------------------------------------------


def logs(vm, **others):
    vm.set_user_memory_region(**{**SLOT, "log_dirty_pages": True, **others})


def anew(vm):
    vm.set_user_memory_region(slot=0)
    logs(vm)


def there_and_back(vm):
    logs(vm)
    logs(vm, base_gfn=0x1400)
    logs(vm)


def takes_all(vm):
    logs(vm)
    vm.invalidate_range(0x400, 0x600)


def takes_one(vm):
    logs(vm)
    vm.invalidate_range(0x400, 0x401)


@pytest.mark.parametrize(
    ("begin", "said"),
    [
        (anew, "Yes."),
        (there_and_back, "Yes."),
        (takes_all, "Yes."),
        (takes_one, "the write to gfn 0x401 is lost"),
        (logs, "NPT, the host's pages of 4K: the write to gfn 0x400 is lost"),
        (lambda vm: None, "slot 0 does not log at the end"),
        (lambda vm: vm.set_user_memory_region(slot=0), "slot 0 must be there at the end"),
        (lambda vm: logs(vm, base_gfn=0x1400), "slot 0 must be there at the end"),
        (lambda vm: logs(vm, slot=0, npages=64), "raised OSError"),
        (lambda vm: (vm.enable_cap_manual_dirty_log_protect2(1), logs(vm)), "the ring and manual protect stay"),
        (lambda vm: vm.get_dirty_log(0), "raised OSError"),
        (7, "give a function of one VM"),
    ],
)
def test_begin(begin, said, capsys):
    assert said in says(check_16_3, begin, capsys)
