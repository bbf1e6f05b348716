"""What tests of the stage ``ingest`` ask it for, and read back."""

from typing import Any

import pyarrow.parquet as pq

from tasks import paths
from tasks.ingest.params import IngestParams
from tasks.sources import CollectParams


def source(**changes: Any) -> dict[str, Any]:
    return {
        "name": "bible",
        "uri": "anywhere",
        "format": "jsonl",
        "licence": "CC0-1.0",
        "text_field": "text",
        "document_fields": ["book", "chapter"],
        "group_field": "book",
    } | changes


def collect_params(*sources: dict[str, Any]) -> CollectParams:
    return CollectParams.model_validate({"sources": list(sources)})


def ingest_params(**changes: Any) -> IngestParams:
    split = {"seed": 1, "valid": 0.2, "test": 0.2}
    return IngestParams.model_validate({"max_line_bytes": 10000, "max_reject_rate": 0.5, "split": split} | changes)


def rows(split: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(paths.CORPUS / split).to_pylist()
    return found
