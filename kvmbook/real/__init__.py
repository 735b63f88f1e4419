"""The same front door on this machine's /dev/kvm: `RealVm` has the calls of `Vm`, and a real guest does the accesses.

From the ground up: `abi` KVM's interface as numbers and shapes, `device` /dev/kvm or why not, `guest` its fifty bytes of
code, `watchdog` nothing hangs, `host` counters and ageing, `vcpu` and `vm`, `offers` what this machine can show,
`modelled` the model in a real VM's place, `calls` calls as data, `machines` live, recorded or modelled, `questions` what
chapter 15 asks of them, `interrupted` a reset that a signal stops, `emulated` Linux's KVM in an emulator, `sequences` and
`differ` model and machine compared; `trace` what a trace of KVM's events tells of each page, by `tracepoints`,
`traced_sptes`, `judging` and `replaying`. It imports anywhere; without KVM it says so in one sentence.
"""

from kvmbook.real.calls import CALLS, Outside, Said, asking, perform
from kvmbook.real.device import NoKvm
from kvmbook.real.emulated import (
    EMULATED,
    FLUSH_RULES,
    PAGES_WRITTEN,
    REPAIRS,
    Boot,
    Cell,
    Loss,
    Turn,
    by_model,
    emulated_boots,
    keep_boots,
)
from kvmbook.real.interrupted import Round, Rounds, forgotten, interrupted_reset
from kvmbook.real.judging import Disagreement
from kvmbook.real.machines import Machine, NotRecorded, live, record, recorded
from kvmbook.real.modelled import ModelVm, as_hardware, as_kernel
from kvmbook.real.offers import CLAIMS, Claim, Offers, ask_machine
from kvmbook.real.questions import (
    BASE,
    BEFORE,
    QUESTIONS,
    RING_GFN,
    Question,
    Refused,
    ask_all,
    clear_reports,
    refusal,
    ring_reports,
)
from kvmbook.real.replaying import Step
from kvmbook.real.trace import HEADINGS, Replay, replay
from kvmbook.real.vcpu import RealDirtyRing, RealVcpu, Seen
from kvmbook.real.vm import RealVm
