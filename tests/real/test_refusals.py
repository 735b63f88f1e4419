"""No KVM here: one sentence that says why and what to do, for each reason, and never a stack trace."""

import ctypes
import errno
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from kvmbook.model import MemoryRegion
from kvmbook.real import NoKvm, RealVm, abi, device, vm
from kvmbook.real.__main__ import main


@pytest.fixture
def sentence(capsys):
    """What `python -m kvmbook.real` and `RealVm()` say: one sentence, the same, with exit code 1."""

    def told():
        open_before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
        assert main([]) == 1
        printed = capsys.readouterr()
        with pytest.raises(NoKvm) as refusal:
            RealVm()
        assert (printed.out, printed.err) == ("", f"{refusal.value}\n")
        assert printed.err.count("\n") == 1 and printed.err.endswith(".\n") and len(printed.err) < 160
        if open_before:
            assert os.listdir("/proc/self/fd") == open_before
        return printed.err

    return told


@pytest.fixture
def x86(monkeypatch):
    monkeypatch.setattr(device.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(device.sys, "platform", "linux")


def cannot_open(monkeypatch, code):
    def refuse(path, flags):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(device.os, "open", refuse)


def answers(monkeypatch, **by_name):
    """A KVM that is a file with nothing in it: ioctls answer what is said here; an OSError is raised."""
    monkeypatch.setattr(device, "DEVICE", os.devnull)

    def ioctl(fd, number, argument=0):
        answer = next(value for name, value in by_name.items() if getattr(abi, name) == number)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(device.fcntl, "ioctl", ioctl)


def test_another_system(monkeypatch, sentence):
    monkeypatch.setattr(device.sys, "platform", "darwin")
    assert "part of Linux" in sentence()


def test_another_architecture(monkeypatch, x86, sentence):
    monkeypatch.setattr(device.platform, "machine", lambda: "aarch64")
    assert "aarch64" in sentence()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM])
def test_no_permission(monkeypatch, x86, sentence, code):
    cannot_open(monkeypatch, code)
    assert "usermod -aG kvm" in sentence()


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENODEV, errno.ENXIO])
@pytest.mark.parametrize(
    "flags, advice",
    [
        ("fpu vmx", "modprobe kvm_intel"),
        ("fpu svm hypervisor", "modprobe kvm_amd"),
        ("fpu hypervisor", "nested virtualization"),
        ("fpu", "firmware"),
        (None, "firmware"),
    ],
)
def test_no_device_or_no_module(monkeypatch, x86, sentence, tmp_path, code, flags, advice):
    cannot_open(monkeypatch, code)
    monkeypatch.setattr(device, "CPUINFO", tmp_path / "cpuinfo")
    if flags:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    assert advice in sentence()


def test_a_device_that_is_busy(monkeypatch, x86, sentence):
    cannot_open(monkeypatch, errno.EBUSY)
    assert "Device or resource busy" in sentence()


def test_a_file_that_is_no_kvm(monkeypatch, x86, sentence):
    monkeypatch.setattr(device, "DEVICE", os.devnull)
    assert "is no KVM" in sentence()


def test_another_version(monkeypatch, x86, sentence):
    answers(monkeypatch, KVM_GET_API_VERSION=11)
    assert "version 11" in sentence()


@pytest.mark.parametrize("flags, advice", [("fpu vmx", "VirtualBox"), ("vmx hypervisor", "nested virtualization")])
def test_a_hypervisor_that_refuses(monkeypatch, x86, sentence, tmp_path, flags, advice):
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: {flags}\n")
    monkeypatch.setattr(device, "CPUINFO", tmp_path / "cpuinfo")
    answers(monkeypatch, KVM_GET_API_VERSION=12, KVM_CREATE_VM=OSError(errno.ENODEV, "No such device"))
    assert advice in sentence()


