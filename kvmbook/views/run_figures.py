"""Pictures of runs: one run as a sequence diagram, and all runs of one page as a graph on which one run is lit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import hypot

from kvmbook.model import Hardware, Kernel
from kvmbook.scenes import Graph, Now, Run, RunMoment, graph_of, label, run_of, what_of
from kvmbook.search import Action, Grain, Result
from kvmbook.views.drawing import INK, LETTER, LOOK, LOST, Picture, block, box, svg, text

LOSS = "✕ lost: nobody will know"
LOSSES = {"the write is lost": LOSS}
LINE = 'stroke="currentColor" fill="none"'
LIT = f'stroke="{LOST}" stroke-width="4" fill="none"'
DASHED, PALE = ' stroke-width="3" stroke-dasharray="6 3"', ' stroke-opacity="0.5"'

# ---- a run as a sequence diagram -------------------------------------------------------------------------------------

ROW, TOP, SIZE = 20, 40, 15
SAID, LANE, ROOM = 330, 56, 34  # widths: of what a step is called, of an actor's lane; letters that a name may have
STATE, BIT, GAP = 130, 40, 6  # widths of a column for a state, of one for a bit, and between two
PASSES, STALE = ("clear_dirty", "write_protect"), "stale: "
HERE = {"TLB": "lets it pass", "SPTE": "walk", "KVM": "fault"}  # said in the column where an access is answered


@dataclass(frozen=True)
class Column:
    """How one thing changes: its state in words at the start and after each step. ``about``: whose TLB and which page, or
    "SPTE" and which page; ``x`` counts from the first column."""

    title: tuple[str, str]
    about: tuple[str, int]
    x: float
    width: float
    states: tuple[str, ...]

    @property
    def middle(self) -> float:
        return self.x + self.width / 2

    def begins(self, row: int) -> bool:
        """Whether another state begins with this row; the start is row 0."""
        return row == 0 or self.states[row] != self.states[row - 1]

    def ends(self, row: int) -> bool:
        """Whether a state ends with this row."""
        return row + 1 == len(self.states) or self.begins(row + 1)

    def changes(self, row: int) -> bool:
        """Whether that row's step writes here; becoming stale is not a change."""
        return row > 0 and self.states[row].removeprefix(STALE) != self.states[row - 1].removeprefix(STALE)


def _columns(run: Run) -> list[Column]:
    """SPTE, then the TLB of each vCPU, then the log, page by page."""
    nows = [run.start, *(moment.now for moment in run.moments)]
    columns: list[Column] = []

    def add(title: str, under: str, about: tuple[str, int], width: float, states: Iterable[str]) -> None:
        x = columns[-1].x + columns[-1].width + GAP if columns else 0
        columns.append(Column((title, under), about, x, width, tuple(states)))

    numbers, vcpus = run.numbers or tuple(range(len(run.start.pages))), len(run.start.faults)
    for place, page in enumerate(numbers):
        views = [now.pages[place] for now in nows]
        add("SPTE of", f"page {page}", ("SPTE", page), STATE, (view.spte for view in views))
        for v in range(vcpus):
            seen = [STALE * view.stale[v] + view.tlb[v] for view in views]
            add("TLB of", f"vCPU{v}" + f", page {page}" * (len(numbers) > 1), (f"vCPU{v}", page), STATE, seen)
        bits = ("PML" if any(view.pml) and view.bit != "1" else view.bit for view in views)
        add("log" if run.log == "bit" else "", run.log, ("log", page), BIT, bits)
    return columns


def _piece(column: Column, row: int) -> str:
    """A column in one row: a piece of a bar in the state's colour; its name where the bar begins."""
    state = column.states[row]
    fill, stale = LOOK.get(state.removeprefix(STALE), ("none", ""))[0], state.startswith(STALE)
    begins, ends = column.begins(row), column.ends(row)
    top, bottom = 1.5 * begins, ROW - 1.5 * ends
    high = bottom - top + 0.6 * (not ends)  # pieces overlap a little: no seams
    parts = [f'<rect x="{column.x:g}" y="{top:g}" width="{column.width:g}" height="{high:g}" fill="{fill}"/>']
    left, right = column.x, column.x + column.width
    border = f"M{left:g} {bottom:g}V{top:g}" + (f"H{right:g}" if begins else f"M{right:g} {top:g}")
    border += f"V{bottom:g}" + f"H{left:g}" * ends
    look = f'stroke="{LOST}"{DASHED}' if stale else f'stroke="currentColor"{PALE}'
    parts.append(f'<path d="{border}" fill="none" {look}/>')
    if begins:
        ink = INK if fill != "none" else ""
        parts.append(text(column.middle, 15, state, size=SIZE, bold=stale or column.changes(row), fill=ink))
    return block(parts, look="" if begins else "same")


