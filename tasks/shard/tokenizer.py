"""The byte-level BPE tokenizer: trained by rustbpe, used through tiktoken, written for the ``tokenizers`` library.

All three see the same pieces of text and the same order of merges, so that they give the same ids.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import rustbpe
import tiktoken
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from lm import cores
from tasks.errors import BadParameter

END_OF_TEXT = "<|endoftext|>"
# Llama 3's pieces: English contractions, words with one character before them, digits in threes, other signs with the
# ends of their lines, spaces. llama.cpp knows them by name (lm.gguf_tokenizer), and can be told no others. It has no
# long s (ſ) in contractions, so neither case is ignored here. Spaces come 100,000 at a time: on an unbounded run the
# look-ahead makes tiktoken panic with a stack overflow.
PATTERN = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s{1,100000}(?!\S)|\s+"
)
_BYTES = 256

Ranks = dict[bytes, int]


class BytePairTokenizer:
    """A trained tokenizer. The special token ``<|endoftext|>`` has the last id and begins each document."""

    def __init__(self, ranks: Ranks) -> None:
        """``ranks`` gives each token its id: first the 256 bytes, then the merges in the order of training."""
        self.ranks = ranks
        self.vocab_size = len(ranks) + 1
        self.bos_token_id = self.eos_token_id = len(ranks)
        self._encoding = tiktoken.Encoding(
            "overnight", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: self.bos_token_id}
        )

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """Returns the ids of each text, on all cores, without the special token: its name in a text is plain text."""
        # A list of Python's integers takes nine times the memory.
        encode = functools.partial(self._encoding.encode_to_numpy, disallowed_special=())
        with ThreadPoolExecutor(cores.available()) as threads:
            return list(threads.map(encode, texts))

    def to_json(self) -> str:
        """Returns the ``tokenizer.json`` that the ``tokenizers`` library loads; it puts ``<|endoftext|>`` first."""
        spelled = {token: "".join(_SPELLING[byte] for byte in token) for token in self.ranks}
        vocab = {spelled[token]: id_ for token, id_ in self.ranks.items()}
        merges = [
            (spelled[left], spelled[right])
            for left, right in (split_of(token, self.ranks) for token in self.ranks if len(token) > 1)
        ]
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{END_OF_TEXT} $A",
            pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B:1",
            special_tokens=[(END_OF_TEXT, self.bos_token_id)],
        )
        return str(tokenizer.to_str(pretty=True)) + "\n"


def train(texts: Iterable[str], vocab_size: int) -> BytePairTokenizer:
    """Returns a tokenizer with ``vocab_size`` ids, the special one included.

    Raises :class:`BadParameter` with the size that can be reached when the texts hold too few pairs of bytes to merge.
    """
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size - 1, pattern=PATTERN)
    ranks = {bytes(token): id_ for token, id_ in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])}
    if len(ranks) < vocab_size - 1:
        raise BadParameter(
            f"params.yaml: shard.vocab_size: the training split is too small for {vocab_size} tokens; "
            f"it yields {len(ranks) + 1}. Set that or less, or collect more text."
        )
    return BytePairTokenizer(ranks)


def split_of(token: bytes, ranks: Ranks) -> tuple[bytes, bytes]:
    """Returns the two tokens whose merge makes ``token``: what BPE leaves of it with only the merges before its own."""
    parts = [token[index : index + 1] for index in range(len(token))]
    limit = ranks[token]
    while len(parts) > 2:
        rank, index = min((ranks.get(a + b, limit), index) for index, (a, b) in enumerate(itertools.pairwise(parts)))
        if rank >= limit:
            raise ValueError(f"token {limit} {token!r} is no merge of two earlier tokens")
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return parts[0], parts[1]


def _spelling_of_bytes() -> dict[int, str]:
    """GPT-2's printable character for each byte: itself where it is visible, else the next one from U+0100 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(_BYTES) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(_BYTES + n) for n, byte in enumerate(hidden)}


_SPELLING = _spelling_of_bytes()
