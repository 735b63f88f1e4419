"""A run that loses a write, as something to hand on: a text that can be read back, a script for a real KVM, a C program."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from kvmbook.model import Kernel
from kvmbook.real import RealVm
from kvmbook.search.configurations import OPTIONS, Configuration, Slot
from kvmbook.search.known_faults import REPAIRED, fault_of, loses, repaired
from kvmbook.search.playing import Call, Cleared
from kvmbook.search.recorder import Recorder
from kvmbook.search.userspace import INTERRUPTED, Play

SLOT = re.compile(r"(\d+) pages from gfn (0x[0-9a-f]+), the host's of (\w+); runs are about (\d+(?:, \d+)*)")
RUN, LOST = "run:", "lost: "
IN_C = ("reads", "writes", "ages", "enables", "disables", "gets", "clears", "harvests", "resets")


@dataclass(frozen=True, repr=False)
class Litmus:
    """A ``run`` of whole calls in a ``configuration``, and the pages whose writes it has ``lost``. ``fault``: the known
    one that it meets (see `fault_of`), or None."""

    configuration: Configuration
    run: tuple[Call, ...]
    lost: tuple[int, ...]
    fault: str | None = None

    def __str__(self) -> str:
        """Fields, calls, and what comes of it: a text that `read_litmus` reads back."""
        head = [f"{name}: {value}" for name, value in self.configuration.words.items()]
        calls = [f"  {call.phrase}" for call in self.run]
        return "\n".join([*head, RUN, *calls, LOST + (", ".join(map(str, self.lost)) or "nothing")])

    def __repr__(self) -> str:
        calls = "; ".join(call.phrase for call in self.run)
        return f"<Litmus on {self.configuration.hardware.name}: {calls}; lost: {list(self.lost)}>"

    def made_on(self, vm: Any) -> Play:
        """The run on ``vm``, new, which has `Vm`'s front door."""
        made = Play.on(vm, self.configuration)
        for call in self.run:
            made.do(call)
        return made

    # ---- simpler ----------------------------------------------------------------------------------------------------

    def simplest(self) -> Litmus:
        """The same calls, the same fault, in the simplest configuration: field by field, as `OPTIONS` has them."""
        found = self
        for name, values in OPTIONS.items():
            value = getattr(found.configuration, name)
            for simpler in values[: values.index(value)] if value in values else values:
                changed = found._with(name, simpler)
                if changed.lost and changed.fault == found.fault:
                    found = changed
                    break
        return found

    def _with(self, name: str, value: Any) -> Litmus:
        """With one field changed; it has lost nothing if that makes no sense."""
        slot, configuration = self.configuration.slot, self.configuration.with_(**{name: value})
        run = tuple(_on_slot(call, slot, value) for call in self.run) if name == "slot" else self.run
        lost = loses(configuration, run) if configuration.makes_sense else ()
        return Litmus(configuration, run, lost, fault_of(configuration, run) if lost else None)

    # ---- for other machines -----------------------------------------------------------------------------------------

    def to_script(self) -> str:
        """Python that makes the run on a real KVM, call by call, and says what was reported of what was written.
        ValueError for what no user space can make happen."""
        if any(call.what == INTERRUPTED for call in self.run):
            raise ValueError("no script makes a signal come at a given moment")
        scribe = Scribe(self.configuration.bare())
        made, c = self.made_on(scribe), self.configuration
        differs = sorted(made.differs)
        made.unreported()
        if c.nested or (missing := sorted(scribe.called - CAN_BE_CALLED)):
            raise ValueError(
                f"on a real KVM, user space cannot {'run a nested guest' if c.nested else ', '.join(missing)}"
            )
        lost = ", ".join(map(str, self.lost))
        title = f"{c.hardware.name}, {c.kernel.name}: the model loses what is written to page {lost}."
        return SCRIPT.format(
            title=title,
            vcpus=c.vcpus,
            page_size=c.slot.page_size,
            calls="".join(f"    {line}\n" for line in scribe.lines[:-1]),
            differs=", ".join(map(str, differs)),
            report=scribe.lines[-1],
        )

    def to_selftest(self, form: str = "standalone") -> str:
        """A C program that makes the run on a real KVM (see `c_program`). ValueError for what it cannot play."""
        if others := sorted({call.what for call in self.run}.difference(IN_C)):
            raise ValueError(f"a C program plays {', '.join(IN_C)}; not {', '.join(others)}")
        if self.configuration.nested:
            raise ValueError("a C program runs no nested guest")
        recorder = Recorder(self.configuration.bare(), f"A run on {self.configuration.hardware.name}")
        self.made_on(recorder)
        return recorder.to_selftest(form)


class Made(NamedTuple):
    """``litmus``: a run that loses a write, or None; and how many ``runs`` were made, of how many ``steps`` of the model."""

    litmus: Litmus | None
    runs: int
    steps: int


