"""Texts written side by side from their beginnings to their ends."""

from collections.abc import Sequence

from lm.batch import Batch
from lm.runtime import Generator
from lm.text import Done, Request


def written_together(model: Generator, requests: Sequence[Request]) -> list[tuple[str, Done]]:
    """Returns the text of each request, and how it ended; each is told nothing after that."""
    batch, texts, told = Batch(model, len(requests)), [model.text(request) for request in requests], {}
    for text in texts:
        batch.add(text)
        told[text] = ""
    ended: dict[object, Done] = {}
    while len(ended) < len(texts):
        for text, piece in batch.step():
            assert text not in ended
            told[text] += piece
            if text.done:
                ended[text] = text.done
    return [(told[text], ended[text]) for text in texts]
