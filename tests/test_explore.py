"""Every run of one page and one vCPU, for each policy: the verdicts, and how many states they rest on."""

import pytest
from conftest import HARDWARE

from kvmbook import FlushPolicy, Kernel
from kvmbook.explore import explore, replay
from kvmbook.invariants import check

# (hardware, policy): states, transitions, steps of the shortest run that loses a write (None: no run does)
GOLDEN = {
    ("ept_no_ad", "NEVER"): (2642, 9615, 14),
    ("ept_no_ad", "IF_CHANGED"): (2619, 9379, 15),
    ("ept_no_ad", "IF_MMU_WRITABLE"): (2392, 8398, None),
    ("ept_no_ad", "ALWAYS"): (2365, 8304, None),
    ("ept_no_ad_legacy", "NEVER"): (2642, 9611, 14),
    ("ept_no_ad_legacy", "IF_CHANGED"): (2619, 9375, 15),
    ("ept_no_ad_legacy", "IF_MMU_WRITABLE"): (2392, 8394, None),
    ("ept_no_ad_legacy", "ALWAYS"): (2365, 8300, None),
    ("npt", "NEVER"): (1909, 7568, 13),
    ("npt", "IF_CHANGED"): (1546, 5901, None),
    ("npt", "IF_MMU_WRITABLE"): (1523, 5806, None),
    ("npt", "ALWAYS"): (1518, 5783, None),
    ("pml", "NEVER"): (1700, 8242, 16),
    ("pml", "IF_CHANGED"): (1220, 5790, None),
    ("pml", "IF_MMU_WRITABLE"): (1220, 5790, None),
    ("pml", "ALWAYS"): (1193, 5676, None),
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
    assert first == "1 page(s), 1 vCPU(s): 2619 states, 9379 transitions, depth 38"
    assert last == " 15  vCPU0         writes page 0"


def test_bounds_are_checked():
    with pytest.raises(ValueError, match="at least one page"):
        explore(HARDWARE["npt"], Kernel.v6_0, pages=0)
    with pytest.raises(ValueError, match="at least one vCPU"):
        explore(HARDWARE["npt"], Kernel.v6_0, vcpus=0)
    with pytest.raises(MemoryError, match="more than 10 states"):
        explore(HARDWARE["npt"], Kernel.v6_0, max_states=10)
