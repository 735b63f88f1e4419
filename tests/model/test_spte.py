"""SPTE words: the worked values, every helper against a slow oracle, and arrays against words."""

import functools
import importlib.util
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmbook import SpteFormat
from kvmbook.model import (
    BLOCK,
    REMOVED_SPTE,
    SHADOW_ACC_TRACK_SAVED_MASK,
    SPTE_TDP_AD_DISABLED_MASK,
    SPTE_TDP_AD_ENABLED_MASK,
    SPTE_TDP_AD_WRPROT_ONLY_MASK,
    compiled,
    each,
)

NO_AD, AD, NPT, SHADOW = SpteFormat.ept(ad_bits=False), SpteFormat.ept(), SpteFormat.npt(), SpteFormat.shadow()
TYPE_1, TYPE_0, TYPE_2 = SPTE_TDP_AD_DISABLED_MASK, SPTE_TDP_AD_ENABLED_MASK, SPTE_TDP_AD_WRPROT_ONLY_MASK
PFN = 0x4567

# The worked values: format and type, then fresh, aged, aged and read again, protected for logging, D cleared, protected
# for shadow paging, host read-only, and made again over a W=1 SPTE.
WORKED = {
    "EPT without A/D": (NO_AD, TYPE_1, 0x0610000004567877, 0x0750000004567870, 0x0610000004567875, 0x0610000004567875,
                        None, 0x0210000004567875, 0x0010000004567875, 0x0610000004567877),
    "EPT with A/D": (AD, TYPE_0, 0x0600000004567B77, 0x0600000004567A77, 0x0600000004567B77, 0x0600000004567B75,
                     0x0600000004567977, 0x0200000004567B75, 0x0000000004567975, 0x0600000004567977),
    "nested, type 2": (AD, TYPE_2, 0x0620000004567B77, 0x0620000004567A77, 0x0620000004567B77, 0x0620000004567B75,
                       0x0620000004567B75, 0x0220000004567B75, 0x0020000004567975, 0x0620000004567977),
    "NPT": (NPT, TYPE_0, 0x0000000004567E67, 0x0000000004567E47, 0x0000000004567E67, 0x0000000004567E65,
            0x0000000004567E27, 0x0000000004567A65, 0x0000000004567825, 0x0000000004567E27),
    "shadow": (SHADOW, TYPE_0, 0x0000000004567E67, 0x0000000004567E47, 0x0000000004567E67, 0x0000000004567E65,
               0x0000000004567E27, 0x0000000004567A65, 0x0000000004567825, 0x0000000004567E27),
}  # fmt: skip


@pytest.mark.parametrize("name", WORKED)
def test_worked_values(name):
    fmt, ad_type, fresh, aged, read, protected, cleaned, guarded, read_only, remade = WORKED[name]
    assert fmt.make_spte(PFN, ad_type=ad_type).spte == fresh
    assert fmt.mark_spte_for_access_track(fresh) == aged
    back = fmt.restore_acc_track_spte(aged) if ad_type == TYPE_1 else aged | fmt.shadow_accessed_mask
    assert back == read
    assert fmt.spte_write_protect(fresh) == (protected, True)
    if cleaned is not None:
        assert fmt.rmap_clear_dirty(fresh) == fmt.tdp_clear_dirty(fresh) == (cleaned, True)
    assert fmt.spte_write_protect(fresh, pt_protect=True) == (guarded, True)
    assert fmt.make_spte(PFN, ad_type=ad_type, host_writable=False).spte == read_only
    assert fmt.make_spte(PFN, ad_type=ad_type, old_spte=fresh).spte == remade
    assert fmt.make_spte(PFN, ad_type=ad_type, write_tracked=True) == (
        guarded & ~(fmt.shadow_dirty_mask * (ad_type != TYPE_1)),
        True,
    )


# ---- every helper against bits written out one by one ----------------------------------------------------------------


