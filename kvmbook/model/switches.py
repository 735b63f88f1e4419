"""A rule that a release changed, as data: what it says, where the kernel says it, its value in each release, the commits.

All of that is written once, where `Kernel` declares the field. Its releases, its help text and the words for what differs
between two kernels are made of it.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Difference(NamedTuple):
    """One rule that differs between two kernels: what it says, file and function, the release that changed it, the commits.
    The last two are empty for what no release changed, the last also where no commit is known."""

    rule: str
    says: str
    source: str
    release: str = ""
    commits: str = ""

    def __str__(self) -> str:
        since = f" since {self.release}" if self.release else ""
        commits = f", {self.commits}" if self.commits else ""
        return f"{self.rule}{since}: {self.says} ({self.source}{commits})"


@dataclass(frozen=True)
class Switch:
    """What is known of one field. ``history``: its value in v5.19, and in each release that changed it, with the commits."""

    says: str
    source: str
    history: dict[str, tuple[Any, str]]

    def value_in(self, release: str) -> Any:
        """Its value in a release, such as "v6.4"; before v5.19, as in v5.19."""
        first, *others = self.history
        return self.history[max((first, *(r for r in others if number(r) <= number(release))), key=number)][0]

    def differences(self, rule: str, one: Any, other: Any) -> list[Difference]:
        """Why it has these two values in two kernels; of two classes, why their methods differ."""
        if isinstance(one, type):
            return _differing_methods(one, other)
        changes = [(r, commits) for r, (value, commits) in [*self.history.items()][1:] if value in (one, other)]
        return [Difference(rule, self.says, self.source, *max(changes, key=lambda c: number(c[0]), default=("", "")))]

    def __str__(self) -> str:
        first, *later = (
            (value, f" since {r}" + f" ({commits})" * (commits != "")) for r, (value, commits) in self.history.items()
        )
        values = "; ".join(f"{getattr(value, '__name__', value)}{since}" for value, since in ((first[0], ""), *later))
        return f"{self.says}. {values}. {self.source}"


def switch(says: str, source: str, v5_19: Any, **changes: tuple[Any, str]) -> Any:
    """Declare a field: ``v5_19`` is its first value, ``v6_2=(True, "c57351a75d01")`` a later one with its commits ("" if they
    are not known)."""
    history = {"v5.19": (v5_19, "")} | {name.replace("_", "."): change for name, change in changes.items()}
    return field(default=v5_19, metadata={"switch": Switch(says, source, history)})


def number(release: str) -> tuple[int, ...]:
    """The number of a release, such as "v6.10" or "6.10.3": (6, 10)."""
    return tuple(int(part) for part in re.findall(r"\d+", release)[:2])


# ---- a rule that is a method -----------------------------------------------------------------------------------------

SAYS = re.compile(r"(.+?)\.? Source\b: (.+), (v\d+\.\d+) \(([0-9a-f]{12}.*)\)\.")  # a docstring, see `spte_rules`


def _differing_methods(one: type, other: type) -> list[Difference]:
    found = []
    for name in sorted({*dir(one), *dir(other)}):
        methods = [inspect.getattr_static(kind, name, None) for kind in (one, other)]
        for method in methods if methods[0] is not methods[1] else ():
            said = SAYS.fullmatch(" ".join((inspect.getdoc(method) or "").split()))
            found += [Difference(name, *said.groups())] if said else []
    return found
