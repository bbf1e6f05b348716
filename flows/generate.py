"""Text from the project's INT8 model, with onnxruntime and no torch."""

import dataclasses
import io
import math
import sys
from collections import abc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from flows import last, runs
from flows.termination import EXIT_INTERRUPTED
from lm.cores import Others
from lm.sampling import LEAST_PENALTY, MOST_PENALTY, Sampling
from tasks import paths
from tasks.errors import BadInput, UserMistake

if TYPE_CHECKING:
    from lm.chat_template import ChatTemplate
    from lm.runtime import Generator

DEFAULT = Sampling()


@dataclasses.dataclass(frozen=True)
class Writing:
    """How a text is written: its tokens at most, how they are drawn, and what ends it.

    ``spin`` is that of :func:`load`, ``version`` as of :func:`place`.
    """

    max_new_tokens: int
    sampling: Sampling = DEFAULT
    stop: tuple[str, ...] = ()
    spin: bool | None = None
    version: str | None = None

    def check(self) -> None:
        """Raises :class:`BadInput` for what is not UTF-8, :class:`UserMistake` for numbers that cannot be."""
        for text in self.stop:
            check_text(text, "--stop")
        if math.isnan(self.sampling.temperature):
            raise UserMistake("--temperature: nan is no number. 0 takes the likeliest token, higher values vary more.")
        if not 0 < self.sampling.top_p <= 1:
            raise UserMistake("--top-p: a share above 0 and up to 1 is needed. 1 leaves nothing out.")
        if not LEAST_PENALTY <= self.sampling.repetition_penalty <= MOST_PENALTY:
            raise UserMistake(
                f"--repetition-penalty: a number from {LEAST_PENALTY:g} to {MOST_PENALTY:g} is needed. 1 changes "
                "nothing, 1.1 repeats less."
            )


def write(root: Path, prompt: str, how: Writing, out: TextIO, err: TextIO) -> None:
    """Writes ``prompt`` and what the INT8 model of the project in ``root`` writes after it to ``out``, as it comes.

    While a run makes the model, or after one that was stopped, the last one that was finished writes. That, and a text
    that ends because the model's context is full, is told in one line on ``err``. Raises
    :class:`tasks.errors.UserMistake` as :func:`place` and :func:`continue_text` do.
    """
    if isinstance(out, io.TextIOWrapper):
        # A terminal of another encoding shows what it can.
        out.reconfigure(errors="replace")
    folder = place(root, lambda line: err.write(f"{line}\n"), how.version)
    pieces = continue_text(folder, prompt, how)
    # The prompt goes out with the first piece: one that is refused is not written.
    waiting = prompt
    try:
        while True:
            waiting += next(pieces)
            out.write(waiting)
            out.flush()
            waiting = ""
    except StopIteration as end:
        out.write(f"{waiting}\n")
        out.flush()
        if end.value:
            err.write(f"{end.value}\n")
    except KeyboardInterrupt:
        out.write("\n")
        sys.exit(EXIT_INTERRUPTED)


def place(root: Path, tell: Callable[[str], object], version: str | None = None) -> Path:
    """Returns the folder of the project's INT8 model: while it is being made, that of the last one; then tells so.

    With a ``version`` that of the version. Raises :class:`UserMistake` where there is none, or its model is lost, and
    as :func:`check_made` does.
    """
    if version is not None:
        # DVC takes its time to import.
        from flows.model import model_of

        return model_of(root, version, tell)
    folder = root / paths.INT8
    if not folder.is_dir() and (finished := last.int8(root)) is not None:
        tell(f"{paths.INT8} is not there: a run makes it, or was stopped. The last finished one writes this.")
        return finished
    check_made(root, paths.INT8)
    return folder


def check_made(root: Path, folder: Path) -> None:
    """Raises :class:`BadInput` where the run at work has yet to make the ``folder`` of a model."""
    if not (root / folder).is_dir() and (run := runs.in_place(root)) is not None:
        raise BadInput(
            f"{folder}: not there yet: run {run.run} (process {run.pid}) is at work and makes it. `overnight status` "
            "says how far it is."
        )


def load(folder: Path, spin: bool | None = None) -> "Generator":
    """Returns the model in ``folder``. Raises :class:`BadInput` where there is none, or a damaged one.

    ``spin`` is that of :class:`lm.runtime.Generator`; None: where nothing else computes while it is imported.
    """
    others = Others()
    for name in (paths.INT8_GRAPH.name, "tokenizer.json", "config.json"):
        if not (folder / name).is_file():
            raise BadInput(f"{folder / name}: no such file. Run `overnight run` first; it makes the INT8 model.")
    # onnxruntime takes most of a second to import.
    from lm.runtime import Generator, OtherInterface, Unloadable

    try:
        return Generator(folder, spin=others.rest() if spin is None else spin)
    except (Unloadable, OtherInterface) as error:
        raise BadInput(f"{error}. `overnight run` makes the model anew.") from None


def load_template(folder: Path, model: "Generator") -> "ChatTemplate | None":
    """Returns how ``model``, from ``folder``, wants conversations written; None where it was not taught to converse.

    Raises :class:`BadInput` for a template that is malformed.
    """
    from lm.chat_template import ChatTemplate
    from lm.chat_template_files import Malformed

    try:
        return ChatTemplate.read(folder, model.tokenizer)
    except Malformed as error:
        raise BadInput(f"{error}. Put the file of the model that this one was started from there.") from None


def continue_text(folder: Path, prompt: str, how: Writing) -> abc.Generator[str, None, str]:
    """Yields what the model in ``folder`` writes after ``prompt``; returns why it had to stop early, or nothing.

    Raises :class:`BadInput` where there is no model or a damaged one, and for a prompt that is not UTF-8 or too long;
    and as :meth:`Writing.check` does.
    """
    check_text(prompt, "TEXT")
    how.check()
    model = load(folder, how.spin)
    from lm.runtime import PromptTooLong
    from lm.text import Request

    try:
        done = yield from model.generate(Request(prompt, how.max_new_tokens, how.sampling, how.stop))
    except PromptTooLong as error:
        raise BadInput(f"{error}.") from None
    if done.ending != "context":
        return ""
    return (
        f"The model's context of {model.context:,} tokens is full: the text ends before "
        f"--max-new-tokens {how.max_new_tokens:,}."
    )


def check_text(text: str, name: str) -> None:
    """Raises :class:`BadInput` where ``text``, which a user knows as ``name``, is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # Python keeps a byte that is not UTF-8 as the surrogate U+DC00 + byte.
        byte = ord(text[error.start]) & 0xFF
        raise BadInput(
            f"{name} is not UTF-8: byte 0x{byte:02x} after {error.start:,} characters. Write it in UTF-8."
        ) from None
