"""Loops over an array of SPTEs, compiled by numba: over a helper's own source, and by kind, see `arrays`.

Of a helper two functions are made, one with the answers and one that says whether the assertions hold: a loop that could
raise in the middle would not be fast. If they do not hold for some word, the helper itself is run on it, and raises.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import textwrap
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np


@functools.cache
def numba_is_there() -> bool:
    """Whether numba can be imported (``pip install 'kvmbook[fast]'``)."""
    return importlib.util.find_spec("numba") is not None


def fill(helper: Any, words: np.ndarray, outs: list[np.ndarray], how: tuple[Any, ...]) -> None:
    """Fill ``outs``, one array for each column of the answer of the bound method ``helper``."""
    loop = _loop(helper.__self__, helper.__name__, how, len(outs))
    if not loop(words, tuple(outs)):
        for word in words.tolist():
            helper(word, *how)  # one of them raises


LOOP = """
def loop(words, outs):
    good = True
    for i in range(words.size):
        good &= holds(words[i], {how})
        said = answer(words[i], {how})
        {stores}
    return good
"""


@functools.cache
def _loop(fmt: Any, name: str, how: tuple[Any, ...], answers: int) -> Callable[..., bool]:
    import numba

    pair = _Compiled(fmt, _Answers), _Compiled(fmt, _Holds)
    for one in pair:
        one.self, one.holds = pair
    answer, holds = (getattr(one, name) for one in pair)
    stores = [f"outs[{k}][i] = said[{k}]" for k in range(answers)] if answers > 1 else ["outs[0][i] = said"]
    known = {"answer": answer, "holds": holds}
    exec(LOOP.format(how=", ".join(map(repr, how)), stores="; ".join(stores)), known)
    loop: Callable[..., bool] = numba.njit(known["loop"])
    return loop


# ---- by kind ---------------------------------------------------------------------------------------------------------

PART, KNOWN, TRUE = 512, 1 << 12, 1 << 13  # words at a time; marks in the address of a flip, where nothing is flipped


@functools.cache
def by_kind() -> Callable[..., tuple[int, int]]:
    """A loop that flips each word, in place, as its kind says. See `_flip`."""
    import numba

    compiled: Callable[..., tuple[int, int]] = numba.njit(_flip)
    return compiled


def _flip(words, said, meant, start, kinds, flips, flags, known, true, page):  # type: ignore[no-untyped-def]
    """``kinds`` and ``flips``, tuples of one length: of SPTEs of a kind, what is to be flipped, with marks. ``said`` gets the
    mark TRUE. ``meant``: None, or 1 for each word that is meant and 0 for others, which count as kind 0. Returns where it
    stopped, at a part with a kind that is not among them or behind the last word, and the bits in which addresses differ from
    a row of pages. After a part of several kinds the next is taken to have several, too."""
    marks, zero, apart, mixed = np.empty(PART, np.uint64), known ^ known, known ^ known, False
    for at in range(start, words.size, PART):
        part, to, differ = words[at : at + PART], said[at : at + PART], zero
        asked = to if meant is None else meant[at : at + PART]
        apart |= part[0] ^ (words[0] + np.uint64(at) * page)
        if not mixed:
            for i in range(part.size):
                differ |= part[i] ^ (part[0] + np.uint64(i) * page)
            apart |= differ
            mark = zero
            for k in range(len(kinds)):
                mark |= flips[k] if part[0] & flags == kinds[k] else zero
            if differ & flags == 0 and mark & known != 0:
                if meant is not None:
                    for i in range(part.size):
                        part[i] ^= mark & flags & (zero - np.uint64(asked[i]))
                    for i in range(part.size):
                        to[i] = asked[i] & np.uint8(mark & true != 0)
                else:
                    to[:] = mark & true != 0
                    if mark & flags != 0:
                        for i in range(part.size):
                            part[i] ^= mark & flags
                continue
        all_known = known
        for i in range(part.size):
            kind, mark = part[i] & flags, zero
            differ |= part[i] ^ (part[0] + np.uint64(i) * page)
            if meant is not None:
                kind &= zero - np.uint64(asked[i])
            for k in range(len(kinds)):
                mark |= flips[k] if kind == kinds[k] else zero
            marks[i] = mark
            all_known &= mark
        apart |= differ
        if all_known == 0:
            return at, apart
        for i in range(part.size):
            part[i] ^= marks[i] & flags
        for i in range(part.size):
            to[i] = marks[i] & true != 0
        mixed = differ & flags != 0
    return words.size, apart


# ---- from source -----------------------------------------------------------------------------------------------------


class _Compiled(ModuleType):
    """The helpers of a format, each compiled when it is first named. (Numba looks names up in a module when it compiles.)"""

    self: _Compiled
    holds: _Compiled

    def __init__(self, fmt: Any, form: type[ast.NodeTransformer]) -> None:
        super().__init__(form.__name__)
        self.__dict__.update(_fmt=fmt, _form=form)

    def __getattr__(self, name: str) -> Any:
        import numba

        value = getattr(self._fmt, name)
        if not inspect.ismethod(value):
            return np.uint64(value) if isinstance(value, int) else value
        tree = ast.parse(textwrap.dedent(inspect.getsource(value.__func__)))
        function: Any = tree.body[0]
        function.args.args = [ast.arg(argument.arg) for argument in function.args.args[1:]]  # without self and types
        function.returns = None
        tree.body = [self._form().visit(_Unsigned().visit(function))]
        known = {key: np.uint64(v) if type(v) is int and v >= 0 else v for key, v in value.__func__.__globals__.items()}
        known |= {"self": self.self, "holds": self.holds, "uint64": np.uint64}
        exec(compile(ast.fix_missing_locations(tree), f"<{self.__name__} of {name}>", "exec"), known)
        self.__dict__[name] = numba.njit(known[name])
        return self.__dict__[name]


class _Unsigned(ast.NodeTransformer):
    """All numbers 64 bits wide, without a sign, as SPTEs are."""

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
