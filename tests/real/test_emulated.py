"""The recorded runs of Linux's own KVM in an emulator: each cell and each loss is what the model says."""

import pathlib

import pytest

from kvmbook.model import Kernel
from kvmbook.real import EMULATED, FLUSH_RULES, PAGES_WRITTEN, Boot, Cell, Turn, by_model, emulated_boots, keep_boots
from kvmbook.search import read_litmus
from tools.real_bug.programs import loses_by_model

BOOTS = emulated_boots()
IDS = [f"{boot.kernel}, {boot.hardware}" for boot in BOOTS]


def test_two_kernels_on_two_cpus():
    assert {(boot.kernel[:4], boot.hardware) for boot in BOOTS} == {(k, h) for k in ("6.1.", "7.2.") for h in EMULATED}


@pytest.mark.parametrize("boot", BOOTS, ids=IDS)
def test_each_cell_is_what_the_model_says(boot):
    assert {(cell.flush, cell.aged) for cell in boot.cells} == {
        (rule.value, aged) for rule in FLUSH_RULES for aged in (0, 1)
    }
    for cell in boot.cells:
        assert len(cell.rounds) == 10
        assert set(cell.rounds) == {by_model(boot.kernel, boot.hardware, cell.flush, cell.aged)}, cell


def test_the_seed_and_its_control_differ_in_the_one_line():
    for boot in BOOTS:
        cells = {(cell.flush, cell.aged): cell.lost for cell in boot.cells}
        seed = str(PAGES_WRITTEN) if boot.hardware == "EPT without A/D bits" else "0"
        assert (cells["if changed", True], cells["always", True]) == (seed, "0")
        assert (cells["if changed", False], cells["never", True]) == ("0", str(PAGES_WRITTEN))


@pytest.mark.parametrize("boot", BOOTS, ids=IDS)
def test_each_loss_is_what_the_model_says(boot):
    assert len(boot.losses) == 14
    for loss in boot.losses:
        assert loss.rounds >= 5
        assert loss.lost == loss.rounds * loses_by_model(loss), loss.name
        if loss.litmus:
            configuration = read_litmus(loss.litmus).configuration
            assert configuration.kernel == Kernel.of(boot.kernel)
            assert configuration.hardware == EMULATED[boot.hardware]


@pytest.mark.parametrize("boot", BOOTS, ids=IDS)
def test_with_the_repairs_nothing_is_lost_and_without_them_something_is(boot):
    assert not any(loss.lost for loss in boot.losses if loss.repaired)
    lost = {loss.name for loss in boot.losses if loss.lost}
    today = {"a signal during RESET"} if boot.kernel.startswith("7") else {"CLEAR of 0, 1, eager_page_split=Y"}
    assert lost == {"CLEAR of 0, 1, eager_page_split=N", "a ring with INITIALLY_SET", *today}


def test_the_chapter_counts_the_rounds():
    rounds = sum(len(cell.rounds) for boot in BOOTS for cell in boot.cells)
    chapter = pathlib.Path(__file__).parents[2] / "notebooks/15-on-a-real-kernel.ipynb"
    assert f"the model agrees with each of their {rounds} rounds" in chapter.read_text()


def test_what_is_kept_is_read_back(tmp_path):
    keep_boots(BOOTS, tmp_path / "boots.json")
    assert emulated_boots(tmp_path / "boots.json") == BOOTS


def test_a_cell_says_which_numbers_its_rounds_had():
    cell = Cell("always", True, (Turn(16, 16, 1), Turn(16, 0, 1), Turn(16, 16, 0)))
    assert (cell.lost, cell.flushes) == ("0 or 16", "0 or 1")
    assert isinstance(BOOTS[0], Boot) and BOOTS[0].seconds > 0
