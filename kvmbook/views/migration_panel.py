"""The panel of chapter 12: a migration on a time axis, and the memory that arrives."""

from __future__ import annotations

from kvmbook.model import Hardware, Kernel
from kvmbook.scenes import INDEX, LOG, MODES, Migrated, Setting, Workload, migrate
from kvmbook.views.drawing import INK, LOOK, LOST, Picture, block, svg, text
from kvmbook.views.panel import Panel, View

CPUS = {
    "EPT without A/D": Hardware.ept(ad_bits=False),
    "EPT with A/D": Hardware.ept(),
    "shadow paging": Hardware.shadow(),
}
RELEASES = {"v5.19": Kernel.v5_19, "v6.0": Kernel.v6_0}
GUESTS = {"busy": 0.0, "half idle": 0.5, "mostly idle": 0.9}
HOSTS = {"never ages": 0, "ages": 16}
SEED, BANDWIDTH = 6, 2

SIZE = 15
AXIS, HIGH, LEAD = 376, 92, 12  # the time axis: its width; as high are all pages; ticks before the migration
BASE = 146  # its own height
CELL, ROW = 22, 16  # of the memory map: a page's size, and pages in a row
WIDE, WIDE_HIGH, NARROW, NARROW_HIGH = 800, 216, 376, 400


def _time(moved: Migrated) -> list[str]:
    """For each round the pages that are left to send, from its number down to none; below them when the host aged."""
    begin, setting = moved.rounds[0].begin, moved.setting
    step = (AXIS - 28) / (moved.end - begin + LEAD + 1)

    def at(tick: float) -> float:
        return 8 + (tick - begin + LEAD) * step

    parts = [f'<path d="M8 {BASE}H{AXIS - 8}" stroke="currentColor"/>']
    for number, one in enumerate(moved.rounds):
        stopped = moved.finished and number == len(moved.rounds) - 1
        left, right, high = at(one.begin), max(at(one.end), at(one.begin) + 3), HIGH * one.pages / setting.pages
        fill, look = LOOK["missed" if stopped else "clean"][0], f' stroke="{LOST if stopped else "currentColor"}"'
        parts.append(f'<path d="M{left:g} {BASE}v-{high:g}L{right:g} {BASE}z" fill="{fill}"{look}/>')
        parts.append(text(left + 4, BASE - high - 6, str(one.pages), size=SIZE, bold=stopped, anchor="start"))
    flushed = moved.enabling_flushed
    said, colour = f"logging on: {'flush' if flushed else 'no flush'}", "" if flushed else LOST
    parts.append(f'<path d="M{at(begin):g} 26V{BASE + 6}" stroke="currentColor" stroke-width="2"/>')
    parts.append(text(at(begin) + 2, 20, said, size=SIZE, bold=True, fill=colour, anchor="start"))
    ages = [
        tick for tick in range(begin - LEAD, moved.rounds[-1].begin) if setting.ageing and tick % setting.ageing == 0
    ]
    parts += [text(at(tick), BASE + 20, "▽", size=SIZE) for tick in ages]
    ticks = f"stopped for {moved.downtime} tick{'s' * (moved.downtime != 1)}"
    told = f"pages left, each round{'; ▽ the host ages' * bool(ages)}"
    parts.append(text(8, BASE + 42, told, size=SIZE, anchor="start"))
    parts.append(text(8, BASE + 61, ticks if moved.finished else "given up", size=SIZE, bold=True, anchor="start"))
    return parts


def _memory(moved: Migrated) -> list[str]:
    """A place for each page: never written, the same on both sides, or wrong."""
    wrong, top = set(moved.differing), 32
    looks = ["missed" if n in wrong else "reported" if page else "untouched" for n, page in enumerate(moved.source)]
    parts = [text(8, 20, "memory at the destination: ✓ right, ✕ wrong", size=SIZE, anchor="start")]
    for look in dict.fromkeys(looks):
        fill, mark = LOOK[look]
        places = [(8 + n % ROW * CELL, top + n // ROW * CELL) for n, one in enumerate(looks) if one == look]
        cells = "".join(f"M{x} {y}h{CELL}v{CELL}h-{CELL}z" for x, y in places)
        parts.append(f'<path d="{cells}" fill="{fill}" stroke="currentColor"/>')
        for y in dict.fromkeys(y for _, y in places):
            row = [x + CELL // 2 for x, at in places if at == y]
            ink = f' fill="{INK}"' * (fill != "none")
            parts.append(f'<text x="{" ".join(map(str, row))}" y="{y + 16}"{ink}>{mark * len(row)}</text>')
    below = top + len(looks) // ROW * CELL + 22
    parts.append(text(8, below, "the first is the log, the second the index", size=SIZE, anchor="start"))
    return parts


def migration_picture(moved: Migrated) -> Picture:
    """A migration: its rounds on a time axis, and the memory at the destination page by page."""
    sizes = ", ".join(str(one.pages) for one in moved.rounds)
    alt = f"Rounds of {sizes} pages. Wrong at the destination: {_named(moved) or 'no page'}."
    parts = [block(_time(moved)), block(_memory(moved), (424, 0), (0, 216))]
    return Picture(svg(WIDE, WIDE_HIGH, alt, parts, (NARROW, NARROW_HIGH)), alt)


def _named(moved: Migrated) -> str:
    names = {LOG: "the log", INDEX: "the index"}
    return ", ".join(names.get(page, f"page {page}") for page in moved.differing)


def move_a_guest() -> Panel:
    """Chapter 12: hardware, release, how user space takes the log, how idle the guest is, whether the host ages."""

    def show(cpu: str, release: str, mode: str, guest: str, host: str) -> View:
        setting = Setting(
            hardware=CPUS[cpu], kernel=RELEASES[release], mode=mode, ageing=HOSTS[host], bandwidth=BANDWIDTH
        )
        moved = migrate(setting, Workload(SEED, GUESTS[guest]))
        said = f"Enabling met {moved.writable or 'no'} writable SPTE{'s' * (moved.writable > 1)}, and "
        said += "flushed. " if moved.enabling_flushed else "did not flush. "
        said += f"Wrong at the destination: {_named(moved)}. " if moved.differing else "All pages are right. "
        wrong = moved.store.disagreements()
        if moved.differing:
            said += f"Its log against its records: {'; '.join(wrong[:2]) if wrong else 'no disagreement'}."
        return View(migration_picture(moved), said.strip())

    settings = {
        "hardware": list(CPUS),
        "kernel": list(RELEASES),
        "user space takes the log by": list(MODES),
        "the guest is": list(GUESTS),
        "the host": list(HOSTS)[::-1],
    }
    return Panel("Migrate", settings, show)
