"""The same again: nothing runs twice without need, and what runs anew gives the same version."""

from typing import TYPE_CHECKING

import pyarrow.parquet as pq
from chain import STAGES, Chain
from lay_out import MALFORMED

if TYPE_CHECKING:
    from conftest import Reference


def test_a_first_run_runs_every_stage(reference: "Reference") -> None:
    # That other copies, each disturbed in its way, give the same version: see test_kill.py and test_failures.py.
    assert reference.ended.outcomes() == dict.fromkeys(["collect", *STAGES], "ran")


def test_a_second_run_runs_no_stage(finished: Chain, server: str, reference: "Reference") -> None:
    again = finished.at(server).overnight("run")
    assert again.code == 0, again.err
    assert again.outcomes() == dict.fromkeys(["collect", *STAGES], "cached")
    # Each command writes a log: but for collecting none was started.
    new = set((finished.root / ".overnight/logs").iterdir()) - {
        finished.root / ".overnight/logs" / run.name for run in (reference.chain.root / ".overnight/logs").iterdir()
    }
    assert [log.name for run in new for log in run.iterdir()] == ["collect.log"]
    assert finished.version() == reference.version


def test_another_learning_rate_reruns_train_and_what_follows(
    finished: Chain, server: str, reference: "Reference"
) -> None:
    finished.set("train.learning_rate", 0.002)
    status = finished.overnight("status").out.splitlines()
    assert status[:3] == [f"{name}: up to date" for name in ("collect", "ingest", "shard")]
    assert status[3] == "train: stale: params.yaml: train.learning_rate modified"
    assert [line.split(": ")[1] for line in status[4:]] == ["stale", "stale", "stale"]

    ended = finished.at(server).overnight("run")
    assert ended.code == 0, ended.err
    assert ended.outcomes() == {
        **dict.fromkeys(["collect", "ingest", "shard"], "cached"),
        **dict.fromkeys(["train", "quantize", "evaluate", "card"], "ran"),
    }
    version = finished.version()
    changed = {name for name, content in version.items() if reference.version.get(name) != content}
    assert {"models/float/model.safetensors", "models/int8/model.onnx.data", "models/evaluation.json"} <= changed
    assert not [name for name in changed if name.startswith("data/")]


def test_malformed_lines_among_good_ones_go_to_quarantine(reference: "Reference") -> None:
    rows = pq.read_table(reference.chain.root / "data/corpus/quarantine.parquet").to_pylist()
    assert len(rows) == len(MALFORMED)
    assert len({row["reason"] for row in rows}) == len(MALFORMED)
    texts = reference.chain.root / "texts"
    found = [(texts / row["file"]).read_text().splitlines()[row["line"] - 1] for row in rows]
    assert sorted(found) == sorted(MALFORMED)
