"""The mutants of a room of ``kvmbook/model``: each is its source with one small mistake.

cosmic-ray's operators make them, as it gives (operator, occurrence) -> source; its own runner starts a new
process for each. mutmut 3 was read, not run: it changes functions only, so that no mask and no release's rule is ever wrong,
and runs nothing but pytest's tests.
"""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.operators.operator import Operator
from cosmic_ray.operators.provider import OperatorProvider
from parso.python.tree import Keyword
from parso.tree import NodeOrLeaf

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "kvmbook" / "model"
EQUIVALENT = Path(__file__).with_name("equivalent.json")
Lines = tuple[int, int]  # the first and the last


class DropCall(Operator):  # type: ignore[misc]
    """A call that stands alone is forgotten: a flush, a mark, a check. cosmic-ray has no operator that forgets."""

    def mutation_positions(self, node: NodeOrLeaf) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        alone = node.type in ("atom_expr", "power") and node.parent.type in ("simple_stmt", "suite")
        if alone and node.children[-1].type == "trailer" and node.children[-1].children[0] == "(":
            yield node.start_pos, node.end_pos

    def mutate(self, node: NodeOrLeaf, index: int) -> NodeOrLeaf:
        return Keyword("pass", node.start_pos, prefix=node.get_first_leaf().prefix)

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


# Of the permutations of operators, those that make the mistakes that people make. The others crash, or change nothing on
# words whose bits do not overlap (`|` to `+` and `^`), or are caught by whatever catches these.
COMPARISONS = "Eq_NotEq NotEq_Eq Is_IsNot IsNot_Is Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt"
ARITHMETIC = "Add_Sub Sub_Add Mul_FloorDiv FloorDiv_Mul Mod_Mul"
BITS = "LShift_RShift RShift_LShift BitOr_BitAnd BitAnd_BitOr BitXor_BitOr"
OTHERS = (
    "AddNot ReplaceTrueWithFalse ReplaceFalseWithTrue ReplaceAndWithOr ReplaceOrWithAnd ReplaceBreakWithContinue "
    "ReplaceContinueWithBreak ExceptionReplacer NumberReplacer ZeroIterationForLoop ReplaceUnaryOperator_Delete_Not "
    "ReplaceUnaryOperator_Delete_Invert ReplaceUnaryOperator_Delete_USub"
)
NAMES = (
    *(f"ReplaceComparisonOperator_{pair}" for pair in COMPARISONS.split()),
    *(f"ReplaceBinaryOperator_{pair}" for pair in (*ARITHMETIC.split(), *BITS.split())),
    *OTHERS.split(),
)
OPERATORS: dict[str, Operator] = {name: OperatorProvider()[name]() for name in NAMES} | {"DropCall": DropCall()}


@dataclass(frozen=True)
class Mutant:
    """One mistake. ``where``: the function or class that it is in; ``lines``: of its statement; ``called``: whether these run
    when a function is called, not when the room is imported."""

    module: str
    operator: str
    occurrence: int
    line: int
    lines: Lines
    where: str
    called: bool
    before: str
    after: str

    @property
    def key(self) -> str:
        """What stays the same while other lines of the room change."""
        return f"{self.module}.{self.where}: {self.before} -> {self.after}"

    @property
    def place(self) -> str:
        return f"kvmbook/model/{self.module}.py:{self.line}"

    def source(self) -> str:
        return mutated(self.module, self.operator, self.occurrence)


@functools.cache
def source_of(module: str) -> str:
    return (MODEL / f"{module}.py").read_text()


def rooms() -> list[str]:
    """All but `compiled`: loops made of other rooms' source, which tests compare with these, word by word."""
    return sorted(path.stem for path in MODEL.glob("*.py") if path.stem not in ("__init__", "compiled"))


@functools.cache
def mutants_of(module: str) -> list[Mutant]:
    """All mutants of a room that are mistakes in what it does, each once."""
    found: dict[str, Mutant] = {}
    for name in OPERATORS:
        for occurrence, (node, _) in enumerate(positions(module, name)):
            if not is_left_out(node):
                found.setdefault(mutated(module, name, occurrence), _mutant(module, name, occurrence, node))
    return list(found.values())


