"""Everything that touches DVC: its graph, what is stale, and the commands that run a stage or version a folder.

Stages run as child processes, ``dvc repro -s``, because ``Repo.reproduce`` is not safe in threads and DVC leaves a
stage's command alive when it is told to end. Only reading happens in this process, and DVC is imported late (a second).
DVC names stages relative to the current directory, which therefore has to be the project's folder.
"""

import contextlib
import dataclasses
import errno
import logging
import os
import re
import shutil
import signal
import sqlite3
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from flows import dvc_lock, ownership
from flows.graph import Graph, Stage, in_order
from flows.store import FULL, S3_REFUSES
from flows.store import Store as Store
from tasks import paths
from tasks.errors import EXIT_TRY_AGAIN, UserMistake


@dataclasses.dataclass(frozen=True)
class Change:
    """One reason why a stage is stale: ``how`` is DVC's word, such as modified, deleted or new."""

    kind: Literal["dependency", "output", "parameter", "command"]
    name: str
    how: str

    def __str__(self) -> str:
        return f"{self.name} {self.how}"


@dataclasses.dataclass(frozen=True)
class Stale:
    """Why a stage is not up to date. ``never_run``: ``dvc.lock`` knows nothing of it."""

    changes: tuple[Change, ...]
    never_run: bool


@dataclasses.dataclass(frozen=True)
class Changes:
    """What is stale: stages of ``dvc.yaml`` by name, folders under ``dvc add`` by the path of their ``.dvc`` file."""

    stages: Mapping[str, Stale]
    data: Mapping[str, Stale]


@dataclasses.dataclass(frozen=True)
class Result:
    """How a DVC command ended.

    ``exit_code`` is that of the stage's own command, None where that did not fail or was not reached. ``message`` is
    one line. ``mendable``: another attempt may succeed. ``locked``: another DVC command held what this one needs.
    ``refused``: DVC's remote lets nobody in without other credentials or permissions, or is not there. ``full``: there
    was no room for what was written.
    """

    outcome: Literal["ran", "cached", "failed"]
    exit_code: int | None = None
    message: str = ""
    mendable: bool = False
    locked: bool = False
    refused: bool = False
    full: bool = False


def graph(root: Path) -> Graph:
    """Returns the stages of ``dvc.yaml`` with the edges of DVC's own graph. Raises :class:`UserMistake` if invalid."""
    with _repo(root) as repo:
        edges = repo.index.graph
        return in_order(
            Stage(
                name=stage.addressing,
                description=stage.desc or "",
                upstream=tuple(other.addressing for other in edges.successors(stage) if not other.is_data_source),
                dependencies=tuple(_relative(entry, root) for entry in stage.deps),
                outputs=tuple(_relative(entry, root) for entry in stage.outs),
            )
            for stage in repo.index.stages
            if not stage.is_data_source
        )


def changes(root: Path) -> Changes:
    """Returns what is not up to date, from one ``dvc status``. Raises as :func:`graph` does."""
    with _repo(root) as repo:
        status: dict[str, list[Any]] = repo.status()
        stages: dict[str, Stale] = {}
        data: dict[str, Stale] = {}
        for stage in repo.index.stages:
            if stage.addressing in status:
                known = any(entry.hash_info for entry in [*stage.outs, *stage.deps])
                stale = Stale(_parse_status(status[stage.addressing]), never_run=not known)
                (data if stage.is_data_source else stages)[stage.addressing] = stale
        return Changes(stages, data)


def repro_command(stage: str, force: bool = False) -> list[str]:
    """Returns the command that runs one stage, or restores it from the cache, or does nothing when it is unchanged."""
    return [*_DVC, "repro", "--single-item", *(["--force"] if force else []), stage]


def rebuild_command(stage: str, python: Path) -> list[str]:
    """Returns the command that computes one stage with the given interpreter and without any cache.

    DVC's table of earlier runs is not asked, and neither it nor the cache gets the result.
    """
    return [str(python), "-m", "dvc", "--wait-for-lock", "repro", "--single-item", "--force", "--no-commit", stage]


