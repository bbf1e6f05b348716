"""``python -m tasks.ingest``: the stage ``ingest``, from ``data/raw`` to ``data/corpus``."""

from tasks import stage
from tasks.ingest.ingest import ingest
from tasks.ingest.params import IngestParams
from tasks.section import read_section
from tasks.sources import CollectParams


def main() -> None:
    ingest(read_section("collect", CollectParams), read_section("ingest", IngestParams))


if __name__ == "__main__":
    stage.run(main)
