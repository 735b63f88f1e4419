"""On this machine's KVM, when asked (KVMBOOK_KVM=1): each run in a process of its own that has a time limit, for a bug in a
host's KVM can hang what uses it, or worse."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

from kvmbook.real import NoKvm, RealVm

pytestmark = pytest.mark.skipif(
    os.environ.get("KVMBOOK_KVM") != "1", reason="runs guests on this machine: KVMBOOK_KVM=1"
)
FILE = pathlib.Path(__file__).with_name("live_runs.py")
LIMIT = 120  # seconds
RUNS = [node.name for node in ast.parse(FILE.read_text()).body if isinstance(node, ast.FunctionDef)]


@pytest.fixture(scope="module", autouse=True)
def kvm():
    try:
        RealVm().close()
    except NoKvm as refusal:
        pytest.skip(str(refusal))


@pytest.mark.parametrize("run", [name for name in RUNS if name not in ("model", "refused")])
def test_live(run):
    process = subprocess.Popen([sys.executable, FILE, run], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()  # and not waited for: it may be beyond reach
        pytest.fail(f"{run} was not back after {LIMIT} s")
    assert process.returncode == 0 and said.endswith("done\n"), said
