"""KVM's statistics of a VM or a vCPU by their names, without debugfs. See Documentation/virt/kvm/api.rst, 4.133."""

from __future__ import annotations

import ctypes
import os
import struct

from kvmbook.real import abi
from kvmbook.real.device import ioctl


class Statistics:
    """What KVM_GET_STATS_FD of ``fd`` offers; single numbers only, no histograms. OSError ENOTTY before Linux v5.14."""

    def __init__(self, fd: int) -> None:
        self.fd = ioctl(fd, abi.KVM_GET_STATS_FD, told="KVM_GET_STATS_FD(), which Linux has since v5.14")
        head = abi.kvm_stats_header.from_buffer_copy(os.pread(self.fd, ctypes.sizeof(abi.kvm_stats_header), 0))
        self._data_offset, size = head.data_offset, ctypes.sizeof(abi.kvm_stats_desc)
        block = os.pread(self.fd, head.num_desc * (size + head.name_size), head.desc_offset)
        self._offsets: dict[str, int] = {}
        for start in range(0, len(block), size + head.name_size):
            about = abi.kvm_stats_desc.from_buffer_copy(block, start)
            name = block[start + size : start + size + head.name_size].split(b"\0")[0].decode()
            if about.size == 1:
                self._offsets[name] = about.offset
        self._length = max(self._offsets.values(), default=0) + 8

    def read(self) -> dict[str, int]:
        values = os.pread(self.fd, self._length, self._data_offset)
        return {name: struct.unpack_from("Q", values, offset)[0] for name, offset in self._offsets.items()}