def add_command(folder: Path) -> list[str]:
    """Returns the command that versions ``folder`` as it is now, in ``FOLDER.dvc``."""
    return [*_DVC, "add", str(folder)]


def pull_command(pointer: Path) -> list[str]:
    """Returns the command that makes a versioned folder what its pointer says, from the cache or from a remote."""
    return [*_DVC, "pull", "--force", str(pointer)]


def checkout_command(root: Path, remote: str | None, *pointers: Path) -> list[str]:
    """Returns the command that makes outputs what ``pointers`` (none: all there are) say.

    What neither cache nor remote has is left out. ``remote`` None takes the default one, if there is any.
    """
    targets = map(str, pointers)
    with _repo(root) as repo:
        from_remote = remote or repo.config["core"].get("remote")
    if from_remote:
        return [*_DVC, "pull", "--force", "--allow-missing", "--remote", from_remote, *targets]
    return [*_DVC, "checkout", "--force", "--allow-missing", *targets]


def push_command(remote: str | None) -> list[str]:
    """Returns the command that copies what the project's pointers name to ``remote``, None for the default one."""
    return [*_DVC, "push", *(["--remote", remote] if remote else [])]


# Without --wait-for-lock a `dvc status` elsewhere makes repro fail after the training has succeeded.
_DVC = (sys.executable, "-m", "dvc", "--wait-for-lock")


def environment(outer: Mapping[str, str], python: Path = Path(sys.executable)) -> dict[str, str]:
    """Returns the environment of a DVC command: ``outer`` without Prefect's settings, with one shell and one Python."""
    kept = {name: value for name, value in outer.items() if not name.startswith("PREFECT_")}
    return {
        **kept,
        # DVC runs stages with $SHELL; a user's login shell must not decide what they do.
        "SHELL": "/bin/sh",
        "PATH": os.pathsep.join([str(python.parent), outer.get("PATH", os.defpath)]),
        "DVC_NO_ANALYTICS": "1",
        "PYTHONUNBUFFERED": "1",
        **_login(outer),
    }


