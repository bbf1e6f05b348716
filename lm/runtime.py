"""Text from an INT8 model with onnxruntime, tokenizers and numpy alone. Imports no torch."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
from tokenizers import Tokenizer

Logits = npt.NDArray[np.float32]


class PromptTooLong(ValueError):
    """A prompt leaves no room for an answer."""


class Generator:
    """Continues text. One graph run over the prompt, then one a token, the latent cache going from run to run."""

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        """Loads ``model.onnx`` and ``tokenizer.json`` from ``folder``; ``threads`` None takes all cores."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        # A thread that spins while it waits takes its core from whatever else runs there.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Without VNNI, products of unsigned and signed 8 bits overflow on x86: pay for exact ones there.
        options.add_session_config_entry("session.x64quantprecision", "1")
        # The fallback warnings of graph optimization say nothing to a user.
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        # The longest text, in tokens, that the model was trained on and has positions for.
        self.context: int = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
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
        self,
        prompt: str,
        max_new_tokens: int,
        temperature: float = 0.8,
        top_k: int = 40,
        seed: int = 0,
    ) -> Iterator[str]:
        """Yields the continuation of ``prompt`` piece by piece; equal arguments yield equal text.

        A temperature of 0 takes the likeliest token. Stops at the end-of-text token, after ``max_new_tokens``, or when
        the text is as long as the model's context. Raises :class:`PromptTooLong`.
        """
        ids = self.tokenizer.encode(prompt).ids
        if len(ids) >= self.context:
            raise PromptTooLong(
                f"the prompt has {len(ids)} tokens, and the model reads at most {self.context}, its answer included; "
                "shorten the prompt"
            )
        stop = ids[0]  # the one special token begins and ends every document
        room = min(max_new_tokens, self.context - len(ids))
        random = np.random.default_rng(seed)
        cache, new, told = self.empty_cache(), list(ids), ""
        written: list[int] = []
        for _ in range(room):
            logits, cache = self.run(np.array([new], np.int64), cache)
            token = sample(logits[0, -1], temperature, top_k, random)
            if token == stop:
                break
            written.append(token)
            new = [token]
            text = self.tokenizer.decode(written)
            # A character of several tokens decodes to U+FFFD until its last one is there.
            if not text.endswith("�"):
                yield text[len(told) :]
                told = text


def sample(logits: Logits, temperature: float, top_k: int, random: np.random.Generator) -> int:
    """Returns a token drawn from the ``top_k`` likeliest of ``logits`` [vocabulary]; the likeliest at temperature 0."""
    if temperature == 0:
        return int(logits.argmax())
    kept = np.argsort(-logits, kind="stable")[:top_k]
    scaled = (logits[kept] - logits[kept[0]]).astype(np.float64) / temperature
    weights = np.exp(scaled)
    return int(random.choice(kept, p=weights / weights.sum()))
