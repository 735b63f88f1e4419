"""Each chapter's questions and check cells.

A chapter's notebook takes its own from the room of its number (`kvmbook.exercises.ch01`); the mechanism that all share, and
whoever writes the next chapter's, stands below.
"""

from kvmbook.exercises.mechanism import Answer, Run, checker, question
from kvmbook.exercises.vms import PAGES, WatchedVm, aged, enable, lost_while_logging, slot_was_touched
