"""The verdict on a rebuild, and what the certificate says of it."""

import json
import re
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

import pytest

from flows import certificate, certificate_page
from flows.certificate import Certificate, MetricResult, OutputResult, StageResult, Verdict
from flows.environment import Difference, Environment, Processor

SAME = OutputResult(path="out/a", stage="work", recorded="1" * 32, rebuilt="1" * 32, files=1)
OTHER = OutputResult(path="out/b", stage="work", recorded="1" * 32, rebuilt="2" * 32, files=1)
MISSING = OutputResult(path="out/c", stage="work", recorded="1" * 32, rebuilt=None, files=1)
CPU = Difference(fact="cpu.model", recorded="one", here="another")
CORES = Difference(fact="cpu.cores", recorded="2", here="1")
PYTEST = Difference(fact="train: packages.pytest", recorded="9.0", here="9.1")


def metric(recorded: object, rebuilt: object) -> MetricResult:
    return MetricResult(file="m.json", name="loss", recorded=recorded, rebuilt=rebuilt)  # type: ignore[arg-type]


NEAR, FAR = metric(2.0, 2.01), metric(2.0, 2.1)
OF_TRAINING = FAR.model_copy(update={"measured": False})


@pytest.mark.parametrize(
    ("outputs", "metrics", "environment", "verdict", "said"),
    [
        ([SAME], [], [], Verdict.IDENTICAL, "all 1 outputs"),
        # Identical bytes need no explanation, whatever the machine.
        ([SAME], [], [CPU], Verdict.IDENTICAL, "all 1 outputs"),
        ([SAME], None, None, Verdict.IDENTICAL, "all 1 outputs"),
        ([SAME, OTHER], [NEAR], [CPU], Verdict.TOLERANCE, r"1 of 2 outputs differ \(out/b\)"),
        # What training says of itself, and sentences, decide nothing; whether the gate passed does.
        ([OTHER], [OF_TRAINING, metric("1.15%", "1.16%")], [CPU], Verdict.TOLERANCE, "all metrics agree"),
        ([OTHER], [metric(True, False)], [CPU], Verdict.DIFFERS, "out of tolerance"),
        # Bytes alone: an output that no metric looks at.
        ([OTHER], [], [CPU], Verdict.TOLERANCE, "all metrics agree"),
        ([SAME, OTHER], [NEAR, FAR], [CPU], Verdict.DIFFERS, "1 metrics are out of tolerance"),
        ([OTHER, MISSING], [], [CPU], Verdict.DIFFERS, r"were not made \(out/c\)"),
        # The same machine has to give the same bytes.
        ([OTHER], [NEAR], [], Verdict.DIFFERS, "every recorded fact of the environment is the same"),
        # Neither does what no stage computes with.
        ([OTHER], [NEAR], [CORES, PYTEST], Verdict.DIFFERS, r"changes no number \(cpu.cores, train: packages.pytest\)"),
        ([OTHER], [NEAR], [CORES, CPU], Verdict.TOLERANCE, r"is another one \(cpu.model\)"),
        ([OTHER], [NEAR], None, Verdict.DIFFERS, "records no environment"),
        ([OTHER], None, [CPU], Verdict.DIFFERS, "metrics are lost"),
    ],
)
def test_the_verdict(
    outputs: list[OutputResult],
    metrics: list[MetricResult] | None,
    environment: list[Difference] | None,
    verdict: Verdict,
    said: str,
) -> None:
    found, reason = certificate.judge(outputs, metrics, environment)
    assert found is verdict
    assert re.search(said, reason), reason


@pytest.mark.parametrize(
    ("recorded", "rebuilt", "agrees"),
    [
        (100.0, 101.0, True),
        (100.0, 101.1, False),
        (-100, -99, True),
        (0.0002, -0.0007, True),
        (0.0002, -0.0009, False),
        (1, 1.005, True),
        (True, False, False),
        (True, 1.0, False),
        (None, 1.0, False),
    ],
)
def test_the_tolerance_of_a_metric(recorded: object, rebuilt: object, agrees: bool) -> None:
    assert metric(recorded, rebuilt).agrees is agrees


@pytest.mark.parametrize(
    ("name", "rebuilt", "verdict"),
    [
        ("models.int8.same_top_1.value", 0.887, Verdict.TOLERANCE),
        ("models.int8.same_top_1.low", 0.913, Verdict.TOLERANCE),
        ("models.int8.same_top_1.value", 0.875, Verdict.DIFFERS),
        ("models.int8.same_experts[0].share.value", 0.77, Verdict.TOLERANCE),
        ("models.int8.bits_per_byte.value", 0.887, Verdict.DIFFERS),
    ],
)
def test_shares_that_tip_over_are_no_losses(name: str, rebuilt: float, verdict: Verdict) -> None:
    # As they came out with other kernels of the same CPU, while no loss moved by a thousandth.
    moved = MetricResult(file="evaluation.json", name=name, recorded=0.9, rebuilt=rebuilt)
    assert certificate.judge([OTHER], [moved], [CPU])[0] is verdict
    assert moved.judged is ("same_experts" not in name)


