"""`make real-bug`: Linux's own KVM loses the write of chapter 1, in an emulator; and the losses of today, under EPT.

It fetches Debian's sources of the kernels, makes the flush of the patch a parameter and repairs of later losses another,
builds them, boots each on a CPU without EPT's A/D bits and on one with them, and compares what they did with what the model
says. About half an hour on two cores; 5 GB in build/real_bug.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvmbook.real import EMULATED, FLUSH_RULES, Boot, by_model, keep_boots
from tools.real_bug import emulator, linux
from tools.real_bug.packages import NotAsExpected, see_programs
from tools.real_bug.programs import cells_in, commands, compiled, loses_by_model, losses_in, programs

WHERE = Path(__file__).parent.parent.parent / "build/real_bug"
BEGIN = time.monotonic()


def say(text: str) -> None:
    minutes, seconds = divmod(int(time.monotonic() - BEGIN), 60)
    print(f"{minutes:3}:{seconds:02}  {text}", flush=True)


def main() -> None:
    """Do all of it; the exit code is 1 if a machine and the model disagree."""
    parser = argparse.ArgumentParser(prog="make real-bug", description=__doc__)
    parser.add_argument("--kernels", nargs="*", choices=list(linux.SOURCES), default=list(linux.SOURCES))
    parser.add_argument("--keep", type=Path, help="write what was recorded to a file")
    asked = parser.parse_args()
    see_programs()
    WHERE.mkdir(parents=True, exist_ok=True)
    boots: list[Boot] = []
    for name in asked.kernels:
        say(f"Linux {name}: fetch, edit, build (5 to 8 minutes the first time)")
        image, release = linux.build(WHERE, name)
        say(f"Linux {release} is built; boot it on {len(EMULATED)} CPUs")
        with ThreadPoolExecutor(len(EMULATED)) as at_once:
            boots += at_once.map(lambda cpu, image=image, release=release: _boot(image, release, cpu), EMULATED)
    agree = [_compare(boot) for boot in boots]
    if asked.keep is not None:
        keep_boots(boots, asked.keep)
    raise SystemExit(not all(agree))


def _boot(image: Path, release: str, cpu: str) -> Boot:
    begin, wanted = time.monotonic(), programs(release, EMULATED[cpu])
    where = WHERE / f"{release} {cpu}".replace(" ", "-").replace("/", "")
    where.mkdir(exist_ok=True)
    disk = emulator.iso(where, image, compiled(where, wanted), commands(wanted))
    said = emulator.boot(disk, cpu, lambda line: say(f"{release}, {cpu}: {line}"))
    seconds = round(time.monotonic() - begin)
    version = subprocess.run(["dpkg-query", "-W", "-f", "bochs ${Version}", "bochs"], capture_output=True, text=True)
    try:
        return Boot(release, cpu, emulator.CPUS[cpu], version.stdout, seconds, cells_in(said), losses_in(said, wanted))
    except ValueError as why:
        raise NotAsExpected(f"Linux {release}, {cpu}: {why}") from None


def _compare(boot: Boot) -> bool:
    """Print what was recorded beside what the model says. Whether they agree, in each round."""
    print(f"\nLinux {boot.kernel}, {boot.hardware} ({boot.cpu}, {boot.emulator}), {boot.seconds} s")
    agrees = len(boot.cells) == 2 * len(FLUSH_RULES)
    for cell in boot.cells:
        model = by_model(boot.kernel, boot.hardware, cell.flush, cell.aged)
        agrees &= set(cell.rounds) == {model}
        print(
            f"  flush {cell.flush:10}  {'aged' if cell.aged else '':4}  {len(cell.rounds)} rounds: lost {cell.lost:>2}, "
            f"flushes {cell.flushes}; model: lost {model.lost:>2}, flushes {model.flushes}"
        )
    for loss in boot.losses:
        expected = loss.rounds * loses_by_model(loss)
        agrees &= loss.lost == expected
        name = loss.name + ", repaired" * loss.repaired
        print(f"  {name:48}  lost in {loss.lost} of {loss.rounds}; model: {expected}")
    return agrees


if __name__ == "__main__":
    main()
