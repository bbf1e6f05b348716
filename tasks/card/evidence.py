"""The reports that a card is made of. What no report holds reads "not assessed": a card never guesses."""

import csv
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks import paths
from tasks.errors import BadInput
from tasks.section import read_yaml

NOT_ASSESSED = "not assessed"
PROJECT = Path(__file__).parent.parent.parent
SECTIONS = ("collect", "ingest", "shard", "train", "quantize", "evaluate", "card")


class Report:
    """A JSON report; its numbers are reached by dotted paths."""

    def __init__(self, path: Path) -> None:
        """Reads ``path``; a missing file is a report without numbers. Raises :class:`BadInput` on a damaged one."""
        self.content: Any = None
        if path.is_file():
            try:
                self.content = json.loads(path.read_bytes())
            except ValueError:
                raise BadInput(f"{path}: not JSON. Rerun the stage that writes it (overnight status).") from None

    def get(self, where: str) -> Any:
        """Returns what lies at the dotted path ``where``, or None."""
        found = self.content
        for part in where.split("."):
            if isinstance(found, list):
                found = dict(enumerate(found)).get(int(part))
            else:
                found = found.get(part) if isinstance(found, dict) else None
        return found

    def show(self, where: str, style: str = "{}") -> str:
        """Returns what lies at ``where`` in the format ``style``, or "not assessed"."""
        return self.tell(where, style.format)

    def tell(self, where: str, describe: Callable[[Any], str]) -> str:
        """Returns ``describe`` of what lies at ``where``, or "not assessed"."""
        found = self.get(where)
        return NOT_ASSESSED if found is None else describe(found)

    def interval(self, where: str, style: str = "{:.3f}") -> str:
        """Returns an estimate with its 95% interval, where it has one: ``1.512 [1.480, 1.544]``."""

        def describe(estimate: dict[str, float | None]) -> str:
            value, *ends = (style.format(one) for key in ("value", "low", "high") if (one := estimate[key]) is not None)
            return f"{value} [{', '.join(ends)}]" if ends else value

        return self.tell(where, describe)


@dataclass(frozen=True)
class Evidence:
    """Everything that a card is made of."""

    corpus: Report
    manifest: Report
    config: Report
    train: Report
    audit: Report
    quantization: Report
    evaluation: Report
    curve: list[dict[str, float]]
    hashes: dict[str, str]


def gather() -> Evidence:
    """Returns what the stages before have left."""
    return Evidence(
        corpus=Report(paths.CORPUS_REPORT),
        manifest=Report(paths.MANIFEST),
        config=Report(paths.FLOAT / "config.json"),
        train=Report(paths.TRAIN_REPORT),
        audit=Report(paths.AUDIT),
        quantization=Report(paths.QUANTIZATION),
        evaluation=Report(paths.EVALUATION),
        curve=_read_curve(paths.CURVE),
        hashes=_hashes(),
    )


def _read_curve(path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def _hashes() -> dict[str, str]:
    params = read_yaml(paths.PARAMS)
    chosen = {name: params.get(name) for name in SECTIONS}
    code = sorted(file for folder in ("lm", "tasks") for file in (PROJECT / folder).rglob("*.py"))
    files = {
        "data: corpus report": [paths.CORPUS_REPORT],
        "data: shards": [paths.MANIFEST],
        "lock file": [paths.LOCK],
        "model: float": sorted(paths.FLOAT.glob("*.safetensors")) or [paths.FLOAT / "model.safetensors"],
        "model: INT8": [paths.INT8_GRAPH, paths.INT8_GRAPH.with_name(f"{paths.INT8_GRAPH.name}.data")],
    }
    return {
        "parameters": hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest(),
        "code": _hash_of(code),
        **{name: _hash_of(parts) for name, parts in files.items()},
    }


def _hash_of(files: list[Path]) -> str:
    if not all(file.is_file() for file in files):
        return NOT_ASSESSED
    whole = hashlib.sha256()
    for file in files:
        whole.update(hashlib.sha256(file.read_bytes()).digest())
    return whole.hexdigest() if len(files) > 1 else hashlib.sha256(files[0].read_bytes()).hexdigest()
