"""``overnight export``: the project's model as other programs take it. Imports no torch.

``gguf`` is one file for llama.cpp and what is built on it (Ollama, LM Studio), made from the float model. By default
its matrices are f16: what the card measured of the float model then holds for it, which nothing has measured for q8_0,
and llama.cpp makes smaller ones of it. ``hf`` is the float model as transformers loads it, in fp32 as it was measured
or in 16 bits as most are published; ``onnx`` the INT8 model with what it needs: the graph that ships, or with the type
``standard`` one in ONNX's own operators alone.
"""

import dataclasses
import filecmp
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console

from flows import generate, project
from flows.terminal import print_line
from flows.versions import describe_size
from tasks import atomic, paths
from tasks.errors import BadInput, UserMistake

FOLDER = paths.SCRATCH / "export"
FORMATS = ("gguf", "hf", "onnx")
DEFAULT_TYPE = "f16"
TYPES = {"hf": ("f32", "bf16", "f16"), "onnx": ("onnxruntime", "standard")}
FLOAT_FILES = ("config.json", "tokenizer.json")
# It was measured, and nobody writes with it.
_UNUSED = (paths.POST_TRAINING.name,)
# What lies there is DVC's: a file more, and a stage's output is another one.
_OF_RUNS = (Path("data"), Path("models"))


@dataclasses.dataclass(frozen=True)
class Request:
    """What to write, and where; ``type`` is that of weights, or of a graph. None: the format's default."""

    to: str
    output: Path | None = None
    type: str | None = None


def export(root: Path, request: Request, out: Console, err: Console) -> Path:
    """Writes the model of the project in ``root`` and returns where it lies; it is there whole, or not at all.

    ``out`` is told where, ``err`` what the format has no room for.

    Raises :class:`UserMistake` for a format or a type that does not exist, and for a place that is taken, that runs
    write to, or that cannot be written; :class:`BadInput` where there is no model, a damaged one, or one that the
    format cannot hold.
    """
    if request.to not in FORMATS:
        raise UserMistake(f"--to: there is no format '{request.to}'; choose one of {', '.join(FORMATS)}.")
    if request.type is not None and request.to in TYPES and request.type not in TYPES[request.to]:
        raise UserMistake(f"--type: there is no type '{request.type}'; choose one of {', '.join(TYPES[request.to])}.")
    for place in _OF_RUNS:
        if request.output is not None and request.output.resolve().is_relative_to((root / place).resolve()):
            raise UserMistake(f"{request.output}: in {place}/, where runs write; name another place with --output.")
    try:
        target = _to_gguf(root, request, err) if request.to == "gguf" else _to_folder(root, request)
    except OSError as error:
        raise UserMistake(f"{error.filename or request.output}: {error.strerror or error}.") from None
    size = sum(file.stat().st_size for file in [target, *target.rglob("*")] if file.is_file())
    print_line(out, f"{target}  {describe_size(size)}")
    return target


def _to_gguf(root: Path, request: Request, err: Console) -> Path:
    from lm.gguf_tensors import Unfit
    from lm.gguf_write import Kind, write

    kinds: tuple[Kind, ...] = get_args(Kind)
    found = [kind for kind in kinds if kind == (request.type or DEFAULT_TYPE)]
    if not found:
        raise UserMistake(f"--type: there is no type '{request.type}'; choose one of {', '.join(kinds)}.")
    card = project.parameters(root).card
    target = request.output or root / FOLDER / f"{card.name}-{found[0]}.gguf"
    if target.is_dir() or (request.output is not None and target.exists()):
        what = "a folder; name a file in it" if target.is_dir() else "already there; remove it, or name another file"
        raise UserMistake(f"{target}: {what} with --output.")
    source = _source(root, paths.FLOAT, FLOAT_FILES)
    try:
        with atomic.file(target) as opened:
            # The library opens the file itself, by the name that it has until it is whole.
            about = {"general.name": card.name, "general.license": card.licence}
            untold = write(source, Path(opened.name), found[0], about)
    except Unfit as error:
        raise BadInput(f"{error}.") from None
    if untold:
        print_line(
            err, f"A GGUF file names three tokens that end a text; llama.cpp will not stop at {', '.join(untold)}."
        )
    return target


def _to_folder(root: Path, request: Request) -> Path:
    # None where the model is taken as it lies there.
    other = None if request.type in (None, TYPES[request.to][0]) else request.type
    target = request.output or root / FOLDER / "-".join(filter(None, (request.to, other)))
    # What an earlier export left in the place that is taken without --output is replaced.
    if request.output is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserMistake(f"{target}: not an empty folder. Name one that is empty, or not there yet, with --output.")
    if request.to == "hf":
        source = _source(root, paths.FLOAT, FLOAT_FILES)
    else:
        source = root / paths.INT8
        generate.check_made(root, paths.INT8)
        # What does not load here loads nowhere.
        generate.load(source)
    with atomic.folder(target) as folder:
        if other is None:
            _copy(source, folder, without=_UNUSED)
        elif other == "standard":
            _write_standard(source, folder)
        else:
            _write_in_16_bits(source, folder, other)
        if (card := root / paths.CARD).is_dir():
            _copy(card, folder)
        if request.to == "hf":
            _check(folder, source)
    return target


def _write_standard(source: Path, folder: Path) -> None:
    from lm import onnx_standard

    graph = paths.INT8_GRAPH.name
    # The audit is of the operators that ship.
    _copy(source, folder, without=(graph, f"{graph}.data", paths.AUDIT.name, *_UNUSED))
    onnx_standard.write(source / graph, folder / graph)


def _write_in_16_bits(source: Path, folder: Path, type_: str) -> None:
    from lm import half_precision
    from lm.gguf_tensors import Unfit
    from lm.hugging_face_files import CONFIG, INDEX, weight_files

    _check(source, source)
    _copy(source, folder, without=(CONFIG, INDEX, *(path.name for path in weight_files(source))))
    try:
        half_precision.write(source, folder, "bf16" if type_ == "bf16" else "f16")
    except Unfit as error:
        raise BadInput(f"{source}: {error}.") from None


def _source(root: Path, place: Path, names: Sequence[str]) -> Path:
    generate.check_made(root, place)
    for name in names:
        if not (root / place / name).is_file():
            raise BadInput(
                f"{place / name}: no such file. Run `overnight run` first; it makes the model. Where one has failed, "
                "`overnight status` says why."
            )
    return root / place


def _copy(source: Path, folder: Path, without: Sequence[str] = ()) -> None:
    for name in sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file()):
        if {*name.parts} & {*without}:
            continue
        file, copy = source / name, folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        if not filecmp.cmp(file, copy, shallow=False):
            raise BadInput(f"{file}: changed while it was copied; a run makes it anew. Export again when it has ended.")


def _check(folder: Path, source: Path) -> None:
    from lm.gguf_tensors import Unfit
    from lm.gguf_write import check

    try:
        check(folder)
    except Unfit as error:
        told = str(error).replace(str(folder), str(source))
        raise BadInput(f"{told}. `overnight run` makes the model anew.") from None
