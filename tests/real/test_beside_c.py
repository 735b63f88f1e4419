"""The numbers and shapes beside those of the C header, and the guest's bytes beside those of the assembler."""

import ctypes
import inspect
import pathlib
import shutil
import subprocess

import pytest

from kvmbook.real import abi, guest

pytestmark = pytest.mark.skipif(
    not (shutil.which("gcc") and shutil.which("objcopy") and pathlib.Path("/usr/include/linux/kvm.h").exists()),
    reason="needs gcc, objcopy and the header linux/kvm.h",
)
NUMBERS = [name for name in vars(abi) if name.startswith("KVM_")]
STRUCTS = [name for name, of in vars(abi).items() if inspect.isclass(of) and name.startswith("kvm_")]
WITH_A_TAIL = {"kvm_cpuid2", "kvm_signal_mask", "kvm_run"}  # shapes that begin as the header's do
NEWER = ("KVM_CAP_DIRTY_LOG_RING_ACQ_REL",)  # than some headers


def test_numbers_and_shapes_are_the_headers(tmp_path):
    lines = [f'#ifdef {name}\nprintf("{name} %lu\\n", (unsigned long){name});\n#endif' for name in NUMBERS]
    for name in STRUCTS:
        if name not in WITH_A_TAIL:
            lines.append(f'printf("{name} %zu\\n", sizeof(struct {name}));')
        for field, *_ in getattr(abi, name)._fields_:
            if field not in ("entries", "padding1") and not (name == "kvm_cpuid2" and field == "padding"):
                lines.append(f'printf("{name}.{field} %zu\\n", offsetof(struct {name}, {field}));')
    source = "#include <stdio.h>\n#include <stddef.h>\n#include <linux/kvm.h>\nint main(void) {\n%s\n}\n"
    (tmp_path / "shapes.c").write_text(source % "\n".join(lines))
    subprocess.run(["gcc", "-o", tmp_path / "shapes", tmp_path / "shapes.c"], check=True, timeout=60)
    printed = subprocess.run([tmp_path / "shapes"], capture_output=True, text=True, check=True, timeout=60).stdout
    header = {name: int(value) for name, value in (line.split() for line in printed.splitlines())}
    assert len(header) > 100 and set(NUMBERS) - set(header) <= set(NEWER)
    for name, value in header.items():
        struct, _, field = name.partition(".")
        ours = getattr(abi, struct)
        if field:
            ours = getattr(ours, field).offset
        elif inspect.isclass(ours):
            ours = ctypes.sizeof(ours)
        assert ours == value, name


def test_the_listing_assembles_to_its_own_bytes(tmp_path):
    source = "\n".join(line[10:] for line in guest.LISTING.splitlines())
    (tmp_path / "guest.s").write_text(source + "\n")
    subprocess.run(["gcc", "-c", "-o", tmp_path / "guest.o", tmp_path / "guest.s"], check=True, timeout=60)
    command = ["objcopy", "-O", "binary", "-j", ".text", tmp_path / "guest.o", tmp_path / "guest.bin"]
    subprocess.run(command, check=True, timeout=60)
    assert (tmp_path / "guest.bin").read_bytes() == guest.CODE
