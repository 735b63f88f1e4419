"""The hunter finds each fault that is known, knows it again, and finds what is new; what it hands on says the same
elsewhere."""

import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvmbook import FlushPolicy, Hardware, Kernel, SpteFormat, Vm
from kvmbook.search import (
    KNOWN_FAULTS,
    Configuration,
    Litmus,
    Play,
    every,
    fault_of,
    faults_in,
    hunt,
    hunt_at_random,
    hunt_one,
    loses,
    read_litmus,
    repaired,
)
from kvmbook.search.configurations import HARDWARE, LARGE, OPTIONS, SMALL

FLUSH, ROUNDED, FORGETS, RING, SIGNAL, DROPPED, ALL_ROOTS = (fault.name for fault in KNOWN_FAULTS)
MET = {  # each fault: where it is met by runs of so many calls
    FLUSH: (Configuration(Kernel.v5_19, Hardware.ept(ad_bits=False)), 4),
    ROUNDED: (Configuration(Kernel.v6_18, Hardware.npt(), eager_page_split=False, manual=3, slot=LARGE[1]), 4),
    RING: (Configuration(Kernel.v6_18, Hardware.shadow(), manual=3, ring=True), 3),
    SIGNAL: (Configuration(Kernel.v6_18, Hardware.npt(), ring=True), 5),
    DROPPED: (Configuration(Kernel.v6_1, Hardware.npt()), 2),
    ALL_ROOTS: (Configuration(Kernel.v6_4, Hardware.ept(pml=True), nested="tdp"), 3),
}


@pytest.fixture(scope="module")
def found():
    """The run that the hunter finds for each fault, where it is met."""
    return {fault: dict((x.fault, x) for x in hunt_one(*where).found).get(fault) for fault, where in MET.items()}


@pytest.mark.parametrize("fault", MET)
def test_the_hunter_finds_each_fault_by_a_shortest_run(found, fault):
    configuration, calls = MET[fault]
    litmus = found[fault]
    assert litmus is not None and len(litmus.run) == calls and litmus.lost
    assert fault not in [litmus.fault for litmus in hunt_one(configuration, calls - 1).found]


@pytest.mark.parametrize("fault", MET)
def test_without_its_known_faults_a_release_loses_nothing_there(fault):
    configuration, calls = MET[fault]
    assert not hunt_one(configuration.with_(kernel=repaired(configuration.kernel)), calls).found


def test_two_faults_of_clear_hide_behind_each_other_by_default(found):
    """v6.0 with eager splitting forgets the page, and overlooks it: either repair alone is enough."""
    run, by_default = found[ROUNDED].run, MET[ROUNDED][0].with_(kernel=Kernel.v6_0, eager_page_split=True)
    assert loses(by_default, run) == (1,)
    for repair in ({"clear_compares_rounded_up": False}, {"clear_split_forgets_last": False}):
        assert loses(by_default.with_(kernel=Kernel.v6_0.with_(**repair)), run) == ()
    assert [call.phrase for call in run] == [
        "vCPU0 writes page 1",
        "user space enables logging",
        "user space clears 0, 1 of the dirty log",
        "vCPU0 writes page 1",
    ]


def test_which_release_has_which_fault():
    has = {kernel.name: [fault.name for fault in faults_in(kernel)] for kernel in Kernel.releases}
    assert has["Linux v5.19"] == [FLUSH, ROUNDED, FORGETS, RING, DROPPED]
    assert ALL_ROOTS in has["Linux v6.4"] and ALL_ROOTS in has["Linux v6.8"] and ALL_ROOTS not in has["Linux v6.9"]
    assert has["Linux v6.18"] == [ROUNDED, RING, SIGNAL]
    assert not any(faults_in(repaired(kernel)) for kernel in Kernel.releases)


class ForgetsToProtect(SpteFormat):
    def tdp_wrprot(self, spte):
        return super().tdp_wrprot(spte)._replace(spte=spte)


def test_a_fault_that_nobody_knows_is_new():
    kernel = repaired(Kernel.v6_0).with_(spte_rules=ForgetsToProtect, name="a kernel with a fault of its own")
    (litmus,) = hunt_one(Configuration(kernel, Hardware.ept(ad_bits=False)), 3).found
    assert litmus.fault is None and [call.what for call in litmus.run] == ["writes", "enables", "writes"]


