"""On this machine's KVM, when asked (KVMBOOK_KVM=1): each run of live_runs.py in a process of its own."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import live_runs
import pytest
from live_kvm import ROOT, in_time, usable_machine, when_asked

from kvmbook.real import recorded

LIVE = [f"tests/real/test_{name}.py" for name in ("live", "live_questions", "selftests_live")]


@pytest.fixture(scope="module")
def machine():
    return usable_machine()


@when_asked
@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("run", live_runs.RUNS)
def test_live(run):
    said, code = in_time(sys.executable, live_runs.__file__, run)
    if code == live_runs.NOT_TRIED:
        pytest.skip(said.splitlines()[-1])
    assert code == 0 and said.endswith("done\n"), said


def test_a_run_that_cannot_be_tried_here_says_so(monkeypatch, capsys):
    monkeypatch.setattr(live_runs, "ask_machine", lambda: replace(recorded().offers, huge_pages=False))
    with pytest.raises(SystemExit) as ended:
        live_runs.a_clear_forgets_the_huge_page_that_begins_at_its_last_gfn()
    assert ended.value.code == live_runs.NOT_TRIED
    assert capsys.readouterr().out == "could not be tried here: needs transparent huge pages\n"


def test_who_asks_for_live_tests_and_has_no_kvm_is_told_by_failures():
    """Not by tests that are skipped, which look as if all were well."""
    chosen = ["-q", "-p", "no:cacheprovider", "-k", "not who_asks and not be_tried", *LIVE]
    code = "import sys, pytest; from kvmbook.real import device; device.DEVICE = '/dev/none'\n"
    code += f"sys.exit(pytest.main({chosen}))"
    environment = {**os.environ, "KVMBOOK_KVM": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1 and not re.search(r"\d skipped", done.stdout.splitlines()[-1]), done.stdout
    for path in LIVE:
        assert f"ERROR {path}" in done.stdout, done.stdout[-2000:]
