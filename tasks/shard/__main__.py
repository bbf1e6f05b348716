"""``python -m tasks.shard``: the stage ``shard``, from ``data/corpus`` to ``data/shards``."""

from tasks import init, stage
from tasks.section import read_section
from tasks.shard.params import ShardParams
from tasks.shard.shard import shard


def main() -> None:
    params = read_section("shard", ShardParams)
    origin = init.checkpoint()
    if origin is not None:
        init.verify(origin)
    shard(params, origin)


if __name__ == "__main__":
    stage.run(main)
