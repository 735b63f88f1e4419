"""A live migration, the story of chapter 12: user space copies a running guest's memory by what the dirty log tells it.

Guest memory has content here: pages of bytes. The guest runs a `Store` on its vCPUs, the host does its chores, user space
copies; then source and destination are laid side by side. Time is counted in *ticks*: in each, in this order, the host does
its chores, the clients ask the store, and user space sends ``bandwidth`` pages.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from kvmbook.model import PG_LEVEL_4K, Hardware, Kernel, Outcome, Vcpu, Vm
from kvmbook.scenes.enabling import BASE_GFN, spte_state, tlb_state
from kvmbook.scenes.store import AtRest, Clients, Store

NO_AD = Hardware.ept(ad_bits=False)
MODES = {
    "GET": "GET takes the bits and arms the pages",
    "GET + CLEAR": "manual protect: GET tells, CLEAR arms, a chunk at a time",
    "INITIALLY_SET": "manual protect, all bits set at first: enabling protects nothing",
    "dirty ring": "a ring for each vCPU instead of the bitmap",
}
CHUNK = 64  # pages of a CLEAR (QEMU's are of 2^18)
RING_BYTES = {False: 4096, True: 16384}  # the smallest that KVM takes; with PML it needs more
THROTTLE_FIRST, THROTTLE_MORE, THROTTLE_MOST = 20, 10, 99  # percent, QEMU's own defaults


@dataclass(frozen=True)
class Setting:
    """A guest, its host, and how user space moves it; times in ticks.

    ``tlb``: how many pages a vCPU's TLB remembers; a new one pushes out the one that it has had longest. ``warm_up``: ticks
    before the migration. ``bandwidth``: pages sent in a tick. ``downtime``: the guest is stopped when what is left can be
    sent in so many ticks; it runs for one more until it stands still, and what it writes in that comes on top.
    ``auto_converge``: it is slowed down while rounds do not get shorter; when it does not run, its clients ask in vain.
    ``max_rounds``: after so many user space gives up. The host's chores, each every so many ticks, 0 for never: ``ageing``
    marks all pages idle without a flush (page_idle); ``reclaim`` looks at the next eight pages, with a flush for each young
    one, and swaps the idle ones out; ``ksm`` makes the next page that is mapped share its frame.
    """

    hardware: Hardware = NO_AD
    kernel: Kernel = Kernel.v5_19
    mode: str = "GET"
    pages: int = 64
    vcpus: int = 1
    page_size: str = "4K"
    tlb: int = 12
    warm_up: int = 40
    bandwidth: int = 4
    downtime: int = 1
    auto_converge: bool = False
    max_rounds: int = 16
    ageing: int = 0
    reclaim: int = 0
    ksm: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode is one of {', '.join(MODES)}; got {self.mode!r}")
        for name in ("pages", "vcpus", "tlb", "bandwidth", "max_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("warm_up", "downtime", "ageing", "reclaim", "ksm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)}")


class Call(NamedTuple):
    """What user space did in a tick, and what came of it."""

    tick: int
    name: str
    note: str = ""


class Round(NamedTuple):
    """A round of copying: from which tick to before which, of how many pages, the guest slowed down by how many percent."""

    begin: int
    end: int
    pages: int
    throttle: int


class Instant(NamedTuple):
    """How one page stands after something has changed it. ``spte`` and, for each vCPU, ``tlb`` in words; ``version``: how
    often the guest has written the page; ``arrived``: the version that was sent last, 0 for none; ``wrote``: the vCPU that
    has just written it."""

    tick: int
    what: str
    spte: str
    tlb: tuple[str, ...]
    version: int
    arrived: int
    wrote: int | None


@dataclass(frozen=True)
class Wrong:
    """A page that is not at the destination as it was at the source. ``instants``: its story."""

    page: int
    source: bytes
    destination: bytes
    instants: tuple[Instant, ...]

    @property
    def lost(self) -> Instant:
        """The first write that has not arrived."""
        arrived = self.instants[-1].arrived
        return next(instant for instant in self.instants if instant.wrote is not None and instant.version > arrived)

    @property
    def cause(self) -> str:
        """Which write, through which entry, since when."""
        write = self.lost
        vcpu = write.wrote or 0
        said = f"page {self.page}: vCPU {vcpu}'s write in tick {write.tick} has not arrived; the SPTE was {write.spte} "
        said += f"since tick {self._since(write, lambda instant: instant.spte)}"
        if write.spte != "writable":
            since = self._since(write, lambda instant: instant.tlb[vcpu])
            said += f", the TLB entry {write.tlb[vcpu]} since tick {since}"
        return said

    def _since(self, write: Instant, part: Callable[[Instant], str]) -> int:
        """Since which tick a part of the page's state was what it was at that write."""
        at = self.instants.index(write)
        while at and part(self.instants[at - 1]) == part(write):
            at -= 1
        return self.instants[at].tick


