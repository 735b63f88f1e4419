"""What KVM's tracepoints print, line by line: the text of ftrace, trace-cmd and `perf script`, read into fields.

Taken from the ``format`` files of Linux v6.18's tracefs, read on a machine that runs it; for v5.19 and before, what
include/trace/events/kvm.h, arch/x86/kvm/trace.h and arch/x86/kvm/mmu/mmutrace.h print (public copies; not run here).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple


class Traced(NamedTuple):
    """One event: the line's number from 1, who was running ("comm-tid"), the CPU, seconds (or ticks), the event's name
    without its system, and its fields by the names in `FORMATS`: numbers, and text where the kernel prints words."""

    line: int
    task: str
    cpu: int
    time: float
    name: str
    fields: dict[str, Any]


class Unread(NamedTuple):
    """A line that is no trace's, or one that is torn: its number and why."""

    line: int
    reason: str


class Other(NamedTuple):
    """An event that nothing here needs, by its name."""

    line: int
    name: str


class Lost(NamedTuple):
    """The tracer says that it has dropped ``events`` here: its buffer was full."""

    line: int
    events: int


Read = Traced | Unread | Other | Lost

# ---- formats ---------------------------------------------------------------------------------------------------------

PATTERNS = {"x": r"(?:0x)?([0-9a-fA-F]{1,16})", "d": r"(-?\d{1,19})", "s": r"(\S*)"}
SHADOW_PAGE = (  # kvm_mmu_page's own words; perf, which cannot run the kernel's code for them, prints the fields
    "sp gen {generation:d} gfn {gfn:x} l{level:d} ...",
    "[FAILED TO PARSE] mmu_valid_gen={generation:d} gfn={gfn:d} role={role:d} ...",
)
HVA_RANGE = "{start:x} -- {end:x}"

# What each event prints: today's form first, then what other releases print. {name:x} is hexadecimal, with or without 0x;
# {name:d} decimal; {name:s} a word, perhaps none; three dots whatever follows.
FORMATS: dict[str, tuple[str, ...]] = {
    "kvm_page_fault": (
        "vcpu {vcpu:d} rip {rip:x} address {address:x} error_code {error_code:x}",
        "address {address:x} error_code {error_code:x}",  # to v5.19
    ),
    "fast_page_fault": (
        "vcpu {vcpu:d} gva {address:x} error_code {error_code:s} sptep {sptep:s} old {old:x} new {new:x}"
        " spurious {spurious:d} fixed {fixed:d}",
    ),
    "kvm_mmu_set_spte": ("gfn {gfn:x} spte {new:x} ({rights:s}) level {level:d} at {at:x}",),
    "kvm_tdp_mmu_spte_changed": ("as id {as_id:d} gfn {gfn:x} level {level:d} old_spte {old:x} new_spte {new:x}",),
    "kvm_mmu_split_huge_page": ("gfn {gfn:x} spte {old:x} level {level:d} errno {errno:d}",),
    "kvm_mmu_spte_requested": ("gfn {gfn:x} pfn {pfn:x} level {level:d}",),
    "kvm_mmu_pagetable_walk": ("addr {address:x} pferr {error_code:x} {flags:s}",),
    "kvm_mmu_prepare_zap_page": SHADOW_PAGE,
    "kvm_mmu_zap_all_fast": ("kvm-mmu-valid-gen {generation:d} used_pages {used:x}",),
    "mark_mmio_spte": ("sptep:{sptep:s} gfn {gfn:x} access {access:x} gen {generation:x}",),
    "kvm_age_page": (  # gone in v5.13
        "hva {hva:x} gfn {gfn:x} level {level:d} {young:s}",
        "hva {hva:x} gfn {gfn:x} {young:s}",  # before the level was told
    ),
    "kvm_age_hva": (f"mmu notifier age hva: {HVA_RANGE}",),  # these four since v5.13
    "kvm_test_age_hva": ("mmu notifier test age hva: {start:x}",),
    "kvm_unmap_hva_range": (f"mmu notifier unmap range: {HVA_RANGE}",),
    "kvm_set_spte_hva": ("mmu notifier set pte hva: {start:x}",),  # gone in v6.10
    "kvm_dirty_ring_push": (
        "ring {ring:d}: dirty {dirty:x} reset {reset:x} slot {slot:d} offset {offset:x} (used {used:d})",
    ),
    "kvm_dirty_ring_reset": ("ring {ring:d}: dirty {dirty:x} reset {reset:x} (used {used:d})",),
    "kvm_dirty_ring_exit": ("vcpu {vcpu:d}",),
    "kvm_flush_remote_tlbs": ("...",),  # no tracepoint: a probe, or the function tracer
}