def _said(moment: RunMoment, before: Now) -> str:
    """The step's name and, where there is room, what came of it."""
    said, note = what_of(moment.action), moment.note
    if moment.action.what.startswith(PASSES) and moment.now.pages == before.pages:
        note = note or "changes no SPTE"
    note = "⟳ TLB flush" if moment.flushed else note
    if moment.now.logging != before.logging:
        note = "" if moment.now.logging == "enabling" else f"logging is {moment.now.logging}"
    return f"{said}: {note}" if note and len(said) + len(note) <= ROOM else said


def _mark(who: str, lane: int, reaches: Sequence[Column], left: float) -> list[str]:
    """Who acts, and arrows to what that changes, or to where an access is answered."""
    x = lane * LANE + LANE / 2
    said = {"v": "guest", "L": "L2", "K": "KVM", "h": "host", "u": "ioctl"}[who[0]]
    look = f'rx="{8 if said in ("guest", "L2") else 2}" fill="{LOOK["read-only"][0]}" stroke="currentColor"'
    parts = [f'<rect x="{x - 24:g}" y="1.5" width="48" height="17" {look}/>', text(x, 15, said, size=SIZE, fill=INK)]
    begin = x + 24
    for column in reaches:
        parts.append(f'<path d="M{begin:g} 10H{left + column.x:g}m-7 -4l7 4l-7 4" {LINE} stroke-width="2"/>')
        begin = left + column.x + column.width
    return parts


def _answered_at(moment: RunMoment, columns: Sequence[Column]) -> Column | None:
    """The column of the TLB entry that lets an access pass, or else of the SPTE; None if the step is no access."""
    if not moment.answered:
        return None
    about = (moment.action.who if moment.answered == "TLB" else "SPTE", moment.action.page or 0)
    return next(column for column in columns if column.about == about)


def _over(moment: RunMoment, row: int, columns: Sequence[Column], reaches: Sequence[Column], lost: bool) -> list[str]:
    """What lies over the columns in a row: where an access is answered, the arrow where it passes, a flush."""
    parts, answered = list[str](), _answered_at(moment, columns)
    if answered and not answered.begins(row):
        ink = INK if LOOK.get(answered.states[row].removeprefix(STALE), ("none", ""))[0] != "none" else ""
        parts.append(text(answered.middle, 15, HERE[moment.answered], size=SIZE, fill=ink, italic=True))
    look = f'stroke="{INK if lost else "currentColor"}" stroke-width="2" stroke-dasharray="2 5"'
    for column in columns:
        if reaches and column.x < reaches[-1].x and column not in reaches and not column.begins(row):
            parts.append(f'<path d="M{column.x:g} 10h{column.width:g}" {look}/>')
    if moment.flushed:
        tlbs = [column for column in columns if column.about[0].startswith("vCPU")]
        parts.append(f'<path d="M{tlbs[0].x - 3:g} 0H{tlbs[-1].x + tlbs[-1].width + 3:g}" {LINE} stroke-width="5"/>')
    return parts


def _names(moment: RunMoment, before: Now, row: int, narrow: float, bold: bool) -> list[str]:
    """What a step is called: beside the lanes, or in full in the narrow form, which has no lanes."""
    name = f"{row}. {label(moment.action)}"
    size = min(SIZE, int(narrow / LETTER / len(name)))
    return [
        block([text(26, 15, str(row), size=SIZE, anchor="end")], look="wide"),
        block([text(34, 15, _said(moment, before), size=SIZE, anchor="start", bold=bold)], look="wide"),
        block([text(4, 15, name, size=size, anchor="start")], look="narrow"),
    ]


