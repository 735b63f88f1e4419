"""What all our widgets are: alive with a kernel and without one, and a picture where there are no widgets."""

from __future__ import annotations

from typing import Any

import anywidget

from kvmbook.views.drawing import Picture


class Widget(anywidget.AnyWidget):
    """A widget whose output also carries a picture of how it begins, with its sentence: GitHub, nbviewer, a diff and a page
    without scripts show that one. Its ``repr`` is the text alternative."""

    def still(self) -> Picture:
        """How it looks when nobody has touched it."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is not None:
            bundle[0]["image/svg+xml"] = self.still().svg
        return bundle
