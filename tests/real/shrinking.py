"""The differential, driven by Hypothesis: it chooses the seed of a sequence of `kvmbook.real.sequences`, and which of its
calls are made. So what it finds it can shrink: to as few calls as still show a difference."""

import random

from hypothesis import HealthCheck, Phase, find, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from kvmbook.real import perform
from kvmbook.real.differ import HANG, access_by_access
from kvmbook.real.sequences import known_to_differ, sequence

FEW = 8  # accesses of a run that are tried one by one


class Hangs(KeyboardInterrupt):
    """A guest hangs, and is not asked again. (Hypothesis catches any other exception, and would shrink it.)"""


@st.composite
def sequences(draw, machine, calls=25):
    """What a sequence is about, and its calls: those of a seed, some of them left out."""
    setting, made, _ = sequence(draw(st.integers(0, (1 << 32) - 1)), machine, calls)
    apart = []
    for call in made:
        apart += access_by_access(call) if call[0] == "run" and len(call[2]) <= FEW else [call]
    kept = draw(
        st.lists(st.integers(0, 31), min_size=len(apart), max_size=len(apart))
    )  # 0 leaves a call out: it is simplest
    return setting, [call for call, keep in zip(apart, kept, strict=True) if keep]


def differs(setting, calls, make_model, make_other):
    """Whether a call is answered otherwise by ``make_other(setting)`` than by ``make_model(setting)``. What is known to
    differ is not asked."""
    with make_other(setting) as other:
        model = make_model(setting)
        for call in calls:
            if known_to_differ(model, call):
                continue
            said, seen = perform(model, *call), perform(other, *call)
            if HANG in (said, seen):
                raise Hangs(f"{setting}: {calls}, at {call}")
            if said != seen:
                return True
    return False


def shrunk(machine, make_model, make_other, examples, seed):
    """Of ``examples`` sequences one that shows a difference, as (setting, calls), with as few calls as show it; None if none
    does."""
    how = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )

    def found(one):
        return differs(*one, make_model, make_other)

    try:
        return find(sequences(machine), found, settings=how, random=random.Random(seed))
    except NoSuchExample:
        return None
