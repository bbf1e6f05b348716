"""What a commit records of its bytes: every output of ``dvc.lock`` and every folder under ``dvc add``, with its MD5.

Read from Git's objects alone, without a checkout. An MD5 that ends in ``.dir`` is that of a folder's listing: a JSON
list of the files in it with theirs, as DVC writes it.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from flows.git import git, show
from tasks.errors import UserMistake

FOLDER_SUFFIX = ".dir"
_MD5 = re.compile(r"[0-9a-f]{32}")
OBJECT = re.compile(r"[0-9a-f]{32}(\.dir)?")
"""The MD5 of a file, or of a folder."""
_READERS = 8


@dataclasses.dataclass(frozen=True)
class Output:
    """A file or folder that DVC versions. ``path`` is relative to the project, ``size`` in bytes.

    ``stage`` is the stage that writes it, None for what ``dvc add`` versions.
    """

    path: Path
    md5: str
    size: int
    stage: str | None

    @property
    def is_folder(self) -> bool:
        return self.md5.endswith(FOLDER_SUFFIX)


def recorded(root: Path, commit: str) -> tuple[Output, ...]:
    """Returns what ``commit`` records: first what was added, in order of its pointers, then the stages' outputs.

    Raises :class:`UserMistake` when it holds no pipeline, or a pointer that cannot be read.
    """
    if show(root, commit, "dvc.lock") is None:
        raise UserMistake(
            f"{commit[:12]}: this commit holds no dvc.lock, so it is no version. Choose one of `overnight versions`."
        )
    return named(root, commit)


def named(root: Path, commit: str) -> tuple[Output, ...]:
    """Returns what :func:`recorded` does, of any commit: one in which no stage has run yet may hold text."""
    lock = _yaml(root, commit, "dvc.lock") or {}
    names = git(root, "ls-tree", "-r", "--name-only", "-z", commit).split("\0")
    pointers = {name: _yaml(root, commit, name) or {} for name in names if name.endswith(".dvc")}
    return _outputs(commit, pointers, lock)


def present(root: Path) -> tuple[Output, ...]:
    """Returns what the project's files record as they are now, committed or not; as :func:`recorded` does."""
    names = git(root, "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", "*.dvc").split("\0")
    pointers = {name: _yaml(root, None, name) or {} for name in sorted(filter(None, names))}
    return _outputs(str(root), pointers, _yaml(root, None, "dvc.lock") or {})


def parse_listing(content: bytes) -> dict[PurePosixPath, str]:
    """Returns the MD5 of each file in a folder, by its path there, from DVC's listing. Raises :class:`ValueError`."""
    try:
        listed = {PurePosixPath(entry["relpath"]): str(entry["md5"]) for entry in json.loads(content)}
    except (TypeError, KeyError) as error:
        raise ValueError(f"no listing of a folder: {error}") from None
    if any(path.is_absolute() or ".." in path.parts for path in listed):
        raise ValueError("a listing that leaves its folder")
    if not all(_MD5.fullmatch(md5) for md5 in listed.values()):
        raise ValueError("a listing with what is no MD5")
    return listed


def listing(files: Mapping[PurePosixPath, str]) -> bytes:
    """Returns DVC's listing of a folder with these files, the inverse of :func:`parse_listing`."""
    listed = [{"md5": md5, "relpath": str(path)} for path, md5 in files.items()]
    # The order and the spelling of dvc_data.hashfile.tree.Tree.as_bytes.
    return json.dumps(sorted(listed, key=lambda entry: entry["relpath"]), sort_keys=True).encode()


def listing_md5(files: Mapping[PurePosixPath, str]) -> str:
    """Returns the MD5 that DVC gives to a folder with these files: that of its listing, ``.dir`` at the end."""
    return hashlib.md5(listing(files)).hexdigest() + FOLDER_SUFFIX


def md5_of(path: Path) -> str:
    """Returns the MD5 of the bytes of the file at ``path``, read now: DVC's own table of hashes is not asked."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def files_of(path: Path) -> dict[PurePosixPath, str]:
    """Returns the MD5 of each file below the folder at ``path``, read now; nothing where there is no folder."""
    names = sorted(file for file in path.rglob("*") if file.is_file())
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        digests = list(pool.map(md5_of, names))
    return {
        PurePosixPath(name.relative_to(path).as_posix()): digest
        for name, digest in zip(names, digests, strict=True)
    }  # fmt: skip


def _outputs(where: str, pointers: Mapping[str, Mapping[str, Any]], lock: Mapping[str, Any]) -> tuple[Output, ...]:
    found: list[Output] = []
    for name, pointer in pointers.items():
        found.extend(_output(where, entry, Path(name).parent, None) for entry in pointer.get("outs", []))
    for stage, entry in (lock.get("stages") or {}).items():
        found.extend(_output(where, output, Path(), stage) for output in entry.get("outs", []))
    return tuple(found)


def _output(commit: str, entry: Mapping[str, Any], folder: Path, stage: str | None) -> Output:
    path, md5 = folder / entry["path"], entry.get("md5")
    if path.is_absolute() or ".." in path.parts:
        raise UserMistake(f"{commit[:12]}: {path} lies outside the project; only what lies inside can be restored.")
    # An object's path in the cache is made of it.
    if md5 is None or not OBJECT.fullmatch(str(md5)) or entry.get("hash", "md5") != "md5":
        raise UserMistake(f"{commit[:12]}: {path} is recorded without an MD5, so its bytes cannot be verified.")
    return Output(path, str(md5), int(entry.get("size", 0)), stage)


def _yaml(root: Path, commit: str | None, name: str) -> dict[str, Any] | None:
    """Returns the mapping in the file ``name`` of ``commit``, or of the project as it is now; None without a file."""
    if commit is not None:
        content = show(root, commit, name)
    else:
        content = (root / name).read_bytes() if (root / name).is_file() else None
    if content is None:
        return None
    try:
        return dict(YAML(typ="safe").load(content) or {})
    except (YAMLError, ValueError, TypeError) as error:
        where = commit[:12] if commit is not None else root
        raise UserMistake(f"{where}: {name} cannot be read: {' '.join(str(error).split())}") from None
