"""The differential's parts, without KVM: the model stands in for the machine, once as it is and once with a rule broken."""

import errno
import io
import pathlib
import subprocess
import sys
from dataclasses import replace

import pytest

from kvmbook import FlushPolicy
from kvmbook.model import Hardware
from kvmbook.real import ModelVm, Offers, Seen, as_hardware, as_kernel, differ, guest, perform, sequences
from kvmbook.real.__main__ import main
from kvmbook.real.calls import CALLS
from kvmbook.real.differ import Tally, access_by_access, minimise
from kvmbook.real.sequences import DIFFERENCES, KINDS, NOT_ASKED, sequence

ROOT = pathlib.Path(__file__).parents[2]
MACHINE = Offers(
    release="6.18.44", vendor="kvm_pvm", paging="shadow", ad_bits=True, pml=False, tdp_mmu=False, eager_page_split=True,
    huge_pages=True, memslots=32764, address_spaces=1, readonly_memory=True, manual_protect=3, ring_size=1 << 20,
    statistics=True, ageing="not here",
)  # fmt: skip


# ---- the model stands as the machine says ----------------------------------------------------------------------------


def test_the_model_stands_as_the_machine_says():
    assert as_hardware(MACHINE) == Hardware.shadow().with_(smm=False)
    intel = replace(MACHINE, paging="EPT", ad_bits=False, tdp_mmu=True, address_spaces=2)
    assert as_hardware(intel) == Hardware.ept(ad_bits=False)
    assert as_hardware(replace(intel, ad_bits=True, pml=True, tdp_mmu=False)) == Hardware.ept(pml=True, tdp_mmu=False)
    assert as_hardware(replace(intel, paging="NPT")) == Hardware.npt()


@pytest.mark.parametrize(
    "release, flush, since_6_2, forgets_last, oldest_first",
    [("5.19.17", FlushPolicy.IF_CHANGED, False, True, False), ("6.1.0-13", FlushPolicy.ALWAYS, False, True, False),
     ("6.7", FlushPolicy.ALWAYS, True, True, False), ("6.18.44", FlushPolicy.ALWAYS, True, False, True)],
)  # fmt: skip
def test_the_kernel_follows_from_its_release(release, flush, since_6_2, forgets_last, oldest_first):
    kernel = as_kernel(replace(MACHINE, release=release))
    assert (kernel.flush, kernel.marks_without_vcpu, kernel.splits_on_fault) == (flush, since_6_2, since_6_2)
    assert (kernel.clear_split_forgets_last, kernel.pml_drains_oldest_first) == (forgets_last, oldest_first)


# ---- sequences -------------------------------------------------------------------------------------------------------


def test_a_seed_always_makes_the_same_sequence():
    assert sequence(7, MACHINE, 40) == sequence(7, MACHINE, 40) != sequence(8, MACHINE, 40)


def test_sequences_call_everything_and_see_something():
    tally, names, kinds, vcpus = Tally(), set(), set(), set()
    for seed in range(200):
        setting, calls, answers = sequence(seed, MACHINE, 25)
        kinds.add(setting.kind), vcpus.add(setting.vcpus), names.update(call[0] for call in calls)
        tally.met += differ._something_to_see(calls, answers)
        assert not any(isinstance(answer, str) and "Error" in answer for answer in answers)
    assert (kinds, vcpus, names) == (set(KINDS), {1, 2}, set(CALLS) - NOT_ASKED)
    assert all(tally.met[name] > 20 for name in (*differ.NAMES.values(), "pages reported", "ring entries", "refusals"))


# ---- what is known to differ -----------------------------------------------------------------------------------------


def test_each_known_difference_has_a_name_a_reason_and_is_not_asked():
    assert all(len(difference.why) > 50 for difference in DIFFERENCES)
    for seed in range(60):
        setting, calls, _ = sequence(seed, MACHINE, 25, "ring")
        vm = ModelVm.of(MACHINE, setting.vcpus, page_size=setting.page_size)
        for call in calls:
            assert not sequences.known_to_differ(vm, call)
            perform(vm, *call)


def test_the_vms_own_slot_is_not_asked_about():
    own, vm = DIFFERENCES[0], ModelVm.of(MACHINE)
    slot = vm.own_slot
    assert own.meets(vm, ("get_dirty_log", slot)) and own.meets(vm, ("memory_region", slot, 0, 0, 1, 0))
    assert not own.meets(vm, ("get_dirty_log", 0)) and not own.meets(vm, ("discard", slot))


def test_the_vms_own_slot_is_the_last_that_the_machine_says_it_has():
    """509 of them, as before v5.12: those behind, which the model has, are not asked about either."""
    own, old = DIFFERENCES[0], replace(MACHINE, memslots=509)
    vm = ModelVm.of(old)
    assert vm.own_slot == 508 and ModelVm.of(MACHINE).own_slot == MACHINE.memslots - 1
    assert (
        vm.hva(0xF0000) is not None and own.meets(vm, ("get_dirty_log", 508)) and own.meets(vm, ("get_dirty_log", 509))
    )
    slots = {call[1] for seed in range(80) for call in sequence(seed, old, 25)[1] if call[0] == "memory_region"}
    assert 507 in slots and not slots & set(range(508, 32764))


