"""Panels: a pure function of a few settings, and a view that shows its result at a click, and a run moment by moment.

A `Panel` carries the result of each combination of its settings, so it works with a kernel (JupyterLab) and without one
(the built pages, the slides). A panel of the book is one function that returns a `View`, and the lists of its options.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import ipywidgets as widgets
import traitlets
from IPython.display import display

from kvmbook.views.drawing import Picture, framed
from kvmbook.views.scripts import script, style
from kvmbook.views.widget import Widget

WHOLE = -1  # no moment: the whole run


class View(NamedTuple):
    """What a panel shows for one combination: a picture and a sentence."""

    picture: Picture
    readout: str


class Panel(Widget):
    """Radio groups over a picture and a sentence. If the picture tells a run, it can be stepped through.

    ``settings`` maps each setting's name to its options, the first chosen; ``show`` takes one option of each, in that
    order, and returns a `View`. ``carry=False`` leaves combinations to be computed when they are chosen, which needs a
    kernel. ``unlock`` names settings that a reader does not see at first: the text brings them in, one after the other,
    with `unlock`; a button shows them all. Raises ValueError for a setting without options, with one twice, or with " | "
    in one, and for a name in ``unlock`` that is none of the settings.
    """

    _esm = script("panel")
    _css = style()
    title = traitlets.Unicode().tag(sync=True)
    settings: Any = traitlets.List().tag(sync=True)
    locked: Any = traitlets.List(traitlets.Unicode()).tag(sync=True)
    chosen = traitlets.Dict().tag(sync=True)
    moment = traitlets.Int(WHOLE).tag(sync=True)
    states = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        title: str,
        settings: Mapping[str, Sequence[str]],
        show: Callable[..., View],
        carry: bool = True,
        unlock: Sequence[str] = (),
    ) -> None:
        for options in settings.values():
            if not options or len(set(options)) < len(options) or any(" | " in option for option in options):
                raise ValueError(f"a setting needs options, each another, none with ' | ' in it; got {dict(settings)}")
        self._show = show
        self._options = {name: list(options) for name, options in settings.items()}
        super().__init__(
            title=title,
            settings=[{"name": name, "options": options} for name, options in self._options.items()],
            locked=self._known(unlock),
            chosen={name: options[0] for name, options in self._options.items()},
            states={" | ".join(c): self._state(c) for c in self.combinations()} if carry else {},
        )
        self._compute_missing(self.chosen)
        self.observe(self._answer, names="chosen")

    def combinations(self) -> list[tuple[str, ...]]:
        """Every combination of options."""
        return list(itertools.product(*self._options.values()))

    def choose(self, **chosen: str) -> str:
        """Set options by name (``_`` for what is no letter), go to the whole run, and return the sentence. KeyError or
        ValueError if unknown."""
        named = {re.sub(r"\W+", "_", name): name for name in self._options}
        wanted = {named[key]: option for key, option in chosen.items()}
        for name, option in wanted.items():
            if option not in self._options[name]:
                raise ValueError(f"{name} is one of {', '.join(self._options[name])}; got {option!r}")
        chosen = {**self.chosen, **wanted}
        self._compute_missing(chosen)  # before it is chosen: if it fails, nothing has changed
        with self.hold_sync():
            self.chosen, self.moment = chosen, WHOLE
        return self.readout

    def step(self, moment: int) -> str:
        """Go to a moment of the run, from 0, or back to the whole run (-1); return the sentence. ValueError if the picture
        has no such moment."""
        if moment != WHOLE and not self.moments:
            raise ValueError(f"there is no run to step through; got moment {moment}")
        if not WHOLE <= moment < len(self.moments):
            raise ValueError(f"the run has moments 0 to {len(self.moments) - 1}; got {moment}")
        self.moment = moment
        return self.readout

    def unlock(self, *names: str) -> Again:
        """The same panel again, where the text has come to these settings. ValueError for a name that is none."""
        return Again(panel=self, opens=self._known(names))

    @property
    def moments(self) -> list[str]:
        """A sentence for each moment of the run that is shown; empty if there is no run."""
        return list(self._chosen_state.get("moments", []))

    @property
    def readout(self) -> str:
        """The sentence for what is chosen: of the moment, if one is shown."""
        if 0 <= self.moment < len(self.moments):
            return self.moments[self.moment]
        sentence: str = self._chosen_state["readout"]
        return sentence

    @property
    def _chosen_state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.states[self._key(self.chosen)]
        return state

    def _known(self, names: Sequence[str]) -> list[str]:
        if unknown := [name for name in names if name not in self._options]:
            raise ValueError(f"the settings are {', '.join(self._options)}; got {', '.join(unknown)}")
        return list(names)

    def _key(self, chosen: Mapping[str, str]) -> str:
        return " | ".join(chosen[name] for name in self._options)

    def _state(self, combination: Sequence[str]) -> dict[str, Any]:
        view = self._show(*combination)
        moments = {"moments": list(view.picture.moments)} if view.picture.moments else {}
        return {"svg": view.picture.svg, "readout": view.readout, **moments}

    def _answer(self, change: Any) -> None:
        """Compute what the page has asked for; if that fails, the page says why."""
        try:
            self._compute_missing(change.new)
        except Exception as error:
            said = {"svg": "", "readout": f"This could not be computed: {type(error).__name__}: {error}."}
            self.states = {**self.states, self._key(change.new): said}

    def _compute_missing(self, chosen: Mapping[str, str]) -> None:
        if (key := self._key(chosen)) not in self.states:
            self.states = {**self.states, key: self._state([chosen[name] for name in self._options])}

    def still(self) -> Picture:
        first = {name: options[0] for name, options in self._options.items()}
        said = " · ".join(f"{name}: {option}" for name, option in first.items())
        self._compute_missing(first)
        svg, readout, *_ = self.states[self._key(first)].values()
        return framed(f"{self.title}. {said}. {readout}", self.title, [said], readout, Picture(svg, readout))

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}: {option}" for name, option in self.chosen.items())
        return f"{self.title} [{settings}]\n{self.readout}" if settings else f"{self.title}\n{self.readout}"


class Again(Widget):
    """A panel once more, further down in the text: what is chosen in one place is chosen in both. ``opens``: settings of
    the panel that are shown from here on."""

    _esm = script("panel")
    _css = style()
    panel = traitlets.Instance(Panel).tag(sync=True, **widgets.widget_serialization)
    opens: Any = traitlets.List(traitlets.Unicode()).tag(sync=True)

    def still(self) -> Picture:
        return self.panel.still()

    def __repr__(self) -> str:
        return repr(self.panel)


def step_through(picture: Picture, title: str = "Moment by moment") -> Panel:
    """A run that can be stepped through: a panel without settings. ValueError for a picture that tells no run."""
    if not picture.moments:
        raise ValueError("the picture has no moments to step through")
    return Panel(title, {}, lambda: View(picture, picture.moments[-1]))


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