def _login(outer: Mapping[str, str]) -> dict[str, str]:
    """Returns the name that DVC and torch ask for, where ``outer`` has none: a container may know none."""
    told = any(outer.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME"))
    return {} if told else {"LOGNAME": ownership.name_of(os.getuid())}


_RUNNING = re.compile(r"^Running stage '", re.MULTILINE)
_EXITED = re.compile(r"failed to run: .*exited with (-?\d+)", re.DOTALL)
_LOCKED = re.compile(r"Unable to acquire lock|is busy, it is being blocked by")
_CORRUPTED = re.compile(r"object \w+\.dir is corrupted")
_REFUSED = re.compile(
    r"Access ?Denied|Forbidden|Permission denied|bucket does not exist|credentials|Unauthorized|Authentication Required"
    r"|SSO session|SSO Token|from sso:|config profile"
    # Of a folder: a file is in its way, or it is mounted for reading alone.
    rf"|\[Errno (?:{errno.ENOTDIR}|{errno.EROFS})\]",
    re.IGNORECASE,
)
# A place that the system names may hold such a word; of a move it names two.
_PLACE = re.compile(r"""(?<=: |> )(['"])/.*?\1""")
# The address that it names may hold such a word, and who hands out credentials may be away.
_SILENT = re.compile(r"time(d )?out|could not connect|connection (refused|reset|aborted)|max retries", re.IGNORECASE)
_MANY = re.compile(r"failed to (?P<how>push|pull|fetch) data (?:to|from) the cloud")
_ONE = re.compile(r"failed to transfer '[^']*' - (.+)")
# s3fs says what S3 has answered, and DVC the cause of that, which is botocore's: the same words and the request.
_TWICE = re.compile(
    r"(?:\[Errno \d+\] )?(?P<words>[^:]+): (?P<whole>An error occurred \(.*?\) when calling .*?: (?P=words))"
)
_STAGE_ERROR = re.compile(r"^error: (.+)$", re.MULTILINE)
_DVC_ERROR = re.compile(r"^ERROR: (.+)$", re.MULTILINE)
_BUSY = "another DVC command is at work in this project; ask again when it has ended."


def classify(code: int, output: str) -> Result:
    """Returns how a DVC command ended, from its exit code and its output: DVC's code is 255 for every failure alike."""
    if code == 0:
        return Result("ran" if _RUNNING.search(output) else "cached")
    own, _, dvc = output.rpartition("\nERROR: ")
    exited = _EXITED.search(dvc)
    exit_code = int(exited[1]) if exited else None
    if exit_code is not None:
        return classify_stage(exit_code, own)
    if _killed(code):
        return Result("failed", None, f"DVC was killed by {_signal(code)}", mendable=True)
    complaints = _DVC_ERROR.findall(output)
    message = complaints[-1] if complaints else _last_line(output) or f"DVC ended with exit code {code}"
    many = _MANY.match(message)
    if many and (reasons := list(filter(None, map(_ONE.match, complaints)))):
        # The last complaint counts them alone.
        message = f"{message.rstrip('.')}: {reasons[0][1]}"
    message = _TWICE.sub(r"\g<whole>", message)
    full = bool(FULL.search(message))
    if full:
        # What is pushed is written elsewhere.
        cure = "The remote is full: make room there" if many and many["how"] == "push" else "Free some space"
        message = f"{message.rstrip('.')}. {cure} and run again."
    if _CORRUPTED.search(message):
        message = (
            f"{message.rstrip('.')}. A folder's listing is damaged in DVC's cache or at its remote: `overnight push`, "
            "where a good copy is left, mends it in both."
        )
    locked = bool(_LOCKED.search(output))
    words = _PLACE.sub("", message)
    refused = bool(_REFUSED.search(words)) and not _SILENT.search(words)
    # These are S3's own answers, however often botocore has asked ("reached max retries").
    refused = refused or bool(S3_REFUSES.search(message))
    return Result("failed", None, message, mendable=locked, locked=locked, refused=refused, full=full)


def classify_stage(code: int, output: str) -> Result:
    """Returns how a stage's own command ended, from its exit code (see :mod:`tasks.errors`) and its output."""
    if code == 0:
        return Result("ran")
    if _killed(code):
        return Result("failed", code, f"its process was killed by {_signal(code)}", mendable=True)
    told = _STAGE_ERROR.findall(output)
    message = told[-1] if told else _last_line(output) or f"its command ended with exit code {code}"
    return Result("failed", code, message, mendable=code == EXIT_TRY_AGAIN)


def _killed(code: int) -> bool:
    # A shell reports the death of its command by signal N as 128 + N; 255 is DVC's own "failed".
    return code < 0 or 128 < code <= 128 + 64


def _signal(code: int) -> str:
    number = -code if code < 0 else code - 128
    if number == signal.SIGKILL:
        return "SIGKILL (often the kernel, short of memory)"
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def share_cache(project: Path, worktree: Path) -> None:
    """Gives the ``worktree`` of ``project`` the project's cache and its remotes, those of ``config.local`` too.

    Remotes that are folders stay the same folders: their relative paths start at the project.
    """
    from dvc.config import Config

    theirs = Config(str(project.resolve() / ".dvc"))
    with Config(str(worktree.resolve() / ".dvc")).edit("local") as local:
        for level in ("repo", "local"):
            for section, values in theirs.load_one(level).items():
                for name, value in values.items():
                    held = local.setdefault(section, {})
                    held[name] = {**held.get(name, {}), **value} if isinstance(value, dict) else value
        local["cache"].setdefault("dir", str(project.resolve() / ".dvc" / "cache"))


def metrics(root: Path) -> tuple[Path, ...]:
    """Returns the metrics files of ``dvc.yaml``, relative to the project."""
    with _repo(root) as repo:
        return tuple(_relative(out, root) for out in repo.index.outs if out.metric)


@contextlib.contextmanager
def store(root: Path, remote: str | None = None) -> Iterator[Store]:
    """Yields the objects of the project at ``root``; ``remote`` is a remote's name, None DVC's default, if any."""
    with _repo(root) as repo:
        if remote is not None and remote not in (known := repo.config["remote"]):
            there = f"there are {', '.join(known)}" if known else "there is none"
            raise UserMistake(
                f"{paths.PARAMS}: publish.data_remote: DVC has no remote '{remote}'; {there} (`dvc remote add`)."
            )
        name = remote or repo.config["core"].get("remote")
        try:
            behind = repo.cloud.get_remote_odb(name, "fetch") if name else None
        except ImportError as error:
            # DVC keeps each kind of remote in a package of its own.
            cause = error.__cause__ or error
            raise UserMistake(
                f"DVC's remote '{name}': {error} ({cause}). `python -m pip install` it in this environment "
                f"({sys.prefix})."
            ) from None
        told = repo.config["remote"].get(name, {}) if name else {}
        place = " ".join(f"{key}={told[key]}" for key in ("url", "endpointurl", "host", "port", "user") if key in told)
        yield Store(repo.cache.local, behind, name, place or None)


@contextlib.contextmanager
def _repo(root: Path) -> Iterator[Any]:
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo

    dvc_lock.mend(root)
    os.environ.update(_login(os.environ))
    # Silences DVC's own progress bars and its warnings about frozen stages, which would mix with ours.
    logging.getLogger("dvc").setLevel(logging.CRITICAL)
    try:
        with Repo(str(root), _wait_for_lock=True) as repo:
            yield repo
    except sqlite3.DatabaseError as error:
        if "is locked" in str(error):
            raise dvc_lock.Busy(_BUSY) from None
        raise UserMistake(_tables(root, error)) from None
    except LockError:
        raise dvc_lock.Busy(_BUSY) from None
    except DvcException as error:
        told = str(error) if error.__cause__ is None else f"{error}: {error.__cause__}"
        complaint = " ".join(told.split()).rstrip(".")
        lock = "`git checkout dvc.lock` brings back the one that was committed."
        cure = lock if "dvc.lock" in complaint else "`dvc status` shows more."
        raise UserMistake(f"DVC cannot read the project: {complaint}. {cure}") from None


def _tables(root: Path, error: sqlite3.DatabaseError) -> str:
    """Returns what to do where DVC cannot use what it keeps of the hashes of files, on another disk perhaps."""
    from dvc.config import Config
    from dvc.dirs import site_cache_dir

    with contextlib.suppress(Exception):
        place = Path(site_cache_dir(Config(str(root / ".dvc"))["core"].get("site_cache_dir")))
        free = f"{shutil.disk_usage(place).free / 2**20:,.1f} MiB free"
        return (
            f"{place}: DVC cannot use the tables that it keeps there ({error}; {free}). Make room there, or remove "
            f"{place / 'repo'}: DVC makes it anew."
        )
    return f"DVC cannot use the tables that it keeps of the hashes of files: {error}."


def _relative(entry: Any, root: Path) -> Path:
    path = Path(entry.fs_path)
    return path.relative_to(root.resolve()) if path.is_relative_to(root.resolve()) else path


def _parse_status(entries: Sequence[Any]) -> tuple[Change, ...]:
    found: list[Change] = []
    for entry in entries:
        if isinstance(entry, str):
            # "changed command", "always changed"
            first, _, second = entry.partition(" ")
            found.append(Change("command", second, first) if first == "changed" else Change("command", first, second))
            continue
        for kind, items in entry.items():
            for name, how in items.items():
                if isinstance(how, dict):
                    found.extend(Change("parameter", f"{name}: {key}", word) for key, word in how.items())
                else:
                    found.append(Change("output" if kind == "changed outs" else "dependency", name, how))
    return tuple(found)
