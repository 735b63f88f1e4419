"""Record tests/real/traces anew, on this machine's KVM: ``python tests/real/record_traces.py``, as root. By hand only.

Each run is a process of its own, in a private mount namespace where it mounts tracefs, with a buffer of its own and only its
own events in it; so the machine's tracing is left as it was. What is in the files is what the tools print: nothing is edited.
"""

import os
import pathlib
import subprocess
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from kvmbook.real import RealVm

HERE = pathlib.Path(__file__).parent / "traces"
TRACING = pathlib.Path("/sys/kernel/tracing")
SLOT = {"slot": 0, "base_gfn": 0x100, "npages": 64}
LOGGING = SLOT | {"log_dirty_pages": True}


def write_protection(vm):
    """Written; protected by logging, written again; protected by GET, and again; taken away by the host, and again."""
    vm.set_user_memory_region(**SLOT)
    vm.vcpu[0].run([("write", 0x100), ("write", 0x101), ("read", 0x110)])
    vm.set_user_memory_region(**LOGGING)
    vm.vcpu[0].run([("write", 0x100), ("read", 0x101)])
    vm.get_dirty_log(0)
    vm.vcpu[0].write(0x100)
    vm.invalidate_range(0x100, 0x101)
    vm.vcpu[0].write(0x100)


def harvest(vm):
    """Manual protect, initially set: GET reports and protects nothing, CLEAR protects one page of two."""
    vm.enable_manual_dirty_log_protect(initially_set=True)
    vm.set_user_memory_region(**SLOT)
    vm.vcpu[0].run([("write", 0x100), ("write", 0x101)])
    vm.set_user_memory_region(**LOGGING)
    vm.get_dirty_log(0)
    vm.vcpu[0].run([("write", 0x100), ("write", 0x101)])
    vm.clear_dirty_log(0, 0, 64, np.arange(64) == 1)
    vm.vcpu[0].run([("write", 0x100), ("write", 0x101)])
    vm.set_user_memory_region(slot=0)


def ring(vm):
    """Three pages pushed, harvested and reset; one of them pushed again."""
    vm.enable_dirty_ring(1 << 16)
    vm.set_user_memory_region(**LOGGING)
    vm.vcpu[0].run([("write", 0x100), ("write", 0x101), ("write", 0x108)])
    vm.vcpu[0].dirty_ring.harvest()
    vm.reset_dirty_rings()
    vm.vcpu[0].write(0x100)


def ring_full(vm):
    """The smallest ring, until the vCPU has to leave."""
    vm.enable_dirty_ring(1 << 12)
    vm.set_user_memory_region(slot=0, base_gfn=0x100, npages=256, log_dirty_pages=True)
    vm.vcpu[0].run([("write", 0x100 + page) for page in range(200)])


RUNS = {run.__name__: run for run in (write_protection, harvest, ring, ring_full)}
EVENTS = {"ring_full": "kvm/kvm_dirty_ring_*"}  # or the file would be large


def run(name):
    pathlib.Path("/proc/self/comm").write_text("guest")
    with RealVm() as vm:
        RUNS[name](vm)


def by_ftrace(name):
    """In a buffer of its own."""
    buffer = TRACING / "instances" / f"kvmbook-{os.getpid()}"
    buffer.mkdir()
    try:
        (buffer / "set_event_pid").write_text(str(os.getpid()))
        events = [buffer / "events" / pattern for pattern in EVENTS.get(name, "kvm kvmmmu").split()]
        switches = [switch for path in events for switch in path.parent.glob(f"{path.name}/enable")]
        for switch in switches:
            switch.write_text("1")
        run(name)
        (buffer / "tracing_on").write_text("0")
        for switch in switches:
            switch.write_text("0")
        (HERE / f"{name}.ftrace.txt").write_text((buffer / "trace").read_text())
    finally:
        buffer.rmdir()


def by_perf(name):
    recorded = f"/tmp/kvmbook-{os.getpid()}.data"
    events = "kvm:kvm_dirty_ring*,kvm:kvm_unmap_hva_range,kvmmmu:*"
    command = ["perf", "record", "-q", "-o", recorded, "-e", events, sys.executable, __file__, "--run", name]
    subprocess.run(command, check=True, timeout=60, stderr=subprocess.DEVNULL)
    text = subprocess.check_output(["perf", "script", "-i", recorded], text=True, stderr=subprocess.DEVNULL)
    os.remove(recorded)
    (HERE / f"{name}.perf.txt").write_text(text)


WAYS = {"--run": run, "--ftrace": by_ftrace, "--perf": by_perf}

if __name__ == "__main__":
    if len(sys.argv) == 3:
        WAYS[sys.argv[1]](sys.argv[2])
    else:
        for way, name in [("--ftrace", name) for name in RUNS] + [("--perf", "write_protection"), ("--perf", "ring")]:
            inside = f"mount -t tracefs tracefs {TRACING} && exec {sys.executable} {__file__} {way} {name}"
            subprocess.run(["unshare", "-m", "sh", "-c", inside], check=True, timeout=60)
            print(name, way)
