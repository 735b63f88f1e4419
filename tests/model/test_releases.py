"""Each release by its rules: which differ, why, and which of them loses a write."""

import numpy as np
import pytest
from conftest import BASE, HARDWARE, log, make_vm, missed, reported

from kvmbook import FlushPolicy, Hardware, Kernel, Vm
from kvmbook.model import check

PML = HARDWARE["pml"]
EVERY = pytest.mark.parametrize("kernel", Kernel.releases, ids=lambda kernel: kernel.name)


def names(kernel, other):
    return {difference.rule for difference in kernel.differs_from(other)}


# ---- releases as values ----------------------------------------------------------------------------------------------


def test_releases_are_in_order_and_each_differs_from_the_one_before_by_what_it_changed():
    assert Kernel.releases[:2] == (Kernel.v5_19, Kernel.v6_0)
    assert [kernel.name for kernel in Kernel.releases] == sorted(
        (kernel.name for kernel in Kernel.releases), key=lambda name: int(name.split(".")[1]) + 100 * ("v6" in name)
    )
    for before, after in zip(Kernel.releases, Kernel.releases[1:], strict=False):
        changed = after.differs_from(before)
        assert bool(changed) == (after not in (Kernel.v6_1, Kernel.v6_18))  # these two changed nothing the model has
        assert changed == before.differs_from(after)
        assert {difference.release for difference in changed} <= {after.name.removeprefix("Linux "), "v6.4"}


def test_every_change_in_a_switch_is_a_release_and_names_its_source():
    known = {kernel.name.removeprefix("Linux ") for kernel in Kernel.releases}
    for name, switch in Kernel.switches().items():
        assert set(switch.history) <= known, name
        assert ": " in switch.source or name == "spte_rules", name
        assert getattr(Kernel("as at first"), name) == switch.history["v5.19"][0]


def test_what_differs_is_said_with_its_commits_and_its_source():
    said = {difference.rule: difference for difference in Kernel.v6_2.differs_from(Kernel.v6_0)}
    assert set(said) == {"marks_without_vcpu", "splits_on_fault"}
    assert said["marks_without_vcpu"][2:] == (
        "virt/kvm/kvm_main.c: mark_page_dirty_in_slot()",
        "v6.2",
        "c57351a75d01",
    )
    (by_method,) = Kernel.v6_4.differs_from(Kernel.v6_2)
    assert by_method.rule == "tdp_clear_dirty" and by_method.release == "v6.4"
    assert "CVE-2024-26990" in by_method.says and "5982a5392663" in str(by_method)
    assert "tdp_clear_dirty" not in names(Kernel.v6_9, Kernel.v6_0)  # done, and undone
    assert Kernel.v6_9.differs_from(Kernel.v6_9.with_(name="another name")) == ()
    (museum,) = Kernel.v6_0.with_(srcu_grace_period=False).differs_from(Kernel.v6_0)
    assert museum.release == "" and str(museum).startswith("srcu_grace_period: publishing")


@pytest.mark.parametrize(
    ("release", "of"),
    [("5.10.0-8-amd64", "v5_19"), ("v6.0", "v6_0"), ("6.3.1", "v6_2"), ("6.8.0-31-generic", "v6_8"), ("7.2", "v6_18")],
)
def test_the_rules_of_any_release_are_those_of_the_newest_that_is_not_newer(release, of):
    assert Kernel.of(release) is getattr(Kernel, of)


@pytest.mark.parametrize(
    ("switch", "since", "value"),
    [
        ("marks_without_vcpu", "v6_2", True),
        ("splits_on_fault", "v6_2", True),
        ("clear_split_forgets_last", "v6_8", False),
        ("kicks_without_pml", "v6_8", False),
        ("clear_flush_young_flushes", "v6_13", False),
        ("pml_drains_oldest_first", "v6_14", True),
        ("flush", "v6_0", FlushPolicy.ALWAYS),
    ],
)
def test_a_switch_changes_with_its_release_and_stays(switch, since, value):
    first = Kernel.releases.index(getattr(Kernel, since))
    assert [getattr(kernel, switch) == value for kernel in Kernel.releases] == [
        number >= first for number in range(len(Kernel.releases))
    ]


@EVERY
def test_get_kicks_without_pml_only_before_v6_8(kernel):
    vm = make_vm(HARDWARE["ept_ad"], kernel, vcpus=1)
    vm.vcpu[0].read(BASE)
    log(vm)
    exits = vm.counters.exits
    vm.get_dirty_log()
    assert vm.counters.exits - exits == kernel.kicks_without_pml


# ---- v6.4 to v6.8: the TDP MMU asks whether KVM uses A/D bits, for all roots -----------------------------------------

ASKS_FOR_ALL = (Kernel.v6_4, Kernel.v6_8)


def l2_written(kernel, hardware=PML, nested="tdp"):
    """A page that the nested guest has written. L1 never touched it."""
    vm = make_vm(hardware, kernel, nested=nested)
    vm.vcpu[0].write(BASE, l2=True)
    return vm


@EVERY
def test_enabling_loses_a_write_of_l2_straight_on_the_tdp_mmu(kernel):
    """CVE-2024-26990: D is cleared, W is not, and PML is off while L2 runs."""
    vm = l2_written(kernel)
    log(vm)
    vm.vcpu[0].write(BASE, l2=True)
    assert vm.fmt.is_writable_pte(vm.spte(BASE, l2=True))
    if kernel in ASKS_FOR_ALL:
        assert reported(vm) == [] and missed(vm) == [BASE]
    else:
        check(vm)
        assert reported(vm) == [BASE] and missed(vm) == []


@EVERY
def test_clear_loses_it_too_when_it_arms_a_single_page(kernel):
    """With INITIALLY_SET enabling protects nothing, so only KVM_CLEAR_DIRTY_LOG has touched the SPTE."""
    vm = l2_written(kernel)
    vm.enable_manual_dirty_log_protect(initially_set=True)
    log(vm)
    assert reported(vm) == list(range(BASE, BASE + 64))
    vm.clear_dirty_log(0, 0, 64, np.ones(64, bool))
    vm.vcpu[0].write(BASE, l2=True)
    assert missed(vm) == ([BASE] if kernel in ASKS_FOR_ALL else [])


@pytest.mark.parametrize(
    ("hardware", "nested"),
    [("pml", "ept"), ("pml", "ept without A/D"), ("pml_legacy", "tdp"), ("ept_ad", "tdp"), ("npt", "tdp")],
)
def test_the_legacy_mmu_and_hardware_without_pml_keep_it(hardware, nested):
    for kernel in ASKS_FOR_ALL:
        vm = l2_written(kernel, HARDWARE[hardware], nested)
        log(vm)
        vm.vcpu[0].write(BASE, l2=True)
        assert missed(vm) == [] and reported(vm) == [BASE]


def test_l1_is_not_concerned():
    vm = Vm(Hardware.ept(pml=True), Kernel.v6_4, nested="tdp")
    vm.set_user_memory_region(slot=0, base_gfn=BASE, npages=64)
    vm.vcpu[0].write(BASE)
    log(vm)
    vm.vcpu[0].write(BASE)
    assert reported(vm) == [BASE] and missed(vm) == []