def _on_slot(call: Call, old: Slot, new: Slot) -> Call:
    """The call on the same of the pages that runs are about, in another slot. (Pages that only one of the two has are
    none.)"""
    renamed = dict(zip(old.pages, new.pages, strict=False))
    if call.page is not None:
        return call._replace(page=renamed.get(call.page))
    if call.cleared is None:
        return call
    pages = {renamed[page] for page in call.cleared.pages if page in renamed}
    if len(call.cleared.pages) > len(old.pages):
        pages |= set(range(new.npages)).difference(new.pages)
    return call._replace(cleared=Cleared.of(pages, new.npages)) if pages else call


# ---- from text -------------------------------------------------------------------------------------------------------


def read_litmus(text: str) -> Litmus:
    """What `str` of a `Litmus` says, played again: what it loses is the model's answer now, not the text's. ValueError with
    the line for what cannot be read, or is not possible."""
    head, _, rest = text.strip().partition(RUN)
    fields = dict(line.split(": ", 1) for line in head.splitlines() if ": " in line)
    configuration = Configuration(
        kernel=_kernel(fields.get("kernel", "")),
        slot=_slot(fields.get("slot", "")),
        **{name: _option(name, fields) for name in OPTIONS if name != "slot"},
    )
    made, run = Play.start(configuration), []
    for line in rest.strip().splitlines():
        if line.startswith(LOST):
            break
        possible = {call.phrase: call for call in made.possible() + made.rarer()}
        if (call := possible.get(line.strip())) is None:
            raise ValueError(f"{line.strip()!r} is not possible here; possible are: {'; '.join(possible)}")
        made.do(call)
        run.append(call)
    lost = made.lost()
    return Litmus(configuration, tuple(run), lost, fault_of(configuration, run) if lost else None)


def _kernel(name: str) -> Kernel:
    known = {kernel.name: kernel for kernel in Kernel.releases}
    if (kernel := known.get(name.removesuffix(REPAIRED))) is None:
        raise ValueError(f"kernel {name!r}: known are {', '.join(known)}, each also {REPAIRED.strip()!r}")
    return repaired(kernel) if name.endswith(REPAIRED) else kernel


def _slot(words: str) -> Slot:
    if (match := SLOT.fullmatch(words)) is None:
        raise ValueError(f"slot {words!r}: such as {OPTIONS['slot'][0]}")
    npages, base_gfn, page_size, pages = match.groups()
    return Slot(int(base_gfn, 16), int(npages), tuple(map(int, pages.split(", "))), page_size)


def _option(name: str, fields: dict[str, str]) -> Any:
    example = Configuration(Kernel.v6_0, OPTIONS["hardware"][0])
    known = {example.with_(**{name: value}).words[name]: value for value in OPTIONS[name]}
    if (said := fields.get(name, "")) not in known:
        raise ValueError(f"{name} {said!r}: known are {', '.join(known)}")
    return known[said]


# ---- to Python -------------------------------------------------------------------------------------------------------

CAN_BE_CALLED = {name for name in dir(RealVm) if not name.startswith("_")} | {"read", "write", "fetch", "harvest"}
SCRIPT = '''"""{title}"""

import numpy as np

from kvmbook.real import RealVm


def bits(number, *pages):
    bitmap = np.zeros(number, bool)
    bitmap[list(pages)] = True
    return bitmap


with RealVm({vcpus}, page_size="{page_size}") as vm:
{calls}    written = {{{differs}}}
    reported = {report}
    told = {{page for _, page in reported}} if isinstance(reported, list) else set(np.flatnonzero(reported).tolist())
    print("lost:", sorted(written - told))
'''


class Scribe:
    """Stands before a VM, or a part of it, hands each call on, and writes it down as a line of Python."""

    def __init__(
        self, vm: Any, path: str = "vm", lines: list[str] | None = None, called: set[str] | None = None
    ) -> None:
        self._vm, self._path = vm, path
        self.lines: list[str] = [] if lines is None else lines
        self.called: set[str] = set() if called is None else called

    def __getattr__(self, name: str) -> Any:
        value, path = getattr(self._vm, name), f"{self._path}.{name}"
        if callable(value):
            return self._writes(name, path, value)
        if isinstance(value, list):
            return [Scribe(item, f"{path}[{number}]", self.lines, self.called) for number, item in enumerate(value)]
        return None if value is None else Scribe(value, path, self.lines, self.called)

    def _writes(self, name: str, path: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            said = [_literal(arg) for arg in args] + [f"{key}={_literal(arg)}" for key, arg in named.items()]
            self.lines.append(f"{path}({', '.join(said)})")
            self.called.add(name)
            return function(*args, **named)

        return call


def _literal(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"bits({', '.join(map(str, [value.size, *np.flatnonzero(value).tolist()]))})"
    return hex(value) if isinstance(value, int) and not isinstance(value, bool) and value > 0xFF else repr(value)
