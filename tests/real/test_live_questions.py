"""On this machine's KVM, when asked (KVMBOOK_KVM=1): chapter 15's questions, in a process that has a time limit."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from kvmbook.real import NoKvm, live, recorded

pytestmark = pytest.mark.skipif(
    os.environ.get("KVMBOOK_KVM") != "1", reason="runs guests on this machine: KVMBOOK_KVM=1"
)
ROOT = pathlib.Path(__file__).parents[2]
LIMIT = 120  # seconds


def test_this_machine_agrees_with_its_model_and_says_what_was_recorded_of_it(tmp_path):
    try:
        offers = live().offers
    except NoKvm as refusal:
        pytest.skip(str(refusal))
    command = [sys.executable, "-m", "kvmbook.real", "ask", str(tmp_path / "live.json")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()  # and not waited for: it may be beyond reach
        pytest.fail(f"not back after {LIMIT} s")
    assert process.returncode == 0 and "DIFFERS" not in said, said
    kept = [json.loads(path.read_text()) for path in (ROOT / "kvmbook/real/recorded").glob("*.json")]
    again = json.loads((tmp_path / "live.json").read_text())
    alike = [one for one in kept if one["machine"] == again["machine"]]
    assert alike or offers != recorded().offers
    for one in alike:
        assert one == again
