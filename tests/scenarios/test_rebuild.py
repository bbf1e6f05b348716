"""Version 1 of a whole chain is rebuilt exactly, long after everything else has moved on."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from chain import STAGES, Chain

from flows import environment

if TYPE_CHECKING:
    from conftest import Reference

VERSIONS_LATER = 10


def git(chain: Chain, *arguments: str) -> str:
    author = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    return subprocess.run(
        ["git", *author, *arguments], cwd=chain.root, env=chain.environment(), check=True, text=True,
        capture_output=True,
    ).stdout  # fmt: skip


def register(chain: Chain, version: str) -> None:
    git(chain, "add", "-A")
    git(chain, "commit", "-q", "-m", version)
    git(chain, "tag", "-a", f"lm@{version}", "-m", version)


def another_version(chain: Chain, number: int) -> None:
    """Registers a version with other parameters, other code, and another output in DVC's cache."""
    chain.set("train.steps", 40 + number)
    module = chain.root / "tasks/train/__main__.py"
    module.write_text(f"raise SystemExit('the code of version {number}')\n")
    report = chain.root / "models/train.json"
    before = hashlib.md5(report.read_bytes()).hexdigest()
    report.unlink()
    report.write_text(json.dumps({"version": number}))
    after = hashlib.md5(report.read_bytes()).hexdigest()
    cached = chain.root / ".dvc/cache/files/md5" / after[:2] / after[2:]
    cached.parent.mkdir(exist_ok=True)
    shutil.copyfile(report, cached)
    lock = chain.root / "dvc.lock"
    assert before in lock.read_text()
    lock.write_text(lock.read_text().replace(before, after))
    register(chain, f"v1.{number}.0")


def test_version_one_is_rebuilt_exactly_after_ten_more(finished: Chain, reference: "Reference") -> None:
    environment.write(finished.root)
    register(finished, "v1.0.0")
    # The source changes, files are deleted there and in the raw data, and DVC versions what is left.
    sources = sorted((finished.root / "texts").iterdir())
    sources[0].unlink()
    sources[1].write_text('{"text": "Another text.", "group": "book 99"}\n')
    raw = sorted(path for path in (finished.root / "data/raw").rglob("*") if path.is_file())
    raw[0].unlink()
    subprocess.run(
        [sys.executable, "-m", "dvc", "add", "-q", "data/raw"],
        cwd=finished.root,
        env=finished.environment(),
        check=True,
    )
    for number in range(1, VERSIONS_LATER + 1):
        another_version(finished, number)
    assert len(git(finished, "tag").split()) == VERSIONS_LATER + 1
    before = finished.version()

    ended = finished.overnight("rebuild", "v1.0.0")
    assert ended.code == 0, ended.err
    assert "lm@v1.0.0: identical: all 8 outputs have the recorded bytes." in ended.out
    certificate = json.loads((finished.root / ".overnight/certificates/v1.0.0.json").read_bytes())
    assert certificate["verdict"] == "identical"
    assert [stage["stage"] for stage in certificate["stages"]] == list(STAGES)
    assert {output["path"]: output["rebuilt"] for output in certificate["outputs"]} == recorded(reference.chain.root)
    assert finished.version() == before
    assert git(finished, "status", "--porcelain") == ""

    # Its bytes come back as well, though the project holds others by now.
    assert finished.overnight("restore", "v1.0.0", "--to", str(finished.root.parent / "one")).code == 0
    assert Chain(finished.root.parent / "one", finished.home).version() == reference.version


def recorded(root: Path) -> dict[str, str]:
    """The MD5 of each output in ``dvc.lock``."""
    from ruamel.yaml import YAML

    lock = YAML(typ="safe").load(root / "dvc.lock")
    return {output["path"]: output["md5"] for stage in lock["stages"].values() for output in stage["outs"]}
