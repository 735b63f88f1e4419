"""A copy of a machine: the same in all that can change, independent of the original, and what never changes is shared."""

import copy
import random
from enum import Enum

from conftest import HARDWARE, log, make_vm

from kvmbook.model import GetDirtyLog, PageFault
from kvmbook.search import Grain, act, possible, smallest_vm


def everything(vm):
    """All that can be reached from a machine by names and keys, objects as the paths by which they are met first."""
    met, told, queue = {}, {}, [("vm", vm)]
    for path, value in queue:  # grows while we go
        if isinstance(value, int | str | type | Enum | None):
            told[path] = value
        elif id(value) in met:
            told[path] = met[id(value)]
        else:
            met[id(value)] = path
            told[path] = type(value).__name__ + (repr(value.tolist()) if hasattr(value, "tolist") else "")
            inside = value.items() if isinstance(value, dict) else getattr(value, "__dict__", {}).items()
            inside = enumerate(value) if isinstance(value, list | tuple) else inside
            told[path] += repr(sorted(value)) if isinstance(value, set) else ""
            queue += [(f"{path}.{name}", item) for name, item in inside]
    return told


def test_a_copy_is_what_deepcopy_makes_in_any_state_of_a_run(hardware):
    chance, vm = random.Random(5), smallest_vm(hardware, make_vm().kernel, 2, 2)
    for _ in range(60):
        there = everything(vm)
        assert everything(vm.copy()) == there == everything(copy.deepcopy(vm))
        other = vm.copy()
        for _ in range(3):
            act(other, chance.choice(possible(other)), Grain.STEP)
        assert everything(vm) == there
        vm = vm.copy()
        act(vm, chance.choice(possible(vm)), Grain.STEP)


def test_a_copy_shares_what_never_changes_and_nothing_else():
    vm = make_vm(HARDWARE["pml"])
    log(vm)
    vm.start(GetDirtyLog(0))
    vm.vcpu[0].attempt("read", 0x200)
    other = vm.copy()
    assert other.hardware is vm.hardware and other.kernel is vm.kernel and other.l1_root is vm.l1_root
    slot, fault = other.memslots.slots[0, 0], other.vcpu[0].fault
    assert isinstance(fault, PageFault) and fault in other.in_flight and fault is not vm.vcpu[0].fault
    assert slot == vm.memslots.slots[0, 0] and slot.dirty_bitmap is not vm.memslots.slots[0, 0].dirty_bitmap
