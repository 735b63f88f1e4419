"""A run as a C program: it plays the run's user-space side on a real KVM, and says whether a write was lost.

What it does beside the calls of the run is the same in each program, and stands in C files here: `selftest_ioctls.c` a VM
on the ioctls alone, or `selftest_kselftest.c` the same with the library of tools/testing/selftests/kvm; `selftest_play.c` the
rest of both. In them a line ``//[ring]`` begins what only some runs need, ``//[end]`` ends it.

The verdict is a migration's. User space copies each page once when enabling has returned, and again when it has been told
that the page is dirty and KVM has armed it again. After a last report a page that differs from its copy has been written, and
no report has said so.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from kvmbook.search.playing import Call, Script

FORMS = {"standalone": "selftest_ioctls.c", "kselftest": "selftest_kselftest.c"}
WIDTH = 118
ROUNDS, ROUNDS_BY_CHANCE, SECONDS = 100, 1000, 60

IOCTLS = {
    "enables": "enable_logging();",
    "disables": "disable_logging();",
    "gets": "get_dirty_log();",
    "resets": "reset_dirty_rings();",
}
JOBS = {"reads": "READ", "writes": "WRITE", "ages": "AGE", "ages and flushes": "AGE"}


def c_program(script: Script, form: str = "standalone") -> str:
    """The program's text. ``form``: "standalone" needs the headers of Linux and libc only; "kselftest" belongs into
    tools/testing/selftests/kvm of a kernel's sources (v6.1 and later), and is compiled there: here it is only held against
    declarations like those of its library. ValueError for other forms.

    It exits with 0 if no write was lost, 1 if one was, 4 (and a sentence) where the run cannot be played, 254 if something
    else failed."""
    if form not in FORMS:
        raise ValueError(f"a form is one of {', '.join(FORMS)}; got {form!r}")
    here = Path(__file__).parent
    text = "".join((here / name).read_text() for name in (FORMS[form], "selftest_play.c"))
    text = _without_what_is_not_needed(text, _needs(script))
    return _head(script, form) + text.replace("@SHAPE@", _shape(script)).replace("@PLAY@", _play(script))


def left_to_chance(script: Script) -> list[str]:
    """Why the program's outcome is not sure, as sentences; none if it is."""
    why = []
    for call in script.calls:
        for other in script.met(call):
            if (call.begins, call.ends) < (other.begins, other.ends):
                why.append(f"{_steps(call)} are mixed with {_steps(other)}: the two can only be begun together.")
    if any(call.what == "forgets" for call in script.calls):
        why.append("no program makes a TLB forget one entry: those steps are not played.")
    if any(call.what == "ages and flushes" for call in script.calls):
        why.append("no program makes the host flush when it ages a page: it is aged without.")
    return why


# ---- what a run needs ------------------------------------------------------------------------------------------------


def _needs(script: Script) -> set[str]:
    does = {call.what for call in script.calls}
    return {
        name
        for name, is_needed in {
            "raced": any(script.met(call) for call in script.calls),
            "chance": bool(left_to_chance(script)),
            "ages": bool(does & {"ages", "ages and flushes"}),
            "disables": "disables" in does,
            "clear": "clears" in does,
            "huge": script.huge,
            "manual": script.manual > 0,
            "ring": script.ring_bytes > 0,
            "capabilities": script.manual > 0 or script.ring_bytes > 0,
            "bitmap": not script.ring_bytes,
            "manual bitmap": script.manual > 0 and not script.ring_bytes,
            "armed by GET": not script.manual and not script.ring_bytes,
            "in turn": any(call.what in JOBS and not script.met(call) for call in script.calls),
            "told": script.manual > 0 or script.ring_bytes > 0,
            "one vCPU": script.vcpus == 1,
            "vCPUs": script.vcpus > 1,
        }.items()
        if is_needed
    }


def _without_what_is_not_needed(text: str, needs: set[str]) -> str:
    """Keep the lines under a mark ``//[name, no name]`` if all of it is so, up to the next mark."""
    kept, keeps = [], True
    for line in text.splitlines(keepends=True):
        if mark := re.fullmatch(r"//\[(.*)\]\n", line):
            names = [] if mark[1] == "end" else mark[1].split(", ")
            keeps = all((name.removeprefix("no ") in needs) != name.startswith("no ") for name in names)
        elif keeps:
            kept.append(line)
    return re.sub(r"\n{3,}", "\n\n", "".join(kept))


# ---- what is this run's own ------------------------------------------------------------------------------------------


