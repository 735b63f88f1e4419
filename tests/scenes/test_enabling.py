"""Chapter 08's scene of the price: what a flush rule costs when logging is enabled, and what it saves."""

import pytest

from kvmbook import FlushPolicy
from kvmbook.scenes import SITUATIONS, price_of_enabling


@pytest.mark.parametrize("situation", SITUATIONS)
def test_always_flushes_once_and_loses_nothing(situation):
    assert price_of_enabling(FlushPolicy.ALWAYS, situation) == (1, 0)


def test_if_changed_saves_a_flush_and_loses_the_write_to_an_aged_page():
    prices = {situation: price_of_enabling(FlushPolicy.IF_CHANGED, situation) for situation in SITUATIONS}
    assert prices["written, then aged"] == (0, 1) and prices["page written"] == (1, 0)
    assert [missed for _, missed in prices.values()] == [0, 0, 1, 0]