def _row(run: Run, row: int, columns: Sequence[Column], left: float) -> list[str]:
    """One row: the step's name, who acts with arrows, and all columns. In the narrow form the name stands above these."""
    pieces = [_piece(column, row) for column in columns]
    if row == 0:
        parts = [text(34, 15, "at the start", size=SIZE, anchor="start")]
        return [block(parts, (0, TOP), (-30, TOP)), block(pieces, (SAID + left, TOP), (4, TOP + ROW))]
    moment, before = run.moments[row - 1], run.moments[row - 2].now if row > 1 else run.start
    lost, answered = moment.now.lost and not before.lost, _answered_at(moment, columns)
    passes = lost and moment.answered == "TLB"  # it goes through the TLB, and there it ends
    reaches = [column for column in columns if column is answered or (column.changes(row) and not passes)]
    lane = run.lane(moment.action.who)
    arrows = _mark(moment.action.who, lane, reaches, left)
    if lost:
        arrows = [part.replace('"currentColor"', f'"{LOST}"') for part in arrows]
    bold = lost or moment.action.what.startswith("flush")
    y, stacked = TOP + row * ROW, TOP + row * 2 * ROW
    return [
        block(_names(moment, before, row, columns[-1].x + columns[-1].width, bold), (0, y), (0, stacked)),
        block(arrows, (SAID, y), look="wide"),
        block([*pieces, *_over(moment, row, columns, reaches, lost)], (SAID + left, y), (4, stacked + ROW)),
    ]


def _headings(run: Run, columns: Sequence[Column], left: float, rows: int) -> list[str]:
    """Who may act, each with a lane, and what the columns are of."""
    lanes, titles = [], []
    for lane, actor in enumerate(run.actors):
        x, (first, _, second) = lane * LANE + LANE / 2, actor.partition(" ")
        lanes += [text(x, 15, first, size=SIZE), text(x, 33, second, size=SIZE)]
        lanes.append(f'<path d="M{x:g} {TOP}V{TOP + rows * ROW:g}" {LINE} stroke-opacity="0.3"/>')
    for column in columns:
        titles.append(text(column.middle, 15, column.title[0], size=SIZE, bold=True))
        titles.append(text(column.middle, 33, column.title[1], size=SIZE, bold=True))
    return [block(lanes, (SAID, 0), look="wide"), block(titles, (SAID + left, 0), (4, 0))]


def trace_picture(told: Result | Run) -> Picture:
    """A run step by step from top to bottom: who acts, and what that makes of the SPTE, of each TLB and of the log. Of a
    search's result it is the shortest run that loses a write. Raises ValueError if there is none."""
    run = run_of(told) if isinstance(told, Result) else told
    columns, left = _columns(run), len(run.actors) * LANE + 9
    rows, lost = len(run.moments) + 1, any(moment.now.lost for moment in run.moments[-1:])
    wide = columns[-1].x + columns[-1].width + 8
    right, bottom, stacked = SAID + left + wide, TOP + rows * ROW, TOP + rows * 2 * ROW
    parts = _headings(run, columns, left, rows)
    for row in range(rows):
        parts.append(block(_row(run, row, columns, left), moment=row))
    if lost:
        for x, y, look in ((right / 2, bottom, "wide"), (wide / 2, stacked, "narrow")):
            said = [text(x, y + 19, LOSSES.get(run.loss, f"✕ {run.loss}"), size=17, bold=True, fill=LOST)]
            said.append(box(2, y - ROW + 1, 2 * x - 4, ROW + 26, "none", stroke=LOST, extra=' stroke-width="3"'))
            parts.append(block(said, moment=rows - 1, look=look))
    alt, below = run.told(), 29 if lost else 4
    size, narrow = (right, bottom + below), (wide, stacked + below)
    return Picture(svg(*size, alt, parts, narrow), alt, ["At the start.", *(f"{said}." for said in run.steps())])


# ---- all runs of one page --------------------------------------------------------------------------------------------

Spot = tuple[str, str, str]  # board, SPTE, TLB
BOARDS = {"off": "logging off", "enabling": "enabling", "on": "logging on", "noted": "logging on, the log has the page"}
BEFORE = ("off", "enabling")
NOWHERE: Spot = ("lost", "", "")
SPTES = ("not mapped", "writable", "clean", "access-tracked", "write-protected", "read-only")
TLBS = ("empty", "write-protected", "clean", "writable")
WIDE, HIGH, DOWN, PANEL, HEAD = 84, 40, 68, 294, 74


