"""Conversations as tokens: written by the checkpoint's chat template, of which the answers alone are learned."""

import itertools
import json
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from lm.chat_template import ChatTemplate, Message, Unrenderable
from lm.chat_template_files import Malformed
from tasks import paths
from tasks.errors import BadInput, BadParameter
from tasks.shard.checkpoint_tokenizer import opened
from tasks.shard.pack import EncodedDocument

# What templates that write the day get for it: a clock's would make other shards of the same data tomorrow.
TODAY = date(2024, 7, 26)


@dataclass
class Conversations:
    """Encodes conversations; counts those that the template refuses, and why it refused the first.

    ``ends`` are the control tokens by which answers end.
    """

    template: ChatTemplate
    tokenizer: Tokenizer
    encoded: int = 0
    refused: int = 0
    reason: str = field(default="")
    ends: set[int] = field(default_factory=set)

    def encode(self, text: str, bos_token_id: int, dtype: str) -> EncodedDocument | None:
        """Returns the conversation in the JSON ``text``, its bytes those of the answers; None where it is refused."""
        try:
            messages = [Message(**message) for message in json.loads(text)]
            ids, answers = self.template.encode_answers(messages, TODAY)
            if not any(answers):
                raise Unrenderable("the model's chat template leaves the answers out")
        except Unrenderable as error:
            self.refused += 1
            self.reason = self.reason or str(error)
            return None
        if ids[0] != bos_token_id:
            ids, answers = [bos_token_id, *ids], [False, *answers]
        self.encoded += 1
        for id_, is_own, goes_on in zip(ids, answers, [*answers[1:], False], strict=True):
            if is_own and not goes_on and id_ in self.template.ending:
                self.ends.add(id_)
        learned = np.array(answers, dtype=np.uint8)
        answered = self.tokenizer.decode(list(itertools.compress(ids, answers)), skip_special_tokens=True)
        return EncodedDocument(np.array(ids, dtype=dtype), len(answered.encode()), learned)

    def told(self) -> str | None:
        """Returns what to tell the user of those that were left out. Raises :class:`BadInput` where that is all."""
        if not self.refused:
            return None
        told = f"{self.refused:,} of {self.refused + self.encoded:,} conversations are left out, the first because"
        if not self.encoded:
            raise BadInput(f"{paths.CORPUS}: {told} {self.reason}. Mend the source, or take another checkpoint.")
        return f"{told} {self.reason}"


def of_checkpoint(origin: Path | None) -> Conversations:
    """Returns what encodes conversations for the checkpoint in ``origin``.

    Raises :class:`BadParameter` where it has no chat template, and :class:`BadInput` where that or its tokenizer is
    damaged.
    """
    template = None
    if origin is not None:
        tokenizer = opened(origin)
        try:
            template = ChatTemplate.read(origin, tokenizer)
        except Malformed as error:
            raise BadInput(f"{error}. Name another checkpoint in train.init.") from None
    if template is None:
        raise BadParameter(
            f"{paths.PARAMS}: collect.sources: a source has a messages_field, and what train.init names brings no chat "
            "template to write conversations with. Name a checkpoint that has one, or take the source out."
        )
    return Conversations(template, tokenizer)