@pytest.mark.parametrize(
    "code, advice", [(errno.EMFILE, "ulimit -n"), (errno.ENFILE, "file-max"), (errno.ENOMEM, "memory")]
)
@pytest.mark.parametrize("where", ["open", "create"])
@pytest.mark.parametrize("command", ["offers", "ask", "differ"])
def test_no_room_for_a_vm_more_is_one_sentence_in_the_command(monkeypatch, x86, capsys, code, advice, where, command):
    """Not `NoKvm`: the machine has one."""
    if where == "open":
        cannot_open(monkeypatch, code)
    else:
        answers(monkeypatch, KVM_GET_API_VERSION=12, KVM_CREATE_VM=OSError(code, os.strerror(code)))
    with pytest.raises(OSError) as refusal:
        RealVm()
    assert refusal.value.errno == code and not isinstance(refusal.value, NoKvm)
    assert main([command]) == 1
    said = capsys.readouterr().err
    assert advice in said and os.strerror(code) in said and said.count("\n") == 1 and said.endswith(".\n")


def test_a_signal_ends_kvm_run_whatever_python_makes_of_eintr(monkeypatch):
    """`fcntl.ioctl` tries again, in newer Pythons; so KVM_RUN does not go through it."""
    calls = []

    class Libc:
        def ioctl(self, *arguments):
            calls.append(arguments)
            ctypes.set_errno(errno.EINTR)
            return -1

    monkeypatch.setattr(device, "_libc", Libc)
    monkeypatch.setattr(device.fcntl, "ioctl", lambda *_: pytest.fail("not by fcntl"))
    with pytest.raises(InterruptedError, match="KVM_RUN of vCPU 0"):
        device.kvm_run(5, "KVM_RUN of vCPU 0")
    assert len(calls) == 1
    monkeypatch.undo()
    with open(os.devnull) as null, pytest.raises(OSError) as refusal:
        device.kvm_run(null.fileno(), "KVM_RUN")
    assert refusal.value.errno == errno.ENOTTY


def test_a_slot_does_not_grow_while_its_log_is_read(monkeypatch):
    """KVM writes as many words as the slot has, into an array made for those that it had."""
    machine = RealVm.__new__(RealVm)
    machine._lock, machine._fd, machine.own_slot, machine._reached = threading.RLock(), 5, 32763, set()
    machine._slots = {0: MemoryRegion(0, 1, 0, 64 << 12, 0)}
    grows = threading.Thread(target=machine.kvm_set_user_memory_region, args=(0, 1, 0, 1 << 30, 0))
    order, zeros = [], np.zeros

    def an_array_is_made(*arguments):
        order.append("its array is made")
        grows.start()
        grows.join(0.2)
        return zeros(*arguments)

    def ioctl(fd, number, argument, told):
        order.append(told.split("(")[0])
        return 0

    monkeypatch.setattr(vm, "ioctl", ioctl)
    monkeypatch.setattr(vm.np, "zeros", an_array_is_made)
    assert len(machine.get_dirty_log(0)) == 64
    grows.join()
    assert order == ["its array is made", "KVM_GET_DIRTY_LOG", "KVM_SET_USER_MEMORY_REGION"]


def test_a_signal_while_the_vm_is_made_is_no_refusal(monkeypatch):
    made = iter([OSError(errno.EINTR, "Interrupted system call"), 5])

    def ioctl(fd, number, argument=0):
        answer = next(made)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(device.fcntl, "ioctl", ioctl)
    assert device.create_vm(3) == 5


@pytest.mark.parametrize("vcpus", [0, 512])
def test_vcpus_that_would_write_beside_their_page_are_refused(vcpus):
    with pytest.raises(ValueError, match="1 to 511"):
        RealVm(vcpus)


def test_it_imports_where_there_is_no_fcntl():
    code = (
        "import sys, numpy; sys.modules['fcntl'] = None\n"
        "from kvmbook.real import RealVm, NoKvm\n"
        "from kvmbook.real.__main__ import main\n"
        "sys.platform = 'win32'\n"
        "sys.exit(main([]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "win32" in done.stderr