def stale(*more):
    """vCPU 0 remembers that it may not write; vCPU 1 has written since."""
    vm = ModelVm.of(MACHINE, vcpus=2)
    calls = [
        ("enable_dirty_ring", 4096), ("memory_region", 0, 1, 0x100, 64, 0x100), ("run", 1, [["read", 0x100]]),
        ("memory_region", 0, 0, 0x100, 64, 0x100), ("memory_region", 0, 1, 0x100, 64, 0x100),
        ("run", 0, [["read", 0x100]]), ("run", 1, [["write", 0x100]]),
    ]  # fmt: skip
    for call in [*calls, *more]:
        perform(vm, *call)
    return vm


def test_a_stale_entry_that_forbids_a_write_gives_a_second_ring_entry_or_not():
    difference = DIFFERENCES[1]
    write = ("run", 0, [["write", 0x100]])
    assert difference.meets(stale(), write)
    assert not difference.meets(stale(), ("run", 0, [["read", 0x100]]))
    assert not difference.meets(stale(), ("run", 1, [["write", 0x100]]))
    assert not difference.meets(stale(write), write)
    remembering, forgetful = stale(write), stale()
    forgetful.vm.vcpu[0].evict(0x100)
    perform(forgetful, *write)
    assert [len(perform(vm, "harvest", 0)) for vm in (remembering, forgetful)] == [1, 0]


def test_the_width_of_addresses_is_asked_without_tdp_only():
    difference, shadow = DIFFERENCES[3], ModelVm.of(MACHINE)
    ept = ModelVm.of(replace(MACHINE, paging="EPT", tdp_mmu=True))
    in_pages, in_bytes = ("memory_region", 0, 0, (1 << 40) - 64, 64, 0), ("memory_region_at", 0, 0, 1 << 46, 4096, 0)
    low = ("memory_region", 0, 0, 0x100, 64, 0x100)
    assert [difference.meets(ept, call) for call in (in_pages, in_bytes, low)] == [True, True, False]
    assert not any(difference.meets(shadow, call) for call in (in_pages, in_bytes, low))


# ---- a difference is found and made small ----------------------------------------------------------------------------


class Broken(ModelVm):
    """A machine that never flushes when logging is enabled."""

    def __init__(self, vcpus, page_size):
        kernel = as_kernel(MACHINE).with_(flush=FlushPolicy.NEVER)
        super().__init__(as_hardware(MACHINE), kernel, vcpus, page_size=page_size)


@pytest.fixture
def stands_in(monkeypatch):
    def put(machine):
        monkeypatch.setattr(differ, "RealVm", machine)
        monkeypatch.setattr(differ, "ask_machine", lambda: MACHINE)

    return put


def test_the_model_does_not_differ_from_itself(stands_in, capsys):
    stands_in(lambda vcpus, page_size: ModelVm.of(MACHINE, vcpus, page_size=page_size))
    assert main(["differ", "--sequences", "60", "--seed", "5"]) == 0
    printed = capsys.readouterr().out
    assert "seeds from 5" in printed and "60 sequences, 1,500 calls" in printed and ": 0 differences" in printed
    assert DIFFERENCES[0].name in printed


def test_a_machine_that_does_not_flush_is_found_and_shown_in_ten_lines(stands_in, capsys):
    stands_in(Broken)
    assert main(["differ", "--sequences", "150"]) == 1
    scripts = capsys.readouterr().out.split("# found by: ")[1:]
    assert scripts
    shortest = min(scripts, key=len)
    assert len(shortest.splitlines()) <= 16 and "'run'" in shortest and "1, 256" in shortest


def test_a_script_runs_alone(stands_in):
    stands_in(Broken)
    tally = differ.differ(range(150), 25, MACHINE, lambda tally: None)
    found = min(tally.found, key=lambda found: len(found.calls))
    here = "from tests.real.test_differ import MACHINE, Broken as RealVm\nask_machine = lambda: MACHINE"
    script = found.script().replace("import ModelVm, RealVm, ask_machine, perform", f"import ModelVm, perform\n{here}")
    done = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True, check=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    assert len(lines) == len(found.calls) and ["model: " in line for line in lines] == [False] * (len(lines) - 1) + [
        True
    ]


