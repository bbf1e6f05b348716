"""Text from an INT8 model with onnxruntime, tokenizers and numpy alone. Imports no torch."""

import contextlib
import functools
import json
from collections.abc import Generator as Pieces
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from lm import cores, huge_pages
from lm.batch import Batch
from lm.cache import Cache
from lm.drafting import Ids
from lm.sampling import Logits
from lm.text import Done, Request, Text
from lm.tokenizer import Detokenizer, read_tokenizer

_LONGEST_REASON = 200
# Smaller ones lie where the processor finds them at once.
_LARGE = 64 << 20


class PromptTooLong(ValueError):
    """A prompt leaves no room for an answer."""

    def __init__(self, tokens: int, context: int, more: bool = False) -> None:
        """``more``: ``tokens`` are the fewest that it may have."""
        super().__init__(
            f"the prompt has {tokens} tokens{' or more' if more else ''}, and the model reads at most {context}, its "
            "answer included; shorten the prompt"
        )
        self.tokens, self.context = tokens, context


class Unloadable(ValueError):
    """A folder's files are no model, or a damaged one."""


class OtherInterface(ValueError):
    """A graph was exported by another version of Overnight: it is sound, but its inputs are not those of this one."""


class Generator:
    """Continues texts: graph runs over the pieces of a prompt, then one for each token of all texts."""

    def __init__(
        self, folder: Path, threads: int | None = None, graph: bytes | None = None, spin: bool = False
    ) -> None:
        """Loads ``model.onnx`` with its ``tokenizer.json`` and ``config.json``; ``threads`` None takes all cores.

        ``graph``: what is run in place of ``model.onnx``, with the weights that lie beside that. ``spin``: within a
        run, threads that wait for each other stay awake. Quicker where nothing else computes, slower beside it.
        Raises :class:`Unloadable` that names the file in ``folder`` that is at fault, and :class:`OtherInterface`.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or cores.available()
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
        # Between runs they sleep.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        ask_for_exact_products(options)
        # The fallback warnings of graph optimization say nothing to a user.
        options.log_severity_level = 3
        with _named(folder / "model.onnx") as model:
            is_large = sum(file.stat().st_size for file in folder.glob("*.onnx.data")) >= _LARGE
            if is_large:
                huge_pages.join()
            if graph is not None:
                options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
            self.session = onnxruntime.InferenceSession(graph or model, options, providers=["CPUExecutionProvider"])
            if is_large:
                huge_pages.collapse()
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
        self._run_options = onnxruntime.RunOptions()

    def stop(self) -> None:
        """Ends a run that is under way, between two of its operators, and any later one, by an exception of its own."""
        self._run_options.terminate = True

    def new_cache(self, batch: int = 1) -> Cache:
        """Returns the cache before the first token of ``batch`` texts."""
        return Cache(self.session, batch)

    def run(self, ids: Ids, cache: Cache, last: bool = False) -> Logits:
        """Returns logits [batch, length, vocabulary] of ``ids`` [batch, length], which come after ``cache``.

        ``last``: the logits of each row's last id alone, [batch, 1, vocabulary].
        """
        return self.observe(ids, cache, (), last)[0]

    def observe(
        self, ids: Ids, cache: Cache, names: Sequence[str], last: bool = False
    ) -> tuple[Logits, list[npt.NDArray[Any]]]:
        """Returns what :meth:`run` returns, and what ``names`` name: the graph's outputs after ``logits``, in order."""
        batch, length = ids.shape
        kept = np.tile(np.arange(length)[-1:] if last else np.arange(length), (batch, 1))
        cache.reserve(int(cache.lengths.max()) + length, self.context)
        binding = cache.binding
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids, np.int64))
        binding.bind_cpu_input("positions", cache.lengths[:, None] + np.arange(length))
        binding.bind_cpu_input("logits_to_keep", kept)
        for name in ("logits", *names):
            binding.bind_output(name)
        self.session.run_with_iobinding(binding, self._run_options)
        cache.lengths += length
        found = binding.get_outputs()
        logits, *others = (found[self._outputs.index(name)].numpy() for name in ("logits", *names))
        return logits, others

    def text(self, request: Request) -> Text:
        """Returns the text that ``request`` asks for, of which nothing is read yet. Raises :class:`PromptTooLong`."""
        prompt = request.prompt
        if isinstance(prompt, str):
            self.check_characters(len(prompt))
            ids = [*self._beginning, *self.tokenizer.encode(prompt, add_special_tokens=False).ids]
        else:
            ids = list(prompt) or self._beginning
        if len(ids) + min(request.max_new_tokens, 1) > self.context:
            raise PromptTooLong(len(ids), self.context)
        written = Detokenizer(self.tokenizer, [] if request.is_answer or request.echo else ids)
        return Text(request, ids, written, self.ends, self.context - len(ids))

    def check_characters(self, count: int) -> None:
        """Raises :class:`PromptTooLong` where a text of ``count`` characters has too many tokens whichever they are.

        Before it is cut into tokens, which takes a minute for 20 MB.
        """
        if count > self.context * self._most_characters:
            raise PromptTooLong(-(-count // self._most_characters), self.context, more=True)

    @functools.cached_property
    def _most_characters(self) -> int:
        # What a token is called has a character for each of its text's, or for each byte of it.
        return max(len(name) for name in self.tokenizer.get_vocab())

    def generate(self, request: Request, held: Batch | None = None) -> Pieces[str, None, Done]:
        """Yields the continuation of one prompt piece by piece and returns how it ended.

        A text stops at a token that ends texts or turns, before the first of its ``stop``, after ``max_new_tokens``, or
        when it is as long as the model's context: it was trained on nothing longer, and a text that drops its beginning
        would be another text. What ``held`` has of earlier texts is not computed again, and it is left with this one.
        Equal calls write equal texts; beside others, after a ``held`` beginning or with guesses, sums are taken in
        another order, and a text may turn where two tokens are nearly alike. Raises :class:`PromptTooLong`.
        """
        batch, text = held or Batch(self, 1), self.text(request)
        batch.add(text)
        try:
            while text.done is None:
                yield from (piece for _, piece in batch.step() if piece)
                if text.failed is not None:
                    raise text.failed
        finally:
            batch.drop(text)
        return text.done


def ask_for_exact_products(options: onnxruntime.SessionOptions, cpu: Path = Path("/proc/cpuinfo")) -> None:
    """Has products of unsigned and signed 8 bits not overflow, as they do on x86 without VNNI or AMX.

    Not asked for elsewhere: those products pass AMX by. What it is lies in ``cpu``, where the system says it.
    """
    if not (cpu.is_file() and any(feature in cpu.read_text() for feature in ("vnni", "amx_int8"))):
        options.add_session_config_entry("session.x64quantprecision", "1")


def _token_ids(entry: int | list[int] | None) -> list[int]:
    """Returns the ids of a configuration's entry, which is one, several or none."""
    return [] if entry is None else [int(one) for one in (entry if isinstance(entry, list) else [entry])]


@contextlib.contextmanager
def _named(file: Path) -> Iterator[Path]:
    try:
        yield file
    except Exception as error:
        # onnxruntime and tokenizers have no exception of their own for a file that they cannot read.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Unloadable(f"{file}: damaged, or not what its name says ({reason[:_LONGEST_REASON]})") from None
