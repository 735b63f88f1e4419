"""The guest's code, its mailbox and what its registers tell, without running it."""

import ctypes

import pytest

from kvmbook.model import PAGE_SIZE
from kvmbook.real import abi, guest


def labels():
    """{label: offset} of the listing."""
    at, found = 0, {}
    for line in filter(None, guest.LISTING.splitlines()):
        words = line.split()
        if words[1].endswith(":"):
            found[words[1][:-1]] = at
        at += len(words[0]) // 2
    return found


def test_every_jump_goes_where_the_listing_says():
    at, jumps = 0, 0
    for line in filter(None, guest.LISTING.splitlines()):
        code = bytes.fromhex(line.split()[0])
        at += len(code)
        mnemonic, _, operand = line[18:].partition("#")[0].strip().partition(" ")
        if mnemonic.startswith("j"):
            jumps += 1
            offset = int.from_bytes(code[1:], "little", signed=True)
            assert len(code) == 2 and at + offset == labels()[operand.strip()], line
    assert jumps == 9 and at == len(guest.CODE) < 64


def test_the_page_tables_map_4_gib_one_to_one_by_2m_pages():
    image = guest.image()

    def entry(table, index):
        return int.from_bytes(image[table - guest.PRIVATE + 8 * index :][:8], "little")

    for address in (0, 0x100000, 0x3FFFFFFF, guest.PRIVATE, guest.STOP, (4 << 30) - 1):
        table = guest.PRIVATE + guest.TABLES * PAGE_SIZE
        for shift in (39, 30):
            found = entry(table, address >> shift & 511)
            assert found & 0x27 == 0x27
            table = found & ~0xFFF
        leaf = entry(table, address >> 21 & 511)
        assert leaf & 0xE7 == 0xE7 and leaf & ~0x1FFFFF == address & ~0x1FFFFF


def test_a_mailbox_ends_with_a_stop_and_each_vcpu_has_its_own_place():
    packed = guest.records([(guest.READ, 0x100), (guest.WRITE, 0x101), (guest.FETCH, 0x102), (guest.WRITE, 3)], 1, 7)
    records = list(guest.RECORD.iter_unpack(packed))
    assert [what for what, _, _ in records] == [guest.READ, guest.WRITE, guest.FETCH, guest.WRITE, guest.STOPS]
    assert [where for _, where, _ in records[:4]] == [0x100008, 0x101008, 0x102FFF, 0x3008]
    assert [value for what, _, value in records if what == guest.WRITE] == [7, 8]
    assert guest.mailbox(1) - guest.mailbox(0) == guest.PER_VCPU * PAGE_SIZE
    behind = guest.mailbox(1) + (guest.RECORDS + 1) * guest.RECORD.size
    assert behind == guest.PRIVATE + guest.private_pages(2) * PAGE_SIZE < guest.STOP


@pytest.mark.parametrize("label, done", [("next", 2), ("write", 2), ("fetch", 2), ("read", 2), ("done", 3)])
def test_registers_tell_how_many_records_are_done(label, done):
    assert guest.retired(guest.mailbox(1) + 32, guest.PRIVATE + labels()[label], 1) == done


@pytest.mark.parametrize("label", ["write", "fetch"])
def test_behind_a_write_or_a_call_it_is_done(label):
    length = {"write": 3, "fetch": 2}[label]
    assert guest.retired(guest.mailbox(0), guest.PRIVATE + labels()[label] + length, 0) == 1
    assert guest.retired(guest.mailbox(0), 0x100FFF, 0) == 0  # at the `ret` itself


@pytest.mark.parametrize(
    "struct, size",
    [("kvm_userspace_memory_region", 32), ("kvm_dirty_log", 16), ("kvm_clear_dirty_log", 24), ("kvm_dirty_gfn", 16),
     ("kvm_enable_cap", 104), ("kvm_regs", 144), ("kvm_sregs", 312), ("kvm_stats_header", 24), ("kvm_stats_desc", 16)],
)  # fmt: skip
def test_structs_have_the_kernels_sizes(struct, size):
    assert ctypes.sizeof(getattr(abi, struct)) == size


@pytest.mark.parametrize(
    "ioctl, number",
    [("KVM_RUN", 0xAE80), ("KVM_SET_USER_MEMORY_REGION", 0x4020AE46), ("KVM_GET_DIRTY_LOG", 0x4010AE42),
     ("KVM_CLEAR_DIRTY_LOG", 0xC018AEC0), ("KVM_RESET_DIRTY_RINGS", 0xAEC7), ("KVM_GET_SREGS", 0x8138AE83)],
)  # fmt: skip
def test_ioctls_have_the_kernels_numbers(ioctl, number):
    assert getattr(abi, ioctl) == number
