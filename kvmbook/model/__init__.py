"""What KVM and the CPU do: an executable model, in the kernel's own names. It knows nobody else in this package.

Read it from the ground up: a word (`spte`; `compiled` and `arrays` ask a million, `layout` names its bits); memory (`tlb`,
`memslots`, `page_tables`, `host`); the machine (`hardware`, `kernel`, `machine`); what happens (`access_tracking`,
`guest_memory`, `huge_pages`, `wrprot`, `faults`, `memory_regions`, `dirty_log`); and the front door (`vm`, `invariants`). The
other wings take what stands below.
"""

from kvmbook.model.access_tracking import (
    ChangePte,
    ClearFlushYoung,
    ClearYoung,
    InvalidateRange,
    TestYoung,
    ZapGfnRange,
)
from kvmbook.model.arrays import ALL_BITS, BLOCK, SPTE_BASE_ADDR_MASK, each
from kvmbook.model.compiled import numba_is_there
from kvmbook.model.dirty_log import ClearDirtyLog, GetDirtyLog, ResetDirtyRings, no_words
from kvmbook.model.faults import Outcome, PageFault
from kvmbook.model.guest_memory import WriteGuest
from kvmbook.model.hardware import Hardware
from kvmbook.model.host import USER_BASE, HostMemory, HostPage
from kvmbook.model.invariants import check, check_leaf, key_invariant, rule_against
from kvmbook.model.kernel import FlushPolicy, FlushRule, Kernel
from kvmbook.model.layout import (
    ABOUT_KINDS,
    ADDRESS,
    FREE,
    HARDWARE_READS,
    KVM_READS,
    Field,
    bit_name,
    changes,
    fields,
    free_bits,
    listed,
)
from kvmbook.model.machine import Event, Machine, Operation, VcpuState, step
from kvmbook.model.memory_regions import SetUserMemoryRegion, kvm_mmu_slot_apply_flags
from kvmbook.model.memslots import (
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_MAX_NR_PAGES,
    KVM_MEM_READONLY,
    KVM_USER_MEM_SLOTS,
    PAGE_SIZE,
    TASK_SIZE_MAX,
    Change,
    DirtyRing,
    MemoryRegion,
    MemorySlot,
    fits,
    to_bits,
    to_words,
)
from kvmbook.model.page_tables import PageTable
from kvmbook.model.spte import (
    ACCESSES,
    EPT_RWX_MASK,
    PAGE_SHIFT,
    PG_LEVEL_4K,
    PT_PAGE_SIZE_MASK,
    PT_WRITABLE_MASK,
    READ_MASK,
    REMOVED_SPTE,
    SHADOW_ACC_TRACK_SAVED_BITS_SHIFT,
    SHADOW_ACC_TRACK_SAVED_MASK,
    SPTE_MMU_PRESENT_MASK,
    SPTE_TDP_AD_DISABLED_MASK,
    SPTE_TDP_AD_ENABLED_MASK,
    SPTE_TDP_AD_MASK,
    SPTE_TDP_AD_WRPROT_ONLY_MASK,
    Changed,
    SpteFormat,
    pages_per_level,
)
from kvmbook.model.spte_rules import (
    AsksForAllRoots,
    GuardAsksForW,
    OneTypeForAll,
    SavesW,
    TdpGuardAsksForW,
    WBringsD,
)
from kvmbook.model.switches import Difference, Switch
from kvmbook.model.tlb import Tlb, TlbEntry
from kvmbook.model.vm import Vcpu, Vm
from kvmbook.model.wrprot import TrackGuestPageTable
