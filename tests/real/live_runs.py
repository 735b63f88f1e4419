"""Runs on this machine's KVM, each for a process of its own: ``python live_runs.py NAME``. `test_live` starts them."""

import errno
import os
import pathlib
import signal
import sys
import tempfile
import threading
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from shrinking import differs, shrunk

from kvmbook import FlushPolicy, Hardware, Kernel, Vm
from kvmbook.real import (
    CLAIMS,
    RING_GFN,
    ModelVm,
    RealVm,
    Rounds,
    Seen,
    as_hardware,
    as_kernel,
    ask_machine,
    clear_reports,
    device,
    forgotten,
    ring_reports,
)
from kvmbook.real.__main__ import main
from kvmbook.real.machines import Recording

NOT_TRIED = 77  # exit code: this machine cannot show it
BASE, NPAGES = 0x100, 64
SLOT = {"slot": 0, "base_gfn": BASE, "npages": NPAGES}
DONE, MMIO, RING_FULL = Seen.DONE, Seen.MMIO, Seen.RING_FULL


def model(**options):
    """The model of a machine like this, as far as the runs here can tell."""
    return Vm(Hardware.shadow() if ask_machine().paging == "shadow" else Hardware.ept(), Kernel.v6_0, **options)


def accesses_are_done_and_memory_has_them():
    with RealVm(vcpus=2) as vm:
        vm.set_user_memory_region(**SLOT)
        a, b = vm.vcpu
        assert [a.read(BASE), a.write(BASE), b.write(BASE), a.fetch(BASE + 1), b.write(BASE + 2)] == [DONE] * 5
        assert (vm.value(BASE, 0), vm.value(BASE, 1), vm.value(BASE + 2, 1)) == (1, 1, 2)
        assert a.run([("write", BASE + n % NPAGES) for n in range(10_000)]) == [DONE] * 10_000
        assert vm.value(BASE + 9_999 % NPAGES) == a.value == 10_001
        assert len(vm.memory(BASE)) == 4096


def what_has_no_memory_leaves_to_user_space():
    with RealVm() as vm:
        vm.set_user_memory_region(**SLOT)
        vm.set_user_memory_region(slot=1, base_gfn=0x200, npages=1, readonly=True)
        told = vm.vcpu[0].run([("read", BASE), ("read", 0x900), ("write", 0x900), ("write", 0x200), ("read", 0x200)])
        assert told == [DONE, MMIO, MMIO, MMIO, DONE]
        refused(OSError, lambda: vm.vcpu[0].fetch(0x900), "gfn 0x900")
        assert vm.vcpu[0].write(BASE) is DONE


def refused(kind, call, word):
    try:
        call()
    except kind as error:
        assert word in str(error), str(error)
        return error
    raise AssertionError(f"not refused: {word}")


def gfns_and_memory_that_are_not_its_own_are_refused():
    with RealVm() as vm:
        vm.set_user_memory_region(**SLOT)
        own = vm.own_slot
        for gfn in (-1, 1 << 20, 0xF0000, 0xF8000):
            refused(ValueError, lambda gfn=gfn: vm.vcpu[0].read(gfn), "guest")
        refused(ValueError, lambda: vm.vcpu[0].run([("jump", BASE)]), "jump")
        refused(ValueError, lambda: vm.set_user_memory_region(slot=own), "the VM's own")
        vm.set_user_memory_region(slot=3, base_gfn=0x300, npages=1, userspace_addr=0x7F00_0000_0000)
        refused(ValueError, lambda: vm.vcpu[0].read(0x300), "not this VM's memory")