@dataclass(frozen=True)
class Migrated:
    """What came of a migration. ``rounds``; ``downtime`` in ticks; ``finished``: False if user space gave up, and the guest
    stays where it is. ``source``, ``destination``: each page's bytes at the end. ``writable``: how many SPTEs were writable
    when logging was enabled, and ``enabling_flushed`` whether that flushed. ``calls``: user space's. ``wrong``: the stories
    of the pages that differ, from `migrate`."""

    setting: Setting
    rounds: tuple[Round, ...]
    downtime: int
    finished: bool
    source: tuple[bytes, ...]
    destination: tuple[bytes, ...]
    writable: int
    enabling_flushed: bool
    calls: tuple[Call, ...]
    wrong: tuple[Wrong, ...] = ()

    @property
    def differing(self) -> list[int]:
        """The pages that are not the same on both sides; none if the guest has stayed."""
        both = zip(self.source, self.destination, strict=True)
        return [page for page, (here, there) in enumerate(both) if self.finished and here != there]

    @property
    def store(self) -> Store:
        """The store, at the destination."""
        return Store(AtRest(self.destination), self.setting.pages)

    @property
    def end(self) -> int:
        """The tick in which the guest runs again."""
        return self.rounds[-1].end


def migrate(setting: Setting, clients: Clients) -> Migrated:
    """Move the guest, and if pages differ, tell the story of each: they are watched in a second run, which is the same."""
    moved = _Migration(setting, clients).run()
    if not moved.differing:
        return moved
    told = _Migration(setting, clients, moved.differing)
    again = told.run()
    wrong = [Wrong(page, again.source[page], again.destination[page], tuple(told.told[page])) for page in told.told]
    return replace(again, wrong=tuple(wrong))


def copied(setting: Setting, clients: Clients) -> Migrated:
    """The same without the stories: for many migrations."""
    return _Migration(setting, clients).run()


class _GuestMemory:
    """The guest's memory, as one of its vCPUs reads and writes it."""

    def __init__(self, migration: _Migration, vcpu: Vcpu) -> None:
        self.migration, self.vcpu = migration, vcpu

    def read(self, page: int) -> bytes:
        self._access("read", page)
        return self.migration.memory[page]

    def write(self, page: int, content: bytes) -> None:
        self._access("write", page)
        self.migration.memory[page] = content

    def _access(self, kind: str, page: int) -> None:
        migration, vcpu = self.migration, self.vcpu
        while (outcome := vcpu.complete(kind, BASE_GFN + page)) is Outcome.RING_FULL:
            migration.reap()
        if page in migration.told:
            migration.versions[page] += kind == "write"
            migration.tell(page, f"vCPU {vcpu.state.id} {kind}s: {outcome}", vcpu.state.id if kind == "write" else None)
        while len(vcpu.tlb.entries) > migration.setting.tlb:
            _, gfn, _ = next(iter(vcpu.tlb.entries))
            vcpu.evict(gfn)
            if gfn - BASE_GFN in migration.told:
                migration.tell(gfn - BASE_GFN, f"vCPU {vcpu.state.id}'s TLB has no more room for it")


