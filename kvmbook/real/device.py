"""/dev/kvm itself: opened, asked, or refused with one sentence that says why and what to do."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
from functools import cache
from pathlib import Path
from typing import Any

from kvmbook.real import abi

try:
    import fcntl
except ImportError:  # not a Unix: then `open_kvm` refuses before anybody calls
    fcntl = None  # type: ignore[assignment]

DEVICE = "/dev/kvm"
CPUINFO, MODULES = Path("/proc/cpuinfo"), Path("/sys/module")
VENDORS = {"kvm_intel": "vmx", "kvm_amd": "svm"}  # a vendor module, and the CPU flag that it needs


class NoKvm(OSError):
    """This machine's KVM cannot be used. The message is one sentence that says why and what to do."""

    def __str__(self) -> str:
        return str(self.strerror)

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows instead of a traceback."""
        return [str(self)]


def open_kvm() -> int:
    """A file descriptor of /dev/kvm that speaks the known version. `NoKvm` where there is none."""
    if sys.platform != "linux":
        raise NoKvm(errno.ENOSYS, f"KVM is a part of Linux, and this is {sys.platform}: come back on a Linux machine.")
    if platform.machine() not in ("x86_64", "AMD64"):
        raise NoKvm(
            errno.ENOSYS, f"The guest's code is x86-64, and this machine is {platform.machine()}: use an x86 one."
        )
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        raise NoKvm(error.errno, _why_not_opened(error)) from None
    try:
        version = ioctl(fd, abi.KVM_GET_API_VERSION, told="KVM_GET_API_VERSION()")
        if version != abi.KVM_API_VERSION:
            why = f"{DEVICE} speaks version {version}, not {abi.KVM_API_VERSION}: this is not the KVM that the book knows."
            raise NoKvm(errno.EPROTO, why)
    except OSError as error:
        os.close(fd)
        if isinstance(error, NoKvm):
            raise
        raise NoKvm(error.errno, f"{DEVICE} is no KVM ({error.strerror}): look at what the file is.") from None
    return fd


def create_vm(kvm: int) -> int:
    """KVM_CREATE_VM. `NoKvm` where the machine or its hypervisor refuses."""
    try:
        return ioctl(kvm, abi.KVM_CREATE_VM, told="KVM_CREATE_VM()")
    except InterruptedError:  # a signal, whose handler has run by now
        return create_vm(kvm)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        advice = "another hypervisor (VirtualBox, VMware) may hold the CPU: stop it"
        if "hypervisor" in _cpu_flags():
            advice = "this machine is a guest: ask its hypervisor for nested virtualization"
        raise NoKvm(error.errno, f"KVM makes no VM here ({error.strerror}); {advice}.") from None


def ioctl(fd: int, number: int, argument: Any = 0, told: str = "") -> int:
    """One ioctl. ``argument``: an int, or a ctypes struct, which the kernel may change. OSError with ``told``, the call and
    its arguments, in its message."""
    if fd < 0:
        raise OSError(errno.EBADF, f"{os.strerror(errno.EBADF)}: {told}: the VM is closed")
    try:
        answer: int = fcntl.ioctl(fd, number, argument)
        return answer
    except OSError as error:
        raise OSError(error.errno, f"{os.strerror(error.errno or 0)}: {told or hex(number)}") from None


def kvm_run(fd: int, told: str) -> None:
    """KVM_RUN, once. InterruptedError if a signal ends it, which is how the watchdog calls a vCPU back.

    By libc, which has no opinion: `fcntl.ioctl` tries again after EINTR in newer Pythons (Modules/fcntlmodule.c:
    fcntl_ioctl_impl(); that of 3.11.7 does not), and then nobody is called back."""
    if _libc().ioctl(fd, ctypes.c_ulong(abi.KVM_RUN), 0) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{os.strerror(code)}: {told}")


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


NO_ROOM = {
    errno.EMFILE: "this process has too many files open: close other VMs, or allow it more (ulimit -n)",
    errno.ENFILE: "this machine has too many files open: close other programs, or allow it more (sysctl fs.file-max)",
    errno.ENOMEM: "there is no memory for it: close other VMs, or allow more (ulimit -v, sysctl vm.overcommit_memory)",
}


def no_room(refusal: OSError) -> str:
    """Why there is no room for a VM more, and what to do, as one sentence; "" if it was refused for another reason."""
    advice = NO_ROOM.get(refusal.errno or 0)
    return f"KVM can be used here, but makes no VM now ({os.strerror(refusal.errno or 0)}): {advice}." if advice else ""


def capability(fd: int, number: int) -> int:
    """KVM_CHECK_EXTENSION of /dev/kvm or of a VM: 0 if it is not offered, else what the capability's page says."""
    return ioctl(fd, abi.KVM_CHECK_EXTENSION, number, told=f"KVM_CHECK_EXTENSION({number})")


def vendor_module() -> str | None:
    """The module that stands below kvm ("kvm_intel", "kvm_amd", ...), or None where none is known to be loaded. Of several,
    which a kernel may have built in, the one that this CPU can use."""
    found, flags = sorted(path.name for path in MODULES.glob("kvm_*") if path.is_dir()), _cpu_flags()
    usable = [name for name in found if VENDORS.get(name) in flags] or [name for name in found if name not in VENDORS]
    return next(iter(usable + found), None)


def _cpu_flags() -> set[str]:
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def _why_not_opened(error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"You may not open {DEVICE}: join its group (sudo usermod -aG kvm $USER) and log in again."
    if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return f"{DEVICE} cannot be opened ({error.strerror}): close what else uses it, and try again."
    flags = _cpu_flags()
    module = next((name for name, flag in VENDORS.items() if flag in flags), None)
    if module:
        return f"KVM is not loaded, though the CPU could: sudo modprobe {module} (in a container: pass {DEVICE} in)."
    if "hypervisor" in flags:
        return (
            "This machine is a guest without virtualization of its own: ask its hypervisor for nested virtualization."
        )
    return "This CPU offers no virtualization (neither vmx nor svm): switch it on in the firmware, if it has it."
