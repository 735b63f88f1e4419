"""JupyterLab as a reader meets it, on a copy of the book, driven in a browser. For tests and the benchmark of panels.

Nothing is kept: configuration, workspaces, settings, signatures and histories live in the folder that the caller gives.
"""

from __future__ import annotations

import json
import os
import pathlib
import secrets
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import nbformat
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import Locator, Page

from tools.reading import deliver, folders, server, trust

PATIENCE = 60  # seconds, for whatever a loaded machine may do slowly
RUN = 180  # seconds, for a chapter
# Cells off screen are there too; nothing is saved, for the panels of a notebook that was are gone until it is run; and
# JupyterLab asks nobody for news.
SETTINGS = {
    "docmanager-extension/plugin": {"autosave": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is on this machine
CLOSE = """() => {
  [...jupyterapp.shell.widgets("main")].forEach((one) => one.dispose());
  delete document.body.dataset.kvmbookRan;
}"""
ERRORS = ["application/vnd.jupyter.stderr", "application/vnd.jupyter.error"]


class Lab:
    """A server: ``home`` is its address, with a slash at the end, and ``book`` the copy that it serves."""

    def __init__(self, home: str, token: str, book: pathlib.Path) -> None:
        self.home, self.token, self.book = home, token, book

    def ask(self, path: str, method: str = "GET") -> Any:
        """What the server's own interface answers; None if that is nothing."""
        headers = {"Authorization": f"token {self.token}"}
        request = urllib.request.Request(f"{self.home}api/{path}", headers=headers, method=method)
        with OPENER.open(request, timeout=PATIENCE) as answer:
            return json.loads(answer.read() or "null")

    def write(self, name: str, *cells: str) -> str:
        """Put a notebook with these cells of code beside the chapters, and return its path in the copy."""
        notebook = new_notebook(cells=[new_code_cell(source) for source in cells])
        notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
        nbformat.write(notebook, self.book / "notebooks" / name)
        return f"notebooks/{name}"

    def open(self, page: Page, notebook: str) -> None:
        """Open a notebook of the copy, by its path in it, in a page that shows none, and wait until it is shown. Nothing is
        run. JupyterLab is loaded if the page does not have it yet."""
        page.set_default_timeout(PATIENCE * 1000)
        if page.url.startswith(self.home):
            page.evaluate("path => jupyterapp.commands.execute('docmanager:open', { path }).then(() => null)", notebook)
        else:
            page.goto(f"{self.home}lab/tree/{notebook}?token={self.token}&reset")
        page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for()

    def wait_for_kernel(self, page: Page, notebook: str) -> None:
        """Wait until the notebook has a kernel that waits for it. The page says "idle" too early, so the server is asked."""
        for _ in range(PATIENCE * 10):
            kernels = [session["kernel"] for session in self.ask("sessions") if session["path"] == notebook]
            if any(kernel["connections"] and kernel["execution_state"] == "idle" for kernel in kernels):
                return
            page.wait_for_timeout(100)  # events of the page go on meanwhile
        raise TimeoutError(f"{notebook} has no idle kernel after {PATIENCE} s; sessions: {self.ask('sessions')}")

    def start_running(self, page: Page, notebook: str) -> None:
        """Have all cells run: what the entry of the menu "Run" does, but its end can be waited for."""
        self.wait_for_kernel(page, notebook)
        run = "jupyterapp.commands.execute('notebook:run-all-cells')"
        page.evaluate(f"{run}.finally(() => document.body.dataset.kvmbookRan = 'yes'); null")

    def wait_until_run(self, page: Page) -> None:
        """Wait until all cells have run, or one of them has failed."""
        page.locator("body[data-kvmbook-ran]").wait_for(state="attached", timeout=RUN * 1000)

    def close(self, page: Page) -> None:
        """Close the notebook that a page shows, unsaved. Its kernel stays, and JupyterLab, for the next one."""
        page.evaluate(CLOSE)

    def shut_down(self, notebook: str) -> None:
        """End the notebook's kernel."""
        for session in self.ask("sessions"):
            if session["path"] == notebook:
                self.ask(f"sessions/{session['id']}", "DELETE")


def errors_in(page: Page) -> list[str]:
    """What the notebook's cells have said on stderr or raised."""
    said = ", ".join(f'.jp-OutputArea-output[data-mime-type="{kind}"]' for kind in ERRORS)
    return page.locator(said).all_text_contents()


def said_by(panel: Locator) -> Locator:
    """The sentence of a panel."""
    return panel.locator(".kvmbook-readout")


# ---- the server ------------------------------------------------------------------------------------------------------


@contextmanager
def jupyter_lab(folder: pathlib.Path) -> Iterator[Lab]:
    """A JupyterLab of this Python on a trusted copy of the book. It and its kernels are gone at the end.

    ``folder`` is empty. RuntimeError with the server's last words if it does not start.
    """
    book, own = folder / "copy", environment(folder / "jupyter")
    deliver(book)
    trust(sorted(book.rglob("*.ipynb")), own["JUPYTER_DATA_DIR"])
    token, port = secrets.token_hex(8), free_port()
    said = folder / "server.log"
    command = [*server(book), "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"]
    command += [f"--IdentityProvider.token={token}", "--LabApp.default_url=/lab", "--LabApp.news_url=None"]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    command += ["--LabApp.expose_app_in_browser=True"]  # as `jupyterapp`
    with said.open("w") as log:
        running = subprocess.Popen(command, env=own, cwd=book, stdout=log, stderr=subprocess.STDOUT)
        lab = Lab(f"http://127.0.0.1:{port}/", token, book)
        try:
            wait_until_up(lab, running, said)
            yield lab
        finally:
            stop(running)


def environment(own: pathlib.Path) -> dict[str, str]:
    """Variables under which Jupyter and IPython neither read nor write anything of the user's. The settings are written."""
    for name, settings in SETTINGS.items():
        path = own / "settings/@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    more = {f"JUPYTERLAB_{name.upper()}_DIR": str(own / name) for name in ("workspaces", "settings")}
    return {**os.environ, **folders(own), **more}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_until_up(lab: Lab, server: subprocess.Popen[bytes], said: pathlib.Path) -> None:
    """Wait until the server answers. RuntimeError if it ends before, or does not in time."""
    for _ in range(PATIENCE * 10):
        if server.poll() is not None:
            break
        try:
            lab.ask("status")
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not start:\n{said.read_text()[-2000:]}")


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server, which ends its kernels. One that does not go is killed; kernels go when their server has gone."""
    server.terminate()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
