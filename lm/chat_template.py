"""Conversations as a model reads them: the chat template that came with it, rendered with jinja2. Imports no torch.

Templates, where a checkpoint keeps them, and what they come to are those of transformers' ``apply_chat_template``. What
looks like a control token in a message is text and does not become one, else whoever writes a message could end it and
speak in another role. (transformers does so only where ``sanitize_control_tokens`` asks for it.) A control token is one
that the tokenizer calls special, or that the template writes.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from functools import cached_property
from pathlib import Path
from typing import Literal

import jinja2
from tokenizers import Tokenizer

from lm.chat_template_files import Malformed, source_in, special_tokens
from lm.chat_template_language import environment

Role = Literal["system", "user", "assistant"]
# Around a control token in a message, while the template is rendered. They stand for no character.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARKS = re.compile(f"[{_OPEN}{_CLOSE}]")
# Around what the assistant wrote, while a conversation is rendered to be learned from.
_BEGIN, _END = "\ufdd2", "\ufdd3"
_RESERVED = re.compile(f"[{_OPEN}{_CLOSE}{_BEGIN}{_END}]")
_SPACE = re.compile(r"\s*")
# Templates cut an answer at these, and trim what is left.
_STARTS = re.compile(r"(?:\A|</?think>)\s*")
_THINKING = re.compile(r"(?:\s|</?think>)*")
_TAG_BEFORE = re.compile(r"</?think>\s*\Z")
# And the space behind it.
_LONGEST_TAG = 64
# A model writes these itself, around what it thinks before it answers, so in its own messages they are tokens.
_THOUGHT = frozenset({"<think>", "</think>"})


class Unrenderable(ValueError):
    """A template refuses a conversation, or fails on it."""


@dataclass(frozen=True)
class Message:
    """What was said, and by whom; ``name`` tells speakers of one role apart, where a template writes it."""

    role: Role
    content: str
    name: str | None = None


class ChatTemplate:
    """How a model wants a conversation written."""

    def __init__(self, source: str, special_tokens: dict[str, str], tokenizer: Tokenizer, place: str) -> None:
        """Takes the template's text, the names and texts of the special tokens that it may use, and a name for errors.

        Raises :class:`Malformed`.
        """
        self._special_tokens, self._tokenizer = special_tokens, tokenizer
        try:
            self._template = environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise Malformed(f"{place}: not a chat template: line {error.lineno}: {error.message}") from None
        # Python compiles what jinja2 makes of it, and may refuse that by anything.
        except Exception as error:
            raise Malformed(f"{place}: not a chat template: {_told(error)}") from None
        added = tokenizer.get_added_tokens_decoder()
        self._added = frozenset(added)
        controls = {
            id_: token.content
            for id_, token in added.items()
            if token.special or (token.content in source and not token.content.isspace())
        }
        self.ending = frozenset(id_ for id_, text in controls.items() if text not in _THOUGHT)
        """The ids of the control tokens by which an answer may end."""
        self._controls = _controls(controls.values())

    @classmethod
    def read(cls, folder: Path, tokenizer: Tokenizer) -> "ChatTemplate | None":
        """Returns the template of the model in ``folder``; None where there is none. Raises :class:`Malformed`."""
        found = source_in(folder)
        if found is None:
            return None
        place, source = found
        return cls(source, special_tokens(folder), tokenizer, str(place))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True, today: date | None = None) -> str:
        """Returns ``messages`` and the beginning of the answer as one text. Raises :class:`Unrenderable`.

        Templates may ask for the day, and write it: ``today``, or by default the clock's.
        """
        conversation = [
            {
                "role": message.role,
                "content": message.content,
                **({} if message.name is None else {"name": message.name}),
            }
            for message in messages
        ]
        try:
            return self._template.render(
                **self._special_tokens,
                messages=conversation,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=lambda style: (today or datetime.now()).strftime(style),
            )
        # A template is a program from outside: what it raises is anything.
        except Exception as error:
            raise Unrenderable(f"the model's chat template refuses this conversation: {_told(error)}") from None

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Returns the tokens of :meth:`render`: the template's control tokens as such, those in messages as text."""
        return self._located(self.render([self._mark(message) for message in messages]))[0]

    def encode_answers(self, messages: Sequence[Message], today: date) -> tuple[list[int], list[bool]]:
        """Returns the tokens of a whole conversation, and which of them are the assistant's; ``today`` as in `render`.

        To an answer belong the control token right behind it, by which a model says that it has ended, and the tags of
        thinking before it that the prompt for it does not have. Tokens that the template writes around the messages
        belong to nobody. Raises :class:`Unrenderable`, also where the template makes something else of an answer than a
        part of it.
        """
        marked = [self._mark(message) for message in messages]
        text = self.render([_mark_answer(message) for message in marked], False, today)
        bare = re.sub(f"[{_BEGIN}{_END}]", "", text)
        if bare != self.render(marked, False, today):
            raise Unrenderable("the model's chat template changes the answers, so that they cannot be told apart")
        whole = _MARKS.sub("", bare)
        spans = list(_spans(_MARKS.sub("", text)))
        answers = [place for place, message in enumerate(messages) if _is_answer(message)]
        # Where a template leaves one out nobody knows which.
        if len(answers) == len(spans):
            spans = [
                (self._beginning(whole, first, marked[:place], today), last)
                for place, (first, last) in zip(answers, spans, strict=True)
            ]
        spans = [self._with_its_end(whole, *span) for span in spans]
        ids, places = self._located(bare)
        return ids, [any(start < last and end > first for first, last in spans) for start, end in places]

    def _beginning(self, text: str, first: int, before: Sequence[Message], today: date) -> int:
        """Returns where in ``text`` the answer begins that has its ``first`` own character there.

        That is where a model begins that is asked to go on after ``before``, if tags of thinking alone are between: it
        has to write these itself.
        """
        if not _TAG_BEFORE.search(text, max(0, first - _LONGEST_TAG), first):
            return first
        try:
            prompt = _MARKS.sub("", self.render(before, True, today))
        except Unrenderable:
            return first
        is_own = text.startswith(prompt) and _THINKING.fullmatch(text, len(prompt), first)
        return len(prompt) if is_own else first

    def _with_its_end(self, text: str, first: int, last: int) -> tuple[int, int]:
        # Space at the end of an answer is its own, where the template leaves it.
        space = _SPACE.match(text, last)
        control = self._controls.match(text, space.end() if space else last)
        return first, control.end() if control else last

    def _located(self, marked: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the tokens of ``marked``, and where each lies in it; the marks do not count."""
        if not _MARKS.search(marked):
            encoding = self._tokenizer.encode(marked, add_special_tokens=False)
            return encoding.ids, encoding.offsets
        # Each control token of a message leaves a hole, so the tokenizer finds only the template's; what lies between
        # two of these is written anew, without control tokens, where it has a hole. A mark whose partner the template
        # has cut off is a hole of nothing: what is on both sides of it must not become one token either.
        texts: list[str] = []

        def leave_hole(found: re.Match[str]) -> str:
            texts.append(found[1] or "")
            return _OPEN

        holed = re.sub(f"{_OPEN}({self._controls.pattern}){_CLOSE}|{_MARKS.pattern}", leave_hole, marked)
        filling = iter(texts)
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        before = 0
        for piece, own, own_places in self._pieces(holed):
            filled = re.sub(_OPEN, lambda _: next(filling), piece)
            if _OPEN in piece:
                encoding = self._plain.encode(filled, add_special_tokens=False)
                own, own_places = encoding.ids, encoding.offsets
            ids += own
            places += [(before + start, before + end) for start, end in own_places]
            before += len(filled)
        return ids, places

    def _mark(self, message: Message) -> Message:
        kept = _THOUGHT if message.role == "assistant" else frozenset()

        def mark(found: re.Match[str]) -> str:
            return found[0] if found[0] in kept else f"{_OPEN}{found[0]}{_CLOSE}"

        def marked(text: str) -> str:
            return self._controls.sub(mark, _RESERVED.sub("\ufffd", text))

        name = None if message.name is None else marked(message.name)
        return replace(message, content=marked(message.content), name=name)

    def _pieces(self, text: str) -> Iterator[tuple[str, list[int], list[tuple[int, int]]]]:
        """Yields ``text`` cut at its added tokens, these too, each piece with its tokens and their places in it."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        start, ids, places = 0, list[int](), list[tuple[int, int]]()
        for token, (first, last) in zip(encoding.ids, encoding.offsets, strict=True):
            if token not in self._added:
                ids.append(token)
                places.append((first - start, last - start))
                continue
            yield text[start:first], ids, places
            yield text[first:last], [token], [(0, last - first)]
            start, ids, places = last, [], []
        yield text[start:], ids, places

    @cached_property
    def _plain(self) -> Tokenizer:
        """The tokenizer without its added tokens."""
        description = json.loads(self._tokenizer.to_str())
        return Tokenizer.from_str(json.dumps({**description, "added_tokens": [], "post_processor": None}))


def _told(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _is_answer(message: Message) -> bool:
    return message.role == "assistant" and bool(message.content.strip())


def _mark_answer(message: Message) -> Message:
    """Returns ``message`` with marks around what the assistant wrote; the space around it may be trimmed."""
    if not _is_answer(message):
        return message
    body = message.content.rstrip()
    marked = _STARTS.sub(lambda found: found[0] + _BEGIN, body)
    return replace(message, content=marked + _END + message.content[len(body) :])


def _spans(text: str) -> Iterator[tuple[int, int]]:
    """Yields where each answer lies in ``text`` without its marks: from the first _BEGIN to the _END after it."""
    marks = 0
    begun: int | None = None
    for place, character in enumerate(text):
        if character == _BEGIN:
            begun = place - marks if begun is None else begun
        elif character == _END and begun is not None:
            yield begun, place - marks
            begun = None
        marks += character in (_BEGIN, _END)


def _controls(texts: Iterable[str]) -> re.Pattern[str]:
    # Of two that begin alike the longer one is meant; (?!) is found nowhere.
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")
