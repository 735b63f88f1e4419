"""The C programs that runs become, on this machine's KVM, when asked (KVMBOOK_KVM=1): each has a time limit."""

import os
import shutil
import subprocess

import pytest
from made_programs import LOST, programs

from kvmbook.real import CLAIMS, NoKvm, ask_machine
from kvmbook.search import c_program

pytestmark = [
    pytest.mark.skipif(os.environ.get("KVMBOOK_KVM") != "1", reason="runs guests on this machine: KVMBOOK_KVM=1"),
    pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc"),
]
MADE = programs() if os.environ.get("KVMBOOK_KVM") == "1" else {"none": None}
LIMIT = 90  # seconds; the program itself ends after 60


@pytest.fixture(scope="module")
def machine():
    try:
        return ask_machine()
    except NoKvm as refusal:
        pytest.skip(str(refusal))


@pytest.mark.parametrize("made", MADE)
def test_what_a_program_says_here(made, machine, tmp_path):
    script, says, says_claim = MADE[made]
    claim = next((claim for claim in CLAIMS if claim.says == says_claim), None)
    assert claim or not says_claim
    if claim and claim.missing(machine):
        pytest.skip(claim.missing(machine))
    (tmp_path / "run.c").write_text(c_program(script))
    subprocess.run(
        ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "run.c", "-o", "run"], cwd=tmp_path, check=True
    )
    process = subprocess.Popen(["./run"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()  # and not waited for: it may be beyond reach
        pytest.fail(f"not back after {LIMIT} s")
    assert process.returncode in says, said
    last = said.splitlines()[-1]
    assert last.startswith({0: "PASS: ", 1: "FAIL: ", 4: "SKIP: "}[process.returncode])
    if says == (LOST,):
        assert last == "FAIL: a write was lost in 100 of 100 rounds."
