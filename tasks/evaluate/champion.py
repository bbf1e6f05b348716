"""The champion on the candidate's test text, whatever its tokenizer, context and architecture."""

import json
from dataclasses import dataclass

import numpy as np

from lm.runtime import Generator, OtherInterface, Unloadable
from lm.tokenizer import read_tokenizer
from tasks import champion, paths
from tasks.bootstrap import Bootstrap
from tasks.errors import BadInput
from tasks.evaluate import report
from tasks.evaluate.routing import Ids
from tasks.evaluate.score import Learned, Scores, Sums, nats_of
from tasks.progress import Progress
from tasks.section import read_yaml
from tasks.shards import Tokens


@dataclass(frozen=True)
class Opponent:
    """The champion, loaded: its version's tag, its INT8 model, and whether text is dealt out as it was for it.

    ``model`` is None where another version of Overnight exported it, whose graphs this one does not run.
    """

    version: str
    model: Generator | None
    same_split: bool

    def nats(
        self,
        texts: list[str],
        documents: list[tuple[Tokens, int]],
        learned: list[Learned] | None,
        threads: int,
        progress: Progress,
    ) -> Sums | None:
        """Returns its loss on each of ``texts``, in nats [texts]; None without a model. Raises as :func:`encode`.

        Where only what is ``learned`` of the ``documents`` counts, a text is not all that a model reads: the champion
        reads the same tokens, and is None where it has another tokenizer.
        """
        if self.model is None:
            return None
        if learned is None:
            return nats_of(self.model, encode(texts), threads, progress)
        if (paths.CHAMPION / paths.TOKENIZER.name).read_bytes() != paths.TOKENIZER.read_bytes():
            return None
        ids = [tokens.astype(np.int64) for tokens, _ in documents]
        return nats_of(self.model, ids, threads, progress, learned)

    def result(self, nats: Sums, scores: Scores, bootstrap: Bootstrap) -> report.ChampionResult:
        """Returns how it compares with the candidate, whose ``scores`` are of the same documents as ``nats``."""
        return report.champion(self.version, nats, scores, bootstrap, self.same_split)


def load() -> Opponent | None:
    """Returns the champion that lies in ``models/champion``, or None where nothing is promoted yet.

    Raises :class:`BadInput` where the folder is missing, incomplete or unreadable.
    """
    record = champion.read()
    if record.version is None:
        return None
    anew = f"Remove {paths.CHAMPION} and {paths.CHAMPION}.dvc; `overnight run` brings it anew."
    for name in champion.MODEL_FILES:
        if not (paths.CHAMPION / name).is_file():
            raise BadInput(
                f"{paths.CHAMPION / name}: no such file, though {paths.CHAMPION_RECORD} names {record.version}. {anew}"
            )
    try:
        model: Generator | None = Generator(paths.CHAMPION, threads=1)
    except OtherInterface:
        model = None
    except Unloadable as error:
        raise BadInput(f"{error}; it is to be the champion's, {record.version}. {anew}") from None
    here = champion.split_of(read_yaml(paths.PARAMS))
    same_split = record.split is not None and here is not None and record.split.deals_like(here)
    return Opponent(record.version, model, same_split)


def encode(texts: list[str]) -> list[Ids]:
    """Returns each text as the champion's tokens, its beginning-of-text token first, so that all bytes are scored.

    Raises :class:`BadInput` when its tokenizer does not keep a text as it is: its loss would be that of another text.
    """
    tokenizer = read_tokenizer(paths.CHAMPION / "tokenizer.json")
    # A text may hold the name of a special token; to a model it is plain text.
    tokenizer.encode_special_tokens = True
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    kept = tokenizer.decode_batch(ids, skip_special_tokens=False)
    changed = sum(before != after for before, after in zip(texts, kept, strict=True))
    if changed:
        raise BadInput(
            f"{paths.CHAMPION / 'tokenizer.json'}: {changed} of {len(texts)} test documents come back changed, so the "
            "champion's loss is not comparable. Promote a version whose tokenizer keeps the text."
        )
    first = _beginning()
    return [np.array([first, *found], dtype=np.int64) for found in ids]


def _beginning() -> int:
    config = json.loads((paths.CHAMPION / "config.json").read_bytes())
    # Families without a beginning-of-text token begin a document with the one that ends the document before.
    found = config.get("bos_token_id")
    return int(config["eos_token_id"] if found is None else found)
