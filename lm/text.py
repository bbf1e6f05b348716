"""One text as it is written: what was asked for, its tokens so far, and how it ended."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from lm.drafting import MOST, Drafter
from lm.sampling import Logits, Sampling, held_back
from lm.tokenizer import Detokenizer

DEFAULT = Sampling()
Ids = npt.NDArray[np.int64]
# Why a text ended: the model ended it, a string that was to stop it came, it is as long as was asked for, or it fills
# the model's context.
Ending = Literal["end of text", "stop", "length", "context"]


@dataclass(frozen=True)
class Request:
    """A text to continue: at most ``max_new_tokens``, ending before the first of the strings ``stop``.

    ``prompt`` is the text, or its tokens where these do not follow from one, as in a conversation. ``most_drafted``:
    so many tokens are guessed from the text and read at once with the one before them (see :mod:`lm.drafting`).
    ``is_answer``: what comes is a text of its own, and its first word has no space before it.
    """

    prompt: str | tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = DEFAULT
    stop: tuple[str, ...] = ()
    most_drafted: int = MOST
    is_answer: bool = False


@dataclass(frozen=True)
class Done:
    """How a text ended, and how many tokens were its prompt's and its own.

    ``drafted`` tokens were guessed and ``accepted`` of these came true; none while texts are written side by side.
    """

    ending: Ending
    prompt_tokens: int
    new_tokens: int
    drafted: int = 0
    accepted: int = 0


class Text:
    """A text from its prompt's tokens, ``ids``, to its end, when ``done`` says how that was.

    ``begun``: the model has begun to read the prompt.
    """

    def __init__(self, request: Request, ids: list[int], written: Detokenizer, ends: frozenset[int], room: int) -> None:
        """``written`` tells what comes after ``ids``; one of ``ends`` ends the text, and so do ``room`` more tokens."""
        self.ids = ids
        self.begun = False
        self.done: Done | None = None
        self._request, self._ends = request, ends
        self._drafter = Drafter(request.most_drafted)
        self._random = np.random.default_rng(request.sampling.seed)
        self._full: Ending = "length" if request.max_new_tokens <= room else "context"
        # The prompt, and room for what is written after it.
        most = min(request.max_new_tokens, room)
        self._tokens: Ids = np.concatenate((np.array(ids, np.int64), np.zeros(most, np.int64)))
        self.new_tokens = 0
        # The text so far, and how much of it is told.
        self._written, self._told = written, 0

    @property
    def tokens(self) -> Ids:
        """The prompt and what is written so far."""
        return self._tokens[: len(self.ids) + self.new_tokens]

    @property
    def drafted(self) -> int:
        """How many tokens were guessed."""
        return self._drafter.drafted

    @property
    def accepted(self) -> int:
        """How many of these came true."""
        return self._drafter.accepted

    def draft(self) -> list[int]:
        """Returns guesses at what comes after the next token that is drawn: there is room for that one too."""
        return self._drafter.draft(self.tokens, self._room - 1)

    def take(self, guesses: Sequence[int], logits: Logits) -> tuple[int, str]:
        """Writes a token for each line of ``logits`` [guesses + 1, vocabulary], until one is not what was guessed.

        Each is drawn by the same random number as without guesses. Returns how many guesses came true, and what can be
        told now.
        """
        accepted, told = 0, ""
        for guess, line in zip([*guesses, None], logits, strict=True):
            token, piece = self._advance(line)
            told += piece
            if token != guess:
                break
            accepted += 1
            if self.done:
                break
        self._drafter.learn(len(guesses), accepted)
        if self.done:
            self.done = replace(self.done, drafted=self.drafted, accepted=self.accepted)
        return accepted, told

    def _advance(self, logits: Logits) -> tuple[int, str]:
        """Returns the next token for ``logits`` [vocabulary], and what can be told now."""
        token = self._request.sampling.draw(logits, self.tokens, self._random)
        if token in self._ends:
            return token, self._end("end of text", len(self._text))
        self._tokens[len(self.tokens)] = token
        self.new_tokens += 1
        self._written.append(token)
        stop = self._request.stop
        if found := [place for one in stop if (place := self._text.find(one, self._told)) >= 0]:
            return token, self._end("stop", min(found))
        if self._room == 0:
            return token, self._end(self._full, len(self._text))
        return token, self._tell(len(self._text) - held_back(self._text, stop))

    @property
    def _text(self) -> str:
        return self._written.text

    @property
    def _room(self) -> int:
        """So many more tokens can be written."""
        return len(self._tokens) - len(self.tokens)

    def _tell(self, end: int) -> str:
        piece = self._text[self._told : end]
        self._told = max(self._told, end)
        return piece

    def _end(self, why: Ending, end: int) -> str:
        self.done = Done(why, len(self.ids), self.new_tokens)
        return self._tell(end)
