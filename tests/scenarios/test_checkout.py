"""A version that was committed comes back from DVC's cache, whatever of it was deleted."""

import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

from chain import ARTIFACTS, Chain

if TYPE_CHECKING:
    from conftest import Reference


def test_everything_that_was_committed_and_deleted_comes_back(finished: Chain, reference: "Reference") -> None:
    def call(*command: str) -> str:
        done = subprocess.run(
            command, cwd=finished.root, env=finished.environment(), check=True, capture_output=True, text=True
        )
        return done.stdout

    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    call("git", "add", "-A")
    call("git", *identity, "commit", "-q", "-m", "A version")
    tracked = call("git", "ls-files").splitlines()
    # Git holds pointers; a blanket rule in a .gitignore would hide them from Git and from DVC.
    assert {"data/raw.dvc", "dvc.lock"} <= set(tracked)
    assert not [name for name in tracked if name.startswith(("data/raw/", "data/corpus/", "models/int8/"))]

    for name in ARTIFACTS:
        place = finished.root / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    assert finished.version() == {}
    call("git", "checkout", "-q", "--", ".")
    call(sys.executable, "-m", "dvc", "checkout")
    assert finished.version() == reference.version
    assert (finished.root / "data/raw/small").is_dir()
    assert call("git", "status", "--porcelain") == ""
    status = finished.overnight("status").out.splitlines()
    assert [line.partition(": ")[2] for line in status] == ["up to date"] * len(status)
