"""The panel of chapter 15: one run, asked of the model and of a machine, answer beside answer."""

from __future__ import annotations

from kvmbook.real import Machine, recorded
from kvmbook.scenes import ASKED, MODELS, Beside, SideBySide, side_by_side
from kvmbook.views.drawing import INK, LOOK, LOST, Picture, block, box, svg, text
from kvmbook.views.panel import Panel, View

SIZE, ROW, TOP = 15, 27, 46
CALL, ANSWER, STATE = 8, 136, 164  # widths of the columns; where the calls begin
MODEL_AT, MACHINE_AT, SPTE_AT, TLB_AT = 316, 496, 650, 824  # where the others begin
WIDTH = TLB_AT + STATE + 4
NARROW_ROW, NARROW_WIDTH, NARROW_TOP = 92, 370, 92  # in the narrow form a call has three lines
LOW_NAMES, LOW_STATES = (0, 186), (42, 218, 136)  # there: names of SPTE and TLB; their boxes, and the width of these
MARKS = {True: "=", False: "≠", None: ""}


def _call(row: Beside) -> str:
    """What is called; with a cross where the model loses the write."""
    said = f"{row.call} ✕ lost" if row.lost else row.call
    return text(0, 0, said, size=SIZE, anchor="start", bold=True, fill=LOST if row.lost else "")


def _answers(row: Beside) -> list[str]:
    """What the model says, what the machine says, and whether that is the same."""
    differ, parts = row.agree is False, list[str]()
    for at, said in ((0, row.model), (MACHINE_AT - MODEL_AT, row.machine)):
        if differ:
            parts.append(
                box(at, -18, ANSWER, 25, "none", stroke=LOST, extra=' stroke-width="2.5" stroke-dasharray="6 3"')
            )
        shown = "not asked" if said is None else said
        parts.append(text(at + ANSWER / 2, 0, shown, size=SIZE, bold=differ, italic=said is None))
    middle = (MACHINE_AT - MODEL_AT + ANSWER) / 2
    return [*parts, text(middle, 0, MARKS[row.agree], size=SIZE, bold=True, fill=LOST if differ else "")]


def _states(row: Beside, before: Beside | None, spte_at: float, tlb_at: float, width: float) -> list[str]:
    """What the model alone can show: SPTE and TLB. A broken frame: the TLB allows what the SPTE does not."""
    if not row.spte:
        return [text(STATE, 0, "the run has ended", size=SIZE, italic=True)]
    parts = list[str]()
    was = (before.spte, before.tlb) if before else ("", "")
    for at, said, old in ((spte_at, row.spte, was[0]), (tlb_at, row.tlb, was[1])):
        fill, changed = LOOK[said][0], said != old
        stale = row.stale and at == tlb_at
        frame = ' stroke-width="3" stroke-dasharray="6 3"' if stale else f' stroke-width="{3 if changed else 1}"'
        parts.append(box(at, -18, width, 25, fill, stroke=LOST if stale else "currentColor", extra=frame))
        ink = INK if fill != "none" else ""
        parts.append(text(at + width / 2, 0, said, size=SIZE, bold=changed, fill=ink))
    return parts


def _headings() -> list[str]:
    said = ("call", CALL, "start"), ("model", MODEL_AT + ANSWER / 2, ""), ("machine", MACHINE_AT + ANSWER / 2, "")
    inside = ("SPTE", SPTE_AT + STATE / 2, ""), ("TLB", TLB_AT + STATE / 2, "")
    wide = [text(x, 36, word, size=SIZE, anchor=anchor, bold=True) for word, x, anchor in (*said, *inside)]
    wide += [
        text((MODEL_AT + MACHINE_AT + ANSWER) / 2, 14, "seen from outside", size=SIZE),
        text((SPTE_AT + WIDTH) / 2, 14, "inside: the model only", size=SIZE),
    ]
    lines = ("call", "model's answer = machine's answer", "SPTE, TLB: the model only")
    low = [text(8, 18 + 22 * n, line, size=SIZE, anchor="start", bold=True) for n, line in enumerate(lines)]
    return [block(wide, look="wide"), block(low, look="narrow")]


def _row(number: int, row: Beside, before: Beside | None) -> str:
    y, low = TOP + 20 + number * ROW, NARROW_TOP + number * NARROW_ROW
    named = zip(("SPTE", "TLB"), LOW_NAMES, strict=True) if row.spte else ()
    names = [text(x, 0, name, size=SIZE, anchor="start") for name, x in named]
    parts = [
        block([_call(row)], (CALL, y), (8, low)),
        block(_answers(row), (MODEL_AT, y), (24, low + 28)),
        block(_states(row, before, 0, TLB_AT - SPTE_AT, STATE - 6), (SPTE_AT, y), look="wide"),
        block([*names, *_states(row, before, *LOW_STATES)], (8, low + 58), look="narrow"),
    ]
    return block(parts, moment=number)


def _sentence(row: Beside) -> str:
    """A call in words."""
    states = f" In the model the SPTE is {row.spte}, the TLB {row.tlb}." if row.spte else ""
    states += " It has lost that write." * row.lost
    if row.model is None or row.machine is None:
        who, said = ("machine", row.machine) if row.model is None else ("model", row.model)
        return f"{_capital(row.call)}: only the {who} is asked, and says {said}.{states}"
    if row.agree:
        return f"{_capital(row.call)}: both say {row.model}.{states}"
    return f"{_capital(row.call)}: the model says {row.model}, the machine {row.machine}.{states}"


def _capital(said: str) -> str:
    return said[0].upper() + said[1:]


def beside_picture(seen: SideBySide) -> Picture:
    """Calls from top to bottom; beside each what the model and the machine answer, and the model's SPTE and TLB."""
    befores = [None, *seen.rows]
    parts = [*_headings(), *(_row(n, row, befores[n]) for n, row in enumerate(seen.rows))]
    told = [_sentence(row) for row in seen.rows]
    alt = f"{beside_readout(seen)} Call by call: {' '.join(told)}"
    count = len(seen.rows)
    return Picture(
        svg(WIDTH, TOP + count * ROW + 2, alt, parts, (NARROW_WIDTH, NARROW_TOP + count * NARROW_ROW - 16)), alt, told
    )


def beside_readout(seen: SideBySide) -> str:
    """Whether they agree; and what the model knows beyond that."""
    differ = [row for row in seen.rows if row.agree is False]
    ended = next((row for row in seen.rows if row.agree is None), None)
    lost = "In the model a write is lost." if seen.missed else "In the model no write is lost."
    if differ:
        row = differ[0]
        where = f'They differ at "{row.call}": the model says {row.model}, the machine {row.machine}.'
        return f"{where} {'The machine cannot run this to its end. ' * (ended is not None)}{lost}"
    if seen.missed:
        lost = "In the model you see why."
    found = ": memory has changed, and no report names it" * seen.missed
    return f"Both say the same, {len(seen.rows)} times{found}. {lost}"


def model_beside_machine(machine: Machine | None = None) -> Panel:
    """Chapter 15: eight runs, in three models and on a machine; the recorded one, if none is given."""
    there = machine or recorded()

    def show(run: str, model: str) -> View:
        seen = side_by_side(run, model, there)
        return View(beside_picture(seen), beside_readout(seen))

    return Panel("Model and machine", {"run": list(ASKED), "the model is of": list(MODELS)}, show)