def the_same_run_gives_the_same_log_and_the_same_errnos():
    def run(vm):
        said = []

        def tell(call, *arguments, **named):
            try:
                answer = call(*arguments, **named)
            except OSError as error:
                answer = errno.errorcode[error.errno]
                assert error.strerror.startswith(os.strerror(error.errno) + ": ")
            said.append(answer.nonzero()[0].tolist() if isinstance(answer, np.ndarray) else answer)

        tell(vm.get_dirty_log, 0)  # ENOENT
        tell(vm.set_user_memory_region, slot=0)  # EINVAL
        tell(vm.set_user_memory_region, **SLOT)
        tell(vm.set_user_memory_region, slot=1, base_gfn=BASE + 63, npages=1)  # EEXIST
        tell(vm.get_dirty_log, 0)  # ENOENT: not logging
        tell(vm.set_user_memory_region, **SLOT | {"npages": 63})  # EINVAL
        tell(vm.enable_cap_manual_dirty_log_protect2, 2)  # EINVAL
        tell(vm.enable_dirty_ring, 100)  # EINVAL
        tell(vm.enable_dirty_ring, 1 << 30)  # E2BIG
        tell(vm.reset_dirty_rings)  # EINVAL
        vm.vcpu[0].write(BASE)
        tell(vm.set_user_memory_region, **SLOT, log_dirty_pages=True)
        for gfn in (BASE, BASE + 8):
            vm.vcpu[0].write(gfn)
        tell(vm.get_dirty_log, 0)
        tell(vm.get_dirty_log, 0)
        tell(vm.set_user_memory_region, **SLOT)
        vm.enable_manual_dirty_log_protect()
        tell(vm.set_user_memory_region, **SLOT, log_dirty_pages=True)
        vm.vcpu[0].write(BASE + 16)
        tell(vm.get_dirty_log, 0)
        tell(vm.clear_dirty_log, 0, 3, 64, np.ones(64, bool))  # EINVAL
        tell(vm.clear_dirty_log, 0, 0, 64, np.ones(5, bool))  # EFAULT
        tell(vm.clear_dirty_log, 0, 0, 64, np.ones(64, bool))
        tell(vm.get_dirty_log, 0)
        tell(vm.set_user_memory_region, **SLOT | {"base_gfn": 0x400}, log_dirty_pages=True)
        vm.vcpu[0].write(0x408)
        tell(vm.get_dirty_log, 0)
        tell(vm.set_user_memory_region, slot=0)
        tell(vm.get_dirty_log, 0x70000)  # EINVAL: no such address space
        return said

    with RealVm() as real:
        assert (ours := run(real)) == (theirs := run(model())), f"\n{ours}\n{theirs}"
    assert [8] in ours and "EFAULT" in ours and "E2BIG" in ours


def a_full_ring_stops_the_vcpu_and_loses_nothing():
    with RealVm() as vm:
        vm.enable_dirty_ring(4096)
        vm.set_user_memory_region(slot=0, base_gfn=BASE, npages=512, log_dirty_pages=True)
        vcpu, written = vm.vcpu[0], [("write", BASE + page) for page in range(300)]
        seen = vcpu.run(written)
        done = seen.index(RING_FULL)
        assert set(seen[:done]) == {DONE} and set(seen[done:]) == {RING_FULL} and done < 256
        assert vcpu.write(BASE) is RING_FULL
        harvested = vcpu.dirty_ring.harvest()
        assert [page for _, page in harvested][:done] == list(range(done)) and len(harvested) - done <= 1
        assert vm.reset_dirty_rings() == len(harvested) and vcpu.dirty_ring.harvest() == []
        assert vcpu.write(BASE) is DONE and vcpu.dirty_ring.harvest() == [(0, 0)]
        assert [vm.value(BASE + page) > 0 for page in range(300)] == [page < done for page in range(300)]


def the_host_takes_a_page_and_the_guest_finds_an_empty_one():
    with RealVm() as vm:
        vm.set_user_memory_region(**SLOT)
        vm.vcpu[0].write(BASE)
        before = vm.counters["pf_fixed"]
        vm.vcpu[0].write(BASE)
        between = vm.counters["pf_fixed"]
        vm.discard(BASE)
        assert vm.value(BASE) == 0 and vm.memory(BASE) == bytes(4096)
        assert vm.vcpu[0].write(BASE) is DONE and vm.value(BASE) == 3
        assert between == before < vm.counters["pf_fixed"]


def ageing_works_or_says_what_is_missing():
    with RealVm() as vm:
        vm.set_user_memory_region(**SLOT)
        vm.vcpu[0].read(BASE)
        if ask_machine().ageing is None:
            assert vm.clear_young(BASE, BASE + 1)
        else:
            assert refused(OSError, lambda: vm.clear_young(BASE, BASE + 1), "page_idle").errno == errno.ENOSYS


