"""How often a migration brings a wrong guest: the same story many thousand times, for chapter 12.

The results of `SEEDS` migrations for each of `LIVES` are kept in chances.json; ``python -m tools.chances`` makes it anew.
Each is the result of `move`, which anybody can ask again.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import NamedTuple

from kvmbook.model import Kernel
from kvmbook.scenes.migration import Setting, copied
from kvmbook.scenes.store import Workload

FLUSHED, LUCKY, WRONG = "flushed", "lucky", "wrong"
ENDINGS = (FLUSHED, LUCKY, WRONG)  # kept by number
WARM_UP = 40
SEEDS = range(2000)


class Life(NamedTuple):
    """How a guest and its host live: the ``kernel``, by its release; how much of its time the guest is ``idle``; every how
    many ticks the host does its ``ageing``."""

    kernel: str
    idle: float
    ageing: int


IDLE = (0.0, 0.5, 0.8, 0.9, 0.98)
AGEINGS = (4, 8, 16, 32, 64)
LIVES = tuple(Life(kernel, idle, ageing) for kernel in ("v5.19", "v6.0") for ageing in AGEINGS for idle in IDLE)


def move(life: Life, seed: int) -> int:
    """Migrate one guest; its ending, by its place in `ENDINGS`: wrong pages; or none, as enabling flushed; or none, though it
    did not, since no SPTE was writable. The migration begins at any time between two ageings, and after the first."""
    warm_up = max(WARM_UP, life.ageing + 1) + seed % life.ageing
    moved = copied(
        Setting(kernel=Kernel.of(life.kernel), ageing=life.ageing, warm_up=warm_up), Workload(seed, life.idle)
    )
    return ENDINGS.index(WRONG if moved.differing else FLUSHED if moved.enabling_flushed else LUCKY)


class Chance(NamedTuple):
    """Of ``runs``, how many ended so; and a 95 % band for the probability (Wilson's)."""

    hits: int
    runs: int

    @property
    def share(self) -> float:
        return self.hits / self.runs

    @property
    def band(self) -> tuple[float, float]:
        z, n = 1.96, self.runs
        centre = (self.share + z * z / (2 * n)) / (1 + z * z / n)
        half = z * (self.share * (1 - self.share) / n + z * z / (4 * n * n)) ** 0.5 / (1 + z * z / n)
        return max(centre - half, 0.0), min(centre + half, 1.0)


@functools.cache
def kept() -> dict[Life, str]:
    """The kept results: for each life a digit a seed."""
    text = (resources.files("kvmbook.scenes") / "chances.json").read_text()
    return {Life(kernel, idle, ageing): digits for kernel, idle, ageing, digits in json.loads(text)}


def chance(life: Life, ending: str) -> Chance:
    """How often a life ends so, one of `ENDINGS`, by what is kept. KeyError for a life that is not."""
    digits = kept()[life]
    return Chance(digits.count(str(ENDINGS.index(ending))), len(digits))
