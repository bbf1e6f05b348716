"""The end of a run, with all, some and none of the reports."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from flows import generate, summary

EVALUATION = {
    "documents": 3,
    "models": {
        "float": {"bits_per_byte": {"value": 2.0, "low": 1.9, "high": 2.1}, "accuracy": {"value": 0.5}},
        "int8": {"bits_per_byte": {"value": 2.01, "low": 1.91, "high": 2.11}},
    },
    "baselines": {"ngram": {"order": 5, "bits_per_byte": {"value": 2.5}}, "xz": {"bits_per_byte": {"value": 3.0}}},
    "gate": {
        "passed": True,
        "checks": [
            {"name": "int8_against_float", "passed": True, "limit": 0.02, "reason": "INT8 is close to float"},
            {"name": "against_champion", "passed": True, "limit": 0.01, "reason": "no champion yet"},
            {"name": "bits_per_byte", "passed": True, "limit": None, "reason": "no limit is set"},
        ],
    },
}


def shown(root: Path) -> list[str]:
    console = Console(force_terminal=False, width=120)
    with console.capture() as capture:
        summary.show_model(console, root)
    return [" ".join(line.split()) for line in capture.get().splitlines()]


def write(root: Path, evaluation: str | None) -> None:
    (root / "models/int8").mkdir(parents=True)
    (root / "models/int8/model.onnx").write_bytes(b"no model")
    if evaluation is not None:
        (root / "models/evaluation.json").write_text(evaluation)


def test_all_numbers_come_from_the_report(tmp_path: Path) -> None:
    write(tmp_path, json.dumps(EVALUATION))
    lines = shown(tmp_path)
    assert lines[-1].startswith("it writes")
    assert lines[1:10] == [
        "INT8 model models/int8/model.onnx",
        "bits per byte, held out",
        "INT8 2.010 (1.910 to 2.110)",
        "float 2.000 (1.900 to 2.100)",
        "n-gram baseline 2.500",
        "xz -9 baseline 3.000",
        "gate passed",
        "INT8 is close to float",
        "no champion yet",
    ]


def test_a_refused_model_is_told_with_the_reasons_first(tmp_path: Path) -> None:
    checks = [
        {"name": "int8_against_float", "passed": True, "limit": 0.02, "reason": "INT8 is close to float"},
        {"name": "against_champion", "passed": False, "limit": 0.01, "reason": "the champion is better"},
    ]
    write(tmp_path, json.dumps({**EVALUATION, "gate": {"passed": False, "checks": checks}}))
    lines = shown(tmp_path)
    assert lines[7:10] == ["gate REFUSED", "refused: the champion is better", "INT8 is close to float"]
    assert lines[-1] == "the gate REFUSED this model: the champion is better"


def test_a_model_that_is_worse_than_a_baseline_is_told_so(tmp_path: Path) -> None:
    baselines = {"ngram": {"bits_per_byte": {"value": 1.5}}, "xz": {"bits_per_byte": {"value": 3.0}}}
    write(tmp_path, json.dumps({**EVALUATION, "baselines": baselines}))
    assert shown(tmp_path)[-1] == "this model is WORSE than the n-gram baseline: 2.010 against 1.500 bits per byte"


def test_rejected_records_are_counted_over_all_sources(tmp_path: Path) -> None:
    write(tmp_path, json.dumps(EVALUATION))
    (tmp_path / "data/corpus").mkdir(parents=True)
    reasons = [{"malformed JSON": 1, "missing field": 1}, {"missing field": 1}, {}]
    records = [{"in": 402, "kept": 402 - len(one), "rejected": len(one), "reasons": one} for one in reasons]
    report = {"sources": [{"name": "a", "records": one} for one in records], "splits": {}}
    (tmp_path / "data/corpus/report.json").write_text(json.dumps(report))
    assert shown(tmp_path)[2] == (
        "rejected 3 of 1,206 records (2 missing field, 1 malformed JSON); data/corpus/quarantine.parquet"
    )


def test_a_log_gets_whole_lines_without_trailing_blanks(tmp_path: Path) -> None:
    reason = "INT8's loss is " + "far " * 40 + "off"
    checks = [{"name": "int8_against_float", "passed": True, "limit": 0.02, "reason": reason}]
    write(tmp_path, json.dumps({**EVALUATION, "gate": {"passed": True, "checks": checks}}))
    console = Console(force_terminal=False, width=80)
    with console.capture() as capture:
        summary.show_model(console, tmp_path)
        summary.show_stages(console, [summary.StageLine(stage="a", outcome="cached", seconds=0, message="")], 1.0)
    lines = capture.get().splitlines()
    assert [line for line in lines if line != line.rstrip()] == []
    assert any(reason in line for line in lines)


@pytest.mark.parametrize("evaluation", [None, "{", '{"models": {}}'])
def test_what_is_missing_was_not_assessed(tmp_path: Path, evaluation: str | None) -> None:
    write(tmp_path, evaluation)
    lines = shown(tmp_path)
    assert lines[0] == "card not assessed"
    assert lines[3:8] == [
        f"{name} not assessed" for name in ("INT8", "float", "n-gram baseline", "xz -9 baseline", "gate")
    ]
    assert lines[8].startswith("it writes nothing: ")


def test_a_project_without_a_model_shows_nothing(tmp_path: Path) -> None:
    assert shown(tmp_path) == []


@pytest.mark.parametrize(
    ("document", "beginning"),
    [
        ({"text": "Monday:\n  the pump of tank 3 leaks again."}, "Monday: the pump of"),
        ({"text": "Fine"}, "Fine"),
        ({"text": "\u96ea" * 500}, "\u96ea" * 24),
        ({"text": "[]", "is_conversation": True}, "Hello"),
    ],
)
def test_the_model_goes_on_with_a_held_out_text_of_its_own_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, document: dict[str, object], beginning: str
) -> None:
    (tmp_path / "data/corpus/test").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([document] * 2), tmp_path / "data/corpus/test/part-00000.parquet")
    monkeypatch.setattr(generate, "continue_text", lambda folder, text, writing: [" and", "\nso on"])
    assert summary.sample(tmp_path) == f"{beginning} and so on"
