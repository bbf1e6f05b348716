"""A model on the disk for whoever reads no text: its tokenizer has a single token, the end of texts."""

from pathlib import Path

from tokenizers import Tokenizer, models

from lm import hugging_face
from lm.model import LanguageModel

_END = "<|endoftext|>"


def save(model: LanguageModel, folder: Path) -> None:
    """Writes ``model`` in Hugging Face layout to ``folder``, which is made."""
    folder.mkdir()
    tokenizer = folder.with_name(f"{folder.name}-tokenizer.json")
    Tokenizer(models.WordLevel({_END: model.config.eos_token_id}, unk_token=_END)).save(str(tokenizer))
    hugging_face.save(model, tokenizer, folder)
