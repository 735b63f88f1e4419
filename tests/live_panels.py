"""The book's panels and questions, made anew: what the pages and JupyterLab show is compared with these."""

import functools
import importlib
import inspect
import pkgutil

import kvmbook.exercises
import kvmbook.views
from kvmbook.views import Panel


@functools.cache
def by_title():
    """Every panel of the package, by its title: what its functions without arguments that promise a `Panel` return."""
    found = {}
    for room in pkgutil.iter_modules(kvmbook.views.__path__, "kvmbook.views."):
        module = importlib.import_module(room.name)
        for name, function in inspect.getmembers(module, inspect.isfunction):
            promises = str(inspect.signature(function).return_annotation)
            if function.__module__ == module.__name__ and promises.endswith("Panel") and not name.startswith("_"):
                panel = function()
                found[panel.title] = panel
    assert all(isinstance(panel, Panel) for panel in found.values())
    return found


@functools.cache
def quizzes():
    """Every question of the book, by what is asked."""
    made = []
    for room in pkgutil.iter_modules(kvmbook.exercises.__path__, "kvmbook.exercises."):
        module = importlib.import_module(room.name)
        made += [function() for name, function in vars(module).items() if name.startswith("quiz_")]
    return {quiz.asked: quiz for quiz in made}
