"""The golden table: what the search finds for all hardware kinds, flush policies and small sizes.

`python tests/golden.py` counts all of it again and writes golden.txt; the tests compare.
"""

import pathlib

from conftest import HARDWARE

from kvmbook import FlushPolicy, Kernel
from kvmbook.cells import Cells
from kvmbook.explore import Search, Space
from kvmbook.schedule import Grain
from kvmbook.tables import PageSteps, Pairs

FILE = pathlib.Path(__file__).with_name("golden.txt")
SIZES = [(pages, vcpus) for pages in (1, 2) for vcpus in (1, 2)]
KINDS = ["ept_no_ad", "ept_ad", "pml", "npt", "shadow"]
HEAD = "hardware   flush            cut by  pages vcpus     states  transitions depth  shortest loss"


def sizes(grain: Grain) -> list[tuple[int, int]]:
    """Cut by step, two vCPUs make tables that take seconds each: those are left to the other cuts."""
    return [size for size in SIZES if grain is not Grain.STEP or size[1] == 1]


def row(name: str, policy: FlushPolicy, steps: PageSteps) -> str:
    search = Search(Space(Pairs(steps.with_flush(policy))))
    search.run()
    loss = "none" if (trace := search.shortest_loss()) is None else len(trace)
    bounds = f"{name:10} {policy.value:16} {steps.cells.grain.value:7} {steps.cells.pages:5} {steps.vcpus:5}"
    return f"{bounds} {search.states:10,} {search.transitions:12,} {search.depth:5}  {loss:>13}"


def table(name: str) -> list[str]:
    """The rows of one hardware kind. What does not depend on the policy is found once for all four."""
    rows = []
    for grain in Grain:
        for pages, vcpus in sizes(grain):
            steps = PageSteps(Cells(HARDWARE[name], Kernel.v5_19, pages, grain), vcpus)
            rows += [row(name, policy, steps) for policy in FlushPolicy]
    return rows


if __name__ == "__main__":
    FILE.write_text("\n".join([HEAD, *(line for name in KINDS for line in table(name))]) + "\n")