class Format:
    """One form in which an event is printed."""

    def __init__(self, template: str) -> None:
        fixed, goes_on, _ = template.partition("...")
        *before, after = re.split(r"\{\w+:\w\}", fixed)
        fields: list[tuple[str, str]] = re.findall(r"\{(\w+):(\w)\}", fixed)
        self._names = [name for name, _ in fields]
        self._bases = [{"x": 16, "d": 10}.get(kind, 0) for _, kind in fields]
        self._pieces = [_spaced(text) + PATTERNS[kind] for text, (_, kind) in zip(before, fields, strict=True)]
        self._whole = re.compile("".join(self._pieces) + _spaced(after) + (".*" if goes_on else r"\s*"), re.DOTALL)

    def read(self, text: str) -> dict[str, Any] | None:
        """The fields, or None if ``text`` has another form."""
        found = self._whole.fullmatch(text)
        if found is None:
            return None
        pairs = zip(found.groups(), self._bases, strict=True)
        return dict(zip(self._names, [int(value, base) if base else value for value, base in pairs], strict=True))

    def misses(self, text: str) -> tuple[int, str]:
        """How many fields can be read, and what is wrong behind them."""
        for known in range(len(self._pieces), -1, -1):
            found = re.match("".join(self._pieces[:known]), text)
            if found is not None:
                break
        rest = text[found.end() :].strip() if found else ""
        wanted = self._names[known] if known < len(self._names) else "proper end"
        return known, f"no {wanted}: {f'there is {_cut(rest)}' if rest else 'the line ends'}"


def _spaced(text: str) -> str:
    """A pattern for fixed text, however many blanks are in it."""
    return r"\s*".join(map(re.escape, re.split(r"\s+", text)))


def _cut(text: str) -> str:
    return repr(text if len(text) <= 30 else text[:27] + "...")


_FORMATS = {name: [Format(template) for template in templates] for name, templates in FORMATS.items()}

# ---- lines -----------------------------------------------------------------------------------------------------------

# "comm-tid (tgid) [cpu] flags time: " and then, as ftrace prints it, "event: ...", or as perf does, "system:event: ...".
HEAD = re.compile(r"\[(\d{1,5})\] +(?:(\S{1,10}) +)?(\d{1,20}(?:\.\d{1,9})?): +(?:\w+:)?(\w+)(:| <-)(.*)", re.DOTALL)
LONGEST = 1000  # characters of a line
LOST = re.compile(r"LOST (\d{1,18})\b")
NOISE = re.compile(r"\s*(?:#|=> |<stack trace>|version = |cpus=\d|CPU \d+ is empty|[0-9a-f]{6,16} \S.*\(.*\)\s*$)|\s*$")
TASK = re.compile(r"(.*?)[-\s]+(\d+)(?:/(\d+))?(?:\s+\(\s*(?:\d+|-+)\s*\))?$")


def read_trace(lines: Iterable[str]) -> Iterator[Read]:
    """Read the lines of a trace, each into one of `Read`; comments and stack traces are left out. Nothing that a line may say
    raises."""
    tasks: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        head = HEAD.search(line[:LONGEST])
        if head is None or len(line) > LONGEST:
            if len(line) > LONGEST:
                yield Unread(number, f"longer than {LONGEST} characters")
            elif (lost := LOST.search(line)) is not None:
                yield Lost(number, int(lost[1]))
            elif NOISE.match(line) is None:
                yield Unread(number, _no_head(line))
            continue
        cpu, _, time, name, _, text = head.groups()
        if name.startswith("kvm_flush_remote_tlbs"):
            name = "kvm_flush_remote_tlbs"
        formats = _FORMATS.get(name)
        if formats is None:
            yield Other(number, name)
            continue
        who = line[: head.start()]
        task = tasks.get(who)
        if task is None:
            task = tasks[who] = _task(who.strip())
        text = text.strip()
        for form in formats:
            fields = form.read(text)
            if fields is not None:
                yield Traced(number, task, int(cpu), float(time), name, fields)
                break
        else:
            yield Unread(number, f"{name}: {max(form.misses(text) for form in formats)[1]}")


def _task(who: str) -> str:
    """ "comm-tid", as ftrace and perf have it."""
    found = TASK.match(who[-80:])
    return f"{found[1].strip()}-{found[3] or found[2]}" if found else who


def _no_head(line: str) -> str:
    if re.search(r"\[\d+\]", line) is None:
        return f"no trace's line: {_cut(line.strip())}"
    if re.search(r"\[\d+\]\s.*\d:", line) is None:
        return "the line ends, or goes wrong, before its time"
    return "the line ends, or goes wrong, before its event's name"
