"""What is noted of the environment in which a stage ran, and to which outputs a note belongs."""

import json
import os
from typing import TYPE_CHECKING

import pytest

from flows import computed, environment, worktree

if TYPE_CHECKING:
    from publishing import Clone
    from versioned import Versioned

ATEN = "variables.ATEN_CPU_CAPABILITY"


def elsewhere(versioned: "Versioned") -> dict[str, object]:
    return dict(computed.elsewhere(versioned.root, environment.record(versioned.root)))


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)


def test_a_note_belongs_to_the_outputs_that_were_computed(
    versioned: "Versioned", monkeypatch: pytest.MonkeyPatch
) -> None:
    assert elsewhere(versioned) == {"work": None, "measure": None}
    with monkeypatch.context() as other:
        other.setenv("ATEN_CPU_CAPABILITY", "avx2")
        computed.note(versioned.root, "work")
    computed.note(versioned.root, "measure")
    assert elsewhere(versioned) == {"work": {ATEN: "avx2"}}
    # What parameters say of another stage by now is no fact of this one.
    params = (versioned.root / "params.yaml").read_text()
    (versioned.root / "params.yaml").write_text(params.replace("world_size: 2", "world_size: 4"))
    assert elsewhere(versioned) == {"work": {ATEN: "avx2"}}
    # Other outputs, of which nothing is known; and those again.
    lock, md5 = (versioned.root / "dvc.lock").read_text(), versioned.output("out/work").md5
    (versioned.root / "dvc.lock").write_text(lock.replace(md5, f"{'0' * 32}.dir"))
    assert elsewhere(versioned) == {"work": None}
    (versioned.root / "dvc.lock").write_text(lock)
    assert elsewhere(versioned) == {"work": {ATEN: "avx2"}}


def test_what_was_noted_in_a_worktree_is_known_in_the_project(versioned: "Versioned") -> None:
    computed.note(worktree.add(versioned.root, "night", "lm@v1.0.0"), "work")
    worktree.remove(versioned.root, "night")
    assert elsewhere(versioned) == {"measure": None}


def test_old_notes_are_dropped_and_those_in_use_kept(versioned: "Versioned") -> None:
    computed.note(versioned.root, "work")
    (first,) = (versioned.root / computed.FOLDER / "work").iterdir()
    for number in range(40):
        (first.parent / f"{number}.json").write_text("{}")
    os.utime(first, (0, 0))
    assert elsewhere(versioned) == {"measure": None}
    computed.note(versioned.root, "work")
    left = list(first.parent.iterdir())
    assert first in left
    assert len(left) == 30


def test_what_cannot_be_noted_fails_nothing(versioned: "Versioned") -> None:
    (versioned.root / ".overnight").write_text("in the way")
    computed.note(versioned.root, "work")
    computed.note(versioned.root, "no-stage")


def test_a_version_tells_what_was_computed_otherwise(publisher: "Clone", monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.publish import publish

    with monkeypatch.context() as other:
        other.setenv("ATEN_CPU_CAPABILITY", "avx2")
        computed.note(publisher.root, "quantize")
    publish(publisher.root)
    recorded = json.loads((publisher.root / environment.FILE).read_text())
    assert recorded["computed"] == {"quantize": {ATEN: "avx2"}, "evaluate": None}
    found = environment.recorded(publisher.root, "lm@v1.0.0")
    assert found is not None
    assert found.unknown == ("evaluate",)

    # Where nothing was, nothing is said.
    publisher.write("b.txt", "More.\n")
    publisher.run()
    for stage in ("quantize", "evaluate"):
        computed.note(publisher.root, stage)
    publish(publisher.root)
    assert "computed" not in json.loads((publisher.root / environment.FILE).read_text())
