"""Every run of one page and one vCPU, for each policy: the verdicts, and how many states they rest on."""

import pytest
from conftest import HARDWARE

from kvmbook import FlushPolicy, Kernel
from kvmbook.explore import explore, replay
from kvmbook.invariants import check

# (hardware, policy): states, transitions, steps of the shortest run that loses a write (None: no run does)
GOLDEN = {
    ("ept_no_ad", "NEVER"): (2639, 9596, 14),
    ("ept_no_ad", "IF_CHANGED"): (2613, 9345, 15),
    ("ept_no_ad", "IF_MMU_WRITABLE"): (2392, 8398, None),
    ("ept_no_ad", "ALWAYS"): (2365, 8304, None),
    ("ept_no_ad_legacy", "NEVER"): (2639, 9592, 14),
    ("ept_no_ad_legacy", "IF_CHANGED"): (2613, 9341, 15),
    ("ept_no_ad_legacy", "IF_MMU_WRITABLE"): (2392, 8394, None),
    ("ept_no_ad_legacy", "ALWAYS"): (2365, 8300, None),
    ("npt", "NEVER"): (1900, 7512, 13),
    ("npt", "IF_CHANGED"): (1543, 5883, None),
    ("npt", "IF_MMU_WRITABLE"): (1521, 5794, None),
    ("npt", "ALWAYS"): (1516, 5771, None),
    ("pml", "NEVER"): (1696, 8219, 16),
    ("pml", "IF_CHANGED"): (1215, 5761, None),
    ("pml", "IF_MMU_WRITABLE"): (1215, 5761, None),
    ("pml", "ALWAYS"): (1188, 5647, None),
}


@pytest.mark.parametrize(("name", "policy"), GOLDEN)
def test_all_runs_of_one_page_and_one_vcpu(name, policy):
    kernel = Kernel.v5_19.with_(flush=FlushPolicy[policy])
    result = explore(HARDWARE[name], kernel)
    assert (result.states, result.transitions, result.trace and len(result.trace)) == GOLDEN[name, policy]
    vm = replay(HARDWARE[name], kernel, result)
    assert vm.missed_dirty(0).tolist() == ([] if result.safe else [0x200])
    if result.safe:
        check(vm)


def test_the_shortest_run_is_the_seeds():
    result = explore(HARDWARE["ept_no_ad"], Kernel.v5_19)
    chosen = [(a.who, a.what) for a in result.trace if a.page is not None or a.what == "enables"]
    assert chosen == [
        ("vCPU0", "reads"),  # a fault: KVM maps the page
        ("vCPU0", "reads"),  # the TLB is filled
        ("host", "ages"),
        ("user space", "enables"),
        ("vCPU0", "writes"),
    ]
    first, *_, last = str(result).splitlines()
    assert first == "1 page(s), 1 vCPU(s): 2613 states, 9345 transitions, depth 38"
    assert last == " 15  vCPU0         writes page 0"


def test_bounds_are_checked():
    with pytest.raises(ValueError, match="at least one page"):
        explore(HARDWARE["npt"], Kernel.v6_0, pages=0)
    with pytest.raises(ValueError, match="at least one vCPU"):
        explore(HARDWARE["npt"], Kernel.v6_0, vcpus=0)
    with pytest.raises(MemoryError, match="more than 10 states"):
        explore(HARDWARE["npt"], Kernel.v6_0, max_states=10)
