"""The panels of chapters 01 and 08: lose a write; who flushes where."""

from __future__ import annotations

from kvmbook.model import FlushPolicy, Kernel
from kvmbook.scenes import CHANGES, HARDWARE, TOUCHES, enabling_plan, write_after_enabling
from kvmbook.views.figures import plans_picture, scene_picture
from kvmbook.views.panel import Panel, View, counted

POLICIES = {policy.value: policy for policy in FlushPolicy}


def lose_a_write() -> Panel:
    """Chapter 01: the seed's scene, with the reader's hand on the flush rule, the hardware and a second vCPU."""

    def show(flush: str, ad_bits: str, touched: str) -> View:
        scenes = {name: write_after_enabling(ad_bits, POLICIES[name], touched) for name in settings["flush rule"]}
        scene = scenes[flush]
        picture = scene_picture(scene, {name: other.missed for name, other in scenes.items()}, flush)
        if scene.missed:
            return View(
                picture, f"{scene.missed} of {len(scene.pages)} writes are missed: the report does not name them."
            )
        said = f"All {len(scene.pages)} writes are reported, after {counted(scene.flushes)} while enabling."
        return View(picture, said)

    settings = {
        "flush rule": ["if changed", "always", "if MMU-writable", "never"],
        "A/D bits": list(HARDWARE),
        "touched again before enabling": list(TOUCHES),
    }
    return Panel("Lose a write", settings, show, unlock=["A/D bits", "touched again before enabling"])


def who_flushes_where() -> Panel:
    """Chapter 08: the path through kvm_mmu_slot_apply_flags(), before the patch and after it."""

    def show(ad_bits: str, change: str, initially_set: str, nested: str) -> View:
        before, after = (
            enabling_plan(ad_bits, kernel, change, initially_set == "on", nested == "has run")
            for kernel in (Kernel.v5_19, Kernel.v6_0)
        )
        old, new = (sum(step.startswith("flush") for step in plan) for plan in (before, after))
        if any(step.startswith("zap") for step in before):
            readout = "Nothing is write-protected. Small tables where a huge page fits again are dropped, and flushed."
        elif not new:
            readout = "No SPTE is visited and no TLB is flushed, before the patch or after it."
        else:
            readout = f"Before: at most {counted(old)}, if a pass asked. After: always {counted(new)}."
        return View(plans_picture(before, after), readout)

    settings = {
        "A/D bits": list(HARDWARE),
        "logging": list(CHANGES),
        "INITIALLY_SET": ["off", "on"],
        "nested guest": ["none", "has run"],
    }
    return Panel("Who flushes where", settings, show, unlock=["logging", "INITIALLY_SET", "nested guest"])
