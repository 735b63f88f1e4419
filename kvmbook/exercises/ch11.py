"""Exercises and questions of chapter 11."""

from itertools import combinations

from kvmbook.exercises.mechanism import Answer, Run, checker, question
from kvmbook.exercises.vms import PAGES, lost_under_always, lost_while_logging
from kvmbook.model import FlushPolicy, Hardware, Kernel, SpteFormat, Vm
from kvmbook.scenes import BASE_GFN
from kvmbook.search import BITS, BitRule, Leaf, all_rules, cost, leaves_met, sound_rules
from kvmbook.views import ShapeGuess


def guess_11_1() -> ShapeGuess:
    """The frontier of flushes against missed writes."""
    hardware = Hardware.ept(ad_bits=False)
    never, always = cost(hardware, FlushPolicy.NEVER), cost(hardware, FlushPolicy.ALWAYS)
    costs = [always, *(cost(hardware, rule) for rule in all_rules(hardware))]
    because = (
        "The line falls in steps, because there are few rules. The first that misses nothing here flushes "
        f'{min(flushes for flushes, missed in costs if not missed)} times, and "always" {always.flushes} times.'
    )
    return ShapeGuess(
        'The workload of the panel, without A/D bits: take all rules over SPTE bits, and "always". How few writes does '
        "the best of them miss, if it may flush no more often than the lower axis says?",
        {
            most: min(missed for flushes, missed in costs if flushes <= most)
            for most in range(0, always.flushes + 1, 10)
        },
        top=never.missed,
        because=because,
        along="flushes while enabling, at most",
        counted="missed writes",
        named="with at most {} flushes",
    )


def _losing_w(hardware: Hardware) -> frozenset[Leaf]:
    return frozenset(kind for kind in leaves_met(hardware) if kind.before & ~kind.after & 1 << BITS.index("W"))


@question("4", "16", "64", "240")
def quiz_11_1() -> Answer:
    """On NPT the pass meets eight kinds of leaf, so there are 256 rules, and the cheapest of the 16 sound ones flushes for
    four kinds. How many of the unsound rules become sound if they flush for one kind more?"""
    hardware = Hardware.npt()
    kinds, needed = frozenset(leaves_met(hardware)), _losing_w(hardware)
    free = sorted(kinds - needed)
    with_them = [BitRule(needed.union(some)) for n in range(len(free) + 1) for some in combinations(free, n)]
    assert not sound_rules(hardware, [BitRule(kinds - {kind}) for kind in needed])
    sound = {rule.kinds for rule in sound_rules(hardware, with_them)}
    short = {rule - {kind} for rule in sound for kind in rule} - sound
    because = (
        f"Such a rule lacks exactly one of the {len(needed)} kinds that every sound rule has. For each of the other "
        f"{len(free)} kinds it may flush or not: {len(needed)} times 2 to the power of {len(free)}."
    )
    return Answer(str(len(short)), because)


@question("yes", "no")
def quiz_11_2() -> Answer:
    """Take the cheapest sound rule on NPT and let it flush for one more kind of leaf. Can it become unsound?"""
    hardware = Hardware.npt()
    cheapest = _losing_w(hardware)
    more = [BitRule(cheapest | {kind}) for kind in leaves_met(hardware) if kind not in cheapest]
    because = (
        "It could, if a flush had side effects that lose a write. The searches say that it has none here: the sound rules "
        "are exactly those that contain all kinds of the cheapest one."
    )
    return Answer("no" if sound_rules(hardware, more) == more else "yes", because)


@question("on all hardware", "without A/D bits and with PML", "only without A/D bits", "nowhere")
def quiz_11_3() -> Answer:
    """Flush if a pass, either of the two, meets an MMU-writable leaf. Where is that the cheapest sound rule over SPTE
    bits: without A/D bits, on NPT, with PML?"""
    cheapest = set()
    for name, hardware in (("", Hardware.ept(ad_bits=False)), ("NPT", Hardware.npt()), ("PML", Hardware.ept(pml=True))):
        named = frozenset(kind for kind in leaves_met(hardware) if kind.before & 1 << BITS.index("MW"))
        smaller = [BitRule(named - {kind}) for kind in named]
        if sound_rules(hardware, [BitRule(named)]) and not sound_rules(hardware, smaller):
            cheapest.add(name)
    said = {3: "on all hardware", 2: "without A/D bits and with PML", 1: "only without A/D bits", 0: "nowhere"}
    assert cheapest in ({"", "NPT", "PML"}, {"", "PML"}, {""}, set())
    because = (
        "Without A/D bits and with PML, a TLB may hold a stale copy of every MMU-writable leaf that a pass meets. On NPT "
        "ageing leaves W alone, so asking for W is enough, and cheaper. The rule that the message sketches asks in the "
        "write-protecting pass only; with PML that rule loses a write."
    )
    return Answer(said[len(cheapest)], because)