def spot_of(now: Now) -> Spot:
    """Where a state with one page and one vCPU is drawn: states that agree in what matters fall on one spot."""
    page = now.pages[0]
    if page.lost:
        return NOWHERE
    noted = now.logging == "on" and (page.bit == "1" or page.taken or any(page.pml))
    return "noted" if noted else now.logging, page.spte, page.tlb[0]


class _Board:
    """Where everything is. ``place``: the middle of each spot's box. ``stacked``: the boards stand below each other, as in
    the narrow form."""

    def __init__(self, graph: Graph, stacked: bool = False) -> None:
        self.stacked = stacked
        self.spots = [spot_of(now) for now in graph.states]
        met = set(self.spots)
        self.sptes = [spte for spte in SPTES if any(spot[1] == spte for spot in met)]
        self.tlbs = [tlb for tlb in TLBS if any(spot[2] == tlb for spot in met)]
        high = len(self.sptes) * DOWN
        tops = {name: HEAD + stacked * number * (high + HEAD) for number, name in enumerate(("off", "enabling", "on"))}
        self.lost_y = tops["on"] + high + 20
        tops["noted"] = self.lost_y + 70
        below = [spte for spte in self.sptes if any(spot[:2] == ("noted", spte) for spot in met)]
        rows = {board: below if board == "noted" else self.sptes for board in BOARDS}
        self.left = {board: 6 + min(n, 2) * (PANEL + 4) * (not stacked) for n, board in enumerate(BOARDS)}
        self.frame = {board: (tops[board] - 52 * (board != "noted"), len(rows[board])) for board in BOARDS}
        self.place: dict[Spot, tuple[float, float]] = {}
        for board, spte, tlb in sorted(met - {NOWHERE}):
            x = self.left[board] + (self.tlbs.index(tlb) + 0.5) * PANEL / len(self.tlbs)
            self.place[board, spte, tlb] = x, tops[board] + (rows[board].index(spte) + 0.5) * DOWN
        self.tops, self.height = tops, tops["noted"] + len(below) * DOWN + 12
        self.words_y = self.height + 20 if stacked else self.lost_y + 10  # where the legend begins
        steps = {(a, self.spots[to]) for a, edges in zip(self.spots, graph.edges, strict=True) for _, to in edges}
        ahead = [(a, b) for a, b in steps if NOWHERE != a != b and (a[0] in BEFORE or b[0] not in BEFORE)]
        self.edges = sorted((a, b) for a, b in ahead if not stacked or a[0] == b[0])

    def below(self, run: Sequence[Action]) -> float:
        """What the legend and the steps of a run take below all boards."""
        return max(0.0, self.words_y + 74 + 20 * len(run) - self.height)

    def ends(self, a: Spot, b: Spot) -> tuple[float, float, float, float]:
        """From the border of one box to the border of another, along the line between their middles."""
        xa, ya = self.place[a]
        xb, yb = self.place.get(b, (xa, self.lost_y + 18))
        dx, dy = xb - xa, yb - ya
        cut = min((WIDE / 2 + 2) / abs(dx) if dx else 1, (HIGH / 2 + 2) / abs(dy) if dy else 1)
        return xa + dx * cut, ya + dy * cut, xb - dx * cut, yb - dy * cut

    def connector(self, a: Spot, b: Spot) -> tuple[str, float, float]:
        """A lit arrow from box to box: its path, and where its number goes. Above the boxes if it runs along a row."""
        if self.stacked and a[0] != b[0]:  # along the boards' right side; "lost" is as wide as a board
            side, end = PANEL + 26, PANEL + 6 if b == NOWHERE else self.place[b][0] + WIDE / 2
            ya, yb = self.place[a][1], self.lost_y + 18 if b == NOWHERE else self.place[b][1]
            path = f"M{self.place[a][0] + WIDE / 2:.1f} {ya:.1f}H{side}V{yb:.1f}H{end + 2:.1f}" + _head(-1, 0)
            return path, side, (ya + yb) / 2
        xa, ya, xb, yb = self.ends(a, b)
        if a[0] != b[0] != NOWHERE[0] and self.place[a][1] == self.place[b][1]:
            (xa, ya), (xb, _) = self.place[a], self.place[b]
            return f"M{xa + 14:.1f} {ya - 21:g}v-12H{xb - 14:.1f}v10" + _head(0, 1), (xa + xb) / 2, ya - 33
        aside = 16 * (abs(xa - xb) < 1)  # a short vertical line must not hide behind its number
        path = f"M{xa:.1f} {ya:.1f}L{xb:.1f} {yb:.1f}" + _head(xb - xa, yb - ya)
        return path, (xa + xb) / 2 - aside, (ya + yb) / 2


