"""The browser's side of the widgets: each view is one script behind the pieces that all share, and one style."""

import pathlib

HERE = pathlib.Path(__file__).parent


def script(name: str) -> str:
    """The script of a view, as anywidget wants it: one module."""
    return (HERE / "elements.js").read_text() + (HERE / f"{name}.js").read_text()


def style(*names: str) -> str:
    """The rules of a view: those of all panels, and its own."""
    return "".join((HERE / f"{name}.css").read_text() for name in ("panel", *names))
