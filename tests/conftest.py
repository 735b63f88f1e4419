"""What the tests share: the hardware kinds, and short ways to build a VM and to run the seed's scene."""

import pytest

from kvmbook import Hardware, Kernel, Vm

HARDWARE = {
    "ept_no_ad": Hardware.ept(ad_bits=False),
    "ept_no_ad_legacy": Hardware.ept(ad_bits=False, tdp_mmu=False),
    "ept_ad": Hardware.ept(),
    "ept_ad_legacy": Hardware.ept(tdp_mmu=False),
    "pml": Hardware.ept(pml=True),
    "pml_legacy": Hardware.ept(pml=True, tdp_mmu=False),
    "npt": Hardware.npt(),
    "npt_legacy": Hardware.npt(tdp_mmu=False),
    "shadow": Hardware.shadow(),
}
BASE = 0x200  # 2M-aligned


@pytest.fixture(params=HARDWARE)
def hardware(request):
    return HARDWARE[request.param]


def make_vm(hardware=HARDWARE["ept_no_ad"], kernel=Kernel.v5_19, npages=64, vcpus=2, **options):
    """A VM with slot 0 of ``npages`` pages from BASE, not logging."""
    vm = Vm(hardware, kernel, vcpus, **options)
    vm.set_user_memory_region(slot=0, base_gfn=BASE, npages=npages)
    return vm


def log(vm, on=True, slot=0):
    """Switch dirty logging of a slot on or off, changing nothing else."""
    old = vm.memslots.id_to_memslot(0, slot)
    vm.set_user_memory_region(slot=slot, base_gfn=old.base_gfn, npages=old.npages, log_dirty_pages=on)


def missed(vm, slot=0):
    return vm.missed_dirty(slot).tolist()


def reported(vm, slot=0):
    base = vm.memslots.id_to_memslot(0, slot).base_gfn
    return [base + int(page) for page in vm.get_dirty_log(slot).nonzero()[0]]