def _head(dx: float, dy: float) -> str:
    """The end of a path that arrives in that direction: an arrow head."""
    x, y = 9 * dx / hypot(dx, dy), 9 * dy / hypot(dx, dy)
    return f"m{-x - y * 0.7:.1f} {-y + x * 0.7:.1f}l{x + y * 0.7:.1f} {y - x * 0.7:.1f}l{-x + y * 0.7:.1f} {-y - x * 0.7:.1f}"


def _lines(said: str) -> list[str]:
    """A state's name on one line or two."""
    cut = max(said.find("-"), said.find(" ")) + 1
    return [said[:cut].strip(), said[cut:]] if cut else [said]


def _boards_parts(board: _Board) -> list[str]:
    """The boards, the boxes, and thin lines for all steps between boxes."""
    parts = []
    for name, title in BOARDS.items():
        (top, rows), left = board.frame[name], board.left[name]
        bottom = board.tops[name] + rows * DOWN
        parts.append(box(left, top - 20, PANEL, bottom - top + 22, "none", extra=' stroke-opacity="0.35"'))
        parts.append(text(left + PANEL / 2, top, title, bold=True))
        for n, tlb in enumerate(board.tlbs if name != "noted" else ()):
            x = left + (n + 0.5) * PANEL / len(board.tlbs)
            parts += [text(x, top + 20 + 15 * k, line, size=12) for k, line in enumerate(["TLB", *_lines(tlb)])]
    for a, b in board.edges:
        xa, ya, xb, yb = board.ends(a, b)
        xm, ym = (xa + xb) / 2 + (yb - ya) * 0.06, (ya + yb) / 2 - (xb - xa) * 0.06
        parts.append(f'<path d="M{xa:.1f} {ya:.1f}Q{xm:.1f} {ym:.1f} {xb:.1f} {yb:.1f}" {LINE} stroke-opacity="0.25"/>')
    for spot, (x, y) in board.place.items():
        fill, stale = LOOK[spot[1]][0], spot[2] == "writable" != spot[1]
        stroke, extra = (LOST, DASHED) if stale else ("currentColor", "")
        parts.append(box(x - WIDE / 2, y - HIGH / 2, WIDE, HIGH, fill, stroke=stroke, extra=extra))
        ink, lines = INK if fill != "none" else "", _lines(spot[1])
        parts += [text(x, y + 12 - 8 * len(lines) + 15 * k, line, size=12, fill=ink) for k, line in enumerate(lines)]
    x, y = board.left["on"] + PANEL / 2, board.lost_y
    if NOWHERE in board.spots:
        parts.append(box(x - PANEL / 2, y, PANEL, 36, LOOK["missed"][0], stroke=LOST, extra=' stroke-width="3"'))
        return [*parts, text(x, y + 24, LOSS, size=16, bold=True, fill=INK)]
    return [*parts, text(x, y + 24, "no run loses a write", size=16, bold=True)]


def _badge(x: float, y: float, said: str) -> list[str]:
    wide = 12 + 8 * len(said)
    around = (
        f'<rect x="{x - wide / 2:.1f}" y="{y - 10:.1f}" width="{wide}" height="20" rx="10" fill="{LOOK["missed"][0]}"/>'
    )
    return [around, text(round(x, 1), round(y + 5, 1), said, size=13, bold=True, fill=INK)]