def enabling_asks_for_one_flush_even_with_nothing_left_to_protect():
    def asked(vm, call):
        before = vm.counters["remote_tlb_flush_requests"]
        call()
        return vm.counters["remote_tlb_flush_requests"] - before

    def enable(vm):
        vm.set_user_memory_region(**SLOT, log_dirty_pages=True)

    with RealVm() as vm:
        vm.set_user_memory_region(**SLOT)
        assert asked(vm, lambda: enable(vm)) == 1  # nothing mapped
        vm.set_user_memory_region(**SLOT)
        vm.vcpu[0].write(BASE)
        assert asked(vm, lambda: enable(vm)) == 1  # a writable page
        vm.set_user_memory_region(**SLOT)
        assert asked(vm, lambda: enable(vm)) == 1  # all write-protected already
    with RealVm() as vm:
        vm.enable_manual_dirty_log_protect(initially_set=True)
        vm.set_user_memory_region(**SLOT)
        vm.vcpu[0].write(BASE)
        assert asked(vm, lambda: enable(vm)) == 0
        assert asked(vm, lambda: vm.clear_dirty_log(0, 0, 64, np.ones(64, bool))) == 1


def a_guest_that_loops_is_called_back():
    with RealVm(vcpus=2, time_limit=0.3) as vm:
        vm.set_user_memory_region(**SLOT)
        answers = []

        def loop(vcpu):
            began = time.monotonic()
            answers.append((refused(TimeoutError, vcpu.spin, "0.3 s"), time.monotonic() - began))

        loop(vm.vcpu[0])
        threads = [threading.Thread(target=loop, args=[vcpu]) for vcpu in vm.vcpu]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(answers) == 3 and all(0.3 <= seconds < 2 for _, seconds in answers)
        assert [vcpu.write(BASE) for vcpu in vm.vcpu] == [DONE, DONE]  # and it is as good as new
        assert signal.SIGURG not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        assert signal.SIGURG not in signal.sigpending()


def a_python_whose_ioctl_tries_again_calls_a_guest_back_too():
    """As `fcntl.ioctl` does in newer Pythons, whenever a signal ends a call."""
    once = device.fcntl.ioctl

    def again(*arguments):
        while True:
            try:
                return once(*arguments)
            except InterruptedError:
                pass

    device.fcntl.ioctl = again
    with RealVm(time_limit=0.3) as vm:
        refused(TimeoutError, vm.vcpu[0].spin, "0.3 s")


def closing_has_those_leave_who_are_in_the_guest_and_refuses_them_in_a_sentence():
    def told(vcpu, call, said):
        try:
            while True:
                call(vcpu)
        except OSError as error:
            said.append((error.errno, str(error)))

    calls = [lambda vcpu: vcpu.spin(), lambda vcpu: vcpu.run([("write", BASE + page % 64) for page in range(9000)])]
    for number in range(60):
        vm = RealVm(vcpus=2, time_limit=60)
        vm.set_user_memory_region(**SLOT)
        said = []
        threads = [threading.Thread(target=told, args=[vcpu, calls[number % 2], said]) for vcpu in vm.vcpu]
        for thread in threads:
            thread.start()
        time.sleep(0.01 * (number % 4))
        began = time.monotonic()
        vm.close()
        for thread in threads:
            thread.join()
        assert time.monotonic() - began < 5 and len(said) == 2
        assert all(code == errno.EBADF and "the VM is closed" in text for code, text in said), said
    vm = RealVm(time_limit=60)
    vm.set_user_memory_region(**SLOT)
    signal.signal(signal.SIGALRM, lambda *_: vm.close())  # in the thread itself that is in the guest
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    refused(OSError, vm.vcpu[0].spin, "the VM is closed")


def slots_change_while_their_log_is_read():
    with RealVm() as vm:
        vm.set_user_memory_region(slot=0, base_gfn=0x1000, npages=64, log_dirty_pages=True)
        ends = time.monotonic() + 2

        def change():
            while time.monotonic() < ends:
                for npages in (0x8000, 64):
                    vm.set_user_memory_region(slot=0)
                    vm.set_user_memory_region(slot=0, base_gfn=0x1000, npages=npages, log_dirty_pages=True)

        changing, sizes = threading.Thread(target=change), set()
        changing.start()
        while changing.is_alive():
            try:
                sizes.add(len(vm.get_dirty_log(0)))
            except OSError as error:
                assert error.errno == errno.ENOENT
        assert sizes == {64, 0x8000}, sizes


