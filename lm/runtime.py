"""Text from an INT8 model with onnxruntime, tokenizers and numpy alone. Imports no torch."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Generator as Pieces
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime

from lm.drafting import MOST, Drafter
from lm.sampling import Logits, Sampling, held_back
from lm.tokenizer import Detokenizer, read_tokenizer

DEFAULT = Sampling()
Ids = npt.NDArray[np.int64]
# Why a text ended: the model ended it, a string that was to stop it came, it is as long as was asked for, or it fills
# the model's context.
Ending = Literal["end of text", "stop", "length", "context"]
# Room for this many more tokens is made at a time: rarely enough to copy little, often enough to attend to little room.
_GROWTH = 64
# So many tokens of a prompt are read at once: enough for products of matrices, and they stay in a core's cache.
_PIECE = 256
_LONGEST_REASON = 200


class PromptTooLong(ValueError):
    """A prompt leaves no room for an answer."""

    def __init__(self, tokens: int, context: int) -> None:
        super().__init__(
            f"the prompt has {tokens} tokens, and the model reads at most {context}, its answer included; "
            "shorten the prompt"
        )
        self.tokens, self.context = tokens, context


class Unloadable(ValueError):
    """A folder's files are no model, or a damaged one."""


class OtherInterface(ValueError):
    """A graph was exported by another version of Overnight: it is sound, but its inputs are not those of this one."""


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

    ``drafted`` tokens were guessed and ``accepted`` of these came true; none where texts are written side by side.
    """

    ending: Ending
    prompt_tokens: int
    new_tokens: int
    drafted: int = 0
    accepted: int = 0


class Tally:
    """How many tokens of prompts, and after these, a model has had so far: those of texts that were left count too."""

    def __init__(self) -> None:
        self.prompt, self.new = 0, 0


class Cache:
    """What the layers keep of the tokens of a batch so far; graph runs write it in place.

    ``lengths`` [batch] counts each row's tokens. Making one smaller forgets the tokens at its end.
    """

    def __init__(self, session: onnxruntime.InferenceSession, batch: int) -> None:
        self.lengths: Ids = np.zeros(batch, np.int64)
        self.capacity = 0
        self._batch = batch
        self._shapes = {value.name: value.shape for value in session.get_inputs() if value.name.startswith("past_")}
        self._buffers: dict[str, npt.NDArray[np.float32]] = {}
        self.binding = session.io_binding()

    def reserve(self, tokens: int, limit: int) -> None:
        """Makes room for ``tokens`` tokens a row, and for some more, but not for more than ``limit``."""
        if tokens <= self.capacity:
            return
        capacity = max(tokens, min(-(-tokens // _GROWTH) * _GROWTH, limit))
        sizes = {"batch": self._batch, "capacity": capacity}
        for name, shape in self._shapes.items():
            # Zeros and not just memory: a weight of zero times what is no number would be no number.
            buffer = np.zeros([sizes.get(axis, axis) for axis in shape], np.float32)
            if (old := self._buffers.get(name)) is not None:
                axis = shape.index("capacity")
                buffer[(slice(None),) * axis + (slice(self.capacity),)] = old
            self._buffers[name] = buffer
            value = onnxruntime.OrtValue.ortvalue_from_numpy(buffer)
            self.binding.bind_ortvalue_input(name, value)
            self.binding.bind_ortvalue_output(name.replace("past_", "present_"), value)
        self.capacity = capacity


class Held:
    """The tokens that a cache of one row holds: a text that begins as the last one did is not read again."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.cache: Cache | None = None


