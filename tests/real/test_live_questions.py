"""On this machine's KVM, when asked (KVMBOOK_KVM=1): chapter 15's questions, in a process that has a time limit."""

import json
import re
import sys

import pytest
from live_kvm import ROOT, in_time, usable_machine, when_asked

from kvmbook.real import live, recorded

pytestmark = when_asked
CHAPTER = ROOT / "notebooks/15-on-a-real-kernel.ipynb"


@pytest.fixture(scope="module")
def offers():
    usable_machine()
    return live().offers


def test_this_machine_agrees_with_its_model_and_says_what_was_recorded_of_it(offers, tmp_path):
    said, code = in_time(sys.executable, "-m", "kvmbook.real", "ask", str(tmp_path / "live.json"))
    assert code == 0 and "DIFFERS" not in said, said
    kept = [json.loads(path.read_text()) for path in (ROOT / "kvmbook/real/recorded").glob("*.json")]
    again = json.loads((tmp_path / "live.json").read_text())
    alike = [one for one in kept if one["machine"] == again["machine"]]
    assert alike or offers != recorded().offers
    for one in alike:
        assert one == again


def test_the_chapter_runs_on_this_machine_when_its_switch_is_turned(offers):
    """And prints the same, if this is the recorded machine."""
    code = [cell["source"] for cell in json.loads(CHAPTER.read_text())["cells"] if cell["cell_type"] == "code"]
    run = "\n".join(re.sub(r"^(Table\(.*\))$", r"print(\1)", "".join(source), flags=re.M) for source in code)
    switched, times = re.subn(r"machine = recorded\(.*\)  #.*", "machine = live()", run)
    assert times == 1
    said, returned = in_time(sys.executable, "-c", switched)
    assert returned == 0, said
    if offers == recorded().offers:
        name = recorded().name
        assert said.replace("this machine", name) == in_time(sys.executable, "-c", run)[0]