def test_a_run_that_meets_two_faults_is_said_to(found):
    kernel = Kernel.v5_19
    configuration = Configuration(kernel, Hardware.ept(ad_bits=False), manual=3, ring=True)
    run = found[FLUSH].run
    assert fault_of(configuration, run) == "several known ones at once"
    assert fault_of(configuration.with_(kernel=kernel.with_(flush=FlushPolicy.ALWAYS)), run) == RING


# ---- the books, and equal futures ------------------------------------------------------------------------------------


def some_run(seed, calls, rarer=True, without=()):
    """A play at random, after each call."""
    chance = random.Random(seed)
    configurations = list(every(chance.choice(Kernel.releases)))
    play = Play.start(chance.choice(configurations))
    for _ in range(calls):
        choices = [call for call in play.possible() + play.rarer() * rarer if call.what not in without]
        play.do(chance.choice(choices))
        yield play


def test_the_hunters_books_agree_with_the_models():
    """Two ways to know of a loss. (The model's begins anew when a slot moves.)"""
    losses = 0
    for seed in range(60):
        for play in some_run(seed, 25, without=["moves"]):
            first = play.configuration.slot.base_gfn
            assert [first + page for page in play.lost()] == play.vm.missed_dirty(0).tolist(), seed
            if play.lost():
                losses += 1
                break
    assert losses > 3


@pytest.mark.parametrize("seed", range(12))
def test_equal_keys_are_equal_futures(seed):
    """Runs that come to the same key by different ways go on alike."""
    chance, met, pairs = random.Random(seed), {}, 0
    configuration = chance.choice(list(every(Kernel.v6_4)))
    for _ in range(60):
        play, run = Play.start(configuration), []
        for _ in range(chance.randint(1, 4)):
            run.append(chance.choice(play.possible()))
            play.do(run[-1])
        other, known = met.setdefault(play.key(), (play, run))
        if known == run:
            continue
        pairs += 1
        one, two = play.copy(), other.copy()
        for _ in range(8):
            assert one.possible() == two.possible() and one.key() == two.key() and one.lost() == two.lost()
            call = chance.choice(one.possible())
            one.do(call)
            two.do(call)
    assert pairs


# ---- what is handed on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", MET)
def test_a_text_is_read_back(found, fault):
    assert read_litmus(str(found[fault])) == found[fault]


def test_a_text_says_what_is_lost_now(found):
    text = str(found[RING])
    assert read_litmus(text.replace("v6.18", "v6.18 without its known faults")).lost == ()
    assert read_litmus(text.replace("lost: 0", "lost: nothing")).lost == (0,)


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("kernel: Linux v6.18", "kernel: Linux v7", "known are Linux v5.19"),
        ("hardware: shadow paging", "hardware: EPT", "hardware 'EPT': known are"),
        ("2 pages from", "two pages from", "slot"),
        ("vCPU0 writes page 0", "vCPU0 jumps", "possible are: vCPU0 writes page 0"),
        ("vCPU0 writes page 0", "vCPU1 writes page 0", "not possible here"),
    ],
)
def test_a_text_that_cannot_be_read_says_what_could_be(found, old, new, why):
    with pytest.raises(ValueError, match=why):
        read_litmus(str(found[RING]).replace(old, new))


def test_the_simplest_configuration_of_the_same_fault():
    crowded = Configuration(
        Kernel.v6_18, Hardware.ept(pml=True).with_(tdp_mmu=False), "ept", manual=3, ring=True, vcpus=2, slot=LARGE[2]
    )
    (litmus,) = hunt_one(crowded, 3).found
    assert litmus.simplest() == Litmus(
        Configuration(Kernel.v6_18, HARDWARE[0], manual=3, ring=True, slot=SMALL[0]),
        tuple(call._replace(page=0) if call.page is not None else call for call in litmus.run),
        (0,),
        RING,
    )


