"""What this machine's KVM offers, and which of the book's claims can be tried on it."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvmbook.real import abi, host
from kvmbook.real.device import MODULES, capability, create_vm, open_kvm, vendor_module

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True)
class Offers:
    """One machine. ``paging``: "EPT", "NPT" or "shadow". Sizes in bytes; a capability that is not there is 0. ``ageing`` is
    what stands in the way of it, or None. Parameters that KVM does not have are None."""

    release: str
    vendor: str | None
    paging: str
    ad_bits: bool
    pml: bool
    tdp_mmu: bool | None
    eager_page_split: bool | None
    huge_pages: bool
    memslots: int
    address_spaces: int
    readonly_memory: bool
    manual_protect: int
    ring_size: int
    statistics: bool
    ageing: str | None

    def since(self, *release: int) -> bool:
        """Whether the kernel is of this release or later, as its name has it: distributors take patches back."""
        return tuple(int(number) for number in re.findall(r"\d+", self.release)[:2]) >= release


def ask_machine() -> Offers:
    """Ask this machine. It makes a VM, and runs no guest. `NoKvm` where there is no usable KVM."""
    kvm = open_kvm()
    try:
        vm = create_vm(kvm)
        try:
            return _ask(vm)
        finally:
            os.close(vm)
    finally:
        os.close(kvm)


def _ask(vm: int) -> Offers:
    vendor = vendor_module()
    ept, npt = _parameter("kvm_intel", "ept"), _parameter("kvm_amd", "npt")
    paging = "EPT" if vendor == "kvm_intel" and ept else "NPT" if vendor == "kvm_amd" and npt else "shadow"
    thp = THP.read_text() if THP.exists() else "[never]"
    rings = (capability(vm, abi.KVM_CAP_DIRTY_LOG_RING), capability(vm, abi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL))
    return Offers(
        release=platform.release(),
        vendor=vendor,
        paging=paging,
        ad_bits=paging != "EPT" or bool(_parameter("kvm_intel", "eptad")),
        pml=paging == "EPT" and bool(_parameter("kvm_intel", "pml")),
        tdp_mmu=_parameter("kvm", "tdp_mmu"),
        eager_page_split=_parameter("kvm", "eager_page_split"),
        huge_pages="[never]" not in thp,
        memslots=capability(vm, abi.KVM_CAP_NR_MEMSLOTS),
        address_spaces=max(1, capability(vm, abi.KVM_CAP_MULTI_ADDRESS_SPACE)),
        readonly_memory=bool(capability(vm, abi.KVM_CAP_READONLY_MEM)),
        manual_protect=capability(vm, abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2),
        ring_size=max(rings),
        statistics=bool(capability(vm, abi.KVM_CAP_BINARY_STATS_FD)),
        ageing=host.missing(),
    )


def _parameter(module: str, name: str) -> bool | None:
    """A module parameter that is on or off; None where it cannot be read."""
    try:
        return (MODULES / module / "parameters" / name).read_text().strip() in ("Y", "1")
    except OSError:
        return None


# ---- which claims can be tried ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """``missing`` says what a machine lacks to try it, or returns None."""

    chapter: str
    says: str
    missing: Callable[[Offers], str | None]


def _inside(machine: Offers) -> str:
    return "SPTEs and TLBs cannot be seen from outside"


def _lost_in_v5_19(machine: Offers) -> str | None:
    if machine.since(6, 0):
        return f"repaired in v6.0, and this is {machine.release}"
    if machine.ad_bits:
        return "needs EPT without A/D bits: kvm_intel with eptad=0"
    return machine.ageing


def _pml(machine: Offers) -> str | None:
    return None if machine.pml else "needs Intel's PML: kvm_intel with pml=1"


def _counted(machine: Offers) -> str | None:
    return None if machine.statistics else "needs KVM_GET_STATS_FD, which Linux has since v5.14"


def _flush_of_v6_0(machine: Offers) -> str | None:
    return _counted(machine) or (None if machine.since(6, 0) else f"is so since v6.0, and this is {machine.release}")


def _initially_set(machine: Offers) -> str | None:
    return None if machine.manual_protect & 2 else "needs KVM_DIRTY_LOG_INITIALLY_SET, which Linux has since v5.7"


def _ring_loss(machine: Offers) -> str | None:
    return _initially_set(machine) or (None if machine.ring_size else "needs dirty rings, which Linux has since v5.11")


def _signal_loss(machine: Offers) -> str | None:
    if not machine.since(6, 17):
        return f"is so since v6.17, and this is {machine.release}"
    return None if machine.ring_size else "needs dirty rings"


def _clear_loss(machine: Offers) -> str | None:
    if not machine.huge_pages:
        return "needs transparent huge pages"
    if machine.since(6, 8) and machine.tdp_mmu and machine.paging != "shadow" and machine.eager_page_split:
        return "needs huge pages that stay whole: kvm with eager_page_split=0"
    return _initially_set(machine)


CLAIMS = (
    Claim("1, 8", "a conditional flush loses a write", _lost_in_v5_19),
    Claim("2", "slots, their errnos, bitmap and CLEAR", lambda machine: None),
    Claim("3, 4, 9", "what an SPTE and a TLB entry say", _inside),
    Claim("5", "read faults make pages dirty", lambda machine: None),
    Claim("5", "PML logs writes without a fault", _pml),
    Claim("6", "ageing without A/D bits", lambda m: "needs EPT without A/D bits: eptad=0" if m.ad_bits else m.ageing),
    Claim("7", "faults counted, fast and slow", _counted),
    Claim("8", "enabling always asks for one flush", _flush_of_v6_0),
    Claim("10, 11", "every interleaving", lambda m: "only a model can be made to take every one"),
    Claim("15, 16", "lost today: a ring, and initially set", _ring_loss),
    Claim("16", "lost today: a reset, and a signal", _signal_loss),
    Claim("15, 16", "lost today: CLEAR and a 2M page", _clear_loss),
)


def as_text(machine: Offers) -> str:
    """What `python -m kvmbook.real` prints."""
    yes = {True: "yes", False: "no", None: "not known"}
    rows = [
        ("kernel", machine.release),
        ("vendor module", machine.vendor or "not known"),
        ("paging", machine.paging),
        ("A/D bits", yes[machine.ad_bits]),
        ("PML", yes[machine.pml]),
        ("tdp_mmu", yes[machine.tdp_mmu]),
        ("eager_page_split", yes[machine.eager_page_split]),
        ("transparent huge pages", yes[machine.huge_pages]),
        ("memslots", f"{machine.memslots:,}, address spaces: {machine.address_spaces}"),
        ("read-only memory", yes[machine.readonly_memory]),
        ("manual protect", {0: "no", 1: "yes"}.get(machine.manual_protect, "yes, also initially set")),
        ("dirty ring", f"up to {machine.ring_size // 16:,} entries" if machine.ring_size else "no"),
        ("statistics", yes[machine.statistics]),
        ("ageing by page_idle", machine.ageing or "yes"),
    ]
    lines = ["KVM can be used here.", "", *(f"{name:<24}{answer}" for name, answer in rows), ""]
    lines.append(f"{'chapter':<9}{'claim':<41}can be tried here")
    for claim in CLAIMS:
        missing = claim.missing(machine)
        lines.append(f"{claim.chapter:<9}{claim.says:<41}{'yes' if missing is None else 'no: ' + missing}")
    return "\n".join(lines)
