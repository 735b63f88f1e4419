"""The drafts of reports: a run that one has loses what it says, and nothing with the repair that it proposes."""

import pathlib
import re
from itertools import product

import pytest

from kvmbook.scenes import up
from kvmbook.search import KNOWN_FAULTS, loses, read_litmus

REPORTS = pathlib.Path(__file__).parent.parent.parent / "book/reports"
DRAFTS = {"clear-initially-set-huge-page": "clear_compares_rounded_up", "ring-initially-set": "ring_skips_protection"}


def test_every_draft_is_listed():
    listed = re.findall(r"^\| \[([\w-]+)\.md\]\(\1\.md\)", (REPORTS / "README.md").read_text(), re.M)
    assert {path.stem for path in REPORTS.glob("*.md")} == {"README", *listed} and set(DRAFTS) < set(listed)


@pytest.mark.parametrize("draft", DRAFTS)
def test_the_run_loses_what_it_says_by_the_fault_that_is_described(draft):
    (text,) = re.findall(r"```\n(.*?)```", (REPORTS / f"{draft}.md").read_text(), re.S)
    litmus = read_litmus(text)
    assert str(litmus) == text.strip() and litmus.lost
    (fault,) = (fault for fault in KNOWN_FAULTS if fault.switch == DRAFTS[draft])
    assert litmus.fault == fault.name
    cured = litmus.configuration.kernel.with_(**fault.repair(litmus.configuration.kernel))
    assert not loses(litmus.configuration.with_(kernel=cured), litmus.run)
    assert "vm.vcpu[0].write(0x400)" in litmus.to_script()
    assert (REPORTS / f"{draft}.c").read_text() == litmus.to_selftest(), "a later kvmbook writes another program"
    assert f"[{draft}.c]({draft}.c)" in (REPORTS / f"{draft}.md").read_text()


def test_how_many_combinations_are_wrong():
    spans = [(base + first, base + last) for base in range(512) for first, last in product(range(64), repeat=2)]
    spans = [(first, last) for first, last in spans if first <= last]
    wrong = sum(up(first) == up(last) and first // 512 != last // 512 for first, last in spans)
    assert f"{len(spans):,} combinations" in (text := (REPORTS / "clear-initially-set-huge-page.md").read_text())
    assert f"is wrong for {wrong:,}" in text
