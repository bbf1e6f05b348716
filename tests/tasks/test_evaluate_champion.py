"""The champion on the test text: models of another kind, whose loss is known by other means."""

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
import torch
from ruamel.yaml import YAML

from tasks.champion import Split, split_of
from tasks.errors import BadInput
from tasks.evaluate import champion
from tasks.evaluate.__main__ import main
from tasks.shard import tokenizer as shard_tokenizer
from tasks.shards import Shards, read_manifest

SPLIT = {"seed": 468, "valid": 0.05, "test": 0.05}
CONTEXT = 11


@pytest.fixture
def project(candidate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose model is not yet evaluated, as the current directory."""
    root = tmp_path / "project"
    shutil.copytree(candidate, root)
    monkeypatch.chdir(root)
    monkeypatch.setattr(torch, "set_deterministic_debug_mode", lambda mode: None)
    return root


def texts_of(split: str) -> list[str]:
    documents = Shards(Path("data/shards"), read_manifest(), split).documents()  # type: ignore[arg-type]
    return [bytes(tokens[1:].astype(np.uint8)).decode() for tokens, _ in documents]


INPUTS = ("positions", "logits_to_keep")


def plant(
    table: np.ndarray, tokenizer: str, bos: int, version: str = "lm@v1.2.0", others: tuple[str, ...] = INPUTS
) -> None:
    """Makes the champion a model that knows only the last token: logits are the rows of ``table`` [V, V]."""
    place = Path("models/champion")
    tiny.write_champion(Path(), version=None)
    (place / "champion.json").write_text(json.dumps({"version": version, "commit": "c" * 40, "split": SPLIT}))
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Gather", ["table", "input_ids"], ["logits"])],
        "bigrams",
        [
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, ["batch", "length"])
            for name in ("input_ids", *others)
        ],
        [onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", "length", len(table)])],
        [onnx.numpy_helper.from_array(table.astype(np.float32), "table")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    onnx.save_model(
        model, place / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0
    )
    (place / "tokenizer.json").write_text(tokenizer)
    (place / "config.json").write_text(json.dumps({"max_position_embeddings": CONTEXT, "bos_token_id": bos}))


def set_param(before: str, after: str) -> None:
    params = Path("params.yaml")
    assert params.read_text().count(before) == 1
    params.write_text(params.read_text().replace(before, after))


def evaluate() -> dict[str, object]:
    main()
    evaluation: dict[str, object] = json.loads(Path("models/evaluation.json").read_text())
    return evaluation


def gate_check(evaluation: dict[str, object], name: str = "against_champion") -> dict[str, object]:
    gate = evaluation["gate"]
    assert isinstance(gate, dict)
    return next(one for one in gate["checks"] if one["name"] == name)


def test_a_better_champion_refuses_the_candidate(project: Path) -> None:
    # Counted pairs of bytes beat a network after twelve steps.
    counts = np.full((tiny.VOCAB, tiny.VOCAB), 0.01)
    for text in texts_of("train"):
        ids = [tiny.VOCAB - 1, *text.encode()]
        np.add.at(counts, (ids[:-1], ids[1:]), 1)
    log_table = np.log(counts / counts.sum(axis=1, keepdims=True))
    plant(log_table, Path("data/shards/tokenizer.json").read_text(), bos=tiny.VOCAB - 1)
    evaluation = evaluate()

    test = texts_of("test")
    nats = sum(-log_table[a, b] for text in test for a, b in zip([256, *text.encode()], text.encode(), strict=False))
    result = evaluation["champion"]
    assert isinstance(result, dict)
    expected = nats / math.log(2) / sum(len(text.encode()) for text in test)
    assert result["bits_per_byte"]["value"] == pytest.approx(expected, abs=1e-5)
    assert result["same_split"] is True
    models = evaluation["models"]
    assert isinstance(models, dict)
    ours = models["int8"]["bits_per_byte"]["value"]
    assert result["relative_loss"]["value"] == pytest.approx(ours / expected - 1, abs=1e-4)
    check = gate_check(evaluation)
    assert check["passed"] is False
    assert evaluation["gate"]["passed"] is False  # type: ignore[index]
    assert "lm@v1.2.0 stays the champion" in str(check["reason"])

    # And by the limit of params.yaml.
    set_param("max_bits_per_byte:", "max_bits_per_byte: 0.1")
    limited = evaluate()
    assert gate_check(limited, "bits_per_byte")["passed"] is False
    assert "0.1" in str(gate_check(limited, "bits_per_byte")["reason"])
    set_param("max_bits_per_byte: 0.1", "max_bits_per_byte:")
    assert evaluate() == evaluation

    # The same again, on another number of threads, is the same file.
    before = Path("models/evaluation.json").read_bytes()
    set_param("threads: 2 ", "threads: 1 ")
    evaluate()
    assert Path("models/evaluation.json").read_bytes() == before


def test_a_worse_champion_with_another_tokenizer_lets_the_candidate_pass(project: Path) -> None:
    other = shard_tokenizer.train(texts_of("train"), 280)
    # It is sure that every token comes twice in a row.
    plant(np.eye(280) * 20, other.to_json(), bos=other.bos_token_id)
    set_param("seed: 468", "seed: 469")
    evaluation = evaluate()
    test = texts_of("test")
    documents = [[other.bos_token_id, *ids] for ids in other.encode(test)]
    # Longer than its context, so that they are walked in windows; each token is scored once all the same.
    assert max(map(len, documents)) > 3 * CONTEXT
    pairs = [pair for ids in documents for pair in itertools.pairwise(ids)]
    nats = len(pairs) * math.log(279 + math.exp(20)) - 20 * sum(before == after for before, after in pairs)
    expected = nats / math.log(2) / sum(len(text.encode()) for text in test)
    result = evaluation["champion"]
    assert isinstance(result, dict)
    assert result["bits_per_byte"]["value"] == pytest.approx(expected, abs=1e-5)
    check = gate_check(evaluation)
    assert check["passed"] is True
    assert result["relative_loss"]["high"] < 0
    assert "text was split otherwise then: lm@v1.2.0 may have been trained on this text" in str(check["reason"])


def test_a_champion_of_another_version_of_overnight_leaves_the_choice_to_people(project: Path) -> None:
    tokenizer = Path("data/shards/tokenizer.json").read_text()
    plant(np.zeros((tiny.VOCAB, tiny.VOCAB)), tokenizer, bos=tiny.VOCAB - 1, others=())
    evaluation = evaluate()
    assert evaluation["champion"] is None
    check = gate_check(evaluation)
    assert check["passed"] is False
    assert str(check["reason"]).startswith("lm@v1.2.0 was exported by another version of Overnight")
    assert "`overnight promote` this one by hand" in str(check["reason"])
    assert evaluation["gate"]["passed"] is False  # type: ignore[index]


def test_the_candidate_itself_as_champion_is_equal_to_the_last_bit(project: Path) -> None:
    tiny.write_champion(project, "lm@v2.0.0", split=SPLIT)
    evaluation = evaluate()
    result = evaluation["champion"]
    assert isinstance(result, dict)
    assert result["relative_loss"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    models = evaluation["models"]
    assert isinstance(models, dict)
    assert result["bits_per_byte"] == models["int8"]["bits_per_byte"]
    assert gate_check(evaluation)["passed"] is True


@pytest.mark.parametrize(
    ("then", "now", "same"),
    [
        ({}, {}, True),
        ({"seed": 1}, {}, False),
        ({"test": 0.1}, {}, False),
        # A grouping that has changed deals the same text out to other splits.
        ({"groups": {"kjv": {"group_field": "chapter"}}}, {"groups": {"kjv": {"group_field": "book"}}}, False),
        ({"groups": {"kjv": {"document_fields": ["a"]}}}, {"groups": {"kjv": {"document_fields": ["b"]}}}, False),
        # A file that was dealt out by its text may be in test by its name.
        ({"groups": {"notes": {}}}, {"groups": {"notes": {"grows_in_place": True}}}, False),
        # Sources come and go: what one of them does not have, it cannot have been trained on.
        ({"groups": {"kjv": {"group_field": "book"}}}, {"groups": {"new": {"group_field": "page"}}}, True),
    ],
)
def test_another_split_or_grouping_is_noticed(then: dict[str, object], now: dict[str, object], same: bool) -> None:
    before, after = (Split.model_validate({**SPLIT, **more}) for more in (then, now))
    assert before.deals_like(after) is after.deals_like(before) is same


def test_the_split_is_read_from_the_parameters_of_any_time() -> None:
    content = YAML(typ="safe").load(tiny.ROOT / "params.yaml")
    found = split_of(content)
    assert found is not None
    assert (found.seed, found.valid, found.test) == (468, 0.05, 0.05)
    assert found.groups["kjv"].group_field == "book"
    assert found.groups["kjv"].document_fields == ("book", "chapter")
    notes = {"name": "notes", "uri": "texts", "format": "txt", "licence": "none"}
    threads = {**content["collect"]["sources"][0], "name": "threads", "group_field": None}
    lines = {**threads, "name": "lines", "document_fields": []}
    content["collect"]["sources"] += [notes, threads, lines]
    for by_this_code in (True, False):
        found = split_of(content, by_this_code)
        assert found is not None
        assert {name: grouping.grows_in_place for name, grouping in found.groups.items()} == {
            "kjv": False,
            "notes": by_this_code,
            "threads": by_this_code,
            "lines": False,
        }
    for strange in (
        None,
        [],
        {"ingest": {}},
        {**content, "ingest": {"split": {"ratio": 0.1}}},
        {**content, "collect": 1},
    ):
        assert split_of(strange) is None


def _no_folder(place: Path) -> None:
    shutil.rmtree(place)


def _no_record(place: Path) -> None:
    (place / "champion.json").write_text('{"versions": 1}')


def _no_weights(place: Path) -> None:
    (place / "model.onnx.data").unlink()


def _damaged(place: Path) -> None:
    (place / "model.onnx").write_bytes(b"no model")


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (_no_folder, "models/champion/champion.json: no such file. `overnight run` brings the champion there."),
        (_no_record, "models/champion/champion.json: not a record of a champion"),
        (_no_weights, "models/champion/model.onnx.data: no such file, though models/champion/champion.json names"),
        (_damaged, "models/champion/model.onnx: damaged"),
    ],
)
def test_a_champion_that_cannot_be_read_is_one_line(project: Path, harm: Callable[[Path], None], told: str) -> None:
    tiny.write_champion(project, "lm@v2.0.0", split=SPLIT)
    harm(project / "models/champion")
    with pytest.raises(BadInput) as caught:
        champion.load()
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)


def test_the_name_of_a_special_token_in_a_text_is_plain_text(project: Path) -> None:
    other = shard_tokenizer.train(texts_of("train"), 280)
    plant(np.zeros((280, 280)), other.to_json(), bos=other.bos_token_id)
    text = "in the <|endoftext|> beginning ☃"
    (ids,) = champion.encode([text])
    assert ids.tolist() == [other.bos_token_id, *other.encode([text])[0]]


def test_a_tokenizer_that_changes_the_text_is_no_measure(project: Path) -> None:
    other = json.loads(shard_tokenizer.train(texts_of("train"), 280).to_json())
    other["normalizer"] = {"type": "Lowercase"}
    plant(np.zeros((280, 280)), json.dumps(other), bos=279)
    assert len(champion.encode(["in the beginning"])) == 1
    with pytest.raises(BadInput, match=r"1 of 2 test documents come back changed"):
        champion.encode(["in the beginning", "In the beginning"])