def find(module: str, operator: str, before: str, after: str) -> Mutant:
    """The mutant of a room that makes this of that line, or ValueError. Faster than `mutants_of`."""
    lines = [" ".join(text.split()) for text in source_of(module).split("\n")]
    for occurrence, (node, _) in enumerate(positions(module, operator)):
        if lines[node.start_pos[0] - 1] == before:
            mutant = _mutant(module, operator, occurrence, node)
            if mutant.after == after:
                return mutant
    raise ValueError(f"{operator} in {module} does not make this of a line: {before} -> {after}")


def _mutant(module: str, operator: str, occurrence: int, node: NodeOrLeaf) -> Mutant:
    old, new = source_of(module).split("\n"), mutated(module, operator, occurrence).split("\n")
    line = next(number for number, (one, other) in enumerate(zip(old, new, strict=True), 1) if one != other)
    where, called = place_of(node)
    before, after = (" ".join(text[line - 1].split()) for text in (old, new))
    return Mutant(module, operator, occurrence, line, statement(source_of(module), line), where, called, before, after)


@functools.cache
def tree_of(module: str) -> NodeOrLeaf:
    return get_ast(source_of(module))


@functools.cache
def positions(module: str, operator: str) -> list[tuple[NodeOrLeaf, int]]:
    """Where an operator can be used in a room: nodes, and which of its positions there."""
    nodes = ast_nodes(tree_of(module))
    return [(node, index) for node in nodes for index, _ in enumerate(OPERATORS[operator].mutation_positions(node))]


def mutated(module: str, operator: str, occurrence: int) -> str:
    """A room's source with one mistake. (cosmic-ray's own `mutate_code` parses the room anew, which takes 0.1 s.)"""
    node, index = positions(module, operator)[occurrence]
    before = [(each, each.children[:] if hasattr(each, "children") else each.value) for each in ast_nodes(node)]
    siblings, place = node.parent.children, node.parent.children.index(node)
    siblings[place] = OPERATORS[operator].mutate(node, index)
    try:
        code: str = tree_of(module).get_code()
        return code
    finally:
        siblings[place] = node
        for each, was in before:
            setattr(each, "children" if isinstance(was, list) else "value", was)


# ---- what is no mistake in what the model does -----------------------------------------------------------------------

TEXT = ("decorator", "raise_stmt", "fstring", "assert_stmt", "import_from", "import_name")


def is_left_out(node: NodeOrLeaf) -> bool:
    """Types, and how a class is declared; what an error says; what only a type checker reads. And assertions: what a bug in
    the model alone could make fail guards the model, and no caller can tell a weaker guard from it."""
    while (parent := node.parent) is not None:
        if node.type in TEXT:
            return True
        if parent.type in ("annassign", "tfpdef") and node is parent.children[-1 if parent.type == "tfpdef" else 1]:
            return True
        if parent.type == "funcdef" and node is parent.annotation:
            return True
        if node.type == "if_stmt" and node.children[1].get_code().strip() == "TYPE_CHECKING":
            return True
        if node.type == "atom_expr" and node.get_code().strip().startswith("refuse("):
            return True
        node = parent
    return False


def place_of(node: NodeOrLeaf) -> tuple[str, bool]:
    """The names of the classes and functions around a node, and whether it runs when a function is called."""
    names, called, below = [], False, node
    while (parent := below.parent) is not None:
        if parent.type in ("funcdef", "classdef") and below.type != "parameters":
            names.append(parent.name.value)
            called = called or (parent.type == "funcdef" and below is parent.children[-1])
        below = parent
    return ".".join(reversed(names)), called


@functools.cache
def _statements(source: str) -> list[Lines]:
    """The lines of each statement; of one with a body, those before its body."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            end = max(node.lineno, body[0].lineno - 1) if body else node.end_lineno or node.lineno
            found.append((node.lineno, end))
    return found


def statement(source: str, line: int) -> Lines:
    """The lines of the smallest statement that has this line."""
    return min(
        ((first, last) for first, last in _statements(source) if first <= line <= last),
        key=lambda lines: lines[1] - lines[0],
        default=(line, line),
    )


def equivalent() -> dict[str, str]:
    """The reason why a mutant is none, by its `Mutant.key`."""
    return {key: each["why"] for each in json.loads(EQUIVALENT.read_text()) for key in each["mutants"]}
