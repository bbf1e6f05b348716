"""``python -m tasks.shard``: the stage ``shard``, from ``data/corpus`` to ``data/shards``."""

from tasks import stage
from tasks.section import read_section
from tasks.shard.params import ShardParams
from tasks.shard.shard import shard


def main() -> None:
    shard(read_section("shard", ShardParams))


if __name__ == "__main__":
    stage.run(main)
