"""Chapter 06's questions and check cells."""

import pytest

from kvmbook.exercises import ch06


@pytest.mark.parametrize(("number", "answer"), [(1, "no"), (2, "it is reported"), (3, "it is lost")])
def test_questions(number, answer):
    assert getattr(ch06, f"quiz_06_{number}")().answer == answer


ASKED, FLUSHING = [(True, 0), (False, 0), (True, 0)], [(True, 1), (False, 0), (True, 1)]
TABLE = {"test_young": ASKED, "clear_young": ASKED, "clear_flush_young": FLUSHING}
YOUNG_BY_HIT = [(True, 0), (True, 0), (True, 0)]


def young_after(ages, one_page=True):
    """A policy: age, take a page away or not, let the guest run, and ask."""

    def policy(host, turn):
        ages(host)
        if one_page:
            host.invalidate_range(0x23F, 0x240)
        turn()
        return [gfn for gfn in range(0x200, 0x240) if not host.test_young(gfn, gfn + 1)]

    return policy


def age_all(host):
    host.clear_young(0x200, 0x240)


def age_some(host):
    host.clear_young(0x200, 0x220)


def age_and_flush(host):
    host.clear_flush_young(0x200, 0x240)


def page_by_page(host):
    for gfn in range(0x200, 0x240):
        host.clear_flush_young(gfn, gfn + 1)


def take_all(host):
    host.invalidate_range(0x200, 0x240)


def right(events):
    """In other words than the book's: sets of rights, and one flag."""
    mapped, spte, tlb, faults = False, set(), set(), 0
    for event in events:
        if event in ("read", "write"):
            if event in tlb:
                continue
            if event not in spte:
                faults += 1
                spte = {"read"} if mapped and event == "read" else {"read", "write"}
            mapped, tlb = True, spte
        elif spte:
            spte = set()
            if event == "clear_flush_young":
                tlb = set()
    return faults


def w_is_saved(events):
    """Wrong: a read gives W back."""
    mapped, tracked, tlb, faults = False, False, False, 0
    for event in events:
        if event in ("read", "write"):
            faults += not tlb and (tracked or not mapped)
            mapped, tracked, tlb = True, tracked and tlb, True
        elif mapped and not tracked:
            tracked, tlb = True, tlb and event == "clear_young"
    return faults


def always_flushes(events):
    """Wrong: clear_flush_young flushes, young or not."""
    mapped, spte, tlb, faults = False, "", "", 0
    for event in events:
        if event in ("read", "write"):
            if event[0] not in tlb:
                if event[0] not in spte:
                    faults += 1
                    spte = "r" if mapped and event == "read" else "rw"
                mapped, tlb = True, spte
        else:
            spte, tlb = "", "" if event == "clear_flush_young" else tlb
    return faults


@pytest.mark.parametrize(
    ("check", "answer", "said"),
    [
        ("check_06_1", TABLE, "Yes."),
        ("check_06_1", {**TABLE, "clear_young": [[1, 0], [0, 0], [1, 0]]}, "Yes."),
        ("check_06_1", [ASKED, ASKED, FLUSHING], "No: the table needs the keys test_young, clear_young"),
        ("check_06_1", {**TABLE, "test_young": [True, False, True]}, "No: your answer raised TypeError"),
        ("check_06_1", {**TABLE, "test_young": ASKED[:2]}, "No: test_young needs 3 pairs"),
        (
            "check_06_1",
            dict.fromkeys(TABLE, ASKED),
            "No: 2 of 9 pairs are wrong; the first is clear_flush_young of a page 'just read': whose name",
        ),
        (
            "check_06_1",
            {**TABLE, "clear_flush_young": [(True, 1), (False, 1), (True, 1)]},
            "No: 1 of 9 pairs are wrong; the first is clear_flush_young of a page 'aged': whose name",
        ),
        (
            "check_06_1",
            {**TABLE, "test_young": YOUNG_BY_HIT},
            "No: 1 of 9 pairs are wrong; the first is test_young of a page 'aged': is the page young",
        ),
        ("check_06_2", right, "Yes."),
        ("check_06_2", 3, "No: give a function"),
        ("check_06_2", lambda events: 0, "No: for ['read'] your function says 0"),
        ("check_06_2", lambda events: sum(e in ("read", "write") for e in events), "No: for ["),
        ("check_06_2", w_is_saved, "No: for ["),
        ("check_06_2", always_flushes, "No: for ["),
        ("check_06_2", lambda events: events.nonsense, "No: your answer raised AttributeError"),
        ("check_06_3", young_after(age_all), "Yes."),
        ("check_06_3", 64, "No: give a function"),
        ("check_06_3", lambda host, turn: turn(), "No: EPT without A/D bits, and all pages were just read: return the"),
        (
            "check_06_3",
            lambda host, turn: [],
            "No: EPT without A/D bits, and all pages were just read: your policy never",
        ),
        (
            "check_06_3",
            lambda host, turn: [turn(), 0],
            "No: EPT without A/D bits, and all pages were just read: return",
        ),
        (
            "check_06_3",
            young_after(age_all, one_page=False),
            "No: EPT without A/D bits, and all pages were just read: 20 busy pages are reported idle; through what",
        ),
        (
            "check_06_3",
            young_after(age_and_flush, one_page=False),
            "No: EPT without A/D bits, and the host had aged every page before: 20 busy pages are reported idle",
        ),
        ("check_06_3", young_after(age_and_flush), "No: EPT without A/D bits, and all pages were just read: 2 flushes"),
        (
            "check_06_3",
            young_after(page_by_page, False),
            "No: EPT without A/D bits, and all pages were just read: 64 fl",
        ),
        (
            "check_06_3",
            young_after(take_all, False),
            "No: EPT without A/D bits, and all pages were just read: you took 64",
        ),
        ("check_06_3", young_after(age_some), "No: EPT without A/D bits, and all pages were just read: "),
    ],
)
def test_a_check_judges_and_its_hint_helps(check, answer, said, capsys):
    getattr(ch06, check)(answer)
    assert capsys.readouterr().out.startswith(said)


def test_the_histories_tell_apart_what_the_text_tells_apart():
    events = [event for history in ch06.histories() for event in history]
    assert set(events) == set(ch06.EVENTS) and len(ch06.histories()) == 200
    assert ch06.count_faults(["read", "clear_young", "write"]) == 1
    assert ch06.count_faults(["read", "clear_flush_young", "read", "write"]) == 3