def words_of(fmt):
    """All legal present leaves of a format: rights, A, D, type, HW/MW/W, saved bits, PS."""
    types = (TYPE_0, TYPE_1, TYPE_2) if fmt in (NO_AD, AD) else (TYPE_0,)
    for ad_type, (hw, mw, w), a, d, rx, large in itertools.product(
        types, [(1, 1, 1), (1, 1, 0), (1, 0, 0), (0, 0, 0)], (0, 1), (0, 1), (0b101, 0b001, 0), (0, 1 << 7)
    ):
        rights = rx | w << 1
        spte = 1 << 11 | PFN << 12 | ad_type | rights | large
        spte |= hw * fmt.shadow_host_writable_mask | mw * fmt.shadow_mmu_writable_mask
        spte |= a * fmt.shadow_accessed_mask | d * fmt.shadow_dirty_mask
        yield spte
        if ad_type == TYPE_1 and rights == 0 and not w:
            yield spte | 0b101 << 54


def bit(spte, number):
    return spte >> number & 1


POSITIONS = {
    "A": {AD: 8, NPT: 5, SHADOW: 5},
    "D": {AD: 9, NPT: 6, SHADOW: 6},
    "MW": {NO_AD: 58, AD: 58, NPT: 10, SHADOW: 10},
}


@pytest.mark.parametrize("fmt", [NO_AD, AD, NPT, SHADOW], ids=lambda fmt: fmt.name)
def test_predicates_and_transformations_bit_by_bit(fmt):
    for s in words_of(fmt):
        ad_type, w, mw = s >> 52 & 3, bit(s, 1), bit(s, POSITIONS["MW"][fmt])
        a = bit(s, POSITIONS["A"][fmt]) if fmt in POSITIONS["A"] else None
        d = bit(s, POSITIONS["D"][fmt]) if fmt in POSITIONS["D"] else None
        tracked = fmt in (NO_AD, AD) and ad_type == 1 and s & 7 == 0
        tracked_shadow = fmt not in (NO_AD, AD) and ad_type == 1
        assert fmt.is_shadow_present_pte(s)
        assert fmt.is_writable_pte(s) == w
        assert fmt.is_mmu_writable_spte(s) == mw
        assert fmt.is_large_pte(s) == bit(s, 7)
        assert fmt.is_last_spte(s, 1) and fmt.is_last_spte(s, 2) == bit(s, 7)
        assert fmt.is_executable_pte(s) == (bit(s, 2) if fmt in (NO_AD, AD) else not bit(s, 63))
        assert fmt.spte_ad_enabled(s) == (ad_type != 1)
        assert fmt.spte_ad_need_write_protect(s) == (ad_type != 0)
        assert fmt.is_access_track_spte(s) == (tracked or tracked_shadow)
        has_a, has_d = ad_type != 1 and a is not None, ad_type != 1 and d is not None
        assert fmt.spte_shadow_accessed_mask(s) == (fmt.shadow_accessed_mask if has_a else 0)
        assert fmt.spte_shadow_dirty_mask(s) == (fmt.shadow_dirty_mask if has_d else 0)
        young, dirty = (a if has_a else not tracked), (d if has_d else w)
        assert fmt.is_accessed_spte(s) == young
        assert fmt.is_dirty_spte(s) == dirty
        a_clear, d_clear = not (has_a and a), not (has_d and d)
        volatile = (not w and mw) or tracked or (ad_type != 1 and (a_clear or (w and d_clear)))
        assert fmt.spte_has_volatile_bits(s) == bool(volatile)

        marked = fmt.mark_spte_for_access_track(s)
        if ad_type != 1:
            assert marked == s & ~fmt.shadow_accessed_mask
        elif tracked:
            assert marked == s
        else:
            assert marked == (s & ~7) | bit(s, 0) << 54 | bit(s, 2) << 56
            assert fmt.restore_acc_track_spte(marked) == s & ~2  # W is not saved
        assert fmt.mmu_spte_age(s) == (marked if young else s, young, bool(young and ad_type == 1 and w))

        assert fmt.spte_write_protect(s) == ((s & ~2, True) if w else (s, False))
        guarded = s & ~2 & ~fmt.shadow_mmu_writable_mask
        assert fmt.spte_write_protect(s, pt_protect=True) == ((guarded, True) if w or mw else (s, False))
        assert fmt.tdp_write_protect(s) == (guarded, bool(w or mw))
        assert fmt.tdp_wrprot(s) == (s & ~2, w)
        assert fmt.spte_wrprot_for_clear_dirty(s) == (s & ~2, w)
        by_w = ad_type != 0
        no_d = s & ~fmt.shadow_dirty_mask
        assert fmt.tdp_clear_dirty(s) == ((s & ~2, w) if by_w else (no_d, bool(s & fmt.shadow_dirty_mask)))
        assert fmt.tdp_clear_dirty(s, wrprot=True) == (s & ~2, w)
        if ad_type != 1:
            flush = bool((mw and not w) or (has_d and d) or (not has_d and dirty and not w))
            assert fmt.spte_clear_dirty(s) == (no_d, flush)
        else:
            with pytest.raises(AssertionError, match="type-1"):
                fmt.spte_clear_dirty(s)
        assert fmt.rmap_clear_dirty(s) == ((s & ~2, w) if by_w else fmt.spte_clear_dirty(s))

        moved = fmt.kvm_mmu_changed_pte_notifier_make_spte(s, 0x9999)
        assert (
            fmt.spte_to_pfn(moved) == 0x9999 and not fmt.is_writable_pte(moved) and not fmt.is_mmu_writable_spte(moved)
        )
        assert not fmt.is_accessed_spte(moved) if has_a or tracked or ad_type == 1 else True


