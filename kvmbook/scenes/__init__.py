"""The runs that chapters tell, and words for what they show: pure functions from a few settings to results.

`enabling` is the story of chapters 01 and 08, `slots` of chapter 02, `words` and `decoding` of chapter 03; `runs` retells any
run moment by moment. For notebooks, for views, which draw the results, and for exercises, which ask about them.
"""

from kvmbook.scenes.decoding import (
    HELPERS,
    NOT_ASKED,
    OPERATIONS,
    SENTENCES,
    VERDICTS,
    Says,
    helper_says,
    operation_does,
)
from kvmbook.scenes.enabling import (
    BASE_GFN,
    CHANGES,
    HARDWARE,
    TOUCHES,
    Moment,
    Scene,
    enabling_plan,
    made_twice,
    missed_against_aged,
    missed_per_harvest,
    spte_state,
    write_after_enabling,
)
from kvmbook.scenes.runs import Graph, Now, Run, RunMoment, graph_of, label, now_of, retell, run_of, what_of
from kvmbook.scenes.slots import (
    FLAGS,
    PLACES,
    PROTOCOLS,
    RULES,
    SEEN_PAGES,
    SIZES,
    SLOTS,
    WHEN,
    WRITTEN,
    Ask,
    Harvest,
    ProtectFirst,
    Row,
    ask,
    ask_panel,
    ask_twice,
    errno_of,
    harvest,
    logged_vm,
    refusals,
    region,
    sent_again,
    what_changes,
)
from kvmbook.scenes.words import (
    ABOUT_KINDS,
    ADDRESS,
    FREE,
    HARDWARE_READS,
    KVM_READS,
    LEAVES,
    PFN,
    Field,
    after_read,
    bit_name,
    broken_rule,
    changes,
    fields,
    free_bits,
    is_legal,
    listed,
    named_words,
)
