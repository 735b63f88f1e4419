"""`make soak` ends at a write that is lost, goes on where it was interrupted, and counts the steps of the model."""

import re
import sys

import pytest
from hypothesis import settings

from kvmbook.search import random_runs, read_litmus
from tools import soak


@pytest.fixture
def soaked(monkeypatch, tmp_path, capsys):
    """What the command prints, with few and short batches, on two releases and two kinds of hardware."""

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["soak", "--jobs", "1", *options])
        soak.main()
        return capsys.readouterr().out.splitlines()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(random_runs, "QUIET", settings(random_runs.QUIET, max_examples=40))
    monkeypatch.setattr(soak, "KERNELS", {name: soak.KERNELS[name] for name in ("Linux v5.19", "Linux v6.18")})
    monkeypatch.setattr(soak, "ON", {name: soak.ON[name] for name in ("NPT", "EPT without A/D bits")})
    return run


def test_releases_without_their_faults_lose_nothing_and_each_kind_gets_its_steps(soaked, tmp_path):
    first, *kinds = soaked("--steps", "3000")
    assert first == "3,000 steps on each of 2 kinds of hardware, 2 releases, seed 1"
    matches = [re.fullmatch(r"(.+?) +([\d,]+) steps, no write lost", line) for line in kinds]
    assert {match[1] for match in matches} == {"NPT", "EPT without A/D bits"}
    assert all(int(match[2].replace(",", "")) >= 3000 for match in matches)
    (kept,) = (tmp_path / "build").iterdir()
    before = kept.read_bytes()
    assert soaked("--steps", "3000") == [first, *kinds] and kept.read_bytes() == before


def test_a_release_as_it_is_loses_a_write_and_the_litmus_test_says_how(soaked):
    with pytest.raises(SystemExit) as ended:
        soaked("--as-released", "--steps", "1000000")
    title, text = str(ended.value).strip().split("\n", 1)
    litmus = read_litmus(text)
    assert title.startswith("Linux v5.19, seed ") and litmus.lost
    assert litmus.made_on(litmus.configuration.bare()).lost() == litmus.lost