def test_update_asks_for_a_flush_by_mmu_writable_of_old_and_w_of_new():
    """A different question than spte_write_protect's early return (trap 7)."""
    protected = NO_AD.spte_write_protect(NO_AD.make_spte(PFN, ad_type=TYPE_1).spte).spte
    assert NO_AD.mmu_spte_update(protected, protected)
    assert not NO_AD.spte_write_protect(protected).flush
    clean = AD.make_spte(PFN).spte & ~(1 << 9) & ~2
    assert AD.spte_clear_dirty(clean).flush  # D was 0 already


@pytest.mark.parametrize("fmt", [NO_AD, AD, NPT, SHADOW], ids=lambda fmt: fmt.name)
def test_illegal_triples_are_refused(fmt):
    ad_type = TYPE_1 if fmt is NO_AD else TYPE_0
    fresh, hw, mw = (
        fmt.make_spte(PFN, ad_type=ad_type).spte,
        fmt.shadow_host_writable_mask,
        fmt.shadow_mmu_writable_mask,
    )
    legal = {(1, 1, 1), (1, 1, 0), (1, 0, 0), (0, 0, 0)}
    for triple in itertools.product((0, 1), repeat=3):
        spte = fresh & ~(hw | mw | 2) | triple[0] * hw | triple[1] * mw | triple[2] * 2
        many = np.full(1000, fresh, np.uint64)
        many[777] = spte
        if triple in legal:
            fmt.check_spte_writable_invariants(spte)
            each(fmt.spte_write_protect, many)
        else:
            with pytest.raises(AssertionError, match="W needs MMU-writable"):
                fmt.check_spte_writable_invariants(spte)
            with pytest.raises(AssertionError, match="W needs MMU-writable"):
                fmt.mmu_spte_update(fresh, spte)


def test_a_present_leaf_never_changes_its_pfn():
    with pytest.raises(AssertionError, match="another pfn"):
        AD.mmu_spte_update(AD.make_spte(1).spte, AD.make_spte(2).spte)


def test_marking_twice_is_noticed():
    fresh = NO_AD.make_spte(PFN, ad_type=TYPE_1).spte
    with pytest.raises(AssertionError, match="marked for access tracking twice"):
        NO_AD.mark_spte_for_access_track(fresh | 1 << 54)


def test_make_spte_without_any_access_would_be_invisible():
    with pytest.raises(AssertionError, match="no access"):
        AD.make_spte(PFN, access=0)
    assert SpteFormat.ept(exec_only=False).make_spte(PFN, access=0).spte & 1


