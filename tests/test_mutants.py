"""Twenty small mistakes in the model, and the tests that notice them. ``make mutants`` puts in many more."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SAMPLE = json.loads((ROOT / "tools/mutants/sample.json").read_text())


@pytest.fixture(scope="module")
def killers():
    """In a process of its own: a fork of this one would have the model already. First: of no mutant."""
    command = [sys.executable, "-m", "tools.mutants.sample"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_the_model_as_it_is_passes_the_tests_that_kill(killers):
    assert killers[0] is None and len(killers) == 1 + len(SAMPLE) == 21


@pytest.mark.parametrize("number", range(len(SAMPLE)), ids=lambda number: f"{SAMPLE[number]['room']}-{number}")
def test_a_mistake_is_noticed(killers, number):
    assert killers[1 + number] == SAMPLE[number]["test"], SAMPLE[number]
