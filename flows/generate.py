"""Text from the project's INT8 model, with onnxruntime and no torch."""

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
    from lm.runtime import Generator, PromptTooLong

    try:
        yield from Generator(folder).generate(prompt, max_new_tokens, temperature, top_k, seed)
    except PromptTooLong as error:
        raise BadInput(f"{error}.") from None
