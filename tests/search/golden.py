"""The golden table: what the search finds for all hardware kinds, flush policies and small sizes.

`PYTHONPATH=.:tests .venv/bin/python tests/search/golden.py` counts all of it again and writes golden.txt; the tests compare.
"""

import functools
import itertools
import pathlib

from conftest import HARDWARE

from kvmbook import FlushPolicy, Kernel
from kvmbook.search import Cells, Grain, PageSteps, Pairs, Search, Space

FILE = pathlib.Path(__file__).with_name("golden.txt")
KINDS = ["ept_no_ad", "ept_ad", "pml", "npt", "shadow"]
HEAD = "hardware   flush            cut by  pages vcpus     states  transitions depth  shortest loss"


@functools.cache
def steps_of(name: str, pages: int, vcpus: int, grain: Grain) -> PageSteps:
    """What does not depend on the flush policy, nor, but for steps, on the number of pages: found once."""
    return PageSteps(Cells(HARDWARE[name], Kernel.v5_19, pages, grain), vcpus)


def row(name: str, policy: FlushPolicy, pairs: Pairs, pages: int) -> str:
    search = Search(Space(pairs, pages))
    search.run()
    loss = "none" if (trace := search.shortest_loss()) is None else len(trace)
    bounds = f"{name:10} {policy.value:16} {pairs.cells.grain.value:7} {pages:5} {pairs.vcpus:5}"
    return f"{bounds} {search.states:10,} {search.transitions:12,} {search.depth:5}  {loss:>13}"


def table(name: str) -> list[str]:
    """The rows of one hardware kind. What does not depend on the policy is found once for all four, and what does not
    depend on the number of pages once for both. Cut by step, a pass tells pages apart, and two vCPUs make tables that
    take seconds each: those are left to the other cuts."""
    rows = []
    for grain, vcpus in itertools.product(Grain, (1, 2)):
        for sizes in ((1,), (2,)) if grain is Grain.STEP else ((1, 2),):
            if grain is not Grain.STEP or vcpus == 1:
                for policy in FlushPolicy:
                    pairs = Pairs(steps_of(name, max(sizes), vcpus, grain).with_flush(policy))
                    rows += [row(name, policy, pairs, pages) for pages in sizes]
    return rows


if __name__ == "__main__":
    FILE.write_text("\n".join([HEAD, *(line for name in KINDS for line in table(name))]) + "\n")
