"""The C programs that runs become, on this machine's KVM, when asked (KVMBOOK_KVM=1): each has a time limit."""

import os
import shutil
import subprocess

import pytest
from live_kvm import ASKED, in_time, usable_machine, when_asked
from made_programs import LOST, programs

from kvmbook.real import CLAIMS
from kvmbook.search import c_program

pytestmark = [
    when_asked,
    pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc"),
]
MADE = programs() if ASKED else {"none": None}
LIMIT = 90  # seconds; the program itself ends after 60


@pytest.fixture(scope="module")
def machine():
    return usable_machine()


def compiled_and_run(text, folder):
    (folder / "run.c").write_text(text)
    command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "run.c", "-o", "run"]
    subprocess.run(command, cwd=folder, check=True)
    said, code = in_time("./run", cwd=folder, limit=LIMIT)
    return code, said


@pytest.mark.parametrize("made", MADE)
def test_what_a_program_says_here(made, machine, tmp_path):
    script, says, says_claim = MADE[made]
    claim = next((claim for claim in CLAIMS if claim.says == says_claim), None)
    assert claim or not says_claim
    if claim and claim.missing(machine):
        pytest.skip(claim.missing(machine))
    code, said = compiled_and_run(c_program(script), tmp_path)
    assert code in says, said
    last = said.splitlines()[-1]
    assert last.startswith({0: "PASS: ", 1: "FAIL: ", 4: "SKIP: "}[code])
    if says == (LOST,):
        assert last == "FAIL: a write was lost in 100 of 100 rounds."


@pytest.mark.usefixtures("machine")
def test_ageing_sets_a_bit_for_each_page_frame_and_looks_whether_it_stays(tmp_path):
    """On a file that stands for page_idle's: nothing is aged, but the program goes to its end. One that keeps nothing, as for
    a frame on no LRU list, is noticed."""
    text = c_program(MADE["seed"].script)
    (tmp_path / "bitmap").touch()
    code, said = compiled_and_run(text.replace("/sys/kernel/mm/page_idle/bitmap", str(tmp_path / "bitmap")), tmp_path)
    assert (code, os.geteuid() == 0) in ((0, True), (4, False)), said
    bits = int.from_bytes((tmp_path / "bitmap").read_bytes(), "little")
    assert bits.bit_count() in (range(1, 101) if code == 0 else (0,))
    code, said = compiled_and_run(text.replace("/sys/kernel/mm/page_idle/bitmap", "/dev/zero"), tmp_path)
    assert code == 4 and said.startswith("SKIP: "), said
