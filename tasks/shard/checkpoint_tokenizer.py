"""The tokenizer of the checkpoint that training starts from, kept as it is: its weights know no other."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from lm import hugging_face_files
from lm.config import ModelConfig
from lm.tokenizer import misfit, read_tokenizer, size_of
from tasks.errors import BadInput
from tasks.init import unusable_is_told


def opened(folder: Path) -> Tokenizer:
    """Returns the tokenizer of the checkpoint in ``folder``. Raises :class:`BadInput` where it is none."""
    path = folder / hugging_face_files.TOKENIZER
    try:
        return read_tokenizer(path)
    except Exception as error:
        # tokenizers has no exception of its own.
        raise BadInput(f"{path}: not a tokenizer ({' '.join(str(error).split())}).") from None


def misfit_of(tokenizer: Tokenizer, config: ModelConfig) -> str | None:
    """Returns what is told of a tokenizer that is not that of the model of ``config``; None where it is."""
    told = misfit(tokenizer, config.vocab_size, bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id)
    return told and f"{told}, or name another in train.init."


class CheckpointTokenizer:
    """A ``tokenizer.json`` with the ids that its ``config.json`` gives to the beginning and the end of a text."""

    def __init__(self, folder: Path) -> None:
        """Reads both from ``folder``. Raises :class:`BadInput` where they cannot be read, or do not fit each other."""
        path = folder / hugging_face_files.TOKENIZER
        with unusable_is_told(folder, "Name another checkpoint in train.init."):
            config = hugging_face_files.read_config(folder)
        self._tokenizer = opened(folder)
        self._content = path.read_text()
        # A text may hold the name of a special token; to a model it is plain text.
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = size_of(self._tokenizer)
        self.bos_token_id, self.eos_token_id = config.bos_token_id, config.eos_token_id
        if told := misfit_of(self._tokenizer, config):
            raise BadInput(f"{path}: {told}")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, on all cores, without special tokens."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[list[int]]) -> list[str]:
        """Returns the text of each list of ids."""
        found: list[str] = self._tokenizer.decode_batch(list(ids), skip_special_tokens=False)
        return found

    def to_json(self) -> str:
        """Returns the ``tokenizer.json`` as it was."""
        return self._content
