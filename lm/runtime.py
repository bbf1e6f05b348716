"""Text from an INT8 model with onnxruntime, tokenizers and numpy alone. Imports no torch."""

import contextlib
import json
import os
from collections import abc
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnxruntime
from tokenizers import Tokenizer

from lm.sampling import Logits, Sampling, held_back

DEFAULT = Sampling()
# Why a text ended: the model ended it, a string that was to stop it came, it is as long as was asked for, or it fills
# the model's context.
Ending = Literal["end of text", "stop", "length", "context"]
_LONGEST_REASON = 200


class PromptTooLong(ValueError):
    """A prompt leaves no room for an answer."""


class Unloadable(ValueError):
    """A folder's files are no model, or a damaged one."""


class Generator:
    """Continues text. One graph run over the prompt, then one a token, the latent cache going from run to run."""

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        """Loads ``model.onnx`` with its ``tokenizer.json`` and ``config.json``; ``threads`` None takes all cores.

        Raises :class:`Unloadable` that names the file in ``folder`` that is at fault.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        # A thread that spins while it waits takes its core from whatever else runs there.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Without VNNI, products of unsigned and signed 8 bits overflow on x86: pay for exact ones there.
        options.add_session_config_entry("session.x64quantprecision", "1")
        # The fallback warnings of graph optimization say nothing to a user.
        options.log_severity_level = 3
        with _named(folder / "model.onnx") as model:
            self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        with _named(folder / "tokenizer.json") as tokenizer:
            self.tokenizer = Tokenizer.from_file(str(tokenizer))
        with _named(folder / "config.json") as config:
            # The longest text, in tokens, that the model was trained on and has positions for.
            self.context: int = json.loads(config.read_text())["max_position_embeddings"]
        self.cache_shapes = {
            value.name: value.shape for value in self.session.get_inputs() if value.name.startswith("past_")
        }
        self._outputs = ["logits", *(name.replace("past_", "present_") for name in self.cache_shapes)]

    def empty_cache(self, batch: int = 1) -> dict[str, npt.NDArray[np.float32]]:
        """Returns the cache before the first token: ``past_I`` [batch, 0, width] for each layer."""
        return {name: np.zeros((batch, 0, shape[2]), np.float32) for name, shape in self.cache_shapes.items()}

    def run(
        self, ids: npt.NDArray[np.int64], cache: dict[str, npt.NDArray[np.float32]]
    ) -> tuple[Logits, dict[str, npt.NDArray[np.float32]]]:
        """Returns logits [batch, length, vocabulary] of ``ids`` [batch, length] after ``cache``, and the new cache."""
        logits, *presents = self.session.run(self._outputs, {"input_ids": ids, **cache})
        return logits, dict(zip(cache, presents, strict=True))

    def generate(
        self, prompt: str, max_new_tokens: int, sampling: Sampling = DEFAULT, stop: tuple[str, ...] = ()
    ) -> abc.Generator[str, None, Ending]:
        """Yields the continuation of ``prompt`` piece by piece and returns why it ended; equal arguments, equal text.

        Stops at the end-of-text token, before the first of the strings ``stop``, after ``max_new_tokens``, or when the
        text is as long as the model's context: it was trained on nothing longer, and text that drops its beginning
        would be another text. Raises :class:`PromptTooLong`.
        """
        ids = self.tokenizer.encode(prompt).ids
        if len(ids) >= self.context:
            raise PromptTooLong(
                f"the prompt has {len(ids)} tokens, and the model reads at most {self.context}, its answer included; "
                "shorten the prompt"
            )
        end_of_text = ids[0]  # the one special token begins and ends every document
        room = min(max_new_tokens, self.context - len(ids))
        random = np.random.default_rng(sampling.seed)
        cache, new, told = self.empty_cache(), list(ids), 0
        written: list[int] = []
        text = ""
        for _ in range(room):
            logits, cache = self.run(np.array([new], np.int64), cache)
            token = sampling.draw(logits[0, -1], np.array(ids + written, np.int64), random)
            if token == end_of_text:
                yield text[told:]
                return "end of text"
            written.append(token)
            new = [token]
            text = self.tokenizer.decode(written)
            if found := [place for one in stop if (place := text.find(one)) >= 0]:
                yield text[told : min(found)]
                return "stop"
            # A character of several tokens decodes to U+FFFD until its last one is there.
            whole = len(text) - held_back(text, stop)
            if not text.endswith("�") and whole > told:
                yield text[told:whole]
                told = whole
        # What might have become one of `stop`, but no half character.
        yield text[told:].rstrip("�")
        return "context" if room < max_new_tokens else "length"


@contextlib.contextmanager
def _named(file: Path) -> abc.Iterator[Path]:
    try:
        yield file
    except Exception as error:
        # onnxruntime and tokenizers have no exception of their own for a file that they cannot read.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Unloadable(f"{file}: damaged, or not what its name says ({reason[:_LONGEST_REASON]})") from None
