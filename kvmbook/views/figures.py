"""Pictures of scenes: a page's timeline, the fate of all pages, a plan of steps; and matplotlib figures of counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from kvmbook.scenes import Chance, Moment, Scene
from kvmbook.views.drawing import INK, LOOK, LOST, Picture, block, box, svg, text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# ---- a page's timeline -----------------------------------------------------------------------------------------------

COLUMN, LEFT = 150, 84
TLB_AT, SPTE_AT, KVM_AT, BELOW = 44, 94, 156, 168  # down from the top of a timeline: two cells, what KVM sees, its end
SIZE = 15
A_ROW = 2  # moments beside each other in the narrow form


def _cell(y: float, state: str, rights: str, stale: bool, changed: bool, lit: bool) -> str:
    """The SPTE or the TLB entry: its state in words, and its bits. A broken frame: stale; a thick one: changed. ``lit``: the
    moment is about it."""
    fill, middle = LOOK[state][0], COLUMN / 2 + 5
    frame = ' stroke-width="3"' + ' stroke-dasharray="6 3"' * stale if stale or changed else ' stroke-width="1"'
    parts = [box(12, y, COLUMN - 14, 42, fill, stroke=LOST if stale else "currentColor", extra=frame)]
    ink = INK if fill != "none" else ""
    if state in ("empty", "not mapped"):
        parts.append(text(middle, y + 26, state, size=SIZE))
    else:
        parts.append(text(middle, y + 18, "stale, " * stale + state, size=SIZE, bold=changed or stale, fill=ink))
        parts.append(text(middle, y + 36, rights, size=SIZE, fill=ink))
    return block(parts, look="" if lit else "same")


def _arrow(answered: str) -> list[str]:
    """How far down an access had to go."""
    end = {"TLB": TLB_AT + 21, "SPTE": SPTE_AT + 21, "KVM": KVM_AT - 5}[answered]
    line = f"M5 {TLB_AT - 6}V{end}h6m-5 -5l5 5l-5 5"
    look = 'stroke="currentColor" stroke-width="2"'
    return [f'<circle cx="5" cy="{TLB_AT - 9}" r="3" {look}/>', f'<path d="{line}" {look} fill="none"/>']


def _moment(moment: Moment, before: Moment | None) -> list[str]:
    """One column: who does what, the TLB entry, the SPTE, KVM, and where an access was answered."""
    tlb, spte = (moment.tlb, moment.tlb_rights, moment.stale), (moment.spte, moment.spte_rights)
    lost = moment.kvm.startswith("✕")
    tlb_new = before is None or tlb[:2] != (before.tlb, before.tlb_rights)
    spte_new = before is None or spte != (before.spte, before.spte_rights)
    return [
        text(COLUMN / 2 + 5, 16, moment.actor, size=SIZE),
        text(COLUMN / 2 + 5, 35, moment.action, size=SIZE, bold=True),
        *(_arrow(moment.answered) if moment.answered else []),
        _cell(TLB_AT, *tlb, tlb_new, tlb_new or moment.answered == "TLB"),
        _cell(SPTE_AT, *spte, False, spte_new, spte_new or moment.answered == "SPTE"),
        text(COLUMN / 2 + 5, KVM_AT, moment.kvm, size=SIZE, bold=lost or moment.flushed, fill=LOST if lost else ""),
    ]


def _row_names(page: int, row: int, below: float) -> str:
    """What the rows of a timeline are. The narrow form has several, each below the other; they come with their moments."""
    said = ("TLB of", TLB_AT + 18), ("vCPU 0", TLB_AT + 36), ("SPTE of", SPTE_AT + 18), (f"page {page}", SPTE_AT + 36)
    parts = [text(LEFT - 12, y, name, size=SIZE, anchor="end", bold=True) for name, y in (*said, ("KVM", KVM_AT))]
    at = (0, row * below)
    return block([block(parts, at, at, look="narrow" if row else "")], moment=row * A_ROW if row else None)


def timeline_parts(followed: int, moments: Sequence[Moment], below: float = BELOW) -> list[str]:
    """The TLB entry and the SPTE of page ``followed`` after each moment, side by side; in the narrow form two in a row, the
    rows ``below`` apart."""
    parts = [_row_names(followed, row, below) for row in range(-(-len(moments) // A_ROW))]
    for number, (before, moment) in enumerate(pairwise([None, *moments])):
        assert moment is not None
        at, narrow = number * COLUMN, (number % A_ROW * COLUMN, number // A_ROW * below)
        parts.append(block(_moment(moment, before), (LEFT + at, 0), (LEFT + narrow[0], narrow[1]), number))
    return parts


def narrow_size(moments: Sequence[Moment], below: float = BELOW) -> tuple[float, float]:
    """The size of a timeline's narrow form."""
    return LEFT + A_ROW * COLUMN + 6, -(-len(moments) // A_ROW) * below


def sentences(moments: Sequence[Moment]) -> list[str]:
    """A timeline in words, one sentence a moment."""
    passes = {
        "TLB": "The TLB lets it pass",
        "SPTE": "The CPU walks, and the SPTE lets it pass",
        "KVM": "The SPTE refuses",
    }
    said = []
    for m in moments:
        kvm = m.kvm.lstrip("✓✕⟳ ")
        told = f". {passes[m.answered]}; KVM: {kvm}." if m.answered else f": {kvm}."
        who = m.actor.replace("host", "The host").replace("user space", "User space").replace("both", "Both")
        said.append(f"{who} {m.action}{told} TLB: {'stale, ' * m.stale}{m.tlb}. SPTE: {m.spte}.")
    return said


def timeline_picture(scene: Scene) -> Picture:
    """The timeline alone, up to the write."""
    moments = scene.moments[:-1]
    told = sentences(moments)
    alt = f"Page {scene.followed}, {scene.pages[scene.followed]}. {' '.join(told)}"
    width = LEFT + len(moments) * COLUMN + 8
    return Picture(svg(width, BELOW, alt, timeline_parts(scene.followed, moments), narrow_size(moments)), alt, told)


def pages_parts(fates: Sequence[str], left: float, top: float, per_row: int = 8) -> list[str]:
    """The slot as a grid of pages, each with what became of its write."""
    parts = []
    for number, fate in enumerate(fates):
        x, y = left + number % per_row * 34, top + number // per_row * 34
        fill, mark = LOOK[fate]
        parts += [
            box(x, y, 30, 30, fill),
            text(x + 15, y + 21, mark, size=17, bold=True, fill=INK if fill != "none" else ""),
        ]
    return parts


def bars_parts(counts: Mapping[str, int], chosen: str, most: int, left: float, top: float) -> list[str]:
    """A bar for each count, the chosen one framed."""
    parts = []
    for number, (label, count) in enumerate(counts.items()):
        y, wide = top + number * 26, max(2, 170 * count / most)
        fill = LOOK["missed" if count else "reported"][0]
        parts.append(text(left - 8, y + 16, label, size=SIZE, anchor="end", bold=label == chosen))
        parts.append(box(left, y, wide, 20, fill, extra=f' stroke-width="{3 if label == chosen else 1}"'))
        parts.append(text(left + wide + 10, y + 16, str(count), size=SIZE, anchor="start", bold=True))
    return parts


def scene_picture(scene: Scene, counts: Mapping[str, int], chosen: str) -> Picture:
    """A scene: one page's timeline, the fate of each page, and the missed writes under every flush rule (``counts``)."""
    last, pages = len(scene.moments) - 1, len(scene.pages)
    fates = [text(4, 16, f"all {pages} pages, after the harvest", size=SIZE, anchor="start", bold=True)]
    fates += [*pages_parts(scene.pages, 4, 28), text(4, 116, "✓ reported   ✕ missed", size=SIZE, anchor="start")]
    bars = [text(4, 16, "missed writes, by flush rule", size=SIZE, anchor="start", bold=True)]
    bars += bars_parts(counts, chosen, pages, 140, 28)
    narrow, deep = narrow_size(scene.moments)
    parts = timeline_parts(scene.followed, scene.moments)
    parts.append(block(fates, (LEFT, BELOW + 12), (0, deep + 12), last))
    parts.append(block(bars, (LEFT + 2.5 * COLUMN, BELOW + 12), (0, deep + 150), last))
    told = sentences(scene.moments)
    alt = f"{scene.missed} of {pages} writes missed. Page {scene.followed}: {' '.join(told)}"
    size = LEFT + len(scene.moments) * COLUMN + 4, BELOW + 142
    return Picture(svg(*size, alt, parts, (narrow, deep + 284)), alt, told)


# ---- a plan ----------------------------------------------------------------------------------------------------------

STEP_SAYS = {
    "kvm_mmu_update_cpu_dirty_logging": "switch PML on or off in every vCPU",
    "zap_collapsible_rmap_sptes": "drop 4K SPTEs that could be huge again",
    "zap_collapsible_tdp_sptes": "drop tables where a huge page fits, and flush",
    "split_huge_rmap_sptes": "split huge pages of nested guests to 4K",
    "split_huge_tdp_sptes": "split huge pages to 4K",
    "clear_dirty_rmap": "clear D of 4K SPTEs, rmap side",
    "clear_dirty_tdp": "clear D of SPTEs that map pages, TDP side",
    "write_protect_rmap": "clear W of SPTEs that map pages, rmap side",
    "write_protect_tdp": "clear W of SPTEs that map pages, TDP side",
    "flush_if_owed": "flush, if the pass asked for it",
    "flush_always": "flush, always",
}


STEP_WIDTH, STEP = 400, 52


def plan_parts(plan: Sequence[str], title: str) -> list[str]:
    """The steps of one plan, from top to bottom, flushes framed."""
    middle, by_d = STEP_WIDTH / 2, any(name.startswith("clear_dirty") for name in plan)
    parts = [text(middle, 17, title, bold=True, size=16)]
    for number, name in enumerate(plan or ["(nothing)"]):
        y, flush = 26 + number * STEP, name.startswith("flush")
        fill = LOOK["reported" if name == "flush_always" else "missed"][0] if flush else "none"
        parts.append(box(0, y, STEP_WIDTH, 39, fill, extra=' stroke-width="2"' if flush else ""))
        ink = INK if flush else ""
        parts.append(text(middle, y + 16, name, bold=True, size=SIZE, fill=ink))
        says = STEP_SAYS.get(name, "no page is touched, no TLB is flushed")
        says = (
            says.replace("SPTEs that map pages", "huge pages only")
            if by_d and name.startswith("write_protect")
            else says
        )
        parts.append(text(middle, y + 33, says, size=SIZE, fill=ink))
        if number + 1 < len(plan):
            parts.append(text(middle, y + 50, "↓", size=SIZE))
    return parts


def plans_picture(before: Sequence[str], after: Sequence[str]) -> Picture:
    """The decision tree's path before the patch and after it, side by side; in the narrow form above each other."""
    alt = f"v5.19: {', '.join(before) or 'nothing'}. v6.0: {', '.join(after) or 'nothing'}"
    high = [20 + STEP * max(len(plan), 1) for plan in (before, after)]
    parts = [block(plan_parts(before, "v5.19"), (4, 0), (4, 0))]
    parts.append(block(plan_parts(after, "v6.0, with b64d740ea7dd"), (STEP_WIDTH + 34, 0), (4, high[0] + 20)))
    narrow = STEP_WIDTH + 8, sum(high) + 24
    return Picture(svg(2 * STEP_WIDTH + 38, max(high) + 4, alt, parts, narrow), alt)


# ---- counts, by matplotlib -------------------------------------------------------------------------------------------

POLICY_LINES: dict[str, dict[str, Any]] = {
    "never": {"color": LOOK["missed"][0], "linestyle": "-", "marker": "x"},
    "if changed": {"color": LOOK["access-tracked"][0], "linestyle": "--", "marker": "o"},
    "if MMU-writable": {"color": LOOK["write-protected"][0], "linestyle": "-.", "marker": "s"},
    "always": {"color": LOOK["reported"][0], "linestyle": ":", "marker": "^"},
}


def plot_missed(ax: Axes, xs: Sequence[int], missed: Mapping[str, Sequence[int]], xlabel: str) -> None:
    """Draw missed writes, one line a flush rule."""
    every = max(1, len(xs) // 8)
    for policy, counts in missed.items():
        ax.plot(
            xs,
            counts,
            label=policy,
            linewidth=3,
            markersize=9,
            markevery=every,
            **POLICY_LINES[policy],
        )
    ax.set_xlabel(xlabel, fontsize=14)
    ax.set_ylabel("missed writes", fontsize=14)
    ax.tick_params(labelsize=13)
    ax.grid(alpha=0.3)
    ax.legend(title="flush rule", fontsize=12, title_fontsize=12)


def plot_chances(ax: Axes, idle: Sequence[float], chances: Mapping[str, Sequence[Chance]], title: str) -> None:
    """Draw how often guests arrive wrong, against how idle they are: a line each, with its 95 % band around it."""
    for mark, (label, line) in zip("osD^v", chances.items(), strict=False):
        low, high = zip(*(chance.band for chance in line), strict=True)
        (drawn,) = ax.plot(idle, [chance.share for chance in line], marker=mark, label=label, linewidth=2, markersize=8)
        ax.fill_between(idle, low, high, alpha=0.25, color=drawn.get_color())
    ax.set_title(title, fontsize=14)
    ax.set_xlabel("how idle the guest is", fontsize=13)
    ax.set_ylabel("wrong at the destination", fontsize=13)
    ax.label_outer()
    ax.tick_params(labelsize=12)
    ax.grid(visible=True, alpha=0.3)


def plot_rules(
    ax: Axes, points: Sequence[tuple[int, int, bool]], named: Mapping[str, tuple[int, int]], title: str
) -> None:
    """Draw what flush rules cost: (flushes, writes missed, sound) of each, and the names of a few."""
    for sound, mark, said in ((False, "x", "unsound"), (True, "o", "sound")):
        here = [(flushes, missed) for flushes, missed, is_sound in points if is_sound is sound]
        colour = LOOK["reported"][0] if sound else LOOK["missed"][0]
        face: dict[str, Any] = {"facecolors": "none", "edgecolors": colour} if sound else {"color": colour}
        xs, ys = [flushes for flushes, _ in here], [missed for _, missed in here]
        ax.scatter(xs, ys, s=180 if sound else 90, marker=mark, label=said, linewidths=3, zorder=2, **face)
    corners: dict[tuple[int, int], list[str]] = {}
    for name, corner in named.items():
        corners.setdefault(corner, []).append(name)
    for number, corner in enumerate(
        sorted(corners, reverse=True)
    ):  # from the right; each label higher than the one before
        last = corner == min(corners)
        ax.annotate(
            ", ".join(corners[corner]),
            corner,
            xytext=(10, 8) if last else (2, 16 + 22 * number),
            textcoords="offset points",
            ha="left" if last else "right",
            arrowprops=None if last else {"arrowstyle": "-", "color": "grey"},
            fontsize=12,
        )
    ax.set_title(title, fontsize=14)
    ax.set_xlabel("flushes while enabling", fontsize=14)
    ax.set_ylabel("missed writes", fontsize=14)
    ax.tick_params(labelsize=13)
    ax.margins(0.12)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=12)
