"""Exercises and quizzes, one mechanism for all chapters; each chapter's own are in a module of its number.

A *check cell* takes a reader's answer, runs it on the model, and says yes, or no with a hint. Never the answer.
An unanswered exercise (None) is "Not yet". An answer that raises is told so, and the error is shown.

A *question* is predicted first and revealed then. Its answer is not written down: it is what the model says.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from kvmbook.model import Vm
from kvmbook.views import Quiz

Run = Callable[[Vm], Any]


def checker(judge: Callable[..., str]) -> Callable[..., None]:
    """Turn a function that returns a hint, or "" if all is well, into a check cell's call, which prints.

    The answer comes first; more arguments, such as the seed of a fresh variant, are handed on.
    """

    @functools.wraps(judge)
    def check(answer: Any = None, *variant: Any, **named: Any) -> None:
        if answer is None:
            print("Not yet: there is no answer to check.")
            return
        inspect.signature(judge).bind(answer, *variant, **named)  # a wrong call is no wrong answer
        try:
            hint = judge(answer, *variant, **named)
        except Exception as error:
            hint = f"your answer raised {type(error).__name__}: {error}"
        if not isinstance(hint, str):
            raise TypeError(f"{judge.__name__} must return a hint or ''; it returned {hint!r}")
        print(f"No: {hint}" if hint else "Yes.")

    return check


class Answer(NamedTuple):
    """What the model says to a question, one of its options, and why, in one to three sentences."""

    option: str
    because: str


def question(*options: str) -> Callable[[Callable[[], Answer]], Callable[[], Quiz]]:
    """Turn a function that asks the model into a question with these options; its docstring is what is asked.

    Calling it returns a `Quiz`. ValueError if the model's answer is none of the options.
    """

    def ask(answer: Callable[[], Answer]) -> Callable[[], Quiz]:
        @functools.wraps(answer)
        def quiz() -> Quiz:
            asked = " ".join((answer.__doc__ or "").split())
            return Quiz(asked, options, *answer())

        return quiz

    return ask