@pytest.mark.parametrize("fault", [FLUSH, ROUNDED, RING])
def test_the_script_makes_the_run_on_another_vm(found, fault, monkeypatch, capsys):
    c = found[fault].configuration

    class Pretends(Vm):
        def __init__(self, vcpus, page_size):
            super().__init__(c.hardware, c.kernel, vcpus, page_size=page_size, eager_page_split=c.eager_page_split)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("kvmbook.real.RealVm", Pretends)
    exec(found[fault].to_script(), {})
    assert capsys.readouterr().out == f"lost: {list(found[fault].lost)}\n"


@pytest.mark.parametrize(
    ("fault", "why"), [(DROPPED, "kvm_write_guest"), (SIGNAL, "a signal"), (ALL_ROOTS, "run a nested guest")]
)
def test_no_script_for_what_user_space_cannot_do(found, fault, why):
    with pytest.raises(ValueError, match=why):
        found[fault].to_script()
    with pytest.raises(ValueError, match=r"plays|nested|signal"):
        found[fault].to_selftest()


def test_the_c_program_makes_the_same_calls(found):
    text = found[ROUNDED].to_selftest()
    body = text[text.index("static void play(void)") :].split("\n}\n")[0]
    calls = re.findall(r"^\t(\w+\(.*\);)$", body, re.M)
    assert calls[:2] + calls[-1:] == ["does(VCPU0, WRITE, 1);", "enable_logging();", "does(VCPU0, WRITE, 1);"]
    assert "MANUAL_PROTECT = 3" in text and "HUGE = 1" in text and "loses what is written to page 1" in text


# ---- the hunt --------------------------------------------------------------------------------------------------------


def test_every_configuration_is_once_there_and_can_be_built():
    configurations = list(every(Kernel.v6_0))
    assert len(configurations) == len(set(configurations)) == 2300
    for name, values in OPTIONS.items():
        assert {getattr(configuration, name) for configuration in configurations} == set(values)
    for configuration in configurations[::23]:
        assert not Play.start(configuration).logs


def test_a_hunt_keeps_count():
    configurations = [MET[RING][0], MET[DROPPED][0].with_(kernel=Kernel.v6_18), MET[RING][0].with_(ring=False)]
    seen = []
    made = hunt(
        Kernel.v6_18,
        600,
        calls=(2, 3),
        configurations=configurations,
        progress=lambda now: seen.append(now.transitions),
    )
    with ThreadPoolExecutor(2) as executor:
        shared = hunt(Kernel.v6_18, 600, calls=(2, 3), configurations=configurations, executor=executor)
    assert made.covered == shared.covered and list(made.met) == list(shared.met) == [RING]
    assert len(seen) == 6 and seen == sorted(seen)
    rows = made.rows("ring")
    assert [row[:4] for row in rows] == [("bitmap", 2, 3, 3), ("dirty rings", 1, 3, 3)]
    assert sum(row[4] for row in rows) == sum(covered.states for covered in made.covered.values())


def test_a_hunt_ends_when_its_time_is_over():
    assert len(hunt(Kernel.v6_18, 0, calls=(1, 1)).covered) == 1


def test_runs_at_random_are_found_and_shrunk():
    litmus, runs = hunt_at_random(Kernel.v6_1, 60, longest=8)
    assert litmus is not None and litmus.fault == DROPPED and runs > 1
    assert [call.what for call in litmus.run] == ["enables", "writes for nobody"]
    assert hunt_at_random(repaired(Kernel.v6_18), 0) == (None, 0)


HUNT = [sys.executable, "-m", "kvmbook.search", "v6.18", "--by", "ring", "--calls"]


def test_the_command_tells_what_it_met():
    asked = [*HUNT, "2", "--minutes", "0.05", "--jobs", "1"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "transitions" in done.stdout and "bitmap" in done.stdout


def test_the_command_tells_what_it_has_covered_when_it_is_ended_early():
    with subprocess.Popen(
        [*HUNT, "3", "--minutes", "60", "--seed", "3", "--jobs", "1"], stdout=subprocess.PIPE, text=True
    ) as hunting:
        assert hunting.stdout is not None
        first = hunting.stdout.readline()
        hunting.terminate()
        rest = hunting.stdout.read()
    assert first.startswith("--- INITIALLY_SET"), "with this seed it meets a fault at once"
    assert "ended before its time" in rest and "transitions" in rest and hunting.returncode == 0
