"""For tests that run guests on this machine: only when asked (KVMBOOK_KVM=1), and each in a process of its own that has a
time limit, for a bug in a host's KVM can hang what uses it, or worse."""

import os
import pathlib
import subprocess

import pytest

from kvmbook.real import NoKvm, ask_machine

ROOT = pathlib.Path(__file__).parents[2]
ASKED = os.environ.get("KVMBOOK_KVM") == "1"
when_asked = pytest.mark.skipif(not ASKED, reason="runs guests on this machine: KVMBOOK_KVM=1")
LIMIT = 120  # seconds


def usable_machine():
    """What this machine offers. A failure where there is no usable KVM: who asks for it is not told that all is well."""
    try:
        return ask_machine()
    except NoKvm as refusal:
        pytest.fail(f"KVMBOOK_KVM=1, but: {refusal}", pytrace=False)


def in_time(*command, cwd=ROOT, limit=LIMIT):
    """What a process says, and its exit code. A failure if it is not back in time."""
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()  # and not waited for: it may be beyond reach
        pytest.fail(f"not back after {limit} s: {command}")
    return said, process.returncode
