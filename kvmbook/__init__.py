"""An executable model of Linux KVM's dirty logging, access tracking and TLB flushing on x86.

Start with ``Vm``; the chapters in ``notebooks/`` do.
"""

from kvmbook.faults import Outcome
from kvmbook.hardware import Hardware
from kvmbook.kernel import FlushPolicy, Kernel
from kvmbook.spte import SpteFormat
from kvmbook.vm import Vcpu, Vm

__all__ = ["FlushPolicy", "Hardware", "Kernel", "Outcome", "SpteFormat", "Vcpu", "Vm"]
