"""The book's panels and questions, made anew: what the pages and JupyterLab show is compared with these."""

import functools
import importlib
import inspect
import pathlib
import pkgutil

import kvmbook.exercises
import kvmbook.views
from kvmbook.views import NumberGuess, Panel, book_map

NOTEBOOKS = pathlib.Path(__file__).parent.parent / "notebooks"


@functools.cache
def by_title():
    """Every panel of the package, by its title: what its functions that promise a `Panel`, and need no argument, return. The
    map of the book is told where the chapters are."""
    found = {}
    for room in pkgutil.iter_modules(kvmbook.views.__path__, "kvmbook.views."):
        module = importlib.import_module(room.name)
        for name, function in inspect.getmembers(module, inspect.isfunction):
            wants = inspect.signature(function)
            needs_none = all(one.default is not one.empty for one in wants.parameters.values())
            promises = str(wants.return_annotation).endswith("Panel") and needs_none
            if function.__module__ == module.__name__ and promises and not name.startswith("_"):
                panel = function(NOTEBOOKS) if function is book_map else function()
                found[panel.title] = panel
    assert all(isinstance(panel, Panel) for panel in found.values())
    return found


@functools.cache
def quizzes():
    """Every question of the book, by what is asked."""
    return {quiz.asked: quiz for quiz in asked_by("quiz_")}


@functools.cache
def guesses():
    """Every guess of the book, by what is asked."""
    return {guess.title: guess for guess in asked_by("guess_")}


def asked_by(prefix):
    """What the exercises' functions whose names begin so ask."""
    for room in pkgutil.iter_modules(kvmbook.exercises.__path__, "kvmbook.exercises."):
        module = importlib.import_module(room.name)
        yield from (function() for name, function in vars(module).items() if name.startswith(prefix))


def guess_the_most(widget, live):
    """Guess the most that there can be, with the keys alone, and see; what must be said then."""
    if isinstance(live, NumberGuess):
        widget.get_by_role("textbox").fill(str(live.top))
        widget.get_by_role("textbox").press("Enter")
        return live.guess(live.top)
    points = widget.get_by_role("slider")
    points.first.press("End")
    for number in range(len(live.truth) - 1):
        points.nth(number).press("ArrowRight")
    widget.get_by_role("button", name="Show what the model says").press("Enter")
    return live.guess([live.top] * len(live.truth))
