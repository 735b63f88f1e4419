"""A question to the reader: predict, then reveal. It carries its answer, so it works with a kernel and without one."""

from __future__ import annotations

from collections.abc import Sequence

import traitlets

from kvmbook.views.drawing import Picture, framed
from kvmbook.views.scripts import script, style
from kvmbook.views.widget import Widget


class Quiz(Widget):
    """One question with its options; the answer shows after a prediction, and on paper.

    Raises ValueError unless there are 2 to 4 options, each another, and the answer is one of them.
    """

    _esm = script("quiz")
    _css = style("quiz")
    asked = traitlets.Unicode().tag(sync=True)
    options = traitlets.List(traitlets.Unicode()).tag(sync=True)
    answer = traitlets.Unicode().tag(sync=True)
    because = traitlets.Unicode().tag(sync=True)
    predicted = traitlets.Unicode("").tag(sync=True)

    def __init__(self, asked: str, options: Sequence[str], answer: str, because: str) -> None:
        if not 2 <= len(set(options)) == len(options) <= 4 or answer not in options:
            raise ValueError(f"the answer, {answer!r}, must be one of 2 to 4 different options; got {list(options)}")
        super().__init__(asked=asked, options=list(options), answer=answer, because=because)

    def predict(self, option: str) -> str:
        """Predict and reveal; return the sentence. ValueError if ``option`` is none of the options."""
        if option not in self.options:
            raise ValueError(f"the options are {', '.join(self.options)}; got {option!r}")
        self.predicted = option
        return self.readout

    @property
    def readout(self) -> str:
        """What is shown below the question: nothing before a prediction."""
        if not self.predicted:
            return ""
        right = self.predicted == self.answer
        verdict = "Right. The" if right else f'Not what the model says. You said "{self.predicted}"; the'
        return f'{verdict} answer is "{self.answer}". {self.because}'

    def still(self) -> Picture:
        return framed(
            f"{self.asked} {' / '.join(self.options)}", self.asked, [f"○ {said}" for said in self.options], ""
        )

    def __repr__(self) -> str:
        options = [f"  [{'x' if option == self.predicted else ' '}] {option}" for option in self.options]
        return "\n".join([self.asked, *options, *filter(None, [self.readout])])
