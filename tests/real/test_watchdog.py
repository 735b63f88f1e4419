"""The watchdog without a guest: who stays too long is called back by its page and by a signal, and left as it was."""

import mmap
import signal
import time

from kvmbook.real.watchdog import IMMEDIATE_EXIT, Watchdog


def called_back(guard):
    until = time.monotonic() + 5
    while not signal.sigpending() and time.monotonic() < until:
        time.sleep(0.01)
    return guard.called_back and signal.sigpending() == {signal.SIGURG}


def test_who_stays_too_long_is_called_back_and_left_as_it_was():
    watchdog, shared, before = Watchdog(), mmap.mmap(-1, 4096), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with watchdog.watch(shared, 0.1) as guard:
        assert called_back(guard) and shared[IMMEDIATE_EXIT] == 1
    assert shared[IMMEDIATE_EXIT] == 0 and not signal.sigpending()
    with watchdog.watch(shared, 5) as guard:
        time.sleep(0.15)
        assert not guard.called_back
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_a_page_that_another_thread_closes_does_not_take_the_watchdog_with_it():
    watchdog, shared, other = Watchdog(), mmap.mmap(-1, 4096), mmap.mmap(-1, 4096)
    with watchdog.watch(shared, 0.1) as guard:
        shared.close()
        assert called_back(guard)
    with watchdog.watch(other, 0.1) as guard:
        assert called_back(guard)
    assert not signal.sigpending()


def test_who_stays_with_a_page_can_be_called_back_before_the_time_is_up():
    """As `RealVm.close` does; a stay with another page goes on."""
    watchdog, shared, other = Watchdog(), mmap.mmap(-1, 4096), mmap.mmap(-1, 4096)
    with watchdog.watch(other, 60) as stays, watchdog.watch(shared, 60) as guard:
        watchdog.call_back(shared)
        assert called_back(guard) and shared[IMMEDIATE_EXIT] == 1
        assert not stays.called_back and other[IMMEDIATE_EXIT] == 0
    assert not signal.sigpending()
