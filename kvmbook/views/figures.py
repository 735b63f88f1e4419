"""Deterministic pictures: SVG strings that notebooks compare, and matplotlib figures of counts.

One look for the whole book. A state has the same colour *and* the same mark everywhere, so that greyscale and the
colour-blind lose nothing. Text takes the page's own colour, so that light and dark pages both work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from kvmbook.scenes import Moment, Scene

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# state: (fill, mark of a page). Colours after Okabe and Ito, which all kinds of eyes tell apart; a state in a timeline
# is also named in words.
LOOK = {
    "writable": ("#56b4e9", ""),
    "clean": ("#a8d8f0", ""),
    "write-protected": ("#e69f00", ""),
    "access-tracked": ("#cc79a7", ""),
    "read-only": ("#bdbdbd", ""),
    "not mapped": ("none", ""),
    "empty": ("none", ""),
    "reported": ("#4dbb9a", "✓"),
    "missed": ("#e8772e", "✕"),
    "untouched": ("none", "·"),
}
INK = "#1a1a1a"  # on coloured cells
LOST = "#d55e00"
DARK = (
    "<style>@media (prefers-color-scheme: dark) { svg:root { color: #ddd } }</style>"  # shown as a document of its own
)
FONT = 'font-family="system-ui, sans-serif" font-size="14" text-anchor="middle" fill="currentColor"'


def text(x: float, y: float, said: str, *, size: int = 14, anchor: str = "", bold: bool = False, fill: str = "") -> str:
    """One line of SVG text; centred at x unless ``anchor`` says otherwise, in the page's own text colour without ``fill``."""
    style = (f' font-size="{size}"' * (size != 14)) + (f' text-anchor="{anchor}"' * bool(anchor))
    style += ' font-weight="bold"' * bold + (f' fill="{fill}"' * bool(fill))
    return f'<text x="{x:g}" y="{y:g}"{style}>{escape(said)}</text>'


def box(
    x: float, y: float, width: float, height: float, fill: str, *, stroke: str = "currentColor", extra: str = ""
) -> str:
    """One rounded rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{fill}" stroke="{stroke}"{extra}/>'


def svg(width: float, height: float, alt: str, parts: Sequence[str]) -> str:
    """A whole picture with its text alternative."""
    size = f'viewBox="0 0 {width:g} {height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" {FONT}>'
    return "\n".join([head, f"<title>{escape(alt)}</title>", DARK, *parts, "</svg>"])


class Picture:
    """An SVG string that JupyterLab shows as a picture, and whose ``repr`` is its text alternative."""

    def __init__(self, drawn: str, alt: str) -> None:
        self.svg, self.alt = drawn, alt

    def _repr_svg_(self) -> str:
        return self.svg

    def __repr__(self) -> str:
        return self.alt


# ---- a page's timeline -----------------------------------------------------------------------------------------------

COLUMN, LEFT = 134, 66


def _cell(x: float, y: float, state: str, rights: str, stale: bool) -> list[str]:
    fill = LOOK[state][0]
    dashed = ' stroke-width="3" stroke-dasharray="6 3"' if stale else ' stroke-width="1"'
    ink = INK if fill != "none" else ""
    parts = [box(x + 4, y, COLUMN - 8, 46, fill, stroke=LOST if stale else "currentColor", extra=dashed)]
    if state in ("empty", "not mapped"):
        return [*parts, text(x + COLUMN / 2, y + 28, state)]
    label = "stale, " + state if stale else state
    return [
        *parts,
        text(x + COLUMN / 2, y + 19, label, size=13, bold=True, fill=ink),
        text(x + COLUMN / 2, y + 37, rights, size=13, fill=ink),
    ]


def timeline_parts(moments: Sequence[Moment], fate: str, top: float = 0) -> list[str]:
    """The SPTE and the TLB of one page after each moment, side by side, and where its write was lost."""
    parts = [
        text(LEFT - 8, top + 76, "SPTE", anchor="end", bold=True),
        text(LEFT - 8, top + 132, "TLB", anchor="end", bold=True),
    ]
    for number, moment in enumerate(moments):
        x = LEFT + number * COLUMN
        parts += [
            text(x + COLUMN / 2, top + 16, moment.actor, size=13),
            text(x + COLUMN / 2, top + 34, moment.action, bold=True),
        ]
        parts += _cell(x, top + 46, moment.spte, moment.spte_rights, False)
        parts += _cell(x, top + 102, moment.tlb, moment.tlb_rights, moment.stale)
        if moment.flushed:
            parts.append(text(x + COLUMN / 2, top + 168, "⟳ TLB flush", size=13, bold=True))
        elif moment.action == "enables logging":
            parts.append(text(x + COLUMN / 2, top + 168, "no flush", size=13))
        if moment.action == "writes":
            lost = fate == "missed"
            said = "✕ nobody sees it" if lost else "✓ seen"
            parts.append(text(x + COLUMN / 2, top + 168, said, bold=True, fill=LOST if lost else ""))
    return parts


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
        y = top + number * 30
        parts.append(text(left - 8, y + 17, label, anchor="end", bold=label == chosen))
        extra = ' stroke-width="3"' if label == chosen else ' stroke-width="1"'
        parts.append(
            box(
                left,
                y,
                max(2, 200 * count / most),
                22,
                LOOK["missed"][0] if count else LOOK["reported"][0],
                extra=extra,
            )
        )
        parts.append(text(left + max(2, 200 * count / most) + 10, y + 17, str(count), anchor="start", bold=True))
    return parts


def told(moments: Sequence[Moment]) -> str:
    """A timeline in words: the text alternative."""
    return "; ".join(f"{m.actor} {m.action}: SPTE {m.spte}, TLB {'stale, ' if m.stale else ''}{m.tlb}" for m in moments)


def timeline_picture(scene: Scene) -> Picture:
    """Page 0's timeline alone, up to the write."""
    moments = scene.moments[:-1]
    alt = f"Page 0, {scene.pages[0]}. {told(moments)}"
    return Picture(svg(LEFT + len(moments) * COLUMN + 8, 186, alt, timeline_parts(moments, scene.pages[0])), alt)


