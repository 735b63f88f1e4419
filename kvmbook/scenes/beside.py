"""The runs of chapter 15: one question, asked of the model and of a machine, call by call; and what a reproducer can show.

`kvmbook.views.beside_panel` draws the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from itertools import zip_longest
from typing import Any, NamedTuple

from kvmbook.model import Hardware, Kernel, Vm
from kvmbook.real import BASE, QUESTIONS, RING_GFN, Machine, ModelVm, Outside, Said, as_hardware, as_kernel, asking
from kvmbook.scenes.enabling import is_stale, spte_state, tlb_state

# What the panel asks: a question and a case, and the page that it is about.
ASKED = {
    "a ring, initially set": ("ring", "manual protect 3", RING_GFN),
    "a ring, not initially set": ("ring", "manual protect 1", RING_GFN),
    "CLEAR of two pages": ("CLEAR", "3ff and 400", 0x400),
    "CLEAR of one page": ("CLEAR", "400", 0x400),
    "enabling twice": ("enabling", "it is protected already", BASE),
    "a read, page not mapped": ("read", "not mapped", BASE),
    "a read beside a page": ("neighbour", "page 3", BASE + 3),
    "chapter 1's run": ("chapter 1", "aged", BASE),
}
V5_19 = Kernel.v5_19.with_(neighbour_prefetch=True)  # as every real one has it
MODELS: dict[str, Callable[[Machine], tuple[Hardware, Kernel]]] = {
    "this machine": lambda machine: (as_hardware(machine.offers), as_kernel(machine.offers)),
    "v5.19 on this CPU": lambda machine: (as_hardware(machine.offers), V5_19),
    "v5.19, no A/D bits": lambda machine: (Hardware.ept(ad_bits=False), V5_19),
}


class Beside(NamedTuple):
    """One call, and its answer in the model and on the machine (None: it was not asked). ``spte`` and ``tlb``: the page's, in
    the model, after the call; ``stale``: the TLB lets a write pass that the SPTE would not; ``lost``: in the model this write
    is lost."""

    call: str
    model: str | None
    machine: str | None
    spte: str
    tlb: str
    stale: bool
    lost: bool

    @property
    def agree(self) -> bool | None:
        """None where one of the two was not asked."""
        return None if self.model is None or self.machine is None else self.model == self.machine


class SideBySide(NamedTuple):
    """A whole run. ``missed``: whether the model has lost a write at its end."""

    rows: tuple[Beside, ...]
    missed: bool


def side_by_side(asked: str, model: str, machine: Machine) -> SideBySide:
    """One run of `ASKED`, in one of `MODELS` and on a machine."""
    name, case, gfn = ASKED[asked]
    question = QUESTIONS[name]
    hardware, kernel = MODELS[model](machine)
    inside = list[tuple[str, str, bool]]()
    made = list[Vm]()

    def make(vcpus: int, page_size: str) -> Outside:
        vm = ModelVm(hardware, kernel, vcpus, page_size=page_size)
        made.append(vm.vm)
        ask = asking(vm)

        def watched(*call: Any) -> Said:
            said = ask(*call)
            entry = vm.vm.vcpu[0].tlb.lookup("L1", gfn) if vm.vm.vcpus else None
            lost = access(said).startswith("write") and len(vm.missed_dirty(0)) > 0
            inside.append((spte_state(vm.fmt, vm.spte(gfn)), tlb_state(entry), lost))
            return said

        return Outside(watched, vcpus=vcpus)

    _, here = question.told(case, Machine(model, machine.offers, make))
    _, there = question.told(case, machine)
    rows = [
        _beside(ours, theirs, *(states or ("", "", False)))
        for ours, theirs, states in zip_longest(_named(here.said), _named(there.said), inside, fillvalue=None)
    ]
    return SideBySide(tuple(_merged(rows)), bool(len(made[0].missed_dirty(0))))


def _beside(ours: Said | None, theirs: Said | None, spte: str, tlb: str, lost: bool) -> Beside:
    said = ours or theirs
    assert said is not None
    model, machine = (answer_in_words(one) if one else None for one in (ours, theirs))
    return Beside(call_in_words(said), model, machine, spte, tlb, is_stale(spte, tlb), lost)


def _named(said: Iterable[Said]) -> list[Said]:
    """Counts of flush requests, each as what came since the one before."""
    found, before = [], None
    for one in said:
        if one.name == "flush_requests" and not one.refused:
            answer, before = one.answer - (one.answer if before is None else before), one.answer
            one = one._replace(answer=answer)
        found.append(one)
    return found


def _merged(rows: Iterable[Beside]) -> list[Beside]:
    """Accesses of one kind to many pages, one after the other, as one row."""
    merged = list[Beside]()
    for row in rows:
        kind = row.call.split()[0]
        if merged and kind in ("read", "write") and merged[-1].call.startswith(f"{kind} "):
            first = merged.pop().call.split()[1]
            row = row._replace(call=f"{kind} {first} to {row.call.split()[1]}")
        merged.append(row)
    return merged


# ---- in words --------------------------------------------------------------------------------------------------------


def call_in_words(said: Said) -> str:
    """What a call is, for one line of a picture."""
    asked = said.arguments
    if said.name == "run":
        return access(said)
    if said.name == "memory_region":
        _, flags, gfn, npages, _ = asked
        return f"slot {gfn:#x}, {npages} pages{', logging' * (flags & 1)}" if npages else "slot deleted"
    if said.name == "clear_dirty_log":
        return f"CLEAR {pages_in_words(asked[3])}"
    if said.name == "values":
        return f"memory of {asked[0][0]:#x}"
    return CALL_WORDS[said.name].format(*asked)


def access(said: Said) -> str:
    """The access that a call is, "" if it is none."""
    if said.name != "run":
        return ""
    ((kind, gfn),) = said.arguments[1]
    return f"{kind} {gfn:#x}"


CALL_WORDS = {
    "get_dirty_log": "GET",
    "manual_protect": "manual protect: {0}",
    "enable_dirty_ring": "dirty ring",
    "harvest": "harvest the ring",
    "clear_young": "the host ages",
    "flush_requests": "flushes asked for",
}


def answer_in_words(said: Said) -> str:
    """An answer, as short."""
    answer = said.answer
    if said.refused:
        return str(answer)
    if said.name in ("run", "values"):
        (told,) = answer
        return str(told[0] if said.name == "values" else told)
    if said.name == "get_dirty_log":
        return pages_in_words(answer[1], answer[0])
    if said.name == "harvest":
        return pages_in_words([page for _, page in answer or ()])
    if said.name == "flush_requests":
        return f"+{answer}"
    if isinstance(answer, bool):
        return "young" if answer else "idle"
    return "done" if answer is None else str(answer)


def pages_in_words(pages: list[int], npages: int = 0) -> str:
    """Pages by number; of ``npages`` many by those that are not among them."""
    others = [page for page in range(npages) if page not in set(pages)]
    if npages and len(others) < len(pages):
        return f"all but {pages_in_words(others)}" if others else f"all {npages} pages"
    return f"page{'s' * (len(pages) > 1)} {', '.join(map(str, pages))}" if pages else "no page"


# ---- a test that cannot fail -----------------------------------------------------------------------------------------

CPUS = {
    "EPT without A/D bits": Hardware.ept(ad_bits=False),
    "EPT with A/D bits": Hardware.ept(),
    "EPT with PML": Hardware.ept(pml=True),
    "NPT": Hardware.npt(),
    "shadow paging": Hardware.shadow(),
}


@cache
def reproduces(cpu: str, kernel: Kernel, aged: bool = True) -> bool:
    """Whether chapter 1's run loses a write there. Not ``aged``: the host does not age the page."""
    vm = Vm(CPUS[cpu], kernel)
    vm.set_user_memory_region(slot=0, base_gfn=BASE, npages=64)
    vm.vcpu[0].write(BASE)
    if aged:
        vm.clear_young(BASE, BASE + 64)
    vm.set_user_memory_region(slot=0, base_gfn=BASE, npages=64, log_dirty_pages=True)
    vm.vcpu[0].write(BASE)
    return len(vm.missed_dirty(0)) > 0
