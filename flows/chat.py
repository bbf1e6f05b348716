"""``overnight chat``: a conversation with the project's INT8 model in a terminal, with onnxruntime and no torch."""

import contextlib
import dataclasses
import io
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TextIO

from flows.generate import Writing, check_text, load, load_template, place
from flows.termination import EXIT_INTERRUPTED
from lm.batch import Batch
from lm.chat_template import ChatTemplate, Message, Unrenderable
from lm.runtime import Generator as Model
from lm.runtime import PromptTooLong
from lm.text import Done, Request
from tasks.errors import BadInput, UserMistake


@dataclasses.dataclass(frozen=True)
class Settings(Writing):
    """How to converse: how each answer is written, and what the model is told at first."""

    system: str | None = None

    def check(self) -> None:
        """Raises as :meth:`flows.generate.Writing.check` does, for what the model is told too."""
        check_text(self.system or "", "--system")
        super().check()


class Conversation:
    """What was said so far. What the model has read of it is not read again."""

    def __init__(self, model: Model, template: ChatTemplate, settings: Settings) -> None:
        self._model, self._template, self._settings = model, template, settings
        self._held = Batch(model, 1)
        self.messages: tuple[Message, ...] = (Message("system", settings.system),) if settings.system else ()

    @property
    def context(self) -> int:
        """How many tokens the conversation may have."""
        return self._model.context

    def answer(self, text: str) -> Generator[str, None, Done]:
        """Yields the answer to ``text`` as it comes, and returns how it ended; closed before, it ends there.

        Raises :class:`BadInput` for what is not UTF-8, is too long, or is refused by the model's template: then it has
        not been said.
        """
        check_text(text, "the message")
        said = (*self.messages, Message("user", text))
        sampling = self._settings.sampling
        # Each answer draws by a seed of its own.
        sampling = dataclasses.replace(sampling, seed=sampling.seed + len(self.messages))
        told = ""
        try:
            prompt = tuple(self._template.encode(said))
            most, stop = self._settings.max_new_tokens, self._settings.stop
            pieces = self._model.generate(Request(prompt, most, sampling, stop, is_answer=True), self._held)
            while True:
                piece = next(pieces)
                told += piece
                yield piece
        except StopIteration as end:
            self._note(said, told)
            done: Done = end.value
            return done
        except GeneratorExit:
            self._note(said, told)
            raise
        except Unrenderable as error:
            raise BadInput(f"{error}.") from None
        except PromptTooLong as error:
            raise BadInput(
                f"the conversation has {error.tokens:,} tokens with this message, and the model reads at most "
                f"{error.context:,}, its answer included. Shorten the message, or begin another conversation with "
                "`overnight chat`."
            ) from None

    def _note(self, said: tuple[Message, ...], answer: str) -> None:
        self.messages = (*said, Message("assistant", answer))


def chat(root: Path, settings: Settings, source: TextIO, out: TextIO, err: TextIO) -> int:
    """Answers each line of ``source`` on ``out`` until it ends; returns the exit code.

    In a terminal, Ctrl-C stops an answer, and what cannot be answered is told and forgotten. Elsewhere the one ends the
    conversation, and the other raises :class:`UserMistake`; so does a model that is not there or has no template.
    """
    for stream, errors in ((source, "surrogateescape"), (out, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            # A byte that is not UTF-8 is told with its place; a terminal of another encoding shows what it can.
            stream.reconfigure(errors=errors)
    settings.check()
    conversation = _begin(root, settings, err)
    try:
        if source.isatty():
            err.write("Ctrl-C stops an answer, Ctrl-D ends the conversation.\n")
            _converse(conversation, out, err)
        else:
            for line in source:
                _show(conversation, line.rstrip("\r\n"), lambda: False, out, err)
    except KeyboardInterrupt:
        out.write("\n")
        return EXIT_INTERRUPTED
    return 0


def _begin(root: Path, settings: Settings, err: TextIO) -> Conversation:
    folder = place(root, lambda line: err.write(f"{line}\n"), settings.version)
    model = load(folder, settings.spin)
    template = load_template(folder, model)
    if template is None:
        raise UserMistake(
            f"{folder}: no chat_template.jinja, so this model continues texts and does not converse. Use `overnight "
            "generate TEXT`, or a model that was started from one with a chat template."
        )
    return Conversation(model, template, settings)


def _converse(conversation: Conversation, out: TextIO, err: TextIO) -> None:
    for text in _typed(out):
        try:
            with _stoppable() as stopped:
                _show(conversation, text, stopped, out, err)
        except UserMistake as mistake:
            err.write(f"error: {mistake}\n")


def _typed(out: TextIO) -> Iterator[str]:
    with contextlib.suppress(ImportError):
        # With it, `input` knows the keys for editing a line and for those before it.
        import readline  # noqa: F401
    while True:
        try:
            yield input("> ")
        except EOFError:
            out.write("\n")
            return
        except KeyboardInterrupt:
            # As shells have it: another line.
            out.write("\n")


def _show(conversation: Conversation, text: str, stopped: Callable[[], bool], out: TextIO, err: TextIO) -> None:
    if not text.strip():
        return
    pieces = conversation.answer(text)
    full = False
    try:
        while not stopped():
            out.write(next(pieces))
            out.flush()
    except StopIteration as end:
        full = end.value.ending == "context"
    pieces.close()
    out.write("\n")
    out.flush()
    if full:
        err.write(
            f"The model's context of {conversation.context:,} tokens is full: the answer ends here. Begin another "
            "conversation with `overnight chat`.\n"
        )


@contextlib.contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Makes Ctrl-C a question, whether to stop, that is answered between two tokens; the second one interrupts."""
    asked = threading.Event()

    def ask(_: int, __: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)
