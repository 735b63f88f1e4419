"""The sequences of the differential, made by Hypothesis: what holds of all of them, and that a difference between two
sides is found and shrunk. Without KVM: both sides are models. On this machine's KVM see live_runs.py."""

import errno
import json
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shrinking import Hangs, differs, sequences, shrunk

from kvmbook import FlushPolicy
from kvmbook.real import CALLS, ModelVm, as_hardware, as_kernel, perform, recorded
from kvmbook.real.differ import minimise
from kvmbook.real.sequences import NOT_ASKED

MACHINE = recorded().offers
MACHINES = [
    MACHINE,
    replace(MACHINE, paging="EPT", ad_bits=False, tdp_mmu=True, address_spaces=2, memslots=509),
    replace(MACHINE, paging="EPT", pml=True, tdp_mmu=True, release="6.1"),
    replace(MACHINE, paging="NPT", tdp_mmu=False, huge_pages=False, release="5.19"),
]
SIDE = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))


@given(st.data(), st.sampled_from(MACHINES))
@SIDE
def test_every_sequence_can_be_asked_kept_and_asked_again(data, machine):
    """Whatever calls are left out: no call is a misuse, and kept as JSON they get the same answers."""
    setting, made = data.draw(sequences(machine))
    vm, again = (ModelVm.of(machine, setting.vcpus, page_size=setting.page_size) for _ in range(2))
    answers = [perform(vm, *call) for call in made]
    for call, answer in zip(made, answers, strict=True):
        assert call[0] in set(CALLS) - NOT_ASKED
        assert not isinstance(answer, str) or answer in errno.errorcode.values(), (call, answer)
    calls, kept = json.loads(json.dumps([made, answers]))
    assert [perform(again, *call) for call in calls] == answers == kept


def model(**changes):
    """Makes the model of `MACHINE`, with some of its kernel's rules changed."""
    hardware, kernel = as_hardware(MACHINE), as_kernel(MACHINE).with_(**changes)
    return lambda setting: ModelVm(hardware, kernel, setting.vcpus, page_size=setting.page_size)


def test_two_sides_that_are_alike_do_not_differ():
    assert shrunk(MACHINE, model(), model(), examples=60, seed=1) is None


def test_a_side_that_never_flushes_is_found_and_its_sequence_shrunk():
    """To a few calls, of which none can be left out."""
    broken = model(flush=FlushPolicy.NEVER)
    setting, calls = shrunk(MACHINE, model(), broken, examples=500, seed=2)
    assert 4 <= len(calls) <= 8 and minimise(calls, lambda some: differs(setting, some, model(), broken)) == calls


def test_a_guest_that_hangs_ends_it():
    """It is not tried again, as what is shrunk would be."""
    made = []

    class Hanging(ModelVm):
        @property
        def vcpu(self):
            made.append(self)
            raise TimeoutError(errno.ETIMEDOUT, "called back")

    def hangs(setting):
        return Hanging(as_hardware(MACHINE), as_kernel(MACHINE), setting.vcpus, page_size=setting.page_size)

    with pytest.raises(Hangs):
        shrunk(MACHINE, model(), hangs, examples=50, seed=3)
    assert len(made) == 1