@checker
def check_11_1(rule: BitRule) -> str:
    """The cheapest sound rule on AMD."""
    hardware = Hardware.npt()
    if type(rule) is not BitRule or not isinstance(rule.kinds, frozenset):
        return "give a BitRule(frozenset(...)) of kinds from leaves_met(...)"
    if sound_rules(hardware, [rule]) != [rule]:
        return "a write can be lost under this rule; of which kinds of leaf may a TLB still hold a writable copy?"
    spare = [kind for kind in rule.kinds if sound_rules(hardware, [BitRule(rule.kinds - {kind})])]
    return f"your rule is sound, but {len(spare)} of its {len(rule.kinds)} kinds could be left out" if spare else ""


class WInTheClearDirtyPass:
    """Asks for MMU-writable where W is taken, and for W where D is cleared."""

    unconditional = False

    def after_write_protect(self, fmt: SpteFormat, old: int, new: int, answer: bool) -> bool:
        return fmt.is_mmu_writable_spte(old)

    def after_clear_dirty(self, fmt: SpteFormat, old: int, new: int, answer: bool) -> bool:
        return fmt.is_writable_pte(old)


def _with_nested_guest(kernel: Kernel) -> Vm:
    """Two vCPUs with PML, and a nested guest whose hypervisor does without A/D bits."""
    vm = Vm(Hardware.ept(pml=True), kernel, vcpus=2, nested="ept without A/D")
    vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=PAGES)
    return vm


@checker
def check_11_2(run: Run) -> str:
    """A nested guest that breaks a rule that was sound without one."""
    kernel = Kernel.v5_19.with_(flush=WInTheClearDirtyPass())
    vm = _with_nested_guest(kernel)
    run(vm)
    hint = "the nested guest's leaves have no A/D bits: what does ageing do to them?"
    return lost_while_logging(vm, kernel, hint) or lost_under_always(_with_nested_guest, run)


SLOTS = range(3)  # of exercise 3: slot n has four pages from gfn 0x200 + n * 0x100


def _three_slots(kernel: Kernel) -> Vm:
    """Two vCPUs without A/D bits, and three slots that do not log."""
    vm = Vm(Hardware.ept(ad_bits=False), kernel, vcpus=2)
    for slot in SLOTS:
        vm.set_user_memory_region(slot=slot, base_gfn=BASE_GFN + slot * 0x100, npages=4)
    return vm


@checker
def check_11_3(run: Run) -> str:
    """One run that loses a write under each unsound rule over the bits of SPTEs, on a CPU without A/D bits."""
    hardware = Hardware.ept(ad_bits=False)
    rules = all_rules(hardware)
    sound = sound_rules(hardware, rules)
    if hint := lost_under_always(_three_slots, run):
        return hint
    for rule in rules:
        vm = _three_slots(kernel := Kernel.v5_19.with_(flush=rule))
        run(vm)
        if vm.kernel is not kernel:
            return "your run has replaced the VM's kernel; keep the one that you are given"
        if any((0, slot) not in vm.memslots.slots for slot in SLOTS):
            return "keep the three slots that you are given"
        missed = sum(len(vm.missed_dirty(slot)) for slot in SLOTS)
        assert not (missed and rule in sound), "a sound rule has lost a write: the search or the model is wrong"
        if rule not in sound and not missed:
            return _hint_11_3(rule, frozenset(leaves_met(hardware)))
    return ""


def _hint_11_3(rule: BitRule, kinds: frozenset[Leaf]) -> str:
    """Which rule passes a reader's test though it should not."""
    if not rule.kinds:
        return "no write is missed even if nothing is ever flushed; who writes after enabling, through which TLB entry?"
    left_out = " and ".join(f"[{kind}]" for kind in sorted(kinds - rule.kinds))
    return (
        f"the rule that flushes for all but {left_out} passes your test; is logging ever enabled on a slot that has no "
        "other leaves than these?"
    )
