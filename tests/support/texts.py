"""A tokenizer by training, and texts on which two ways of cutting a text into pieces part."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END_OF_TEXT = "<|endoftext|>"
HARD = [
    "",
    " ",
    "\n",
    "  \n \t leading and trailing  ",
    "don't we'll LORD'S I'M 'tis 'twas o'clock it'sun",
    "0 1 12 123 1234 12345678901234567890 \u0663\u0664 \u00bd \u2168 a1b22 x 12",
    "\U0001f468\u200d\U0001f469 \U0001f1e9\U0001f1ea \U0001f44b\U0001f3fd!!!???...",
    "e\u0301 \u0301 a\u0300\u0301\u0302 \u200b\u200d\ufeff\u00a0\u3000\u2028x\u0085y",
    "a\r\nb\rc\n\n\nd\x00\x1b\x7f",
    " " * 70 + "x" + "\n" * 130 + " " * 64 + "y",
    "a" * 200 + "!" * 200 + "1" * 200,
    "Здравствуй, мир! 你好，世界。 नमस्ते دنيا ภาษาไทย 日本語テキスト한국어",
    "def f(x):\n\treturn x  # caf\u00e9\r\n\r\n    if x:\n        pass\n",
    "--->><<== {}[];:'\"\\ http://a.b/c?d=e&f=g",
    *map("".join, itertools.product(["a", "न", "12", ","], ["'s", "'", " ", "\n", "\u0301", "."], ["b", "3", " "])),
]


def write_trained_tokenizer(path: Path, pieces: Sequence[dict[str, Any]], size: int, adds_bos: bool = True) -> None:
    """Writes a ``tokenizer.json`` with ``size`` ids, the special one last, that cuts texts by the steps ``pieces``."""
    parsed = json.loads(Tokenizer(models.BPE()).to_str())
    parsed["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": list(pieces)}
    tokenizer = Tokenizer.from_str(json.dumps(parsed))
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        HARD, trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False)
    )
    assert tokenizer.get_vocab_size() == size - 1
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, size - 1)]
        )
    tokenizer.save(str(path))
