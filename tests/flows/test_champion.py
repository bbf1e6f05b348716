"""When the champion moves, where its files come from, and what a run says of it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from publishing import REPOSITORY, Clone
from ruamel.yaml import YAML

from flows import champion, contents, dvc, registry
from flows.champion import Action
from flows.dvc import Change, Stale
from flows.publish import publish
from tasks import paths
from tasks.champion import Champion, split_of
from tasks.champion import read as read_champion
from tasks.errors import UserMistake

OLD, NEW = Champion(version="lm@v1.0.0", commit="a"), Champion(version="lm@v1.1.0", commit="b")
MODEL = Stale((Change("dependency", "models/int8", "modified"),), never_run=False)
LIMIT = Stale((Change("parameter", "params.yaml: evaluate.max_regression", "modified"),), never_run=False)
CODE = Stale((Change("command", "command", "changed"),), never_run=False)
LOST = Stale((Change("output", "models/evaluation.json", "deleted"),), never_run=False)
ITSELF = Stale((Change("dependency", "models/champion", "modified"),), never_run=False)
FIRST = Stale((Change("dependency", "models/champion", "deleted"),), never_run=True)


@pytest.mark.parametrize(
    ("stale", "here", "versioned", "intact", "expected"),
    [
        # What is measured anew is measured against the model that is in production now.
        (MODEL, OLD, True, True, Action.BRING),
        (LIMIT, OLD, True, True, Action.BRING),
        (CODE, OLD, True, True, Action.BRING),
        (MODEL, NEW, True, True, Action.KEEP),
        (FIRST, OLD, True, True, Action.BRING),
        (FIRST, NEW, True, True, Action.KEEP),
        # A stage that is forced, or whose output was lost, measures what it measured before.
        (None, OLD, True, True, Action.KEEP),
        (LOST, OLD, True, True, Action.KEEP),
        (ITSELF, OLD, True, True, Action.KEEP),
        (None, OLD, True, False, Action.RESTORE),
        (LOST, None, True, False, Action.RESTORE),
        (ITSELF, OLD, True, False, Action.RESTORE),
        # Brought, but killed before it was versioned; or edited.
        (MODEL, NEW, True, False, Action.BRING),
        (MODEL, None, True, False, Action.BRING),
        # Never brought.
        (None, None, False, True, Action.BRING),
        (None, NEW, False, True, Action.BRING),
        (LOST, None, False, True, Action.BRING),
    ],
)
def test_the_champion_moves_only_with_what_is_measured_anew(
    stale: Stale | None, here: Champion | None, versioned: bool, intact: bool, expected: Action
) -> None:
    assert champion.plan(stale, here, NEW, versioned, intact) == expected


def test_what_is_to_be_done_is_read_from_the_project(published: Clone) -> None:
    def look() -> Action:
        return champion.look(published.root, "evaluate", dvc.changes(published.root))

    assert look() == Action.KEEP
    registry.promote(published.root, registry.resolve(published.root, "v1.1.0"), "By hand.")
    assert look() == Action.KEEP
    published.set("train", "learning_rate", 0.3)
    assert look() == Action.BRING
    published.set("train", "learning_rate", 0.75)
    record = paths.CHAMPION_RECORD.read_bytes()
    paths.CHAMPION_RECORD.unlink()
    assert look() == Action.RESTORE
    paths.CHAMPION_RECORD.write_bytes(record)
    assert look() == Action.KEEP
    champion.POINTER.unlink()
    assert look() == Action.BRING


def objects_of(clone: Clone, version: str) -> list[Path]:
    """The files of the cache that hold the INT8 model of ``version``, its listing last."""
    commit = registry.resolve(clone.root, version).commit
    (output,) = (one for one in contents.recorded(clone.root, commit) if one.path == paths.INT8)
    with dvc.store(clone.root) as store:
        listing = store.path(output.md5)
        files = contents.parse_listing(listing.read_bytes()).values()
        return [*(store.path(md5) for md5 in files), listing]


def test_the_champion_is_the_model_in_production_and_says_which(published: Clone) -> None:
    version = registry.resolve(published.root, "v1.0.0")
    shutil.rmtree(paths.CHAMPION)
    # What its fine-tuning began with is not needed.
    (unused,) = (file for file in objects_of(published, "v1.0.0") if file.read_text().startswith("post_training/"))
    unused.unlink()
    shutil.rmtree(published.shelf)
    brought = champion.bring(published.root)
    assert brought == read_champion() == champion.current(published.root)
    assert (brought.version, brought.commit) == (version.tag, version.commit)
    assert brought.split is not None
    # The repository's own, which the small project has taken over.
    assert (brought.split.seed, brought.split.valid, brought.split.test) == (468, 0.05, 0.05)
    assert brought.split.groups["kjv"].group_field == "book"
    assert {path.name for path in paths.CHAMPION.iterdir()} == {
        "champion.json", "model.onnx", "model.onnx.data", "config.json", "tokenizer.json"
    }  # fmt: skip
    # Not the model that lies in models/int8, which is that of v1.1.0.
    assert (paths.CHAMPION / "model.onnx").read_text() == "model.onnx 0.25: In the beginning.\n"
    assert "model.onnx 0.75" in paths.INT8_GRAPH.read_text()


def test_a_champion_whose_code_dealt_files_out_by_their_text_is_told_apart(published: Clone) -> None:
    content = YAML(typ="safe").load(Path("params.yaml"))
    notes = {"name": "notes", "uri": "texts", "format": "txt", "licence": "none"}
    published.set("collect", "sources", [*content["collect"]["sources"], notes])

    def dealt_alike(bold: float) -> bool:
        published.set("train", "learning_rate", bold)
        published.run()
        published.commit()
        publish(published.root)
        registry.promote(published.root, registry.versions(published.root)[-1], "By hand.")
        then, now = champion.current(published.root).split, split_of(YAML(typ="safe").load(Path("params.yaml")))
        assert then is not None
        assert now is not None
        return then.deals_like(now)

    assert not dealt_alike(0.6)
    code = published.root / "tasks/ingest/file_group.py"
    code.parent.mkdir(parents=True)
    shutil.copy(REPOSITORY / code.relative_to(published.root), code)
    assert dealt_alike(0.7)


def test_what_the_cache_has_lost_comes_from_the_remote_and_what_is_damaged_is_mended(published: Clone) -> None:
    before = {path.name: path.read_bytes() for path in paths.CHAMPION.iterdir()}
    damaged, lost, *_, listing = objects_of(published, "v1.0.0")
    damaged.chmod(0o644)
    damaged.write_text("no model at all")
    lost.unlink()
    listing.unlink()
    shutil.rmtree(paths.CHAMPION)
    champion.bring(published.root)
    assert {path.name: path.read_bytes() for path in paths.CHAMPION.iterdir()} == before


def test_a_champion_whose_files_are_nowhere_is_one_line_and_the_old_one_stays(published: Clone) -> None:
    registry.promote(published.root, registry.resolve(published.root, "v1.1.0"), "By hand.")
    before = {path.name: path.read_bytes() for path in paths.CHAMPION.iterdir()}
    for file in objects_of(published, "v1.1.0"):
        file.unlink()
    shutil.rmtree(published.shelf)
    # The project's own copy would do.
    shutil.rmtree(paths.INT8)
    with pytest.raises(UserMistake) as caught:
        champion.bring(published.root)
    told = str(caught.value)
    assert told.startswith("the champion lm@v1.1.0 cannot be had: models/int8")
    assert "remote" in told
    assert "\n" not in told
    assert {path.name: path.read_bytes() for path in paths.CHAMPION.iterdir()} == before


def test_without_a_version_in_production_there_is_no_champion(publisher: Clone) -> None:
    assert champion.bring(publisher.root) == Champion()
    assert [path.name for path in paths.CHAMPION.iterdir()] == ["champion.json"]
    assert read_champion() == Champion()


def overnight(clone: Clone, server: str, *arguments: str) -> dict[str, str]:
    """Runs ``overnight ARGUMENTS`` and returns the outcome of each stage that it told."""
    done = ran(clone, server, *arguments)
    assert done.returncode == 0, done.stderr
    words = [line.split() for line in (done.stdout + done.stderr).splitlines()]
    outcomes = ("ran", "cached", "skipped", "failed")
    return {line[index - 1]: one for line in words for index, one in enumerate(line) if index and one in outcomes}


def ran(clone: Clone, server: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "OVERNIGHT_"))}
    return subprocess.run(
        [sys.executable, "-m", "flows", *arguments],
        cwd=clone.root,
        env={**kept, "PYTHONPATH": str(REPOSITORY), "PREFECT_API_URL": server, "COLUMNS": "160"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_champion_that_is_lost_everywhere_is_one_line_that_says_how_to_go_on(published: Clone, server: str) -> None:
    shutil.rmtree(paths.CHAMPION)
    shutil.rmtree(published.root / ".dvc/cache")
    shutil.rmtree(published.shelf)
    failed = ran(published, server, "run", "--from", "evaluate", "--force")
    assert failed.returncode == 2
    (told,) = re.findall(r"^error: .*$", failed.stderr, re.MULTILINE)
    assert told.startswith("error: champion: models/champion is lost or edited, and cannot be had again (")
    assert told.endswith(", or delete models/champion.dvc, and the next run brings what is in production now.")


def test_a_promotion_alone_changes_nothing_and_the_next_model_meets_the_new_champion(
    published: Clone, server: str
) -> None:
    registry.promote(published.root, registry.resolve(published.root, "v1.1.0"), "By hand.")
    before = {name: Path(name).read_bytes() for name in (champion.POINTER, paths.CHAMPION_RECORD, "dvc.lock")}
    assert overnight(published, server, "run", "--from", "quantize") == {
        "collect": "skipped", "quantize": "cached", "evaluate": "cached"
    }  # fmt: skip
    assert {name: Path(name).read_bytes() for name in before} == before

    published.set("train", "learning_rate", 0.3)
    # The champion is a row of the run, because it moved.
    assert overnight(published, server, "run", "--from", "quantize") == {
        "collect": "skipped", "quantize": "ran", "champion": "ran", "evaluate": "ran"
    }  # fmt: skip
    assert json.loads(paths.CHAMPION_RECORD.read_text())["version"] == "lm@v1.1.0"
    assert published.evaluation()["against"] == "lm@v1.1.0"
    assert champion.POINTER.read_bytes() != before[champion.POINTER]
    assert str(champion.POINTER) not in dvc.changes(published.root).data
