"""Text from the project's INT8 model, with onnxruntime and no torch."""

import json
from collections.abc import Iterator
from pathlib import Path

from tasks import paths
from tasks.errors import BadInput


def continue_text(
    folder: Path, prompt: str, max_new_tokens: int, temperature: float = 0.8, top_k: int = 40, seed: int = 0
) -> Iterator[str]:
    """Yields what the model in ``folder`` writes after ``prompt``. Raises :class:`BadInput` where there is none."""
    for name in (paths.INT8_GRAPH.name, "tokenizer.json", "config.json"):
        if not (folder / name).is_file():
            raise BadInput(f"{folder / name}: no such file. Run `overnight run` first; it makes the INT8 model.")
    # onnxruntime takes most of a second to import.
    from lm.runtime import Generator

    context = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
    generator = Generator(folder)
    length = len(generator.tokenizer.encode(prompt).ids)
    if context is not None and length >= context:
        raise BadInput(f"the text has {length} tokens and the model reads at most {context}; shorten the text.")
    yield from generator.generate(prompt, max_new_tokens, temperature, top_k, seed, context)
