"""What the tests share: the hardware kinds, short ways to build a VM and to run the seed's scene, pages, and a browser."""

import fcntl
import os
import pathlib
import platform
import shutil

import pytest

from kvmbook import Hardware, Kernel, Vm
from tools import book
from tools.browser import launch_options
from tools.debian import Missing, program

HARDWARE = {
    "ept_no_ad": Hardware.ept(ad_bits=False),
    "ept_no_ad_legacy": Hardware.ept(ad_bits=False, tdp_mmu=False),
    "ept_ad": Hardware.ept(),
    "ept_ad_legacy": Hardware.ept(tdp_mmu=False),
    "pml": Hardware.ept(pml=True),
    "pml_legacy": Hardware.ept(pml=True, tdp_mmu=False),
    "npt": Hardware.npt(),
    "npt_legacy": Hardware.npt(tdp_mmu=False),
    "shadow": Hardware.shadow(),
}
BASE = 0x200  # 2M-aligned


@pytest.fixture(params=HARDWARE)
def hardware(request):
    return HARDWARE[request.param]


@pytest.fixture(scope="session")
def gcc():
    """CI installs it, and skips nothing."""
    compiler = program("gcc", packages=("gcc", "libc6-dev"))
    if platform.machine() != "x86_64" or not compiler or not pathlib.Path("/usr/include/linux/kvm.h").exists():
        pytest.skip("needs gcc and linux/kvm.h on x86-64; on Debian: apt-get install gcc libc6-dev")
    return compiler


def make_vm(hardware=HARDWARE["ept_no_ad"], kernel=Kernel.v5_19, npages=64, vcpus=2, **options):
    """A VM with slot 0 of ``npages`` pages from BASE, not logging."""
    vm = Vm(hardware, kernel, vcpus, **options)
    vm.set_user_memory_region(slot=0, base_gfn=BASE, npages=npages)
    return vm


def log(vm, on=True, slot=0):
    """Switch dirty logging of a slot on or off, changing nothing else."""
    old = vm.memslots.id_to_memslot(0, slot)
    vm.set_user_memory_region(slot=slot, base_gfn=old.base_gfn, npages=old.npages, log_dirty_pages=on)


def missed(vm, slot=0):
    return vm.missed_dirty(slot).tolist()


def reported(vm, slot=0):
    base = vm.memslots.id_to_memslot(0, slot).base_gfn
    return [base + int(page) for page in vm.get_dirty_log(slot).nonzero()[0]]


IN_CI = os.environ.get("CI") == "true"
LIVE = os.environ.get("KVMBOOK_KVM") == "1"
ASSEMBLER = bool(shutil.which("gcc") and shutil.which("objcopy") and pathlib.Path("/usr/include/linux/kvm.h").exists())

# What the machine lacks is not collected in CI, so that nothing is skipped there. (Here, for a folder's own conftest.py would
# take this one's name, by which tests import it.)
collect_ignore = []
if IN_CI and not LIVE:
    collect_ignore += ["real/test_live.py", "real/test_live_questions.py", "real/test_selftests_live.py"]
if IN_CI and not ASSEMBLER:
    collect_ignore += ["real/test_beside_c.py"]


def pytest_configure(config):
    """In CI nothing is skipped: chromium is there before the first test, or there is one sentence and no test."""
    if IN_CI and not hasattr(config, "workerinput"):
        try:
            launch_options()
        except Missing as missing:
            pytest.exit(str(missing), returncode=1)


# Files, and folders of files, that take longest, the longest first. Of the first three only test_every_page needs the built
# pages, so nobody waits while it builds them.
LONGEST = (
    "tests/book/test_lab.py",
    "tests/book/test_every_page.py",
    "tests/search/test_explore.py",
    "tests/book/test_panels_in_pages.py",
    "tests/book/test_slides.py",
    "notebooks",
    "tests/search",
    "tests/book",
)


# `make check` does without these: chapters run, pages, decks and browsers, and what searches or draws lots for long.
NOT_QUICK = (
    "notebooks",
    "tests/book",
    "tests/search",
    "tests/views",
    "tests/real",
    "tests/model/test_properties.py",
    "tests/model/test_releases.py",
    "tests/model/test_spte.py",
    "tests/model/test_kernels.py",
    "tests/scenes/test_relaxing.py",
    "tests/scenes/test_exhibits.py",
    "tests/exercises",
)


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="without the files that take long: see NOT_QUICK")


def place_in(files, item):
    """The place of an item's file, or of a folder above it, among ``files``; None if it is not there."""
    path = item.path.relative_to(item.config.rootpath).as_posix()
    return next((place for place, start in enumerate(files) if path.startswith(start)), None)


def pytest_collection_modifyitems(config, items):
    """Files that take long are begun early, so that at the end no worker waits for another: for pytest-xdist, which hands
    out the files in this order (`make test`: --no-loadscope-reorder). With ``--quick`` some are left out."""
    items.sort(key=lambda item: len(LONGEST) if (place := place_in(LONGEST, item)) is None else place)
    if config.getoption("quick"):
        long = [item for item in items if place_in(NOT_QUICK, item) is not None]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A program that is missing is a sentence, not a traceback."""
    report = yield
    if call.excinfo is not None and isinstance(call.excinfo.value, Missing):
        report.longrepr = str(call.excinfo.value)
    return report


@pytest.fixture(scope="session")
def browser_type_launch_args():
    """Debian's chromium for pytest-playwright (CI installs it if it is missing); skipped where there is none."""
    try:
        return launch_options()
    except Missing as missing:
        if IN_CI:
            raise
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def pages(tmp_path_factory, request):
    """The folder of the pages, built from the outputs that are stored in the notebooks; warnings are errors. They are built
    once, and nobody may change them: pytest-xdist's workers, whose folders lie beside each other, share them."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if hasattr(request.config, "workerinput") else own
    built = shared / "pages/_build/html"
    with (shared / "pages.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        return built if built.exists() else book.build(shared / "pages", stored=True)


# anywidget gives a panel two seconds to begin, and does not show it if it takes longer: on a loaded machine it may.
PATIENT = "const asked = AbortSignal.timeout.bind(AbortSignal); AbortSignal.timeout = (ms) => asked(30 * ms);"
LEFT = "net::ERR_ABORTED"  # what a request ends with whose page is left before it is answered, as of its icon


class Visit:
    """A page with what must not happen noted: ``foreign``, requests to another host, and ``errors``, of the console."""

    def __init__(self, browser, home, **options):
        self.context = browser.new_context(**options)
        self.context.add_init_script(f"{{ {PATIENT} }}")
        self.page = self.context.new_page()
        self.foreign, self.errors = [], []
        own = (home, "data:", "blob:", "about:")
        self.context.on("request", lambda r: None if r.url.startswith(own) else self.foreign.append(r.url))
        self.context.on("requestfailed", lambda r: r.failure == LEFT or self.errors.append(f"failed: {r.url}"))
        self.context.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def clean(self):
        """Assert that nothing was noted."""
        assert not self.foreign and not self.errors, (self.foreign, self.errors)


@pytest.fixture
def visit(browser):
    """Open pages: ``visit(home, **options of a browser context)`` returns a `Visit`; all are closed at the end."""
    opened = []

    def new(home, **options):
        opened.append(Visit(browser, home, **options))
        return opened[-1]

    yield new
    for each in opened:
        each.context.close()