def test_metrics_are_compared_value_by_value() -> None:
    before = {"a": {"b": 1.5, "c": [1, 2]}, "same": None, "gone": 1, "passed": True}
    after = {"a": {"b": 2.0, "c": [1, 3]}, "same": None, "new": "x", "passed": True}
    equal, unequal = certificate.compare_metrics("m", json.dumps(before).encode(), json.dumps(after).encode(), True)
    assert equal == 3
    assert {one.name: (one.recorded, one.rebuilt, one.difference) for one in unequal} == {
        "a.b": (1.5, 2.0, 0.5),
        "a.c[1]": (2, 3, 1.0),
        "gone": (1, None, None),
        "new": (None, "x", None),
    }


def test_files_that_differ_are_listed() -> None:
    recorded = {PurePosixPath("a"): "1", PurePosixPath("b"): "2", PurePosixPath("c"): "3"}
    rebuilt = {PurePosixPath("a"): "1", PurePosixPath("b"): "x", PurePosixPath("d"): "4"}
    found = certificate.compare_files(recorded, rebuilt)
    assert [(one.path, one.recorded, one.rebuilt) for one in found] == [
        ("b", "2", "x"), ("c", "3", None), ("d", None, "4"),
    ]  # fmt: skip


HERE = Environment(
    python="3.11.7", system="Linux x86_64", libc="glibc 2.36", cpu=Processor(model="a CPU", flags=("fma",), cores=2),
    gpus=(), driver=None, packages={"torch": "2.13.0"}, stages={}, variables={}, lock_sha256="a",
)  # fmt: skip


def test_an_earlier_certificate_is_kept(tmp_path: Path) -> None:
    made = Certificate(
        version="v1.0.0", tag="lm@v1.0.0", commit="c" * 40, at=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
        verdict=Verdict.DIFFERS, reason="first", attempts=1, inputs=(), stages=(), outputs=(SAME,),
        metrics_compared=True, equal_metrics=7, metrics=(), environment_recorded=True, environment=(), here=HERE,
    )  # fmt: skip
    for reason in ("first", "second", "third"):
        data, page = certificate_page.write(tmp_path, made.model_copy(update={"reason": reason}))
    assert {
        file.stem: Certificate.model_validate_json(file.read_bytes()).reason
        for file in (tmp_path / data.parent).glob("*.json")
    } == {"v1.0.0": "third", "v1.0.0.20260102-030400": "first", "v1.0.0.20260102-030400-2": "second"}
    assert "second" in (tmp_path / page.with_name("v1.0.0.20260102-030400-2.md")).read_text()
    # One of before what is told of the machine, and what is none.
    old = made.model_dump_json(exclude={"here", "tag_object", "unknown"})
    assert Certificate.model_validate_json(old).here is None
    (tmp_path / data).write_text("{")
    certificate_page.write(tmp_path, made)
    assert len(list((tmp_path / data.parent).glob("*.json"))) == 4


def test_page_and_json_say_all(tmp_path: Path) -> None:
    differing = certificate.compare_files({PurePosixPath("x"): "1"}, {PurePosixPath("x"): "2", PurePosixPath("y"): "3"})
    made = Certificate(
        version="v1.0.0", tag="lm@v1.0.0", commit="c" * 40, at=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
        verdict=Verdict.DIFFERS, reason="because", attempts=2, inputs=(),
        stages=(StageResult(stage="work", seconds=1234.5),),
        outputs=(SAME, OTHER.model_copy(update={"differing": differing}), MISSING),
        metrics_compared=True, equal_metrics=7, metrics=(NEAR, FAR, OF_TRAINING, metric("a|b", None)),
        environment_recorded=True, environment=(CPU, CORES),
        here=HERE, tag_object="d" * 40,
    )  # fmt: skip
    data, page = certificate_page.write(tmp_path, made)
    assert Certificate.model_validate_json((tmp_path / data).read_bytes()) == made
    text = (tmp_path / page).read_text()
    for line in (
        "# Rebuild of lm@v1.0.0: differs",
        "in 2 attempts",
        f"| out/a | work | 1 | identical | `{'1' * 32}` | `{'1' * 32}` |",
        f"| out/b | work | 1 | **differs** | `{'1' * 32}` | `{'2' * 32}` |",
        f"| out/c | work | 1 | **differs** | `{'1' * 32}` | `missing` |",
        "- `y` is new",
        "7 values are equal.",
        "| m.json: loss | 2 | 2.01 | 0.01 | agrees |",
        "| m.json: loss | 2 | 2.1 | 0.1 | **out of tolerance** |",
        "| m.json: loss | 2 | 2.1 | 0.1 | not judged |",
        "| cpu.model | one | another |  |",
        "| cpu.cores | 2 | 1 | changes no number |",
        "computed anew by that commit's code",
        "The machine: Linux x86_64, a CPU, 2 cores, no GPU.",
        f"The tag was the object `{'d' * 40}`.",
        "| packages.torch | 2.13.0 |",
        "| work | 1,234.5 |",
    ):
        assert line in text
    assert "does not prove" not in text
    assert "does not prove" in certificate_page.render(made.model_copy(update={"verdict": Verdict.TOLERANCE}))
    # A bar in a value would end the cell.
    assert "a\\|b" in text