def many_accesses_are_counted_as_the_model_counts_them():
    def counts(vm):
        vm.enable_dirty_ring(4096)
        vm.set_user_memory_region(slot=0, base_gfn=BASE, npages=512, log_dirty_pages=True)
        seen = vm.vcpu[0].run([("write", BASE + page % 512) for page in range(5000)])
        return len(seen), seen.index(RING_FULL), vm.vcpu[0].value

    with RealVm() as real:
        assert counts(real) == counts(ModelVm.of(ask_machine()))


def a_signals_handler_runs_while_the_guest_loops():
    def interrupt(*_):
        raise KeyboardInterrupt

    with RealVm(time_limit=30) as vm:
        vm.set_user_memory_region(**SLOT)
        vm.vcpu[0].read(BASE)
        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        began = time.monotonic()
        refused(KeyboardInterrupt, vm.vcpu[0].spin, "")
        assert time.monotonic() - began < 5
        ticks = []
        signal.signal(signal.SIGALRM, lambda *_: ticks.append(1))  # one that returns: the guest goes on
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        for _ in range(20):
            assert set(vm.vcpu[0].run([("write", BASE)] * 4000)) == {DONE}
        while not ticks:
            vm.vcpu[0].run([("write", BASE)] * 4000)
        signal.setitimer(signal.ITIMER_REAL, 0)


def a_failed_fetch_leaves_the_vcpu_as_new_and_touches_no_page():
    with RealVm(vcpus=2) as vm:
        vm.set_user_memory_region(slot=0, base_gfn=0, npages=1)  # where an interrupt table would lie
        vm.set_user_memory_region(slot=1, base_gfn=BASE, npages=NPAGES, log_dirty_pages=True)
        for _ in range(3):
            refused(OSError, lambda: vm.vcpu[0].fetch(0x900), "gfn 0x900")
            assert vm.vcpu[0].run([("write", BASE), ("read", BASE)]) == [DONE, DONE]
        assert vm.memory(0) == bytes(4096)


def two_vcpus_in_two_threads_are_logged_completely():
    with RealVm(vcpus=2) as vm:
        vm.set_user_memory_region(**SLOT, log_dirty_pages=True)
        copies = {page: vm.memory(BASE + page) for page in range(NPAGES)}

        def write(vcpu):
            for _ in range(50):
                vcpu.run([("write", BASE + number % NPAGES) for number in range(1000)])

        def copy_dirty():
            for page in vm.get_dirty_log(0).nonzero()[0].tolist():
                copies[page] = vm.memory(BASE + page)

        threads = [threading.Thread(target=write, args=[vcpu]) for vcpu in vm.vcpu]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            copy_dirty()
        copy_dirty()
        assert copies == {page: vm.memory(BASE + page) for page in range(NPAGES)}


def a_thousand_vms_leave_nothing_behind():
    def held():
        maps = pathlib.Path("/proc/self/maps").read_text()
        return len(os.listdir("/proc/self/fd")), maps.count("kvm"), len(maps.splitlines())

    def one(number):
        with RealVm(vcpus=1 + number % 2, page_size="2M" if number % 3 == 0 else "4K") as vm:
            if number % 4 == 0:
                vm.enable_dirty_ring(4096)
            vm.set_user_memory_region(**SLOT)
            vm.vcpu[0].write(BASE)
            if number % 5 == 0:
                assert vm.counters["pf_taken"] >= 0
            if number % 7 == 0:
                refused(OSError, lambda: vm.enable_dirty_ring(100), "Invalid argument")
        if number % 10 == 0:
            vm.close()  # once more
            refused(OSError, lambda: vm.get_dirty_log(0), "Bad file descriptor")
            others = [os.open("/dev/zero", os.O_RDONLY) for _ in range(8)]  # which get its numbers
            refused(OSError, lambda: vm.counters, "Bad file descriptor")
            for other in others:
                os.close(other)
        if number % 11 == 0:
            RealVm().vcpu[0].run([])  # forgotten: given back when nobody has it any more

    def break_off():
        with RealVm() as vm:
            vm.vcpu[0].run([("write", BASE)])
            raise KeyError

    import gc

    for number in range(30):
        one(number)
    gc.collect()
    time.sleep(0.2)  # the watchdog's thread goes
    before = held()
    began = time.monotonic()
    for number in range(1000):
        one(number)
    refused(KeyError, break_off, "")
    print(f"{1000 / (time.monotonic() - began):.0f} VMs/s", file=sys.stderr)
    gc.collect()
    time.sleep(0.2)
    after = held()
    assert after[:2] == before[:2] and before[1] == 0 and after[2] <= before[2] + 2, (before, after)


