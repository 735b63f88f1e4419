"""What runs where: in CI, what the machine lacks is not collected, so that nothing is skipped there."""

import os
import pathlib
import shutil

LIVE = os.environ.get("KVMBOOK_KVM") == "1"
ASSEMBLER = bool(shutil.which("gcc") and shutil.which("objcopy") and pathlib.Path("/usr/include/linux/kvm.h").exists())
IN_CI = os.environ.get("CI") == "true"

collect_ignore = [
    *(["test_live.py", "test_live_questions.py", "test_selftests_live.py"] if IN_CI and not LIVE else []),
    *(["test_beside_c.py"] if IN_CI and not ASSEMBLER else []),
]
