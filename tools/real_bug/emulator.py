"""Bochs, an emulator of CPUs that have VMX and EPT, without A/D bits or with them: one boot, and what it printed.

Its screen, which shows nothing, is a VNC server on a port from 5900 on while it runs. (Debian's other display without a
desktop stops, some minutes after its start, if nobody reads what it writes.)
"""

from __future__ import annotations

import gzip
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tools.real_bug.packages import NotAsExpected, run

# What kvm_intel says of each: eptad N, pml N; eptad Y, pml N.
CPUS = {"EPT without A/D bits": "corei7_sandy_bridge_2600k", "EPT with A/D bits": "corei7_haswell_4770"}
ENDED = "kvmbook: all done"
KERNEL_LINE = "console=ttyS0 quiet nokaslr mitigations=off nopti tsc=reliable idle=halt irqaffinity=0"
PATIENCE = 1800  # seconds

BOCHSRC = """\
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
cpu: model={cpu}, count=2:1:1, ips=100000000, reset_on_triple_fault=0
memory: guest=512, host=512
ata0-master: type=cdrom, path={iso}, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev={serial}
clock: sync=none
display_library: rfb, options="timeout=0"
log: {log}
panic: action=fatal
"""
GRUB = """\
set timeout=0
menuentry kvmbook {{ linux /boot/kernel {line}; initrd /boot/initramfs }}
"""
INIT = """\
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev
/bin/busybox mount -t proc none /proc
/bin/busybox mount -t sysfs none /sys
/bin/busybox mount -t devtmpfs none /dev
exec >/dev/ttyS0 2>&1
echo madvise >/sys/kernel/mm/transparent_hugepage/enabled # with so little memory it is off
for name in ept eptad pml; do echo "kvm_intel $name=$(/bin/busybox cat /sys/module/kvm_intel/parameters/$name)"; done
{commands}
echo "{ended}"
/bin/busybox sleep 1000
"""


def iso(where: Path, kernel: Path, programs: list[Path], commands: list[str]) -> Path:
    """A CD, made in ``where``, that boots the kernel with these programs in /; its first process is a script of these
    commands."""
    disk, files = where / "disk", where / "files"
    for directory in disk / "boot/grub", files / "bin":
        directory.mkdir(parents=True, exist_ok=True)
    init = files / "init"
    init.write_text(INIT.format(commands="\n".join(commands), ended=ENDED))
    for program in programs:
        shutil.copy(program, files)
    shutil.copy("/bin/busybox", files / "bin")
    init.chmod(0o755)
    names = "\n".join(str(path.relative_to(files)) for path in sorted(files.rglob("*")))
    archive = subprocess.run(
        ["cpio", "-o", "-H", "newc", "--quiet"], input=names.encode(), cwd=files, capture_output=True
    )
    if archive.returncode:
        raise NotAsExpected(f"cpio failed: {archive.stderr.decode()}")
    (disk / "boot/initramfs").write_bytes(gzip.compress(archive.stdout))
    shutil.copy(kernel, disk / "boot/kernel")
    (disk / "boot/grub/grub.cfg").write_text(GRUB.format(line=KERNEL_LINE))
    image = where / "disk.iso"
    run("grub-mkrescue", "-o", str(image), str(disk))
    return image


def boot(image: Path, cpu: str, seen: Callable[[str], None]) -> str:
    """Boot the CD on this model of `CPUS`, until its script has ended. What it printed on its serial line; ``seen`` is told
    each new line. NotAsExpected if Bochs ends before, or after `PATIENCE`."""
    serial, config = image.with_suffix(".serial"), image.with_suffix(".bochsrc")
    serial.write_text("")
    config.write_text(BOCHSRC.format(cpu=CPUS[cpu], iso=image, serial=serial, log=image.with_suffix(".log")))
    go_on = image.with_suffix(".debugger")  # Debian's Bochs stops in its debugger first
    go_on.write_text("c\n")
    with subprocess.Popen(
        ["bochs", "-q", "-f", str(config), "-rc", str(go_on)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as emulator:
        try:
            return _until_ended(emulator, serial, seen)
        finally:
            os.killpg(emulator.pid, signal.SIGKILL)


def _until_ended(emulator: subprocess.Popen[bytes], serial: Path, seen: Callable[[str], None]) -> str:
    told, begin = 0, time.monotonic()
    while True:
        time.sleep(0.5)
        said = serial.read_text(errors="replace").replace("\r", "")
        lines = said.split("\n")
        for line in lines[told:-1]:
            seen(line)
        told = len(lines) - 1
        if ENDED in said:
            return said
        if emulator.poll() is not None or time.monotonic() - begin > PATIENCE:
            end = "\n".join(lines[-20:])
            raise NotAsExpected(f"the emulator ended, or took more than {PATIENCE} s; the last that it printed:\n{end}")
