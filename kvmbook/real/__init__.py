"""The same front door on this machine's /dev/kvm: `RealVm` has the calls of `Vm`, and a real guest does the accesses.

From the ground up: `abi` KVM's interface as numbers and shapes, `device` /dev/kvm or why not, `guest` fifty bytes of guest
code, `watchdog` nothing hangs, `stats` and `page_idle` what else the machine lets us see and do, `vcpu` and `vm`, `losses` two
writes that kernels of today lose, `offers` what this machine can show: `python -m kvmbook.real`. For chapter 15, and for whoever
wants to see the model beside the real thing. It imports anywhere; without KVM it says so in one sentence.
"""

from kvmbook.real.device import NoKvm
from kvmbook.real.vcpu import RealVcpu, Seen
from kvmbook.real.vm import RealVm
