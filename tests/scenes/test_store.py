"""The store knows only its pages, and says where they disagree."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmbook.scenes import DELETED, INDEX, LOG, RECORDS, AtRest, Request, Store, Workload


def store(pages: int = 8) -> Store:
    return Store(AtRest([b""] * pages), pages)


def test_it_answers_what_was_put_and_forgets_what_was_deleted():
    shop = store()
    shop.put("bob", "7")
    shop.put("carol", "3")
    shop.put("bob", "8")
    assert (shop.get("bob"), shop.get("carol"), shop.get("dave")) == ("8", "3", None)
    shop.delete("bob")
    assert shop.get("bob") is None
    assert shop.page(LOG) == {"carol": "3", "bob": DELETED}
    assert shop.page(INDEX) == {"carol": str(RECORDS + 1)}
    assert shop.disagreements() == []


def test_a_page_that_is_free_again_is_taken_first():
    shop = store()
    shop.put("bob", "7")
    shop.put("carol", "3")
    shop.delete("bob")
    shop.put("dave", "1")
    assert shop.page(INDEX)["dave"] == str(RECORDS)


@pytest.mark.parametrize(
    "key, value", [("bo b", "7"), ("bob", "7 8"), ("", "7"), ("bob", ""), ("b\nob", "7"), ("bob", DELETED)]
)
def test_a_put_that_is_no_word_is_refused_and_changes_nothing(key, value):
    shop = store()
    with pytest.raises(ValueError, match="words"):
        shop.put(key, value)
    assert shop.memory.pages == [b""] * 8


def test_a_full_store_says_so_and_changes_nothing():
    shop = store(pages=RECORDS + 1)
    shop.put("bob", "7")
    before = list(shop.memory.pages)
    with pytest.raises(ValueError, match="no room for 'carol': 1 records"):
        shop.put("carol", "3")
    assert shop.memory.pages == before


@given(st.lists(st.tuples(st.sampled_from(["put", "delete", "get"]), st.sampled_from("abc"), st.sampled_from("123"))))
def test_it_does_what_a_dict_does(asked):
    shop, known = store(), {}
    for kind, key, value in asked:
        answer = shop.do(Request(kind, key, value))
        if kind == "put":
            known[key] = value
        elif kind == "delete":
            known.pop(key, None)
        else:
            assert answer == known.get(key)
    assert {key: shop.get(key) for key in "abc"} == {key: known.get(key) for key in "abc"}
    assert shop.disagreements() == []


@pytest.mark.parametrize(
    "old, said",
    [
        ([INDEX], "bob is back (7); the log says: deleted"),
        ([LOG], "bob is gone; the log says: 7"),
        ([LOG, INDEX], None),
    ],
)
def test_an_old_page_shows_if_the_others_are_new(old, said):
    shop = store()
    shop.put("bob", "7")
    before = list(shop.memory.pages)
    shop.delete("bob")
    for page in old:
        shop.memory.pages[page] = before[page]
    assert shop.disagreements() == ([said] if said else [])


def test_an_old_record_and_an_unknown_key_show():
    shop = store()
    shop.put("bob", "7")
    before = list(shop.memory.pages)
    shop.put("bob", "8")
    shop.memory.pages[RECORDS] = before[RECORDS]
    assert shop.disagreements() == ["bob is 7; the log says: 8"]
    shop.memory.pages[RECORDS] = b"carol 1\n"
    assert shop.disagreements() == ["bob is not where the index says; the log says: 8"]
    shop.memory.pages[LOG] = b""
    assert shop.disagreements() == ["bob is there (None); the log has never heard of it"]


def test_a_workload_says_the_same_again_and_another_seed_something_else():
    one, other = Workload(1, 0.5), Workload(2, 0.5)
    asked = [tuple(one.requests(tick)) for tick in range(200)]
    assert asked == [tuple(one.requests(tick)) for tick in range(200)]
    assert asked != [tuple(other.requests(tick)) for tick in range(200)]
    assert len(asked[0]) == one.keys
    idle = sum(not requests for requests in asked[1:]) / 199
    assert 0.4 < idle < 0.6
    kinds = [request.kind for requests in asked[1:] for request in requests]
    assert kinds.count("get") > kinds.count("put") > kinds.count("delete") > 0
