"""What is asked of one SPTE, as a loop over an array, compiled by numba from the source of the method that says it.

Two loops are made, one for the answers and one that says whether the assertions hold: one that could raise in the middle
would not be fast. If they do not hold for some word, the method itself is run on it, and raises.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import is_dataclass
from types import ModuleType
from typing import Any

import numpy as np

PART = 1024  # words that a loop works at a time


@functools.cache
def numba_is_there() -> bool:
    """Whether numba can be imported (``pip install 'kvmbook[fast]'``)."""
    return importlib.util.find_spec("numba") is not None


def fill(method: Any, words: np.ndarray, outs: list[np.ndarray], how: tuple[Any, ...] = ()) -> bool:
    """Fill ``outs``, one array for each column of what ``method(word, *how)`` says; the first may be ``words`` itself.
    ``method`` is bound to a frozen dataclass. False, and nothing is filled, if numba cannot compile it."""
    loops = _loops(method.__self__, method.__name__, how, tuple(out.dtype for out in outs))
    if loops is None:
        return False
    all_hold, loop = loops
    if not all_hold(words):
        for word in words.tolist():
            method(word, *how)  # one of them raises
    loop(words, tuple(outs))
    return True


# What an SPTE becomes stays in a small array until a part is done: LLVM would make slow masked stores of storing in place.
LOOPS = """
def all_hold(words):
    good = True
    for i in range(words.size):
        good &= holds(words[i], {how})
    return good

def loop(words, outs):
    first = np.empty({PART}, outs[0].dtype)
    for start in range(0, words.size, {PART}):
        part = words[start : start + {PART}]
        for i in range(part.size):
            said = answer(part[i], {how})
            {stores}
        for i in range(part.size):
            outs[0][start + i] = first[i]
"""


@functools.cache
def _loops(
    asked: Any, name: str, how: tuple[Any, ...], answers: tuple[np.dtype[Any], ...]
) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    import numba

    pair = _Compiled(asked, _Answers), _Compiled(asked, _Holds)
    for one in pair:
        one.self, one.holds = pair
    stores = ["first[i] = said[0]" if len(answers) > 1 else "first[i] = said"]
    stores += [f"outs[{k}][start + i] = said[{k}]" for k in range(1, len(answers))]
    text = LOOPS.format(how=", ".join(map(repr, how)), stores="; ".join(stores), PART=PART)
    try:
        known = {"np": np, "answer": getattr(pair[0], name), "holds": getattr(pair[1], name)}
        exec(text, known)
        all_hold, loop = numba.njit(known["all_hold"]), numba.njit(known["loop"])
        none = np.zeros(0, np.uint64)
        all_hold(none)
        loop(none, tuple(none.astype(kind) for kind in answers))
    except (numba.core.errors.NumbaError, OSError):  # such as super(), or no source to read
        return None
    return all_hold, loop


class _Compiled(ModuleType):
    """The methods of an object and of those in its fields, each compiled when it is first named. (Numba looks names up in a
    module when it compiles.)"""

    self: _Compiled
    holds: _Compiled

    def __init__(self, asked: Any, form: type[ast.NodeTransformer]) -> None:
        super().__init__(form.__name__)
        self.__dict__.update(_asked=asked, _form=form)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._asked, name)
        if inspect.ismethod(value):
            mine = self if value.__self__ is self._asked else self._part(value.__self__)
            value = mine._function(value.__func__)
        elif is_dataclass(value):
            value = self._part(value)
        elif type(value) is int:
            value = np.uint64(value)
        self.__dict__[name] = value
        return value

    def _part(self, other: Any) -> _Compiled:
        """The same for an object that is in a field."""
        pair = _Compiled(other, self.self._form), _Compiled(other, self.holds._form)
        for one in pair:
            one.self, one.holds = pair
        return pair[self is not self.self]

    def _function(self, function: Any) -> Any:
        import numba

        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        body: Any = tree.body[0]
        body.args.args = [ast.arg(argument.arg) for argument in body.args.args[1:]]  # without self and types
        body.returns = None
        tree.body = [self._form().visit(_Unsigned().visit(body))]
        known = {key: np.uint64(v) if type(v) is int and v >= 0 else v for key, v in function.__globals__.items()}
        known |= {"self": self.self, "holds": self.holds, "uint64": np.uint64}
        exec(compile(ast.fix_missing_locations(tree), f"<{self.__name__} of {body.name}>", "exec"), known)
        return numba.njit(known[body.name])


class _Unsigned(ast.NodeTransformer):
    """All numbers 64 bits wide, without a sign, as SPTEs are; but not where they say which column of an answer."""

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return ast.parse(f"uint64({node.value})", mode="eval").body if type(node.value) is int else node


class _Answers(ast.NodeTransformer):
    """A helper without its assertions, and without calls that only assert."""

    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        return ast.Pass()

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        return ast.Pass()


class _Holds(ast.NodeTransformer):
    """Whether the assertions of a helper hold, and those of the helpers that it calls."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.stmt:
        self.generic_visit(node)
        node.body.append(ast.parse("return True").body[0])
        return node

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:
        return [*self._of_calls(node.test), _unless(node.test)]

    def visit_If(self, node: ast.If) -> list[ast.stmt]:
        self.generic_visit(node)
        return [*self._of_calls(node.test), node]

    def visit_Return(self, node: ast.Return) -> list[ast.stmt]:
        return [*self._of_calls(node), *ast.parse("return True").body]

    def visit_Expr(self, node: ast.Expr) -> list[ast.stmt]:
        return self._of_calls(node) or [ast.Pass()]

    def visit_Assign(self, node: ast.Assign) -> list[ast.stmt]:
        return [*self._of_calls(node), node]

    def _of_calls(self, node: ast.AST) -> list[ast.stmt]:
        calls = [
            call for call in ast.walk(node) if isinstance(call, ast.Call) and ast.unparse(call).startswith("self.")
        ]
        return [_unless(ast.parse(ast.unparse(call).replace("self.", "holds.", 1), mode="eval").body) for call in calls]


def _unless(test: ast.expr) -> ast.stmt:
    return ast.If(ast.UnaryOp(ast.Not(), test), ast.parse("return False").body, [])