def test_what_does_not_come_again_is_told_apart(monkeypatch, stands_in, capsys):
    """A machine that is broken until the first difference has been seen."""
    examine, looked = differ._examine, []

    def once(vcpus, page_size):
        return ModelVm.of(MACHINE, vcpus, page_size=page_size) if looked else Broken(vcpus, page_size)

    def look(*arguments):
        looked.append(True)
        return examine(*arguments)

    stands_in(once)
    monkeypatch.setattr(differ, "_examine", look)
    assert main(["differ", "--sequences", "100"]) == 0
    printed = capsys.readouterr().out
    assert "# did not come again: seed" in printed and ": 0 differences" in printed and "besides, 1" in printed


def test_a_guest_that_hangs_is_told_and_not_tried_again(stands_in, capsys):
    """Nor are those after it: who knows in what state the host is."""
    made = []

    class Hanging(Broken):
        def __init__(self, vcpus, page_size):
            super().__init__(vcpus, page_size)
            made.append(self)

        @property
        def vcpu(self):
            raise TimeoutError(errno.ETIMEDOUT, "vCPU 0 was called back")

    stands_in(Hanging)
    assert main(["differ", "--sequences", "50"]) == 1
    printed = capsys.readouterr().out
    assert len(made) == 1 and "In the last call the guest hangs. It was not tried again" in printed
    assert "1 sequences" in printed and "1 differences" in printed and "ended, as a guest has hung" in printed


def test_a_guest_that_hangs_while_a_difference_is_made_small_ends_that(stands_in, capsys):
    made = []

    class HangsLater(Broken):
        def __init__(self, vcpus, page_size):
            super().__init__(vcpus, page_size)
            made.append(self)

        def get_dirty_log(self, slot):
            if len(made) > 150 and found:
                raise TimeoutError(errno.ETIMEDOUT, "vCPU 0 was called back")
            return self.vm.get_dirty_log(slot)

    found = []
    stands_in(HangsLater)
    tally = differ.differ(range(150), 25, MACHINE, lambda tally: found.extend(tally.found))
    assert tally.found[-1].hangs and not any(one.hangs for one in tally.found[:-1])
    assert tally.found[-1].calls[-1][0] == "get_dirty_log" and str(tally).endswith("ended, as a guest has hung")


def test_what_kvm_keeps_for_itself_on_intel_is_not_asked_about():
    difference, shadow = DIFFERENCES[2], ModelVm.of(MACHINE)
    ept, npt = (ModelVm.of(replace(MACHINE, paging=paging, tdp_mmu=True)) for paging in ("EPT", "NPT"))
    meets = [
        ("run", 0, [["read", 0x100], ["read", 0xFFFBC]]),
        ("memory_region", 0, 0, 0xFFFB0, 64, 0),
        ("memory_region_at", 0, 0, 0xFFFBC000, 4096, 0),
    ]
    assert "0xfffbc" in difference.name and all(difference.meets(ept, call) for call in meets)
    assert not any(difference.meets(vm, call) for vm in (npt, shadow) for call in meets)
    for call in (("run", 0, [["read", 0xFFFBD]]), ("memory_region", 0, 0, 0xFFFBD, 64, 0), ("get_dirty_log", 0xFFFBC)):
        assert not difference.meets(ept, call)


def test_a_write_that_no_mailbox_took_is_not_counted():
    """As on a real vCPU: behind a full ring, what is in the same mailbox is, what would be in the next is not."""
    vm = ModelVm.of(MACHINE)
    perform(vm, "enable_dirty_ring", 4096)
    perform(vm, "memory_region", 0, 1, 0x100, 512, 0x100)
    seen = vm.vcpu[0].run([("write", 0x100 + page % 512) for page in range(guest.RECORDS + 10)])
    assert len(seen) == guest.RECORDS + 10 and seen[-1] is Seen.RING_FULL and vm.vcpu[0].value == guest.RECORDS


def test_minimising_leaves_what_is_needed_and_nothing_else():
    calls = [("discard", number) for number in range(40)]
    needed = [("discard", 3), ("discard", 17), ("discard", 39)]
    assert minimise(calls, lambda some: all(one in some for one in needed)) == needed
    assert access_by_access(("run", 1, [["read", 1], ["write", 2]])) == [
        ("run", 1, [["read", 1]]),
        ("run", 1, [["write", 2]]),
    ]
    assert access_by_access(("discard", 1)) == [("discard", 1)]


# ---- the bar ---------------------------------------------------------------------------------------------------------


def test_a_bar_on_a_terminal_is_one_line_and_elsewhere_a_few(monkeypatch):
    times = iter(number * 10.0 for number in range(100))
    monkeypatch.setattr(differ.time, "monotonic", lambda: next(times))
    for terminal, lines in ((True, 0), (False, 2)):
        stream = io.StringIO()
        stream.isatty = lambda terminal=terminal: terminal
        bar = differ.Progress(4, stream)
        for done in range(1, 5):
            bar.show(done, "0 differences")
        assert stream.getvalue().count("\n") == lines
        assert stream.getvalue().rstrip().endswith("[####################] 4 of 4, 0 differences, 0:00 left")
        bar.end()
