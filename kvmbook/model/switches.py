"""A rule that a release changed, as data: what it says, where the kernel says it, its value in each release, the commits.

All of that is written once, where `Kernel` declares the field. Its releases, and the words for what differs between two
kernels, are made of it.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from dataclasses import field, fields
from itertools import pairwise
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


class Switch(NamedTuple):
    """What is known of one field. ``history``: its value in v5.19, and in each release that changed it, with the commits."""

    says: str
    source: str
    history: dict[str, tuple[Any, str]]

    def differences(self, rule: str, one: Any, other: Any) -> list[Difference]:
        """Why it has these two values in two kernels; of two classes, why their methods differ."""
        if isinstance(one, type):
            return _differing_methods(one, other)
        changes = [(r, commits) for r, (value, commits) in self.history.items() if value in (one, other)]
        return [Difference(rule, self.says, self.source, *(changes[-1] if changes[1:] else ()))]


def switch(v5_19: Any, **changes: tuple[Any, str]) -> Any:
    """Declare a field: ``v5_19`` is its first value, ``v6_2=(True, "c57351a75d01")`` a later one with its commits ("" if they
    are not known). Below it stands a string, as a docstring does: what the rule says, then file and function."""
    history = {"v5.19": (v5_19, "")} | {name.replace("_", "."): change for name, change in changes.items()}
    return field(default=v5_19, metadata={"history": history})


def values_in(kind: type, release: str) -> dict[str, Any]:
    """The value of each of a dataclass's switches in a release, such as "v6.4"."""
    histories = {each.name: each.metadata["history"] for each in fields(kind) if each.metadata}
    known = {name: [h[r][0] for r in h if number(r) <= number(release)] for name, h in histories.items()}
    return {name: values[-1] for name, values in known.items()}


def switches_of(kind: type) -> dict[str, Switch]:
    """The switches that a dataclass declares, by their names."""
    histories = {each.name: each.metadata["history"] for each in fields(kind) if each.metadata}
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    found = {}
    for node, below in pairwise(getattr(tree, "body")):
        if isinstance(node, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            name, words = ast.unparse(node.target), " ".join(str(below.value.value).split())
            says, _, source = words.removesuffix(".").rpartition(". ")
            found[name] = Switch(says, source, histories[name])
    return found


def number(release: str) -> tuple[int, ...]:
    """The number of a release, such as "v6.10" or "6.10.3": (6, 10)."""
    return tuple(int(part) for part in re.findall(r"\d+", release)[:2])


# ---- a rule that is a method: its docstring says the same ------------------------------------------------------------

SAYS = re.compile(r"(.+?)\.? Source\b: (.+), (v\d+\.\d+) \(([0-9a-f]{12}.*)\)\.")


def _differing_methods(one: type, other: type) -> list[Difference]:
    found = []
    for kind in sorted({*one.__mro__} ^ {*other.__mro__}, key=lambda kind: len(kind.__mro__)):
        for name, method in vars(kind).items():
            said = SAYS.fullmatch(" ".join((inspect.getdoc(method) or "").split()))
            found += [Difference(name, *said.groups())] if said else []
    return found
