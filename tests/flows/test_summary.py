"""The end of a run, with all, some and none of the reports."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from flows import summary

EVALUATION = {
    "documents": 3,
    "models": {
        "float": {"bits_per_byte": {"value": 2.0, "low": 1.9, "high": 2.1}, "accuracy": {"value": 0.5}},
        "int8": {"bits_per_byte": {"value": 2.01, "low": 1.91, "high": 2.11}},
    },
    "baselines": {"ngram": {"order": 5, "bits_per_byte": {"value": 2.5}}, "xz": {"bits_per_byte": {"value": 3.0}}},
    "gate": {"passed": True, "relative_loss": {"value": 0.005, "low": 0.001, "high": 0.009}, "limit": 0.02},
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
    assert shown(tmp_path)[1:8] == [
        "INT8 model models/int8/model.onnx",
        "bits per byte, held out",
        "INT8 2.010 (1.910 to 2.110)",
        "float 2.000 (1.900 to 2.100)",
        "n-gram baseline 2.500",
        "xz -9 baseline 3.000",
        "gate passed: INT8's loss is +0.50% of float's, at most +0.90%; the limit is +2.00%",
    ]


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
