"""What the emulator's machine is to run: the twelve cells, and the losses of later kernels with a control each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from kvmbook.model import Hardware, Kernel
from kvmbook.real import PAGES_WRITTEN, REPAIRS, Cell, Loss, Turn
from kvmbook.search import INTERRUPTED, Call, Cleared, Configuration, Litmus, Slot, loses, read_litmus
from tools.real_bug.packages import run

HERE = Path(__file__).parent
REPORTS = HERE.parent.parent / "book/reports"
PARAMETERS = "/sys/module/kvm/parameters"
CELLS, SIGNAL = "twelve_cells", "reset-at-a-signal"
BORDER = Slot(0x3FF, 513, (0, 1), "2M")  # its second page begins a 2M page


class Program(NamedTuple):
    """What it shows, its C file without the suffix, the parameters of KVM that it needs, and the run that it plays, if the
    release has all calls of it."""

    shows: str
    name: str
    parameters: dict[str, str]
    litmus: Litmus | None = None

    @property
    def repaired(self) -> bool:
        return self.parameters["repairs"] == "1"


def programs(release: str, hardware: Hardware) -> list[Program]:
    """The losses, each followed by its control, and all again with the repairs. What is expected of a run is for the model to
    say: `Litmus.lost`, on the kernel without repairs."""
    border = Configuration(Kernel.of(release), hardware, manual=3, slot=BORDER)
    rings = Configuration(Kernel.of(release), hardware, ring=True)
    write, enable = Call("vCPU0", "writes", 1), Call("user space", "enables")
    made = []
    for splits in (False, True):
        for name, pages in ("clear-both", {0, 1}), ("clear-one", {1}):
            clear = Call("user space", "clears", cleared=Cleared.of(pages, border.slot.npages))
            litmus = _litmus(border.with_(eager_page_split=splits), write, enable, clear, write)
            shows = f"CLEAR of {clear.cleared}, eager_page_split={'NY'[splits]}"
            made.append(Program(shows, name, {"eager_page_split": "NY"[splits]}, litmus))
    for name, manual in ("ring-initially-set", 3), ("ring", 0):
        litmus = _litmus(rings.with_(manual=manual), write, enable, write)
        made.append(Program("a ring" + " with INITIALLY_SET" * bool(manual), name, {}, litmus))
    stopped = Call("user space", INTERRUPTED)
    run = enable, write, Call("user space", "harvests", ring=0), stopped, write
    litmus = _litmus(rings, *run) if rings.kernel.reset_stops_at_signal else None
    made.append(Program("a signal during RESET", SIGNAL, {}, litmus))
    return [
        program._replace(parameters={**program.parameters, "repairs": repairs}) for repairs in "01" for program in made
    ]


def _litmus(configuration: Configuration, *run: Call) -> Litmus:
    return Litmus(configuration, run, loses(configuration, run))


def loses_by_model(loss: Loss) -> bool:
    """Whether the model loses a write of the run that was recorded, with the repairs if they were on. A release that knows no
    stopped reset loses none by one."""
    if not loss.litmus:
        return False
    litmus = read_litmus(loss.litmus)
    kernel = litmus.configuration.kernel.with_(**REPAIRS) if loss.repaired else litmus.configuration.kernel
    return bool(loses(litmus.configuration.with_(kernel=kernel), litmus.run))


def compiled(where: Path, wanted: list[Program]) -> list[Path]:
    """The executables of these programs and of the twelve cells, in ``where``."""
    for program in wanted:
        own = program.name == SIGNAL or program.litmus is None
        text = (REPORTS / f"{program.name}.c").read_text() if own else program.litmus.to_selftest()
        (where / f"{program.name}.c").write_text(text)
    (where / f"{CELLS}.c").write_text((HERE / f"{CELLS}.c").read_text())
    names = sorted({CELLS, *(program.name for program in wanted)})
    for name in names:
        run("gcc", "-O2", "-static", "-pthread", "-o", str(where / name), str(where / f"{name}.c"))
    return [where / name for name in names]


# ---- the script that runs them, and what it prints -------------------------------------------------------------------

ROUNDS, LONG_ROUNDS = 20, 5
ENDS = "-- exit code: "


def begins(program: Program) -> str:
    return f"-- {program.shows}, repairs={program.parameters['repairs']}"


def commands(wanted: list[Program]) -> list[str]:
    """The lines of shell that run the programs, and then the cells."""
    lines = []
    for program in wanted:
        lines += [f"echo {value} >{PARAMETERS}/{name}" for name, value in program.parameters.items()]
        lines += [
            f'echo "{begins(program)}"',
            f"/{program.name} {LONG_ROUNDS if program.name == SIGNAL else ROUNDS}",
            f'echo "{ENDS}$?"',
        ]
    return [*lines, f"/{CELLS}"]


CELL = re.compile(r"cell flush=(.+) aged=(\d) written=(\d+) reported=(\d+) flushes=(\d+) idle=(\d+) stays=(\d+)")
LOST_IN = re.compile(r"lost in (\d+) of (\d+) rounds")
PASSED = re.compile(r"PASS: .*\b(?:in|of) (\d+) rounds")


def cells_in(said: str) -> tuple[Cell, ...]:
    """The cells in what a boot printed. ValueError if the host could not age a page that it should have aged."""
    rounds: dict[tuple[str, bool], list[Turn]] = {}
    for flush, aged, *numbers in CELL.findall(said):
        written, reported, flushes, idle, _ = map(int, numbers)
        if idle != PAGES_WRITTEN * (aged == "1"):
            raise ValueError(f"flush {flush}: {idle} pages were idle after ageing")
        rounds.setdefault((flush, aged == "1"), []).append(Turn(written, reported, flushes))
    return tuple(Cell(*key, tuple(made)) for key, made in rounds.items())


def losses_in(said: str, wanted: list[Program]) -> tuple[Loss, ...]:
    """What became of the programs. ValueError for one that was not played to its end."""
    made = []
    for program in wanted:
        _, _, rest = said.partition(f"{begins(program)}\n")
        printed, _, end = rest.partition(ENDS)
        if end[:1] not in ("0", "1"):
            raise ValueError(f"{begins(program)}: exit code {end[:3].strip()}: {printed[-300:].strip()}")
        lost, rounds = LOST_IN.findall(printed)[0] if end[0] == "1" else (0, PASSED.findall(printed)[0])
        made.append(Loss(program.shows, program.repaired, int(rounds), int(lost), str(program.litmus or "")))
    return tuple(made)
