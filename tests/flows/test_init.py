"""When what training starts from moves, where its files come from, and what a run says of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import tiny
from dvc.repo import Repo
from odd import write_checkpoint
from publishing import REPOSITORY, Clone
from ruamel.yaml import YAML

from flows import dvc, init, registry
from flows.bodies import Bodies
from flows.champion import Action
from flows.dvc import Change, Changes, Stale
from flows.execute import Site
from flows.graph import Graph, Stage
from flows.publish import publish
from lm.config import completed
from lm.hugging_face_config import config_to_json
from tasks import paths
from tasks.errors import UserMistake
from tasks.init import Init, write_record
from tasks.init import read as read_init
from tasks.params import read as read_params
from tasks.progress import Event

GRAPH = Graph(
    (
        Stage("ingest", "", (), (paths.RAW,), (paths.CORPUS,)),
        Stage("shard", "", ("ingest",), (paths.CORPUS, paths.INIT), (paths.SHARDS,)),
        Stage("train", "", ("shard",), (paths.SHARDS, paths.INIT), (paths.FLOAT,)),
        Stage("quantize", "", ("train",), (paths.FLOAT,), (paths.INT8,)),
    )
)


def stale(*changes: Change, never_run: bool = False) -> Stale:
    return Stale(changes, never_run)


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ({"train": stale(Change("parameter", "params.yaml: train.steps", "modified"))}, True),
        ({"ingest": stale(Change("dependency", "data/raw", "modified"))}, True),
        ({"shard": stale(never_run=True)}, True),
        # What is gone is to be what it was, and what lies there already is no news.
        ({"shard": stale(Change("output", "data/shards", "deleted"))}, False),
        ({"train": stale(Change("dependency", "data/shards", "deleted"))}, False),
        ({"train": stale(Change("dependency", "models/init", "modified"))}, False),
        # What comes after the training gives no other training.
        ({"quantize": stale(Change("parameter", "params.yaml: quantize.steps", "modified"))}, False),
        ({}, False),
    ],
)
def test_other_inputs_give_another_training(stages: dict[str, Stale], expected: bool) -> None:
    assert init.trains_anew(GRAPH, Changes(stages, {}), {stage.name for stage in GRAPH.stages}) == expected


def test_what_a_run_skips_does_not_count() -> None:
    changes = Changes({"ingest": stale(Change("dependency", "data/raw", "modified"))}, {})
    assert not init.trains_anew(GRAPH, changes, {"train", "quantize"})


SCRATCH, OLD, NEW = (
    Init(init="scratch"),
    Init(init="previous", version="lm@v1.0.0", commit="a", files={"config.json": "0"}),
    Init(init="previous", version="lm@v1.1.0", commit="b"),
)


@pytest.mark.parametrize(
    ("wanted", "here", "anew", "versioned", "intact", "expected"),
    [
        # It moves with a model that is trained anew, and with that alone.
        ("previous", OLD, True, True, True, Action.BRING),
        ("previous", OLD, False, True, True, Action.KEEP),
        ("previous", NEW, True, True, True, Action.KEEP),
        ("previous", NEW, True, True, False, Action.BRING),
        ("previous", OLD, False, True, False, Action.RESTORE),
        ("previous", None, False, True, False, Action.RESTORE),
        # Another train.init is another training.
        ("previous", SCRATCH, True, True, True, Action.BRING),
        ("scratch", OLD, True, True, True, Action.BRING),
        ("scratch", SCRATCH, True, True, True, Action.KEEP),
        ("scratch", None, False, True, False, Action.RESTORE),
        ("scratch", None, True, False, True, Action.BRING),
        # A checkpoint comes with what is collected.
        ("models/x", Init(init="models/x"), True, True, True, Action.KEEP),
        ("models/x", None, True, True, False, Action.RESTORE),
        ("models/x", None, True, False, True, Action.KEEP),
    ],
)
def test_what_training_starts_from_moves_only_with_another_training(
    wanted: str, here: Init | None, anew: bool, versioned: bool, intact: bool, expected: Action
) -> None:
    assert init.plan(wanted, here, NEW, anew, versioned, intact) == expected


def overnight(clone: Clone, server: str, told: str = "") -> dict[str, str]:
    """Runs ``overnight run`` and returns the outcome of each row of its table; a mistake of the user's is ``told``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "OVERNIGHT_"))}
    done = subprocess.run(
        [sys.executable, "-m", "flows", "run"],
        cwd=clone.root,
        env={**kept, "PYTHONPATH": str(REPOSITORY), "PREFECT_API_URL": server, "COLUMNS": "160"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (2 if told else 0), done.stderr
    assert told in " ".join(done.stderr.split()), done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    return {row[0]: row[1] for row in rows if len(row) > 1 and row[1] in ("ran", "cached", "skipped", "failed")}


def status(clone: Clone) -> str:
    """Returns the line of ``overnight status`` that tells what training starts from."""
    command = [sys.executable, "-m", "flows", "status"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=clone.root, env=environment, capture_output=True, text=True, check=True)
    return next(line for line in done.stdout.splitlines() if line.startswith("init: failed: "))


TRAIN = """
import json, pathlib
record = json.loads(pathlib.Path("models/init/init.json").read_text())
folder = pathlib.Path("models/float")
folder.mkdir(parents=True)
(folder / "config.json").write_bytes(pathlib.Path("shape.json").read_bytes())
(folder / "from.txt").write_text(str(record["version"]))
# As low-rank factors are kept.
(folder / "adapter").mkdir()
(folder / "adapter/adapter_config.json").write_text("{}")
"""


@pytest.fixture
def trained(published: Clone) -> Clone:
    """The project with a stage that reads what training starts from; its last version, v1.2.0, is in production."""
    yaml = YAML()
    pipeline = yaml.load(published.root / "dvc.yaml")
    pipeline["stages"]["train"] = {
        "cmd": "python train.py",
        "deps": ["data/raw", "models/init", "train.py"],
        "params": ["train.learning_rate", "train.init"],
        "outs": ["models/float"],
    }
    yaml.dump(pipeline, published.root / "dvc.yaml")
    (published.root / "train.py").write_text(TRAIN)
    train = read_params(published.root / "params.yaml").train
    assert train.model is not None
    ids = {"vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256}
    shape = completed(train.model, max_position_embeddings=train.seq_len, **ids)
    (published.root / "shape.json").write_text(json.dumps(config_to_json(shape)))
    published.set("train", "learning_rate", 0.3)
    published.set("collect", "sources", [{"name": "s", "uri": "texts", "format": "txt", "licence": "none"}])
    (published.root / "texts").mkdir()
    (published.root / "texts/a.txt").write_text("A text.")
    (published.root / "data/raw/s").mkdir()
    published.write("s/a.txt", "A text.")
    init.bring(published.root, "scratch")
    with patch.dict(os.environ, dvc.environment(os.environ)), Repo(str(published.root)) as repo:
        repo.add(str(paths.INIT))
    published.run()
    published.commit("With a training")
    publish(published.root)
    return published


def test_the_version_in_production_is_what_the_next_training_starts_from(trained: Clone, server: str) -> None:
    assert read_init() == Init(init="scratch")
    trained.set("train", "init", "previous")
    outcomes = overnight(trained, server)
    assert (outcomes["init"], outcomes["train"]) == ("ran", "ran")
    record = read_init()
    version = registry.champion(trained.root)
    assert version is not None
    assert (record.version, record.commit) == (version.tag, version.commit) == ("lm@v1.2.0", version.commit)
    assert list(record.files) == ["adapter/adapter_config.json", "config.json", "from.txt"]
    assert (paths.INIT / "adapter/adapter_config.json").read_text() == "{}"
    assert (paths.INIT / "from.txt").read_text() == "None"
    assert (paths.FLOAT / "from.txt").read_text() == "lm@v1.2.0"
    changes = dvc.changes(trained.root)
    assert not changes.stages
    assert not changes.data

    # Nothing is new: neither the promotion of another version nor a second run trains anew.
    registry.promote(trained.root, registry.resolve(trained.root, "v1.0.0"), "By hand.")
    before = {name: Path(name).read_bytes() for name in (init.POINTER, "dvc.lock")}
    assert "ran" not in overnight(trained, server).values()
    assert {name: Path(name).read_bytes() for name in before} == before

    # That version has no float model.
    with pytest.raises(UserMistake, match=r"train.init: lm@v1\.0\.0 cannot be had: commit .* records no models/float"):
        init.bring(trained.root, "previous")
    assert (paths.INIT / "config.json").is_file()


def test_the_first_night_says_that_there_is_nothing_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_params(tmp_path, train__init="previous")
    write_record(paths.INIT, Init(init="previous"))
    told: list[Event] = []
    bodies = Bodies(Site(tmp_path, "night", 0), read_params(), Mock(event=told.append))
    with patch.object(bodies, "_bring", return_value=Action.BRING):
        bodies.bring_init(GRAPH, ["train"])
    assert [event.notice for event in told] == [
        "no version is in production yet that training could go on from: it starts from scratch"
    ]


def test_a_checkpoint_is_versioned_with_the_text_and_a_change_of_it_trains_anew(trained: Clone, server: str) -> None:
    write_checkpoint(trained.root / "given")
    trained.set("train", "init", "given")
    outcomes = overnight(trained, server, "params.yaml: train.model is not the model that train.init names: model_type")
    assert (outcomes["collect"], outcomes["init"], outcomes["train"]) == ("ran", "failed", "skipped")
    trained.set("train", "model", None)
    trained.set("train", "seq_len", 16)
    trained.set("quantize", "in_float", ["*.down_prj"])
    (trained.root / "texts/b.txt").write_text("Another.")
    told = "params.yaml: quantize.in_float: no layer's name matches '*.down_prj'"
    outcomes = overnight(trained, server, told)
    # Not even the stage that does not read it.
    assert (outcomes["collect"], outcomes["init"], outcomes["quantize"]) == ("ran", "failed", "skipped")
    assert told in status(trained)
    os.utime(trained.root / "params.yaml")
    assert "(params.yaml has been edited since)" in status(trained)
    trained.set("quantize", "in_float", ["lm_head"])
    trained.set("shard", "vocab_size", None)
    assert overnight(trained, server)["train"] == "ran"
    assert read_init().init == "given"
    pointer = init.POINTER.read_bytes()
    (trained.root / "given/chat_template.jinja").write_text("{{ other }}")
    outcomes = overnight(trained, server)
    assert (outcomes["collect"], outcomes["train"]) == ("ran", "ran")
    assert init.POINTER.read_bytes() != pointer
    assert json.loads(paths.INIT_RECORD.read_text())["files"].keys() > {"config.json", "model.safetensors"}

    # Lost here and gone there, it comes from DVC's cache.
    shutil.rmtree(trained.root / "given")
    shutil.rmtree(paths.INIT)
    shutil.rmtree(paths.FLOAT)
    assert overnight(trained, server)["train"] == "cached"
    assert (paths.INIT / "chat_template.jinja").read_text() == "{{ other }}"
