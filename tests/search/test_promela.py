"""SPIN on the model that is generated from the tables: it meets as many states, and needs as many steps to lose a write."""

import os

import pytest

from benchmarks.promela import Verifier, missing
from kvmbook import Hardware, Kernel
from kvmbook.model import FlushPolicy
from kvmbook.search import Grain, Search, space_of
from tools.debian import program

NEVER = Kernel.v5_19.with_(flush=FlushPolicy.NEVER)
PML = Hardware.ept(pml=True)
CASES = {
    "ept_no_ad": (Hardware.ept(ad_bits=False), Kernel.v5_19, 1, 1, Grain.FAULT),
    "pml": (PML, NEVER, 1, 2, Grain.FAULT),
    "pml_safe": (PML, Kernel.v5_19, 2, 1, Grain.ACCESS),
    "two_pages_by_steps": (Hardware.npt(), NEVER, 2, 1, Grain.STEP),
}


@pytest.fixture(scope="module")
def spin_installed():
    """CI installs what is missing, and skips nothing."""
    for name in ("spin", "cc"):
        program(name, packages=("spin", "gcc", "libc6-dev"))
    if missing() and os.environ.get("CI") != "true":
        pytest.skip(f"{missing()}; on Debian: apt-get install spin gcc")
    assert not missing()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("spin_installed")
def test_spin_agrees(case, tmp_path):
    search = Search(space_of(*CASES[case]))
    search.run()
    trace = search.shortest_loss()
    spin = Verifier(search.space, tmp_path)
    counted, levels, (_, steps) = spin.count(), spin.breadth_first(), spin.shortest_loss()
    assert counted.states == levels.states == search.states
    assert levels.depth == search.depth
    assert counted.lost == levels.lost == (trace is not None)
    assert steps == (None if trace is None else len(trace))
    assert (trace is None) == (case == "pml_safe")