def _ring(x: float, y: float, wide: float = WIDE, high: float = HIGH) -> str:
    """Where the run is at a moment: seen only while that moment is lit."""
    extra = ' stroke-width="4" class="kvmbook-here" visibility="hidden"'
    return box(x - wide / 2 - 5, y - high / 2 - 5, wide + 10, high + 10, "none", extra=extra)


def _lit_parts(board: _Board, graph: Graph, lit: Sequence[Action]) -> list[str]:
    """The run as a thick line with the numbers of its steps, and those steps in words; one moment a step, after the start."""
    spots = [board.spots[state] for state in graph.walk(lit)]
    places = {**board.place, NOWHERE: (board.left["on"] + PANEL / 2, board.lost_y + 18)}
    room = {NOWHERE: (PANEL, 36)}
    paths, marks, stays = [], [block([_ring(*places[spots[0]])], moment=0)], list[int]()
    for number, (action, (a, b)) in enumerate(zip(lit, pairwise(spots), strict=True), 1):
        line, stay = board.words_y + 64 + 20 * number, ": stays in its spot" * (a == b and not board.stacked)
        mark = [text(34, line, str(number), size=13, anchor="end")]
        mark += [text(42, line, label(action) + stay, size=13, anchor="start"), _ring(*places[b], *room.get(b, ()))]
        stays = [*stays, number] if a == b else []
        if a != b and NOWHERE not in spots[:number]:
            path, x, y = board.connector(a, b)
            paths.append(block([f'<path d="{path}" {LIT}/>'], moment=number))
            mark += _badge(x, y, str(number))
        elif a == b != NOWHERE and spots[number + 1 : number + 2] != [b]:
            said = "-".join(dict.fromkeys([str(stays[0]), str(stays[-1])]))
            mark += _badge(places[b][0], places[b][1] + HIGH / 2 + 6, said)
        marks.append(block(mark, moment=number))
    return paths + marks


def page_graph_picture(hardware: Hardware, kernel: Kernel, lit: Sequence[Action] | None = None) -> Picture:
    """All runs of one page and one vCPU, an access being one step. Each spot stands for the states that agree in the phase of
    logging, the SPTE, the TLB, and whether the log has the page; each line for steps between them. ``lit``: the run to
    show, by default a shortest one that loses a write. Raises ValueError for a run that is not possible."""
    graph = graph_of(hardware, kernel, grain=Grain.ACCESS)
    run = graph.shortest_loss() or () if lit is None else lit
    passed = [graph.states[state] for state in graph.walk(run)]
    wide, narrow = _Board(graph), _Board(graph, stacked=True)
    said = f"{len(graph.states)} states in {len(set(wide.spots))} spots"
    told = [said, "a box: the SPTE; broken: the TLB allows more", "not drawn: steps that switch logging off"]
    told += [f"lit: a run of {len(run)} steps"] * bool(run)
    ends = "no run loses a write" if graph.distance[0] is None else f"a run of {graph.distance[0]} steps loses a write"
    steps = [f"{number}. {label(action)}" for number, action in enumerate(run, 1)]
    alt = f"One page and one vCPU: {said}; {ends}. {'; '.join(steps)}".strip()
    moments = ["At the start.", *(f"{step}: {_where(now)}." for step, now in zip(steps, passed[1:], strict=True))]
    parts = [block(_whole(wide, graph, run, told), look="wide"), block(_whole(narrow, graph, run, told), look="narrow")]
    sizes = [
        (board.left["on"] + PANEL + 6 + 34 * board.stacked, board.height + board.below(run)) for board in (wide, narrow)
    ]
    return Picture(svg(*sizes[0], alt, parts, sizes[1]), alt, moments if run else ())


def _whole(board: _Board, graph: Graph, run: Sequence[Action], told: Sequence[str]) -> list[str]:
    """The boards with the run, and what is told of them."""
    lines = [
        text(10, board.words_y + 20 * n, line, size=13, anchor="start", bold=n == 3) for n, line in enumerate(told)
    ]
    return [*_boards_parts(board), *_lit_parts(board, graph, run), *lines]


def _where(now: Now) -> str:
    """In which spot a state is, in words."""
    board, spte, tlb = spot_of(now)
    return f"{BOARDS[board]}, SPTE {spte}, TLB {tlb}" if board != NOWHERE[0] else "the write is lost"
