"""``python -m tasks.collect``: copies what is new at the sources into ``data/raw`` and says what that was."""

from tasks import stage
from tasks.collect.collect import collect
from tasks.section import read_section
from tasks.sources import CollectParams


def main() -> None:
    report = collect(read_section("collect", CollectParams))
    for source in report.sources:
        print(
            f"{source.name}: {source.new} new, {source.changed} changed, {source.unchanged} unchanged, "
            f"{source.kept} kept; {source.bytes:,} bytes at the source"
        )


if __name__ == "__main__":
    stage.run(main)
