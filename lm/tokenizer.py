"""A model's ``tokenizer.json``, and the text of tokens that come one by one. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

# What decoders write for half a character.
HALF = "\ufffd"
# So many tokens before a text hold a whole character and more.
_MOST_BEFORE = 16
_NAMED = 3


def read_tokenizer(file: Path) -> Tokenizer:
    """Returns the tokenizer in ``file``, but for the truncation and padding that it may have been saved with.

    Both would change texts without a word. Raises as ``Tokenizer.from_file`` does, which has no exception of its own.
    """
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def size_of(tokenizer: Tokenizer) -> int:
    """Returns how many ids it has, added tokens included."""
    return int(max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)) + 1


def misfit(tokenizer: Tokenizer, vocab_size: int, **ids: int) -> str | None:
    """Returns what is told of a tokenizer that is not that of a model with so many rows; None where it is.

    ``ids`` are the tokens that the model's configuration names.
    """
    if (size := size_of(tokenizer)) > vocab_size:
        names = {number: name for name, number in tokenizer.get_vocab(with_added_tokens=True).items()}
        surplus = [f"{names[number]!r} ({number})" for number in sorted(names) if number >= vocab_size]
        more = f" and {len(surplus) - _NAMED:,} more" if len(surplus) > _NAMED else ""
        return (
            f"it has {size} tokens, and config.json's vocab_size is {vocab_size}: the model knows no "
            f"{', '.join(surplus[:_NAMED])}{more}. Where no text needs them, remove them from its added_tokens"
        )
    for name, number in ids.items():
        if tokenizer.id_to_token(number) is None:
            return f"it has no token {number}, which is config.json's {name}. Mend the checkpoint"
    return None


class Detokenizer:
    """The text of tokens that come one by one, behind those ``before``.

    A decoder looks at what stands before a token (Llama 2's takes the space off a text's first word), so the last
    tokens are decoded behind those before them, whose text is left out then.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]) -> None:
        self.text = ""
        """What they come to; of a character that is not whole yet, nothing."""
        self._tokenizer = tokenizer
        self._silent = {number for number, one in tokenizer.get_added_tokens_decoder().items() if one.special}
        self._before, self._told = self._end_of(before)
        # The tokens behind those whose text is not whole, and the text of all that comes before them.
        self._open: list[int] = []
        self._closed = ""

    def append(self, token: int) -> None:
        """Takes the next token, and adds to the text what is whole now."""
        if token in self._silent:
            # Kept, a thousand of them would be read a thousand times.
            return
        self._open.append(token)
        piece = self._tokenizer.decode([*self._before, *self._open])[len(self._told) :]
        whole = piece.rstrip(HALF)
        self.text = self._closed + whole
        # Tokens without a text are nothing to look back to.
        if piece and whole == piece:
            self._closed = self.text
            self._before, self._open = self._open, []
            self._told = self._tokenizer.decode(self._before)

    def behind(self, token: int) -> str:
        """Returns what ``token`` would come to here by itself; a part of a character comes to U+FFFD."""
        return self._tokenizer.decode([*self._before, token])[len(self._told) :]

    def _end_of(self, tokens: Sequence[int]) -> tuple[list[int], str]:
        """Returns the last tokens that come to whole characters, and these."""
        for count in range(1, min(len(tokens), _MOST_BEFORE) + 1):
            last = list(tokens[-count:])
            if (told := self._tokenizer.decode(last)) and HALF not in told:
                return last, told
        return [], ""
