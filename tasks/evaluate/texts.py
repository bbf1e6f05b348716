"""Which documents are measured on, and what the baselines learn from."""

import hashlib
import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from tasks.shards import Manifest, Shards, Tokens


@dataclass(frozen=True)
class Documents:
    """Each document's tokens, its beginning first, and its text's bytes; and which tokens count, None for all.

    A plain text's own end is left out: it has no bytes, and of many tokenizers none.
    """

    tokens: list[tuple[Tokens, int]]
    learned: list[npt.NDArray[np.bool_]] | None

    def texts(self, tokenizer: Tokenizer) -> list[str]:
        """Returns the text of each; of a conversation the answers, which alone are scored and counted in bytes."""
        # Byte-level tokens decode to the very text that was encoded; BOS is left out as a special token.
        ids = [tokens.tolist() for tokens, _ in self.tokens]
        if self.learned is not None:
            ids = [list(itertools.compress(found, mask)) for found, mask in zip(ids, self.learned, strict=True)]
        return tokenizer.decode_batch(ids, skip_special_tokens=True)

    def take(self, numbers: list[int]) -> "Documents":
        learned = None if self.learned is None else [self.learned[number] for number in numbers]
        return Documents([self.tokens[number] for number in numbers], learned)


def documents(shards: Shards, manifest: Manifest) -> Documents:
    """Returns all documents of a split, whose shards ``manifest`` names."""
    found, learned = shards.documents(), shards.learned()
    if manifest.bos_token_id == manifest.eos_token_id:
        return Documents(found, learned)
    # Of a conversation the beginning is not learned, and the end is that of an answer.
    ends = [len(tokens) if learned and not learned[index].all() else -1 for index, (tokens, _) in enumerate(found)]
    kept = [(tokens[:end], size) for (tokens, size), end in zip(found, ends, strict=True)]
    return Documents(kept, learned and [mask[:end] for mask, end in zip(learned, ends, strict=True)])


def drawn(found: Documents, tokens: int, seed: int) -> Documents:
    """Returns those of ``found`` that are measured: all, or whole ones until they have so many ``tokens``.

    ``seed`` and a document's own tokens decide when its turn comes, so text that is added moves few of the others.
    """
    if sum(len(document) for document, _ in found.tokens) <= tokens:
        return found
    turns = [hashlib.sha256(f"{seed} ".encode() + document.tobytes()).digest() for document, _ in found.tokens]
    chosen: list[int] = []
    for number in sorted(range(len(turns)), key=turns.__getitem__):
        chosen.append(number)
        tokens -= len(found.tokens[number][0])
        if tokens <= 0:
            break
    return found.take(sorted(chosen))


def last(found: Documents, most_bytes: int) -> Documents:
    """Returns the last of ``found``, in their order, that have at most so many bytes together; at least one."""
    sizes = [size for _, size in reversed(found.tokens)]
    kept = sum(total <= most_bytes for total in itertools.accumulate(sizes))
    first = len(sizes) - max(kept, 1)
    return found.take(list(range(max(first, 0), len(sizes))))
