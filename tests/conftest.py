"""Makes tests/support importable, and what tests of several folders share."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "support"))


@pytest.fixture
def small_disk() -> Iterator[Callable[[Path, int], None]]:
    """Mounts an empty disk of some KiB on a folder; the test is skipped where one may not mount."""
    mounted: list[Path] = []

    def mount(folder: Path, kibibytes: int) -> None:
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small disk needs root")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)
