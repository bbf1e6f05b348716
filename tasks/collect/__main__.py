"""``python -m tasks.collect``: copies what is new at the sources into ``data/raw`` and says what that was.

``.overnight/collect.json`` then says it to programs: :mod:`tasks.collect.report`.
"""

import argparse
from pathlib import Path

from tasks import init, stage
from tasks.collect import report
from tasks.collect.collect import collect
from tasks.collect.init import collect_init
from tasks.section import read_section
from tasks.sources import CollectParams


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tasks.collect", description="Copy what is new at the sources.")
    parser.add_argument(
        "--relative-to", type=Path, metavar="FOLDER", help="where a relative uri starts; without it, this folder"
    )
    arguments = parser.parse_args()
    report.forget()
    collected = collect(read_section("collect", CollectParams), relative_to=arguments.relative_to)
    checkpoint = collect_init(init.wanted(), relative_to=arguments.relative_to)
    report.write(collected.model_copy(update={"init": checkpoint}))
    for source in collected.sources:
        print(
            f"{source.name}: {source.new:,} new, {source.changed:,} changed, {source.unchanged:,} unchanged, "
            f"{source.gone:,} gone; {source.bytes:,} bytes at the source"
        )
    if checkpoint is not None:
        print(checkpoint.notice or f"train.init: {init.wanted()}: {checkpoint.state}")


if __name__ == "__main__":
    stage.run(main)
