"""Guess first: the reader draws a line or types a number, then sees what the model says. Works without a kernel, too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import traitlets

from kvmbook.views.drawing import LOST, Picture, framed, svg, text
from kvmbook.views.scripts import script, style
from kvmbook.views.widget import Widget

WIDE, STACKED = 560, 290  # units of the two forms of a chart; a phone shows the narrow one
NOBODY = -1  # a point that nobody has guessed yet


class Guess(Widget):
    """A question, an empty chart, a guess, and what the model says to it. See `ShapeGuess` and `NumberGuess`.

    ``title`` is the question, ``charts`` has its empty chart in both forms. ``guessed`` has a value for each of ``truth``,
    `NOBODY` where there is none yet; ``told``: whether the truth is shown; ``why`` is said with it.
    """

    _esm = script("guess")
    _css = style("guess")
    title = traitlets.Unicode().tag(sync=True)
    truth = traitlets.List(traitlets.Int()).tag(sync=True)
    top = traitlets.Int().tag(sync=True)
    why = traitlets.Unicode().tag(sync=True)
    charts = traitlets.Dict(traitlets.Unicode()).tag(sync=True)
    guessed = traitlets.List(traitlets.Int()).tag(sync=True)
    told = traitlets.Bool(False).tag(sync=True)

    def _tell(self, guessed: Sequence[int]) -> str:
        with self.hold_sync():
            self.guessed, self.told = list(guessed), True
        return self.readout

    @property
    def readout(self) -> str:
        """What is said below the chart: nothing before the guess is done."""
        return f"{self._verdict()} {self.why}" if self.told else ""

    def _verdict(self) -> str:
        """How far the guess was from what the model says."""
        raise NotImplementedError

    def _asks_for(self) -> str:
        """What is to be guessed, in one line."""
        raise NotImplementedError

    def still(self) -> Picture:
        return framed(f"{self.title} {self._asks_for()}", self.title, [], "", Picture(self.charts["wide"], ""))

    def __repr__(self) -> str:
        return "\n".join([self.title, f"  [{self._asks_for()}]", *filter(None, [self.readout])])


# ---- a shape ---------------------------------------------------------------------------------------------------------


class ShapeGuess(Guess):
    """A value, 0 to ``top``, for each of a few x's: the reader draws it.

    ``truth``: what the model says, by x. ``along`` and ``counted`` name the axes; ``named`` words a point, with {} for its
    x. Raises ValueError for fewer than two points, or one that the chart has no room for.
    """

    names = traitlets.List(traitlets.Unicode()).tag(sync=True)
    counted = traitlets.Unicode().tag(sync=True)

    def __init__(
        self, asked: str, truth: Mapping[int, int], top: int, because: str, along: str, counted: str, named: str
    ) -> None:
        if len(truth) < 2 or not all(0 <= value <= top for value in truth.values()):
            raise ValueError(f"a shape has two points or more, each 0 .. {top}; got {dict(truth)}")
        self._along, self._xs = along, [f"{x:,}" for x in truth]
        super().__init__(
            title=asked,
            truth=list(truth.values()),
            top=top,
            why=because,
            names=[named.format(x) for x in self._xs],
            counted=counted,
            guessed=[NOBODY] * len(truth),
            charts={
                form: _shape_chart(width, asked, top, self._xs, along, counted)
                for form, width in (("wide", WIDE), ("narrow", STACKED))
            },
        )

    def guess(self, values: Iterable[int]) -> str:
        """Guess a value for each point and see; return the sentence.
        ValueError unless there is one for each, 0 to ``top``."""
        values = list(values)
        if len(values) != len(self.truth) or not all(0 <= value <= self.top for value in values):
            raise ValueError(f"a guess is {len(self.truth)} numbers, each 0 .. {self.top}; got {values}")
        return self._tell(values)

    def _verdict(self) -> str:
        slack, points = self.top // 20, len(self.truth)  # a hand draws no finer
        off = [abs(said - true) for said, true in zip(self.guessed, self.truth, strict=True)]
        right = sum(distance <= slack for distance in off)
        near = f", give or take {slack}," if slack else ""
        if right == points:
            return f"Right{near} at all {points} points."
        worst = off.index(max(off))
        true, said = self.truth[worst], self.guessed[worst]
        furthest = f"Furthest off {self.names[worst]}: the model says {true:,}, you said {said:,}."
        return f"Right{near} at {right} of {points} points. {furthest}"

    def _asks_for(self) -> str:
        return f"{self.counted}? {self._along}: {', '.join(self._xs)}"


def _plot(x: float, y: float, width: float, height: float) -> str:
    """Where the values of a chart stand: the view draws its marks there."""
    return f'<g data-plot="{x:g} {y:g} {width:g} {height:g}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, extra: str = "") -> str:
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="currentColor"{extra}/>'


def _shape_chart(width: int, asked: str, top: int, xs: Sequence[str], along: str, counted: str) -> str:
    left, right, high, low, inset = 38, width - 6, 60, 226, 12
    parts = [
        text(2, 16, counted, anchor="start"),
        '<rect x="4" y="28" width="12" height="12" fill="none" stroke="currentColor" stroke-width="2"/>',
        text(22, 39, "your guess", anchor="start"),
        f'<circle cx="122" cy="34" r="6" fill="{LOST}"/>',
        text(134, 39, "the model", anchor="start"),
        _line(left, low, right, low),
    ]
    for value in range(0, top + 1, top // 4) if top % 4 == 0 else (0, top):
        y = low - (low - high) * value / top
        parts += [_line(left, y, right, y, ' opacity="0.25"'), text(left - 6, y + 5, f"{value:,}", anchor="end")]
    first, step = left + inset, (right - left - 2 * inset) / (len(xs) - 1)
    for number, x in enumerate(xs):
        parts += [
            _line(first + number * step, low, first + number * step, low + 5),
            text(first + number * step, low + 20, x),
        ]
    parts += [text((left + right) / 2, low + 41, along), _plot(first, high, right - left - 2 * inset, low - high)]
    return svg(width, low + 48, asked, parts)


# ---- a number --------------------------------------------------------------------------------------------------------


class NumberGuess(Guess):
    """One number, 1 to ``top``, a power of ten: the reader types it, and it is shown on a logarithmic scale.

    Raises ValueError if ``top`` is no power of ten, or the truth is outside the scale.
    """

    def __init__(self, asked: str, truth: int, top: int, because: str) -> None:
        if top < 10 or str(top).strip("0") != "1" or not 1 <= truth <= top:
            raise ValueError(f"the scale goes from 1 to a power of ten, and has room for {truth}; got {top}")
        super().__init__(
            title=asked,
            truth=[truth],
            top=top,
            why=because,
            guessed=[NOBODY],
            charts={
                "wide": _number_chart(WIDE, asked, top, every=1),
                "narrow": _number_chart(STACKED, asked, top, every=2),
            },
        )

    def guess(self, number: int) -> str:
        """Guess and see; return the sentence. ValueError unless the number is 1 to ``top``."""
        if not 1 <= number <= self.top:
            raise ValueError(f"{self._asks_for()}; got {number}")
        return self._tell([number])

    def _verdict(self) -> str:
        (true,), (said,) = self.truth, self.guessed
        if said == true:
            return f"Right: it is {true:,}."
        small, big = sorted((true, said))
        both = f"the model says {true:,}, you said {said:,}"
        if 4 * big <= 5 * small:
            return f"Close: {both}."
        return f"T{both[1:]}: too {'many' if said > true else 'few'}, by a factor of {_factor(big, small)}."

    def _asks_for(self) -> str:
        return f"a guess is a whole number, 1 .. {self.top:,}"


def _factor(big: int, small: int) -> str:
    """How many times the small number the big one is: in tenths if it is below ten."""
    tenths = (20 * big + small) // (2 * small)
    return f"{tenths // 10}.{tenths % 10}" if tenths < 100 else f"{(2 * big + small) // (2 * small):,}"


def _number_chart(width: int, asked: str, top: int, every: int) -> str:
    left, right, axis, tens = 24, width - 38, 44, len(str(top)) - 1
    parts = [_line(left, axis, right, axis)]
    for power in range(tens + 1):
        x = left + (right - left) * power / tens
        parts.append(_line(x, axis - 6, x, axis + 6))
        if power % every == 0:
            parts.append(text(x, axis + 28, f"{10**power:,}"))
    return svg(width, axis + 62, asked, [*parts, _plot(left, axis, right - left, 0)])