def scene_picture(scene: Scene, counts: Mapping[str, int], chosen: str) -> Picture:
    """A scene: page 0's timeline, the fate of each page, and the missed writes under every flush policy (``counts``)."""
    columns = max(6, len(scene.moments))
    width, pages = LEFT + columns * COLUMN + 8, len(scene.pages)
    parts = timeline_parts(scene.moments, scene.pages[0])
    parts += [text(LEFT + 4, 210, f"all {pages} pages of the slot, after the harvest", anchor="start", bold=True)]
    parts += pages_parts(scene.pages, LEFT + 4, 222)
    parts += [
        text(LEFT + 4, 314, "✓ reported", anchor="start"),
        text(LEFT + 104, 314, "✕ written, and missed", anchor="start"),
    ]
    parts += [text(LEFT + 400, 210, "missed writes, by flush policy", anchor="start", bold=True)]
    parts += bars_parts(counts, chosen, pages, LEFT + 530, 222)
    alt = f"{scene.missed} of {pages} writes missed. Page 0: {told(scene.moments)}"
    return Picture(svg(width, 350, alt, parts), alt)


# ---- a plan ----------------------------------------------------------------------------------------------------------

STEP_SAYS = {
    "kvm_mmu_update_cpu_dirty_logging": "switch PML on or off in every vCPU",
    "zap_collapsible_rmap_sptes": "drop 4K SPTEs that could be huge again",
    "zap_collapsible_tdp_sptes": "cut off tables that could be huge pages again, flush",
    "split_huge_rmap_sptes": "split huge pages of nested guests to 4K",
    "split_huge_tdp_sptes": "split huge pages to 4K",
    "clear_dirty_rmap": "clear D (or W) of 4K SPTEs, rmap side",
    "clear_dirty_tdp": "clear D (or W) of leaves, TDP side",
    "write_protect_rmap": "clear W of leaves, rmap side",
    "write_protect_tdp": "clear W of leaves, TDP side",
    "flush_if_owed": "flush, if the pass asked for it",
    "flush_always": "flush, always",
}


def plan_parts(plan: Sequence[str], left: float, title: str) -> list[str]:
    """The steps of one plan, from top to bottom, flushes framed."""
    parts = [text(left + 210, 20, title, bold=True, size=15)]
    for number, name in enumerate(plan or ["(nothing)"]):
        y, flush = 34 + number * 62, name.startswith("flush")
        always = name == "flush_always"
        fill = LOOK["reported"][0] if always else LOOK["missed"][0] if flush else "none"
        parts.append(box(left, y, 420, 46, fill, extra=' stroke-width="2"' if flush else ""))
        ink = INK if flush else ""
        parts.append(text(left + 210, y + 19, name, bold=True, size=14, fill=ink))
        parts.append(
            text(left + 210, y + 37, STEP_SAYS.get(name, "no page is touched, no TLB is flushed"), size=13, fill=ink)
        )
        if number + 1 < len(plan):
            parts.append(text(left + 210, y + 59, "↓", size=13))
    return parts


def plans_picture(before: Sequence[str], after: Sequence[str]) -> Picture:
    """The decision tree's path before the patch and after it, side by side."""
    alt = f"v5.19: {', '.join(before) or 'nothing'}. v6.0: {', '.join(after) or 'nothing'}"
    parts = plan_parts(before, 8, "v5.19") + plan_parts(after, 452, "v6.0, with b64d740ea7dd")
    height = 40 + 62 * max(len(before), len(after), 1)
    return Picture(svg(880, height, alt, parts), alt)


# ---- counts, by matplotlib -------------------------------------------------------------------------------------------

POLICY_LINES: dict[str, dict[str, Any]] = {
    "never": {"color": LOOK["missed"][0], "linestyle": "-", "marker": "x"},
    "if changed": {"color": LOOK["access-tracked"][0], "linestyle": "--", "marker": "o"},
    "if MMU-writable": {"color": LOOK["write-protected"][0], "linestyle": "-.", "marker": "s"},
    "always": {"color": LOOK["reported"][0], "linestyle": ":", "marker": "^"},
}


def plot_missed(ax: Axes, xs: Sequence[int], missed: Mapping[str, Sequence[int]], xlabel: str) -> None:
    """Draw missed writes, one line a flush policy."""
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
    ax.legend(title="flush when enabling", fontsize=12, title_fontsize=12)


def plot_rules(
    ax: Axes, points: Sequence[tuple[int, int, bool]], named: Mapping[str, tuple[int, int]], title: str
) -> None:
    """Draw what flush rules cost: (flushes, writes missed, sound) of each, and the names of a few."""
    for sound, mark, said in ((False, "x", "unsound"), (True, "o", "sound")):
        here = [(flushes, missed) for flushes, missed, is_sound in points if is_sound is sound]
        colour = LOOK["reported"][0] if sound else LOST
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