class _Migration:
    """A migration while it happens. ``told``: what has happened to the pages that are watched."""

    def __init__(self, setting: Setting, clients: Clients, watched: Collection[int] = ()) -> None:
        self.setting, self.clients = setting, clients
        self.tick, self.hand, self.merged, self.credit, self.throttle, self.slow = 0, 0, 0, 0, 0, 0
        self.told: dict[int, list[Instant]] = {page: [] for page in watched}
        self.versions = [0] * setting.pages
        self.arrived = [0] * setting.pages
        self.memory, self.sent = [b""] * setting.pages, [b""] * setting.pages
        self.calls, self.rounds = list[Call](), list[Round]()
        self.reported = list[int]()  # what GET has told, and, chunk by chunk, is to be cleared before it is sent
        self.to_clear = set[int]()
        self.reaped = set[int]()  # what was taken from rings since the last harvest
        self.vm = vm = Vm(setting.hardware, setting.kernel, setting.vcpus, page_size=setting.page_size)
        if setting.mode == "dirty ring":
            vm.enable_dirty_ring(RING_BYTES[bool(setting.hardware.pml_entries)])
        elif setting.mode != "GET":
            vm.enable_manual_dirty_log_protect(initially_set=setting.mode == "INITIALLY_SET")
        vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=setting.pages)
        self.stores = [Store(_GuestMemory(self, vcpu), setting.pages) for vcpu in vm.vcpu]

    # ---- time -------------------------------------------------------------------------------------------------------

    def pass_tick(self, sending: Iterable[int] = ()) -> None:
        """The host, the guest, and user space, each for one tick."""
        self._chores()
        self.credit += 100 - self.throttle
        if self.credit >= 100:
            self.credit -= 100
            for request in self.clients.requests(self.tick):
                self.stores[self.tick % len(self.stores)].do(request)
        self._send(sending)
        self.tick += 1

    def _chores(self) -> None:
        setting, vm = self.setting, self.vm
        first, behind = BASE_GFN, BASE_GFN + setting.pages
        if self._is_time(setting.ageing):
            vm.clear_young(first, behind)
            self.tell_all("the host ages")
        if self._is_time(setting.reclaim):
            for gfn in range(first + self.hand, min(first + self.hand + 8, behind)):
                if not vm.clear_flush_young(gfn, gfn + 1):
                    vm.invalidate_range(gfn, gfn + 1)
            self.hand = (self.hand + 8) % setting.pages
            self.tell_all("the host reclaims")
        if self._is_time(setting.ksm):
            mapped = [gfn for gfn in range(first, behind) if vm.level(gfn) == PG_LEVEL_4K]
            for gfn in mapped[self.merged % len(mapped) :][:1] if mapped else ():
                vm.change_pte(gfn, writable=False)
            self.merged += 1
            self.tell_all("the host merges a page")

    def _is_time(self, period: int) -> bool:
        return period > 0 and self.tick > 0 and self.tick % period == 0

    def _send(self, pages: Iterable[int]) -> None:
        for page in pages:
            if page // CHUNK in self.to_clear:
                self._clear(page // CHUNK)
            self.sent[page] = self.memory[page]
            if page in self.told:
                self.arrived[page] = self.versions[page]
                self.tell(page, "user space sends it")

    # ---- the log ----------------------------------------------------------------------------------------------------

    def _call(self, name: str, note: str = "") -> None:
        self.calls.append(Call(self.tick, name, note))
        self.tell_all(name)

    def _harvest(self) -> list[int]:
        """The pages to send in the next round."""
        if self.setting.mode == "dirty ring":
            self._kick()  # QEMU does, too: with PML the last writes are in no ring yet
            self.reap()
            pages, self.reaped = sorted(self.reaped), set()
            return pages
        pages = np.flatnonzero(self.vm.get_dirty_log(0)).tolist()
        self._call("KVM_GET_DIRTY_LOG", f"{len(pages)} dirty")
        if self.setting.mode != "GET":
            self.to_clear = {page // CHUNK for page in pages}
            self.reported = pages
        return pages

    def _kick(self) -> None:
        """Every vCPU leaves the guest."""
        for vcpu in self.vm.vcpu:
            vcpu.exit()

    def _clear(self, chunk: int) -> None:
        """Take the bits of a chunk, before its first page is sent."""
        self.to_clear.remove(chunk)
        first, count = chunk * CHUNK, min(CHUNK, self.setting.pages - chunk * CHUNK)
        bitmap = np.isin(np.arange(first, first + count), self.reported)
        self.vm.clear_dirty_log(0, first, count, bitmap)
        self._call("KVM_CLEAR_DIRTY_LOG", f"{bitmap.sum()} of chunk {chunk}")

    def reap(self) -> None:
        """Take what is in the rings, and give the entries back."""
        rings = [vcpu.dirty_ring for vcpu in self.vm.vcpu]
        pages = {page for ring in rings if ring is not None for _, page in ring.harvest()}
        self.reaped |= pages
        self.vm.reset_dirty_rings()
        self._call("KVM_RESET_DIRTY_RINGS", f"{len(pages)} dirty")

    # ---- the migration ----------------------------------------------------------------------------------------------

    def run(self) -> Migrated:
        """Warm up, enable logging, copy round by round, stop, copy the rest."""
        setting, vm = self.setting, self.vm
        for _ in range(setting.warm_up):
            self.pass_tick()
        writable, flushes = self._writable(), vm.counters.flushes
        vm.set_user_memory_region(slot=0, base_gfn=BASE_GFN, npages=setting.pages, log_dirty_pages=True)
        flushed = vm.counters.flushes > flushes
        self._call("KVM_SET_USER_MEMORY_REGION", f"LOG_DIRTY_PAGES: {'flush' if flushed else 'no flush'}")
        self._harvest()
        left, enough = list(range(setting.pages)), setting.bandwidth * setting.downtime
        while not self.rounds or (len(left) > enough and len(self.rounds) < setting.max_rounds):
            self._round(left)
            left = self._harvest()
            self._converge(len(left))
        finished = len(left) <= enough
        return Migrated(
            setting=setting,
            downtime=self._stop(left) if finished else 0,
            rounds=tuple(self.rounds),
            finished=finished,
            source=tuple(self.memory),
            destination=tuple(self.sent),
            writable=writable,
            enabling_flushed=flushed,
            calls=tuple(self.calls),
        )

    def _writable(self) -> int:
        return sum(self.vm.fmt.is_writable_pte(spte) for _, _, _, spte in self.vm.page_tables.every_leaf())

    def _converge(self, left: int) -> None:
        """Slow the guest down, or further down, when for the second time a round has left more than half of its pages."""
        self.slow += self.setting.auto_converge and 2 * left > self.rounds[-1].pages
        if self.slow >= 2:
            more = self.throttle + THROTTLE_MORE if self.throttle else THROTTLE_FIRST
            self.throttle, self.slow = min(more, THROTTLE_MOST), 0

    def _round(self, pages: list[int]) -> None:
        begin, size = self.tick, self.setting.bandwidth
        for at in range(0, max(len(pages), 1), size):
            self.pass_tick(pages[at : at + size])
        self.rounds.append(Round(begin, self.tick, len(pages), self.throttle))

    def _stop(self, left: list[int]) -> int:
        """The guest runs on for a tick until its vCPUs stand still; then the last harvest, and the rest is sent."""
        self.pass_tick()
        self._kick()
        self._call("the vCPUs stop")
        begin, pages = self.tick, sorted({*left, *self._harvest()})
        self._send(pages)
        self.tick += -(-len(pages) // self.setting.bandwidth)
        self.rounds.append(Round(begin, self.tick, len(pages), self.throttle))
        self._call("the guest runs at the destination")
        return self.tick - begin

    # ---- stories ----------------------------------------------------------------------------------------------------

    def tell_all(self, what: str) -> None:
        """Note for each watched page what has happened, if it has changed anything there."""
        for page in self.told:
            self.tell(page, what)

    def tell(self, page: int, what: str, wrote: int | None = None) -> None:
        vm, gfn, told = self.vm, BASE_GFN + page, self.told[page]
        spte, tlbs = spte_state(vm.fmt, vm.spte(gfn)), (vcpu.tlb.lookup("L1", gfn) for vcpu in vm.vcpus)
        tlb = tuple(tlb_state(entry) for entry in tlbs)
        now = Instant(self.tick, what, spte, tlb, self.versions[page], self.arrived[page], wrote)
        if not told or now[2:6] != told[-1][2:6]:
            told.append(now)
