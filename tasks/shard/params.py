"""The section ``shard`` of ``params.yaml``."""

from pydantic import Field

from tasks.section import Section


class ShardParams(Section):
    """The tokenizer's size and the shards'."""

    # 256 bytes and the one special token are always there. None: that of the tokenizer that comes with train.init.
    vocab_size: int | None = Field(ge=257, le=2**31)
    tokens_per_shard: int = Field(ge=1)
