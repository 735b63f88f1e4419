"""What is shown: pictures, panels, the SPTE inspector, the scheduler, quizzes, and their JavaScript.

The only wing that imports matplotlib or a widget library. `drawing` is what pictures are made with; `figures`,
`word_figures`, `run_figures` draw; `results` shows rows and columns. `widget` is what all widgets are, `panel` the
mechanism of all panels; each panel has a room. For notebooks and exercises.
"""

from kvmbook.views.ageing_panel import age_touch_and_ask
from kvmbook.views.beside_panel import beside_picture, model_beside_machine
from kvmbook.views.book_map import book_map
from kvmbook.views.drawing import INK, LOOK, Picture
from kvmbook.views.enabling_panels import lose_a_write, who_flushes_where
from kvmbook.views.faulting_panel import follow_one_access, path_picture
from kvmbook.views.figures import plot_chances, plot_missed, plot_rules, timeline_picture
from kvmbook.views.guess import Guess, NumberGuess, ShapeGuess
from kvmbook.views.inspector import (
    PATTERNS,
    SPECIAL,
    SpteInspector,
    decode,
    last_sentence,
    looks_at,
    parse,
    spte_inspector,
)
from kvmbook.views.losses_panel import which_word_loses, word_picture
from kvmbook.views.migration_panel import migration_picture, move_a_guest
from kvmbook.views.museum_panel import confusions_picture, curator, proof_picture
from kvmbook.views.panel import Again, Panel, View, search_progress, step_through
from kvmbook.views.quiz import Quiz
from kvmbook.views.reasons_panel import may_w_come_back
from kvmbook.views.relaxing_panel import take_the_flush_away
from kvmbook.views.remembering_panel import who_remembers_what
from kvmbook.views.results import Table
from kvmbook.views.rules_panel import write_the_rule
from kvmbook.views.run_figures import LOSS, page_graph_picture, trace_picture
from kvmbook.views.scheduler import SchedulerPanel, rows_of, you_are_the_scheduler
from kvmbook.views.scripts import script
from kvmbook.views.slot_panels import which_errno, word_by_word
from kvmbook.views.word_figures import formats_picture, words_picture
from kvmbook.views.writes_panel import one_write_four_ways
