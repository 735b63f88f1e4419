"""An executable model of Linux KVM's dirty logging, access tracking and TLB flushing on x86.

Start with ``Vm``; the chapters in ``notebooks/`` do.
"""

from kvmbook.model import FlushPolicy, Hardware, Kernel, Outcome, SpteFormat, Vcpu, Vm

__all__ = ["FlushPolicy", "Hardware", "Kernel", "Outcome", "SpteFormat", "Vcpu", "Vm"]
