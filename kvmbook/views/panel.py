"""Panels: a pure function of a few settings, and a view that shows its result at a click.

A `Panel` carries the result of each combination of its settings, so it works with a kernel (JupyterLab) and without one
(the built pages, the slides). A panel of the book is one function that returns a `View`, and the lists of its options.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import anywidget
import ipywidgets as widgets
import traitlets
from IPython.display import display

from kvmbook.views.figures import Picture
from kvmbook.views.scripts import script, style


class View(NamedTuple):
    """What a panel shows for one combination: a picture and a sentence."""

    picture: Picture
    readout: str


class Panel(anywidget.AnyWidget):
    """Radio groups over a picture and a sentence.

    ``settings`` maps each setting's name to its options, the first chosen; ``show`` takes one option of each, in that
    order, and returns a `View`. ``carry=False`` leaves combinations to be computed when they are chosen, which needs a
    kernel. Raises ValueError for a setting without options, with one twice, or with " | " in one.
    """

    _esm = script("panel")
    _css = style()
    title = traitlets.Unicode().tag(sync=True)
    settings: Any = traitlets.List().tag(sync=True)
    chosen = traitlets.Dict().tag(sync=True)
    states = traitlets.Dict().tag(sync=True)

    def __init__(
        self, title: str, settings: Mapping[str, Sequence[str]], show: Callable[..., View], carry: bool = True
    ) -> None:
        for options in settings.values():
            if not options or len(set(options)) < len(options) or any(" | " in option for option in options):
                raise ValueError(f"a setting needs options, each another, none with ' | ' in it; got {dict(settings)}")
        self._show = show
        self._options = {name: list(options) for name, options in settings.items()}
        super().__init__(
            title=title,
            settings=[{"name": name, "options": options} for name, options in self._options.items()],
            chosen={name: options[0] for name, options in self._options.items()},
            states={" | ".join(c): self._state(c) for c in self.combinations()} if carry else {},
        )
        self._compute_missing(self.chosen)
        self.observe(lambda change: self._compute_missing(change.new), names="chosen")

    def combinations(self) -> list[tuple[str, ...]]:
        """Every combination of options."""
        return list(itertools.product(*self._options.values()))

    def choose(self, **chosen: str) -> str:
        """Set options by name (``_`` for what is no letter) and return the sentence. KeyError or ValueError if unknown."""
        named = {re.sub(r"\W+", "_", name): name for name in self._options}
        wanted = {named[key]: option for key, option in chosen.items()}
        for name, option in wanted.items():
            if option not in self._options[name]:
                raise ValueError(f"{name} is one of {', '.join(self._options[name])}; got {option!r}")
        chosen = {**self.chosen, **wanted}
        self._compute_missing(chosen)  # before it is chosen: if it fails, nothing has changed
        self.chosen = chosen
        return self.readout

    @property
    def readout(self) -> str:
        """The sentence for what is chosen."""
        sentence: str = self.states[self._key(self.chosen)]["readout"]
        return sentence

    def _key(self, chosen: Mapping[str, str]) -> str:
        return " | ".join(chosen[name] for name in self._options)

    def _state(self, combination: Sequence[str]) -> dict[str, str]:
        view = self._show(*combination)
        return {"svg": view.picture.svg, "readout": view.readout}

    def _compute_missing(self, chosen: Mapping[str, str]) -> None:
        if (key := self._key(chosen)) not in self.states:
            self.states = {**self.states, key: self._state([chosen[name] for name in self._options])}

    def __repr__(self) -> str:
        return (
            f"{self.title} [{', '.join(f'{name}: {option}' for name, option in self.chosen.items())}]\n{self.readout}"
        )


def counted(flushes: int) -> str:
    """A number of flushes in words."""
    return f"{('no', 'one', 'two')[flushes]} flush{'es' * (flushes != 1)}"


@contextmanager
def search_progress() -> Iterator[Callable[[int, int, int], None]]:
    """A progress bar for `kvmbook.search.explore`, as its ``progress``; it goes when the search ends or is interrupted."""
    bar = widgets.IntProgress(description="searching")
    said = widgets.Label()
    line = widgets.HBox([bar, said])
    display(line)  # type: ignore[no-untyped-call]

    def show(level: int, states: int, bound: int) -> None:
        bar.max, bar.value, said.value = bound, states, f"level {level}, {states:,} states of at most {bound:,}"

    try:
        yield show
    finally:
        line.close()
