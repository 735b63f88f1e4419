"""The same front door on this machine's /dev/kvm: `RealVm` has the calls of `Vm`, and a real guest does the accesses.

From the ground up: `abi` KVM's interface as numbers and shapes, `device` /dev/kvm or why not, `guest` its fifty bytes of
code, `watchdog` nothing hangs, `stats` and `page_idle` what else the machine lets us see and do, `vcpu` and `vm`, `losses`
two writes that kernels of today lose, `offers` what this machine can show: `python -m kvmbook.real`; `trace` what a trace of
KVM's events tells of each page, by `tracepoints`, `traced_sptes`, `told` and `replaying`. For chapter 15, and for
whoever wants to see the model beside the real thing. It imports anywhere; without KVM it says so in one sentence.
"""

from kvmbook.real.calls import perform
from kvmbook.real.device import NoKvm
from kvmbook.real.losses import RING_GFN, clear_reports, ring_reports
from kvmbook.real.machines import Machine, NotRecorded, live, model_vm, record, recorded
from kvmbook.real.modelled import ModelVm, as_hardware, as_kernel
from kvmbook.real.offers import CLAIMS, Claim, Offers, ask_machine
from kvmbook.real.outside import Outside, Said, asking
from kvmbook.real.questions import BASE, BEFORE, QUESTIONS, Question, ask_all
from kvmbook.real.told import HEADINGS, Disagreement, Replay, Step
from kvmbook.real.trace import replay
from kvmbook.real.vcpu import RealDirtyRing, RealVcpu, Seen
from kvmbook.real.vm import RealVm