def _head(script: Script, form: str) -> str:
    lost = ", ".join(map(str, script.lost))
    title = script.title.replace("*/", "* /").replace("/*", "/ *")  # neither ends the comment nor begins another
    lines = [*title.splitlines(), "", *script.steps, ""]
    lines.append(
        f"kvmbook's model loses what is written to page {lost}." if lost else "kvmbook's model loses no write."
    )
    lines += ["This program plays what user space can play of it, and says whether a write was lost here."]
    if form == "standalone":
        lines += ["", "cc -O2 -Wall -pthread run.c -o run && ./run [rounds]"]
    lines += ["Exit code: 0 nothing lost, 1 lost, 4 cannot be played here, 254 something else failed."]
    return "// SPDX-License-Identifier: MIT\n/*\n" + "".join(f" * {line}".rstrip() + "\n" for line in lines) + " */\n"


def _shape(script: Script) -> str:
    """The run's constants."""
    chance = left_to_chance(script)
    names = ", ".join(f"VCPU{number}" for number in range(script.vcpus))
    constants = {"BASE_GFN": f"{script.base_gfn:#x}", "PAGES": script.pages, "HUGE": int(script.huge)}
    if script.manual:
        constants["MANUAL_PROTECT"] = script.manual
    if script.ring_bytes:
        constants["RING_BYTES"] = script.ring_bytes
    if any(script.met(call) for call in script.calls):
        constants["JOBS"] = len(script.calls) + 1
    constants |= {"ROUNDS": ROUNDS_BY_CHANCE if chance else ROUNDS, "SECONDS": SECONDS}
    lines = ["/* ---- the run's own numbers ".ljust(WIDTH - 2, "-") + " */", ""]
    lines.append(f"enum {{ {names}, VCPUS, HOST = VCPUS }};")
    lines.append(f"enum {{ {', '.join(f'{name} = {value}' for name, value in constants.items())} }};")
    if chance:
        lines.append("static const char CHANCE[] =")
        lines.append('\t"Left to chance, so that a pass proves little:\\n"')
        for why in chance:
            parts = textwrap.wrap(f"- {why}", WIDTH - 14, drop_whitespace=False)
            lines += [f'\t"{part}"' for part in parts[:-1]] + [f'\t"{parts[-1]}\\n"']
        lines[-1] += ";"
    return "\n".join(lines)


def _play(script: Script) -> str:
    """The run, call by call. What meets an ioctl is begun before it, and finished after it."""
    moments: list[tuple[int, int, list[str]]] = []  # before which step, after what else there, lines
    for call in script.calls:
        met = script.met(call)
        if call.who == "user space":
            moments.append((call.begins, 1, [*_comment(call, met), *["dawdle();"] * bool(met), _ioctl(call)]))
        elif call.what not in JOBS:
            moments.append((call.begins, 1, _comment(call, met)))
        else:
            who = call.who.upper()
            job = f"{who}, {JOBS[call.what]}, {call.page or 0}"
            if not met:
                moments.append((call.begins, 1, [*_comment(call, met), f"does({job});"]))
                continue
            around = [ioctl for ioctl in met if ioctl.who == "user space"]
            begin = min([call.begins, *(ioctl.begins for ioctl in around)])
            end = max([call.ends, *(ioctl.ends for ioctl in around)])
            moments.append((begin, 0, [*_comment(call, met), f"begin({job});"]))
            moments.append((end, 2, [f"finish({who});"]))
    moments.sort(key=lambda moment: moment[:2])
    lines = [f"\t{line}" for _, _, lines in moments for line in lines]
    return "\n".join(["static void play(void)", "{", *lines, "}"])


def _ioctl(call: Call) -> str:
    if call.what == "harvests":
        return f"harvest_ring(VCPU{call.ring});"
    if call.cleared is not None:
        words = ", ".join(f"{word:#x}" for word in call.cleared.words)
        return f"clear_dirty_log({call.cleared.first}, {call.cleared.number}, (uint64_t[]){{ {words} }});"
    return IOCTLS[call.what]


def _comment(call: Call, met: list[Call]) -> list[str]:
    """Which steps of the run this is, as lines of C."""
    said = f"{_numbers(call).capitalize()}: {call.phrase}."
    if call.inside:
        said += f" In KVM, where nobody can stop it: {', '.join(call.inside)}."
    if met:
        said += f" Together with {' and '.join(_steps(other) for other in met)}."
    if call.what == "forgets":
        said += " Not played: no program can make it."
    if call.what == "exits":
        said += " Not played: here each access ends with an exit."
    lines = textwrap.wrap(said, WIDTH - 14)
    if len(lines) == 1:
        return [f"/* {lines[0]} */"]
    return ["/*", *(f" * {line}" for line in lines), " */"]


def _steps(call: Call) -> str:
    """A call as a phrase: "steps 1 to 6 (vCPU0 reads page 0)"."""
    return f"{_numbers(call)} ({call.phrase})"


def _numbers(call: Call) -> str:
    return f"step {call.begins}" if call.begins == call.ends else f"steps {call.begins} to {call.ends}"
