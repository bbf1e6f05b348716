"""One text as it is written: what was asked for, its tokens so far, and how it ended."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from lm.drafting import MOST, Drafter, Ids
from lm.logprobs import Scored, Token, logprobs
from lm.sampling import Logits, Sampling, held_back
from lm.tokenizer import Detokenizer

DEFAULT = Sampling()
# Why a text ended: the model ended it, a string that was to stop it came, it is as long as was asked for, or it fills
# the model's context.
Ending = Literal["end of text", "stop", "length", "context"]


@dataclass(frozen=True)
class Request:
    """A text to continue: at most ``max_new_tokens``, ending before the first of the strings ``stop``.

    ``prompt`` is the text, or its tokens where these do not follow from one, as in a conversation. ``most_drafted``:
    so many tokens are guessed from the text and read at once with the one before them (see :mod:`lm.drafting`).
    ``is_answer``: what comes is a text of its own, and its first word has no space before it. ``echo``: what is told
    begins with the text of the prompt's tokens, special ones left out. ``logprobs``: each token that is told is scored,
    and so many of the likeliest in its place.
    """

    prompt: str | tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = DEFAULT
    stop: tuple[str, ...] = ()
    most_drafted: int = MOST
    is_answer: bool = False
    echo: bool = False
    logprobs: int | None = None


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
    """A text from its prompt's tokens, ``ids``, to its end, when ``done`` says how that was, or ``failed`` why not.

    ``begun``: the model has begun to read the prompt.
    """

    def __init__(self, request: Request, ids: list[int], written: Detokenizer, ends: frozenset[int], room: int) -> None:
        """``written`` tells what comes after ``ids``; one of ``ends`` ends the text, and so do ``room`` more tokens.

        An echo begins with ``ids``, and ``written`` is at its beginning.
        """
        self.ids = ids
        self.begun = False
        self.done: Done | None = None
        self.failed: Exception | None = None
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
        # The tokens that are not told yet, if they are scored.
        self._scores: list[Scored] = []
        if request.echo:
            for token in ids[:1] if self.scores_prompt else ids:
                self._append(token, None)

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's tokens are scored: :meth:`read` wants the logits of each."""
        return self._request.echo and self._request.logprobs is not None

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

    def read(self, first: int, logits: Logits) -> None:
        """Scores the prompt's tokens behind its ``first``, by ``logits`` [tokens, vocabulary] from that one on."""
        for token, line in zip(self.ids[first + 1 :], logits, strict=False):
            self._append(token, line)

    def take(self, guesses: Sequence[int], logits: Logits) -> tuple[int, str]:
        """Writes a token for each line of ``logits`` [guesses + 1, vocabulary], until one is not what was guessed.

        Each is drawn by the same random number as without guesses. Returns how many guesses came true, and what can be
        told now.
        """
        accepted, told = 0, ""
        if self._request.echo and self.new_tokens == 0:
            told = self._tell(len(self._text))
        if self._room == 0:
            # Nothing was to be written.
            return accepted, told + self._end(self._full, len(self._text))
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
        token = self._request.sampling.draw(logits, self.tokens, self._random, len(self.ids))
        if token in self._ends:
            return token, self._end("end of text", len(self._text))
        self._tokens[len(self.tokens)] = token
        self.new_tokens += 1
        self._append(token, logits)
        stop = self._request.stop
        if found := [place for one in stop if (place := self._text.find(one, self._told)) >= 0]:
            return token, self._end("stop", min(found))
        if self._room == 0:
            return token, self._end(self._full, len(self._text))
        return token, self._tell(len(self._text) - held_back(self._text, stop))

    def take_scores(self) -> tuple[Scored, ...]:
        """Returns the scores of what was told since they were last taken, if tokens are scored.

        Of what a string to stop at took from the text there are none.
        """
        whole = self.done is not None and self.done.ending != "stop"
        count = len(self._scores) if whole else sum(one.at < self._told for one in self._scores)
        taken, self._scores = self._scores[:count], self._scores[count:]
        return tuple(taken)

    def _append(self, token: int, logits: Logits | None) -> None:
        if self._request.logprobs is not None:
            text, at = self._written.behind(token), len(self._text)
            own, best = (None, []) if logits is None else logprobs(logits, token, self._request.logprobs)
            likeliest = tuple(Token(self._written.behind(one), share) for one, share in best)
            self._scores.append(Scored(text, own, at, likeliest))
        self._written.append(token)

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
