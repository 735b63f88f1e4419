"""What a machine offers, asked of files and answers that are made up; ageing through made-up bitmaps."""

import errno
import struct
from dataclasses import replace

import pytest

from kvmbook.real import CLAIMS, Offers, ask_machine, device, host, offers
from kvmbook.real.__main__ import main

OLD = Offers(
    release="5.19.17", vendor="kvm_intel", paging="EPT", ad_bits=False, pml=False, tdp_mmu=True, eager_page_split=True,
    huge_pages=True, memslots=32764, address_spaces=2, readonly_memory=True, manual_protect=3, ring_size=1 << 20,
    statistics=True, ageing=None,
)  # fmt: skip


def missing(machine):
    return [claim.missing(machine) for claim in CLAIMS]


def lacks(machine, word):
    return [claim.says for claim in CLAIMS if word in (claim.missing(machine) or "")]


def test_the_old_kernel_without_ad_bits_loses_the_write():
    lost = CLAIMS[0].missing
    assert lost(OLD) is None
    assert "v6.0" in lost(replace(OLD, release="6.1.0-13-amd64"))
    assert "eptad=0" in lost(replace(OLD, ad_bits=True))
    assert lost(replace(OLD, ageing="nothing to age with")) == "nothing to age with"


def test_each_lack_is_named():
    assert lacks(replace(OLD, manual_protect=1), "INITIALLY_SET") == lacks(replace(OLD, manual_protect=0), "v5.7")
    assert len(lacks(replace(OLD, statistics=False), "KVM_GET_STATS_FD")) == 2
    assert lacks(replace(OLD, ring_size=0), "dirty rings")
    assert lacks(replace(OLD, huge_pages=False), "huge pages")
    assert lacks(replace(OLD, release="6.8"), "eager_page_split") and not lacks(OLD, "eager_page_split")
    assert not lacks(replace(OLD, release="6.8", eager_page_split=False), "eager_page_split")
    assert not lacks(replace(OLD, release="6.10.2", paging="shadow"), "eager_page_split")
    assert lacks(OLD, "PML") and not lacks(replace(OLD, pml=True), "PML")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of files: ``machine(module=..., parameter=...)`` writes them."""
    monkeypatch.setattr(device, "MODULES", tmp_path)
    monkeypatch.setattr(offers, "MODULES", tmp_path)
    monkeypatch.setattr(offers, "THP", tmp_path / "thp")
    monkeypatch.setattr(offers, "open_kvm", lambda: device.os.open(device.os.devnull, 0))
    monkeypatch.setattr(offers, "create_vm", lambda kvm: device.os.open(device.os.devnull, 0))
    monkeypatch.setattr(offers, "capability", lambda fd, number: 0)

    def make(**modules):
        for module, parameters in modules.items():
            (tmp_path / module / "parameters").mkdir(parents=True)
            for name, value in parameters.items():
                (tmp_path / module / "parameters" / name).write_text(value + "\n")

    return make


def test_intel_with_and_without_ad_bits(machine):
    machine(kvm={"tdp_mmu": "Y"}, kvm_intel={"ept": "Y", "eptad": "N", "pml": "N"})
    seen = ask_machine()
    assert (seen.vendor, seen.paging, seen.ad_bits, seen.pml, seen.tdp_mmu) == ("kvm_intel", "EPT", False, False, True)
    assert (seen.eager_page_split, seen.address_spaces, seen.huge_pages) == (None, 1, False)


@pytest.mark.parametrize(
    "modules, paging, ad_bits",
    [
        ({"kvm_intel": {"ept": "Y", "eptad": "Y", "pml": "Y"}}, "EPT", True),
        ({"kvm_intel": {"ept": "N", "eptad": "N"}}, "shadow", True),
        ({"kvm_amd": {"npt": "1"}}, "NPT", True),
        ({"kvm_amd": {"npt": "0"}}, "shadow", True),
        ({"kvm_pvm": {}}, "shadow", True),
        ({}, "shadow", True),
    ],
)
def test_paging_is_read_from_the_vendors_parameters(machine, modules, paging, ad_bits):
    machine(**modules)
    seen = ask_machine()
    assert (seen.paging, seen.ad_bits) == (paging, ad_bits)


@pytest.mark.parametrize("flags, vendor", [("vmx", "kvm_intel"), ("svm", "kvm_amd"), ("hypervisor", "kvm_pvm")])
def test_of_modules_that_are_built_in_the_one_counts_that_the_cpu_can_use(
    machine, monkeypatch, tmp_path, flags, vendor
):
    machine(kvm_amd={"npt": "1"}, kvm_intel={"ept": "Y"}, kvm_pvm={})
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: fpu {flags}\n")
    monkeypatch.setattr(device, "CPUINFO", tmp_path / "cpuinfo")
    assert ask_machine().vendor == vendor


def test_the_command_prints_a_row_for_each_claim(machine, capsys):
    machine(kvm={"tdp_mmu": "N"}, kvm_amd={"npt": "1"})
    assert main(["offers"]) == main([]) == 0
    printed = capsys.readouterr().out
    for claim in CLAIMS:
        assert printed.count(f"{claim.says} ") == 2
    assert "kvm_amd" in printed and "NPT" in printed


# ---- ageing ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def frames(monkeypatch, tmp_path):
    """User pages 0 to 3 on frames 70, 71, none and 3 (the host's files, made up); the bitmap is returned."""
    pagemap, bitmap = tmp_path / "pagemap", tmp_path / "bitmap"
    pagemap.write_bytes(struct.pack("4Q", 1 << 63 | 70, 1 << 63 | 71, 0, 1 << 63 | 3))
    bitmap.write_bytes(bytes(16))
    monkeypatch.setattr(host, "PAGEMAP", pagemap)
    monkeypatch.setattr(host, "BITMAP", bitmap)
    return bitmap


def test_ageing_sets_the_bits_of_the_frames_and_tells_whether_any_was_young(frames):
    frames.write_bytes(struct.pack("2Q", 0, 1 << 6))
    assert host.clear_young([0]) is False
    assert host.clear_young([0x1000]) is True
    assert struct.unpack("2Q", frames.read_bytes())[1] == 1 << 7
    assert host.clear_young([0x2000]) is False  # the host has no page there


def test_what_the_host_does_not_age_is_refused_not_told_as_young(frames, monkeypatch):
    """A bitmap that keeps nothing, as for the frame of a page on no LRU list; or only when that list has been filled."""
    monkeypatch.setattr(host, "BITMAP", type(frames)("/dev/zero"))
    with pytest.raises(OSError, match="does not age frame 0x46") as refusal:
        host.clear_young([0])
    assert refusal.value.errno == errno.EAGAIN
    monkeypatch.setattr(host, "BITMAP", frames)
    filled, set_idle = [], host._set_idle
    monkeypatch.setattr(host, "_fill_lru_list", lambda: filled.append(True))
    monkeypatch.setattr(host, "_set_idle", lambda bitmap, pfn: set_idle(bitmap, pfn) if filled else None)
    assert host.clear_young([0]) and not host.clear_young([0]) and filled == [True]


def test_without_page_idle_it_says_what_is_missing(frames):
    frames.unlink()
    with pytest.raises(OSError, match="CONFIG_IDLE_PAGE_TRACKING") as refusal:
        host.clear_young([0])
    assert refusal.value.errno == errno.ENOSYS


def test_where_page_frames_are_hidden_it_says_so(frames):
    host.PAGEMAP.write_bytes(struct.pack("Q", 1 << 63))
    with pytest.raises(OSError, match="root only"):
        host.clear_young([0])
