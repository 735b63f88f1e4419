"""Every interleaving of the model: searched, counted, judged for any number of pages and vCPUs.

`schedule` has the steps of a small VM and the plain search; `playing`, `selftest` and `recorder` make a run a C program for
a real KVM; `cells` and `tables` keep what each step does, `pagewise` asks them for one state, `space` numbers the states,
`explore` visits them (`levels`: its inner loop, compiled), `products` counts them without, `anynumber` and `flush_rules`
judge. For chapters 10 and 11, and for whoever wants to know whether a change of the model can lose a write.

The hunter looks beyond small slots and single steps, at runs of whole calls: `configurations` has what it goes over,
`userspace` how a careful user space behaves, `known_faults` what is known already, `litmus` a run to hand on, `hunt` the
search itself: `python -m kvmbook.search`. For chapter 16, and for whoever changes KVM.

The museum has twelve lost writes of the past: `cast` moves actors that the others do not have, `museum` has the exhibits.
For chapter 13.

`sweep` makes one run for many seeds and settings, here or on any executor. For whoever wants to know how often, not whether.
"""

from kvmbook.search.anynumber import AnyNumber, Verdict, any_number
from kvmbook.search.cast import BEGINS, Cast, freed_pages, missed_writes, unseen_writes
from kvmbook.search.cells import BLANK_VIEW, Cells, control_of, ioctl_of, view_of, word_of
from kvmbook.search.configurations import Configuration, Slot, every
from kvmbook.search.explore import Result, Search, explore
from kvmbook.search.flush_rules import BITS, BitRule, Leaf, all_rules, as_bits, cost, least, leaves_met, sound_rules
from kvmbook.search.hunt import Covered, Hunt, Met, hunt, hunt_at_random, hunt_one, runs_at_random
from kvmbook.search.known_faults import KNOWN_FAULTS, Fault, fault_of, faults_in, loses, play, repaired
from kvmbook.search.litmus import Litmus, read_litmus
from kvmbook.search.museum import BUG, CONFUSIONS, EXHIBITS, Calls, Exhibit, Found, Interleavings, Moves
from kvmbook.search.pagewise import Pagewise, search_pagewise
from kvmbook.search.playing import Call, Cleared, Script, script_of
from kvmbook.search.products import count_any_size, count_states, pages_seen
from kvmbook.search.recorder import Recorder
from kvmbook.search.schedule import Action, Grain, Moving, act, plain_search, possible, search_plainly, smallest_vm
from kvmbook.search.selftest import FORMS, c_program, left_to_chance
from kvmbook.search.space import Space, space_of
from kvmbook.search.sweep import Done, Run, Sweep, SweepError, Workers, stream, sweep
from kvmbook.search.tables import EXIT, PageSteps, Pairs
from kvmbook.search.userspace import INTERRUPTED, Play