class Generator:
    """Continues texts: one graph run over the prompts, then one for each token of all rows, or for several of a row."""

    def __init__(
        self, folder: Path, threads: int | None = None, graph: bytes | None = None, spin: bool = False
    ) -> None:
        """Loads ``model.onnx`` with its ``tokenizer.json`` and ``config.json``; ``threads`` None takes all cores.

        ``graph``: what is run in place of ``model.onnx``, with the weights that lie beside that. ``spin``: within a
        run, threads that wait for each other stay awake. Quicker where nothing else computes, slower beside it.
        Raises :class:`Unloadable` that names the file in ``folder`` that is at fault, and :class:`OtherInterface`.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
        # Between runs they sleep.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        ask_for_exact_products(options)
        # The fallback warnings of graph optimization say nothing to a user.
        options.log_severity_level = 3
        with _named(folder / "model.onnx") as model:
            if graph is not None:
                options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
            self.session = onnxruntime.InferenceSession(graph or model, options, providers=["CPUExecutionProvider"])
        outputs = {value.name: value.shape for value in self.session.get_outputs()}
        self._outputs = list(outputs)
        if "positions" not in {value.name for value in self.session.get_inputs()}:
            raise OtherInterface(f"{model}: exported by another version of Overnight; it runs with that one's code")
        self.vocab_size: int = outputs["logits"][-1]
        with _named(folder / "tokenizer.json") as tokenizer:
            self.tokenizer = read_tokenizer(tokenizer)
        with _named(folder / "config.json") as config:
            told = json.loads(config.read_text())
            # The longest text, in tokens, that the model has positions for.
            self.context: int = told["max_position_embeddings"]
            # And the longest that it was trained on last.
            self.window: int = told.get("training_length") or self.context
            begins, ends = _token_ids(told.get("bos_token_id")), _token_ids(told.get("eos_token_id"))
        # A model that was taught to converse says there what ends its turns.
        if (folder / "generation_config.json").is_file():
            with _named(folder / "generation_config.json") as generation:
                ends = _token_ids(json.loads(generation.read_text()).get("eos_token_id")) or ends
        # A text begins with the first, whatever the tokenizer adds; it ends there too, since in training the next one
        # follows.
        self._beginning = (begins or ends)[:1]
        self.ends = frozenset((*begins, *ends))
        self.tally = Tally()
        self.look: Callable[[], object] = lambda: None
        """Is called before each run of the graph; what it raises ends the text."""

    def new_cache(self, batch: int = 1) -> Cache:
        """Returns the cache before the first token of ``batch`` texts."""
        return Cache(self.session, batch)

    def run(self, ids: Ids, cache: Cache, counts: Ids | None = None, last: bool = False) -> Logits:
        """Returns logits [batch, length, vocabulary] of ``ids`` [batch, length], which come after ``cache``.

        ``counts`` [batch] says how many of a row's ids are its own, the others after them being fillers; None: all.
        ``last``: the logits of each row's last own id alone, [batch, 1, vocabulary]. A long single row is then read
        piece by piece: nothing is multiplied for pairs of tokens of which the first could not see the second.
        """
        if last and len(ids) == 1 and (counts is None or counts[0] == ids.shape[1]):
            *before, ids = np.split(ids, range(_PIECE, ids.shape[1], _PIECE), axis=1)
            for piece in before:
                self.observe(piece, cache, (), last=True)
            counts = None
        return self.observe(ids, cache, (), counts, last)[0]

    def observe(
        self, ids: Ids, cache: Cache, names: Sequence[str], counts: Ids | None = None, last: bool = False
    ) -> tuple[Logits, list[npt.NDArray[Any]]]:
        """Returns what :meth:`run` returns, and what ``names`` name: the graph's outputs after ``logits``, in order."""
        self.look()
        batch, length = ids.shape
        counts = np.full(batch, length) if counts is None else counts
        kept = np.maximum(counts - 1, 0)[:, None] if last else np.broadcast_to(np.arange(length), ids.shape)
        cache.reserve(int(cache.lengths.max()) + length, self.context)
        binding = cache.binding
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids, np.int64))
        binding.bind_cpu_input("positions", cache.lengths[:, None] + np.arange(length))
        binding.bind_cpu_input("logits_to_keep", np.ascontiguousarray(kept, np.int64))
        for name in ("logits", *names):
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        cache.lengths = cache.lengths + counts
        found = binding.get_outputs()
        logits, *others = (found[self._outputs.index(name)].numpy() for name in ("logits", *names))
        return logits, others

    def generate(self, request: Request, held: Held | None = None) -> Pieces[str, None, Done]:
        """Yields the continuation of one prompt piece by piece and returns how it ended; see :meth:`generate_batch`.

        What ``held`` has of an earlier call is not computed again, and it is left with the text of this one. Guesses at
        the next tokens are read at once; each token is drawn from its own logits, by the same random number.
        """
        row = self._row(request)
        self.tally.prompt += len(row.ids)
        held = held or Held()
        if held.cache is None:
            held.cache = self.new_cache()
        # At least the last token is read: its logits are needed.
        common = _common(held.ids, row.ids[:-1])
        held.cache.lengths[:] = common
        held.ids, new = row.ids[:common], row.ids[common:]
        drafter, guesses = Drafter(request.most_drafted), list[int]()
        while row.done is None:
            logits = self.run(np.array([new + guesses]), held.cache, last=not guesses)[0]
            held.ids += new
            accepted = 0
            for guess, line in zip([*guesses, None], logits, strict=True):
                token, piece = row.advance(line)
                if piece:
                    yield piece
                if token != guess:
                    break
                accepted += 1
                if row.done:
                    break
            held.ids += guesses[:accepted]
            held.cache.lengths[:] = len(held.ids)
            drafter.learn(len(guesses), accepted)
            # After the last guess comes one more token.
            new, guesses = [token], drafter.draft(row.tokens, row.room - 1)
        return replace(row.done, drafted=drafter.drafted, accepted=drafter.accepted)

    def generate_batch(self, requests: Sequence[Request]) -> Iterator[tuple[int, str, Done | None]]:
        """Yields (number of the request, next piece of its text, how that ended or None), all rows side by side.

        A text stops at a token that ends texts or turns, before the first of its ``stop``, after ``max_new_tokens``, or
        when it is as long as the model's context: it was trained on nothing longer, and a text that drops its beginning
        would be another text. Equal calls write equal texts; beside other rows, after a ``held`` beginning or with
        guesses, sums are taken in another order, and a text may turn where two tokens are nearly alike. Raises
        :class:`PromptTooLong`.
        """
        rows = [self._row(request) for request in requests]
        cache = self.new_cache(len(rows))
        counts = np.array([len(row.ids) for row in rows])
        self.tally.prompt += int(counts.sum())
        ids = np.zeros((len(rows), counts.max()), np.int64)
        for row, line in zip(rows, ids, strict=True):
            line[: len(row.ids)] = row.ids
        while True:
            logits = self.run(ids, cache, counts, last=True)
            ids, counts = np.zeros((len(rows), 1), np.int64), np.zeros(len(rows), np.int64)
            for number, row in enumerate(rows):
                if row.done is None:
                    ids[number], piece = row.advance(logits[number, 0])
                    counts[number] = row.done is None
                    if piece or row.done:
                        yield number, piece, row.done
            if not counts.any():
                return
            # A row that has ended writes its fillers over its own last token, so that they need no room.
            cache.lengths = np.where(counts == 0, 0, cache.lengths)

    def _row(self, request: Request) -> "_Row":
        prompt = request.prompt
        if isinstance(prompt, str):
            ids = [*self._beginning, *self.tokenizer.encode(prompt, add_special_tokens=False).ids]
        else:
            ids = list(prompt) or self._beginning
        if len(ids) >= self.context:
            raise PromptTooLong(len(ids), self.context)
        written = Detokenizer(self.tokenizer, [] if request.is_answer else ids)
        return _Row(written, request, ids, self.ends, self.context, self.tally)