def test_prefetched_sptes_are_born_old():
    assert not AD.is_accessed_spte(AD.make_spte(PFN, prefetch=True).spte)
    assert NO_AD.is_access_track_spte(NO_AD.make_spte(PFN, ad_type=TYPE_1, prefetch=True).spte)


def test_special_values_are_not_present():
    for fmt in (NO_AD, AD, NPT, SHADOW):
        assert fmt.is_removed_spte(REMOVED_SPTE) and not fmt.is_shadow_present_pte(REMOVED_SPTE)
        assert not any(fmt.hardware_rights(REMOVED_SPTE)), fmt.name
        mmio = fmt.shadow_mmio_value | 0x123 << 52 & ~(1 << 63)
        assert fmt.is_mmio_spte(mmio) and not fmt.is_shadow_present_pte(mmio)
        assert not fmt.is_mmio_spte(fmt.make_spte(PFN).spte)


@pytest.mark.parametrize("fmt", [NO_AD, AD, NPT], ids=lambda fmt: fmt.name)
def test_a_split_huge_spte_gives_512_heirs(fmt):
    ad_type = TYPE_1 if fmt is NO_AD else TYPE_0
    huge = fmt.make_spte(0x40000, level=2, ad_type=ad_type).spte
    for parent in (huge, fmt.mark_spte_for_access_track(huge)):
        for index in range(512):
            child = fmt.make_huge_page_split_spte(parent, 2, index)
            assert fmt.spte_to_pfn(child) == 0x40000 + index
            assert child == parent & ~(1 << 7) | index << 12
            assert fmt.is_access_track_spte(child) == fmt.is_access_track_spte(parent)
    gig = fmt.make_spte(0x40000, level=3, ad_type=ad_type).spte
    assert fmt.make_huge_page_split_spte(gig, 3, 1) == gig | 512 << 12 and fmt.is_large_pte(gig)


def test_executable_parts_of_an_nx_huge_page():
    huge = NO_AD.make_spte(0x40000, level=2, ad_type=TYPE_1, nx_huge_pages=True).spte
    assert not NO_AD.is_executable_pte(huge)
    assert NO_AD.is_executable_pte(NO_AD.make_huge_page_split_spte(huge, 2, 7, nx_huge_pages=True))
    tracked = NO_AD.make_huge_page_split_spte(NO_AD.mark_spte_for_access_track(huge), 2, 7, nx_huge_pages=True)
    assert NO_AD.is_access_track_spte(tracked)
    assert NO_AD.is_executable_pte(NO_AD.restore_acc_track_spte(tracked))


# ---- one word or a million -------------------------------------------------------------------------------------------

TRANSFORMATIONS = [
    "mark_spte_for_access_track", "restore_acc_track_spte", "mmu_spte_age", "make_spte_executable", "spte_write_protect",
    "spte_wrprot_for_clear_dirty", "rmap_clear_dirty", "tdp_wrprot", "tdp_clear_dirty", "tdp_write_protect",
]  # fmt: skip
PREDICATES = [
    "is_shadow_present_pte", "is_removed_spte", "is_mmio_spte", "is_writable_pte", "is_mmu_writable_spte", "is_large_pte",
    "is_executable_pte", "spte_ad_enabled", "spte_ad_need_write_protect", "is_access_track_spte", "is_accessed_spte",
    "is_dirty_spte", "spte_has_volatile_bits",
]  # fmt: skip


def one_by_one(helper, words, *how):
    """What `each` must say: the helper's answer to each distinct word, as columns."""
    distinct, which = np.unique(words, return_inverse=True)
    answers = [helper(int(word), *how) for word in distinct]
    rows = [answer if isinstance(answer, tuple) else (answer,) for answer in answers]
    return [np.array(column)[which].tolist() for column in zip(*rows, strict=True)]


