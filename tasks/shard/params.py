"""The section ``shard`` of ``params.yaml``."""

from pydantic import Field

from tasks.section import Section


class ShardParams(Section):
    """The tokenizer's size and the shards'."""

    # 256 bytes and the one special token are always there. None: that of the tokenizer that comes with train.init.
    vocab_size: int | None = Field(ge=257, le=2**31)
    tokens_per_shard: int = Field(ge=1)

    def misfit(self, vocab_size: int | None) -> str | None:
        """Returns what is told where the tokenizer that comes with ``train.init``, or none, is not what is asked for.

        ``vocab_size`` is how many tokens it has; None: training starts from scratch, which brings none.
        """
        if vocab_size is None and self.vocab_size is None:
            return (
                "shard.vocab_size is null, and train.init brings no tokenizer: it is scratch, or previous, and no "
                "version is in production yet. Name a checkpoint in train.init, or set the size of the tokenizer to "
                "train."
            )
        if vocab_size is not None and self.vocab_size not in (None, vocab_size):
            return (
                f"shard.vocab_size is {self.vocab_size}, and the tokenizer that comes with train.init has {vocab_size} "
                "tokens. Set vocab_size: null to take it, or init: scratch to train another."
            )
        return None