class _Row:
    """One text as it is written. ``ids`` is its prompt."""

    def __init__(
        self,
        written: Detokenizer,
        request: Request,
        ids: list[int],
        ends: frozenset[int],
        context: int,
        tally: Tally,
    ) -> None:
        self.ids = ids
        self.done: Done | None = None
        self._request, self._ends, self._tally = request, ends, tally
        self._random = np.random.default_rng(request.sampling.seed)
        room = min(request.max_new_tokens, context - len(ids))
        self._full: Ending = "length" if room == request.max_new_tokens else "context"
        # The prompt, and room for what is written after it.
        self._tokens: Ids = np.concatenate((np.array(ids, np.int64), np.zeros(room, np.int64)))
        self._written = 0
        # The text so far, and how much of it is told.
        self._new, self._told = written, 0

    def advance(self, logits: Logits) -> tuple[int, str]:
        """Returns the next token for ``logits`` [vocabulary], and what can be told now."""
        token = self._request.sampling.draw(logits, self.tokens, self._random)
        if token in self._ends:
            return token, self._end("end of text", len(self._text))
        self._tokens[len(self.tokens)] = token
        self._written += 1
        self._tally.new += 1
        self._new.append(token)
        stop = self._request.stop
        if found := [place for one in stop if (place := self._text.find(one, self._told)) >= 0]:
            return token, self._end("stop", min(found))
        if self.room == 0:
            return token, self._end(self._full, len(self._text))
        return token, self._tell(len(self._text) - held_back(self._text, stop))

    @property
    def _text(self) -> str:
        return self._new.text

    @property
    def tokens(self) -> Ids:
        """The prompt and what is written so far."""
        return self._tokens[: len(self.ids) + self._written]

    @property
    def room(self) -> int:
        """So many more tokens can be written."""
        return len(self._tokens) - len(self.tokens)

    def _tell(self, end: int) -> str:
        piece = self._text[self._told : end]
        self._told = max(self._told, end)
        return piece

    def _end(self, why: Ending, end: int) -> str:
        self.done = Done(why, len(self.ids), self._written)
        return self._tell(end)


def ask_for_exact_products(options: onnxruntime.SessionOptions) -> None:
    """Has products of unsigned and signed 8 bits not overflow, as they do on x86 without VNNI or AMX.

    Not asked for elsewhere: those products pass AMX by.
    """
    cpu = Path("/proc/cpuinfo")
    if not (cpu.is_file() and any(feature in cpu.read_text() for feature in ("vnni", "amx_int8"))):
        options.add_session_config_entry("session.x64quantprecision", "1")


def _token_ids(entry: int | list[int] | None) -> list[int]:
    """Returns the ids of a configuration's entry, which is one, several or none."""
    return [] if entry is None else [int(one) for one in (entry if isinstance(entry, list) else [entry])]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return min(len(one), len(other))


@contextlib.contextmanager
def _named(file: Path) -> Iterator[Path]:
    try:
        yield file
    except Exception as error:
        # onnxruntime and tokenizers have no exception of their own for a file that they cannot read.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Unloadable(f"{file}: damaged, or not what its name says ({reason[:_LONGEST_REASON]})") from None