def a_ring_and_initially_set_lose_a_write():
    for manual in (0, 1, 3):
        for _ in range(10):
            with RealVm() as vm:
                assert ring_reports(vm, manual) == ring_reports(model(), manual) == ([] if manual == 3 else [(0, 0)])
                assert vm.value(RING_GFN) == vm.vcpu[0].value == 2  # memory has it


def a_clear_forgets_the_huge_page_that_begins_at_its_last_gfn():
    if why := CLAIMS[-1].missing(ask_machine()):
        print(f"could not be tried here: {why}")
        sys.exit(NOT_TRIED)
    word = range(0x3FF, 0x43F)
    runs = [
        ("2M", (0x3FF, 0x400), 0x400, 3, False),  # the loss
        ("4K", (0x3FF, 0x400), 0x400, 3, True),  # and its controls
        ("2M", (0x3FF, 0x400), 0x400, 1, True),
        ("2M", (0x400,), 0x400, 3, True),
        ("2M", (0x3FF, 0x401), 0x401, 3, True),
        ("2M", (0x3FF, 0x400, 0x401), 0x401, 3, True),
        ("2M", word, 0x400, 3, True),
    ]
    for page_size, cleared, written, manual, reported in runs:
        asked = {"cleared": cleared, "written": written, "manual": manual}
        assert clear_reports(model(page_size=page_size), **asked) == reported
        for _ in range(10):
            with RealVm(page_size=page_size) as vm:
                assert clear_reports(vm, **asked) == reported, asked
                assert vm.value(written) == vm.vcpu[0].value  # memory has it
                assert vm.counters["pages_2m"] == (not reported)


def a_reset_that_a_signal_stops_forgets_what_it_freed():
    rounds = Rounds.made(5)
    stops = rounds.machine.since(6, 17)
    for one in rounds.with_signal:
        assert one.lost == (forgotten(one.freed, rounds.pages) if stops else ()), one
    assert rounds.losing[1] == 0


def two_hundred_sequences_without_a_difference():
    assert main(["differ", "--sequences", "200"]) == 0


def beside(setting):
    return RealVm(setting.vcpus, page_size=setting.page_size)


def model_beside(**changes):
    machine = ask_machine()
    hardware, kernel = as_hardware(machine), as_kernel(machine).with_(**changes)
    return lambda setting: ModelVm(
        hardware, kernel, setting.vcpus, page_size=setting.page_size, memslots=machine.memslots
    )


def hypothesis_finds_no_difference():
    assert (found := shrunk(ask_machine(), model_beside(), beside, examples=300, seed=None)) is None, found


def hypothesis_finds_a_model_that_does_not_flush_and_shrinks_what_shows_it():
    model = model_beside(flush=FlushPolicy.NEVER)
    setting, calls = shrunk(ask_machine(), model, beside, examples=500, seed=2)
    print(*calls, sep="\n")
    assert 4 <= len(calls) <= 6 and differs(setting, calls, model, beside)
    assert not differs(setting, calls, model_beside(), beside)


def what_is_recorded_agrees_with_the_model_and_comes_again():
    with tempfile.TemporaryDirectory() as folder:
        paths = [pathlib.Path(folder, name) for name in ("first.json", "again.json")]
        for path in paths:
            assert main(["record", str(path), "--kind", "ring", "--calls", "60"]) == 0
        first, again = map(Recording.load, paths)
        said = [[one[:3] for one in recording.sessions[0].said] for recording in (first, again)]
        assert said[0] == said[1]


RUNS = {
    name: run for name, run in list(globals().items()) if getattr(run, "__module__", "") == __name__ and "_" in name
}

if __name__ == "__main__":
    RUNS[sys.argv[1]]()
    print("done")
