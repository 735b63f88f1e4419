"""Nothing hangs: what is in KVM_RUN for longer than its limit is called back.

Called back by a signal that is blocked in the calling thread and let through by KVM_RUN alone: so it needs no handler, works
in any thread, and ends no other system call. Where it comes just before KVM_RUN, ``immediate_exit`` in the vCPU's shared page
does the same.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ctypes import c_uint8
from mmap import mmap

from kvmbook.real import abi

TICK = 0.05  # seconds between two looks
IMMEDIATE_EXIT = abi.kvm_run.immediate_exit.offset


class Guard:
    """One stay in the guest, of the thread that made it. ``called_back``: the time was up, or the VM is to be closed."""

    def __init__(self, shared: mmap, seconds: float) -> None:
        self.shared, self.deadline = shared, time.monotonic() + seconds
        self.thread = threading.get_ident()
        self.called_back = False

    def call_back(self) -> None:
        self.called_back = True
        with suppress(ValueError):  # another thread has closed the VM: then the signal has to do
            self.shared[IMMEDIATE_EXIT] = 1
        signal.pthread_kill(self.thread, signal.SIGURG)


class Watchdog:
    """The stays of this process, and the thread that looks after them while there are any."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # of a thread twice: a signal's handler may close its VM
        self._stays: set[Guard] = set()
        self._thread: threading.Thread | None = None

    @contextmanager
    def watch(self, shared: mmap, seconds: float) -> Iterator[Guard]:
        """Call KVM_RUN in here. ``shared``: the vCPU's page."""
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGURG})
        guard = Guard(shared, seconds)
        try:
            with self._lock:
                self._stays.add(guard)
                if self._thread is None or not self._thread.is_alive():
                    self._thread = threading.Thread(target=self._look, name="KVM_RUN watchdog", daemon=True)
                    self._thread.start()
            yield guard
        finally:
            with self._lock:
                self._stays.discard(guard)
            if guard.called_back:
                with suppress(ValueError):
                    shared[IMMEDIATE_EXIT] = 0
                signal.sigtimedwait({signal.SIGURG}, 0)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def call_back(self, shared: mmap) -> None:
        """Call back who stays with this page now."""
        with self._lock:
            for guard in self._stays:
                if guard.shared is shared:
                    guard.call_back()

    def _look(self) -> None:
        while True:
            time.sleep(TICK)
            with self._lock:
                if not self._stays:
                    self._thread = None
                    return
                for guard in self._stays:
                    if time.monotonic() > guard.deadline:
                        guard.call_back()


watchdog = Watchdog()


def let_through() -> abi.kvm_signal_mask:
    """The argument of KVM_SET_SIGNAL_MASK: in KVM_RUN as the thread is now, but for the watchdog's signal."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ()) - {signal.SIGURG}
    bits = sum(1 << number - 1 for number in blocked)
    return abi.kvm_signal_mask(8, (c_uint8 * 8)(*bits.to_bytes(8, "little")))
