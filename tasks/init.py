"""What training starts from: ``train.init`` in ``params.yaml``, and the folder ``models/init``.

``models/init`` is an input that is brought and versioned, as ``data/raw`` and ``models/champion`` are: collecting
copies a checkpoint that ``train.init`` names, the flow brings the version in production. ``init.json`` says what lies
there, and the digest of each file; for a training from scratch it stands alone. ``shard`` takes the tokenizer from
there and ``train`` the weights, so that they cannot part.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tasks import atomic, paths
from tasks.digest import digest_of
from tasks.errors import BadInput
from tasks.section import read_yaml

SCRATCH = "scratch"
PREVIOUS = "previous"
Kind = Literal["scratch", "previous", "checkpoint"]


class Init(BaseModel):
    """``init.json``: ``init`` is ``train.init`` as it was; ``version`` and ``commit`` are those of the version there.

    ``files`` has the 128-bit XXH3 digest of each file beside it; none where training starts from scratch. ``unpacked``
    is that of the GGUF file that they were unpacked from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    init: str
    version: str | None = None
    commit: str | None = None
    unpacked: str | None = None
    files: Mapping[str, str] = {}

    @property
    def name(self) -> str:
        """The version, or the last part of the path: a report may be published, and where it lay is nobody's affair."""
        return self.version or PurePath(self.init).name or self.init


def kind(init: str) -> Kind:
    """Returns what the value of ``train.init`` means: ``checkpoint`` for the path of a folder or a file."""
    if init == SCRATCH:
        return "scratch"
    return "previous" if init == PREVIOUS else "checkpoint"


def wanted() -> str:
    """Returns ``train.init``. Whether it is one is checked with the rest of its section."""
    found = _section().get("init")
    return found if isinstance(found, str) else SCRATCH


def trains_mtp() -> bool:
    """Returns whether layers of multi-token prediction are trained, by the section ``train``, as it stands."""
    section = _section()
    return section.get("mtp_loss_weight") != 0 and section.get("lora") is None


def _section() -> dict[str, Any]:
    found = read_yaml(paths.PARAMS).get("train")
    return found if isinstance(found, dict) else {}


def read(folder: Path = paths.INIT) -> Init:
    """Returns what lies in ``folder``. Raises :class:`BadInput` where nothing says so."""
    record = folder / paths.INIT_RECORD.name
    try:
        return Init.model_validate_json(record.read_bytes())
    except FileNotFoundError:
        raise BadInput(
            f"{record}: no such file. `overnight run` brings what train.init names there; of a checkpoint "
            "`python -m tasks.collect` does."
        ) from None
    except ValidationError as error:
        raise BadInput(
            f"{record}: not a record of what training starts from ({error.error_count()} faults). Remove {folder} and "
            f"{folder}.dvc; `overnight run` brings it anew."
        ) from None


def checkpoint() -> Path | None:
    """Returns the folder of the checkpoint that training starts from, None where it starts from scratch.

    The first night with ``previous`` has no version to start from, so it starts from scratch too. Raises
    :class:`BadInput` where ``models/init`` is missing, or of another ``train.init``.
    """
    init = wanted()
    if kind(init) == "scratch":
        return None
    record = read()
    if record.init != init:
        raise BadInput(
            f"{paths.INIT}: it holds what train.init called {record.init!r}, and {paths.PARAMS} says {init!r}. "
            "`overnight run`, from its beginning, brings that."
        )
    return paths.INIT if record.files else None


def verify(folder: Path) -> None:
    """Raises :class:`BadInput` that names a file of the checkpoint in ``folder`` that is not as it was brought."""
    for name, digest in read(folder).files.items():
        found = digest_of(folder / name) if (folder / name).is_file() else "missing"
        if found != digest:
            raise BadInput(
                f"{folder / name}: not what was brought: its digest is {found}, {paths.INIT_RECORD.name} says "
                f"{digest}. Fetch it again (dvc checkout --force {folder}.dvc)."
            )


def write_record(folder: Path, init: Init) -> None:
    """Writes ``init.json`` beside the files in ``folder``; of ``init`` all but the digests counts."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / paths.INIT_RECORD.name)
    files = {path.relative_to(folder).as_posix(): digest_of(path) for path in found}
    atomic.write_json(folder / paths.INIT_RECORD.name, init.model_copy(update={"files": files}).model_dump())


@contextlib.contextmanager
def unusable_is_told(
    folder: Path, do: str = "Name another checkpoint in train.init, or mend that one."
) -> Iterator[None]:
    """Turns :class:`lm.hugging_face_config.Unusable` into :class:`BadInput`: names ``folder``, and what to ``do``."""
    from lm.hugging_face_config import Unusable

    try:
        yield
    except Unusable as error:
        raise BadInput(f"{folder}: {error}. {do}") from None
