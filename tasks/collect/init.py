"""Brings the checkpoint that ``train.init`` names into ``models/init``, where that is not what lies there already.

A folder in Hugging Face layout is copied, a GGUF file unpacked into one.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import xxhash

from tasks import atomic, init, paths
from tasks.collect.report import InitReport
from tasks.digest import digest_of
from tasks.errors import BadInput, BadParameter

_MEND = "Mend the folder, or name another in train.init."
_MEND_MTP = "Mend the folder, or set train.mtp_loss_weight: 0 to leave its layers of multi-token prediction out."


def collect_init(wanted: str, relative_to: Path | None = None) -> InitReport | None:
    """Makes ``models/init`` hold the checkpoint ``wanted``; None where that is none.

    A relative path starts at ``relative_to``, without it in this folder. A checkpoint that has gone stays here, and is
    still used. Raises :class:`BadParameter` where there never was one, :class:`BadInput` for a folder that holds none,
    or weights that do not fit it, and :class:`tasks.errors.DiskFull` when there is no room.
    """
    if init.kind(wanted) != "checkpoint":
        return None
    # Each night collects, and few of them a checkpoint.
    from lm.hugging_face_files import checkpoint_files, is_pickle

    held = _held(wanted)
    source = _place(wanted, Path() if relative_to is None else relative_to)
    if not source.exists():
        if held is None:
            raise BadParameter(
                f"{paths.PARAMS}: train.init: {wanted!r} is neither scratch nor previous, and there is no such folder "
                f"or file ({source}). Name a folder in Hugging Face layout, or a GGUF file."
            )
        return InitReport(state="gone", notice=f"train.init: {wanted} has gone; its copy in {paths.INIT} is still used")
    known = paths.INIT_RECORD.is_file()
    if not source.is_dir():
        if is_pickle(source):
            raise BadInput(
                f"{source}: a pickle, which can run code when it is read. Convert it to safetensors, and name its "
                "folder in Hugging Face layout in train.init, or name a GGUF file."
            )
        unpacked = _digest_of_gguf(source)
        if held is not None and held.unpacked == unpacked:
            return InitReport(state="unchanged")
        with atomic.folder(paths.INIT) as folder:
            _unpack(source, folder)
            init.write_record(folder, init.Init(init=wanted, unpacked=unpacked))
        return InitReport(state="changed" if known else "new")
    with init.unusable_is_told(source, _MEND):
        files = checkpoint_files(source)
    if held is not None and dict(held.files) == _digests(source, files):
        # The parameters may have changed.
        _check_mtp(source)
        return InitReport(state="unchanged")
    _check_weights(source)
    with atomic.folder(paths.INIT) as folder:
        for file in files:
            copy = folder / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
        init.write_record(folder, init.Init(init=wanted))
    return InitReport(state="changed" if known else "new")


def _check_weights(source: Path) -> None:
    """Raises :class:`BadInput` where the weights in ``source`` are damaged, missing or too many.

    Training looks as well, hours later where there is much text to read before.
    """
    # It imports torch, which takes seconds.
    from lm import hugging_face

    with init.unusable_is_told(source, _MEND):
        hugging_face.check(source)
    _check_mtp(source)


def _check_mtp(source: Path) -> None:
    """Raises :class:`BadInput` where what ``source`` has of multi-token prediction is to be trained, and not whole."""
    from lm.config import without_further
    from lm.hugging_face_files import read_config

    config = read_config(source)
    if not init.trains_mtp() or without_further(config) == config:
        return
    from lm import hugging_face

    with init.unusable_is_told(source, _MEND_MTP):
        hugging_face.check(source, mtp=True)


def _unpack(source: Path, folder: Path) -> None:
    """Writes the model in a GGUF file into ``folder`` as a checkpoint in Hugging Face layout, in fp32."""
    # They import torch, which takes seconds.
    from lm import gguf_file, hugging_face
    from lm.hugging_face_files import CHAT_TEMPLATE
    from lm.model import LanguageModel
    from lm.weights import held_by

    with _unfit_is_told(source):
        loaded = gguf_file.load(source)
    if loaded.tokenizer is None:
        raise BadInput(
            f"{source}: its tokenizer cuts texts in a way that is not known here, and a model needs the one that it "
            "was trained with. Name the folder in Hugging Face layout that the file was made from."
        )
    model = LanguageModel(loaded.config)
    model.load_state_dict(loaded.state)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = Path(scratch) / "tokenizer.json"
        tokenizer.write_text(loaded.tokenizer)
        hugging_face.save_weights(loaded.config, held_by(model), folder)
        hugging_face.save_companions(loaded.config, tokenizer, folder, answer_ends=loaded.ends)
    if loaded.chat_template is not None:
        (folder / CHAT_TEMPLATE).write_text(loaded.chat_template, encoding="utf-8")


def _digest_of_gguf(source: Path) -> str:
    """Returns the digest of a GGUF file; of a model in several, one of theirs."""
    from lm.gguf_split import files_of

    with _unfit_is_told(source):
        files = files_of(source)
    digests = [*_digests(source.parent, files).values()]
    return digests[0] if len(digests) == 1 else xxhash.xxh3_128_hexdigest("".join(digests).encode())


@contextlib.contextmanager
def _unfit_is_told(source: Path) -> Iterator[None]:
    from lm.gguf_tensors import Unfit

    try:
        yield
    except Unfit as error:
        told = str(error).removeprefix(f"{source}: ")
        raise BadInput(
            f"{source}: {told}. Name another file in train.init, or a folder in Hugging Face layout."
        ) from None


def _held(wanted: str) -> init.Init | None:
    """Returns the record of what lies in ``models/init``, where that is all there and of the same ``train.init``."""
    try:
        record = init.read(paths.INIT)
    except BadInput:
        return None
    whole = all((paths.INIT / name).is_file() for name in record.files)
    return record if record.init == wanted and whole else None


def _digests(folder: Path, files: list[Path]) -> dict[str, str]:
    try:
        return {file.relative_to(folder).as_posix(): digest_of(file) for file in files}
    except OSError as error:
        raise BadInput(f"{error.filename}: cannot be read ({error.strerror}). Mend its permissions.") from None


def _place(wanted: str, start: Path) -> Path:
    try:
        return start / Path(wanted).expanduser()
    except RuntimeError:
        raise BadParameter(f"{paths.PARAMS}: train.init: {wanted!r}: there is no such user. Mend the path.") from None
