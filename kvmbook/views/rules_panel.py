"""The panel of chapter 11: write the rule, and have it judged."""

from __future__ import annotations

from kvmbook.model import Hardware, Kernel
from kvmbook.scenes import retell, run_of
from kvmbook.search import BITS, Action, BitRule, Grain, any_number, cost, explore, leaves_met, smallest_vm
from kvmbook.views.panel import Panel, View
from kvmbook.views.run_figures import trace_picture


def write_the_rule() -> Panel:
    """Chapter 11: which kinds of leaf shall make enabling flush? For a CPU without A/D bits, all eight rules."""
    hardware = Hardware.ept(ad_bits=False)
    names = {"W": "writable", "tracked": "access-tracked", "MW": "neither, but MMU-writable"}  # the first that fits
    kinds = {
        next(said for bit, said in names.items() if kind.before >> BITS.index(bit) & 1): kind
        for kind in leaves_met(hardware)
    }
    seed = run_of(explore(hardware, Kernel.v5_19, grain=Grain.FAULT))

    def show(*answers: str) -> View:
        chosen = dict(zip(names.values(), answers, strict=True))
        rule = BitRule(frozenset(kind for name, kind in kinds.items() if chosen[name] == "yes"))
        result = explore(hardware, Kernel.v5_19.with_(flush=rule), vcpus=2, grain=Grain.FAULT)
        flushes, missed = cost(hardware, rule)
        paid = f"60 migrations of the workload: {flushes} flushes, {missed} writes missed."
        if not result.safe:
            steps = len(result.trace or ())
            return View(trace_picture(result), f"Unsound: a write can be lost, in {steps} steps. {paid}")
        vm = smallest_vm(hardware, result.kernel, 1, 2, Grain.FAULT)
        states = any_number(hardware, result.kernel).states
        said = f"Sound, for any number of pages and vCPUs, cut by fault ({states} abstract states). {paid}"
        cured = [*(moment.action for moment in seed.moments), Action("KVM for vCPU0", "handles the fault")]
        return View(trace_picture(retell(vm, cured, Grain.FAULT)), said)

    settings = {f"flush for a leaf that is {name}": ["no", "yes"] for name in names.values()}
    return Panel("Write the rule", settings, show)