def by_columns(answer):
    return [column.tolist() for column in (answer if isinstance(answer, tuple) else (answer,))]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_an_array_gets_what_its_words_get(data):
    fmt = data.draw(st.sampled_from([NO_AD, AD, NPT]))
    size = data.draw(st.sampled_from([1, 7, 512, 513, 2000]))
    kinds = data.draw(
        st.lists(st.sampled_from(list(words_of(fmt))), min_size=1, max_size=data.draw(st.sampled_from([1, 3, 40])))
    )
    words = random_words(kinds, size, data.draw(st.integers(0, 99)))
    helper = getattr(fmt, data.draw(st.sampled_from(TRANSFORMATIONS + PREDICATES)))
    answer = each(helper, words)
    assert by_columns(answer) == one_by_one(helper, words)
    assert type(answer) is type(helper(int(words[0]))) or isinstance(answer, np.ndarray)


def random_words(kinds, size, seed=1):
    """Words of these kinds, mixed, with random addresses."""
    rng = np.random.default_rng(seed)
    pfns = rng.integers(0, 1 << 20, size, dtype=np.uint64) << np.uint64(12)
    return rng.choice(np.array(kinds, np.uint64), size) ^ pfns


@pytest.mark.parametrize("way", ["by kind", "compiled"])
@pytest.mark.parametrize("fmt", [NO_AD, AD], ids=lambda fmt: fmt.name)
def test_a_million_words_get_what_each_gets_compiled_or_not(fmt, way, monkeypatch):
    """10^6 words of 40 kinds, mixed, and every transformation; one illegal triple among them is found in both ways."""
    assert importlib.util.find_spec("numba"), "numba is missing; the extra `test` has it"
    monkeypatch.setattr(compiled, "numba_is_there", lambda: way == "compiled")
    words = random_words(list(words_of(fmt))[:40], 10**6)
    distinct, which = np.unique(words & ~np.uint64(0xFFFFF << 12), return_inverse=True)
    for name, how in [*((name, ()) for name in TRANSFORMATIONS), ("spte_write_protect", (True,))]:
        helper = getattr(fmt, name)
        answer = each(helper, words, *how)
        columns = answer if isinstance(answer, tuple) else (answer,)
        for got, column in zip(columns, one_by_one(helper, distinct, *how), strict=True):
            expected = np.array(column, got.dtype)[which]
            address = words & np.uint64(0xFFFFF << 12) if got.dtype == np.uint64 else False
            assert (got == (expected | address)).all(), name
    for missing in (fmt.shadow_mmu_writable_mask, fmt.shadow_host_writable_mask):
        broken = words.copy()
        broken[777_777] = fmt.make_spte(PFN, ad_type=TYPE_1 if fmt is NO_AD else TYPE_0).spte & ~missing
        helper = fmt.mark_spte_for_access_track if fmt is NO_AD else fmt.spte_clear_dirty
        with pytest.raises(AssertionError, match="MMU-writable needs host-writable"):
            each(helper, broken)


@pytest.mark.parametrize("kinds", [1, 3, 40])
def test_arrays_of_any_shape_are_worked_in_blocks(kinds):
    words = np.resize(np.array(list(words_of(NO_AD))[:kinds], np.uint64), (2, BLOCK))
    for name in TRANSFORMATIONS:
        answer = each(functools.partial(getattr(NO_AD, name)), words)  # no method, so it is not compiled
        columns = answer if isinstance(answer, tuple) else (answer,)
        assert all(column.shape == words.shape for column in columns)
        assert [column.reshape(-1).tolist() for column in columns] == one_by_one(
            getattr(NO_AD, name), words.reshape(-1)
        )


def test_the_input_is_left_alone():
    words = np.full(10_000, NO_AD.make_spte(PFN, ad_type=TYPE_1).spte, np.uint64)
    before = words.copy()
    each(NO_AD.mmu_spte_age, words)
    assert (words == before).all()
    assert each(NO_AD.mmu_spte_age, words[:0]).spte.shape == (0,)


def test_arrays_that_hold_no_sptes_are_refused():
    with pytest.raises(TypeError, match="uint64; got int64"):
        each(AD.mark_spte_for_access_track, np.zeros(4, np.int64))


def test_saved_bits_are_the_two_that_the_sheet_names():
    assert SHADOW_ACC_TRACK_SAVED_MASK == 1 << 54 | 1 << 56
