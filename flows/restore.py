"""``overnight restore``: a version's files in a folder, each verified against its recorded hash.

What is verified is the file that was written, read again. DVC itself trusts every file of its cache that is marked
read-only, so a damaged one would pass through `dvc checkout` unseen.
"""

import concurrent.futures
import contextlib
import dataclasses
import enum
import functools
import io
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from flows import contents, dvc, project, registry
from flows.contents import Output
from flows.git import archive
from flows.store import EMPTY
from flows.terminal import print_line
from tasks import atomic, paths
from tasks.errors import UserMistake
from tasks.progress import Event, sink_for

FOLDER = paths.SCRATCH / "versions"
# What mends bytes at the remote, which a plain push takes for good.
VERIFY = "overnight push --verify"
EXIT_LOST = 1
_COPIES_AT_A_TIME = 8
_MOST_NAMED = 5


class Source(enum.StrEnum):
    """Where a good copy of a file was found."""

    PLACE = "already there"
    CACHE = "the cache"
    REMOTE = "the remote"
    PROJECT = "the project's own folder"
    NOWHERE = "nowhere"


@dataclasses.dataclass(frozen=True)
class Fetched:
    """How one file was had. ``damaged``: the cache held other bytes under its hash. ``path`` is relative."""

    path: Path
    source: Source
    damaged: bool = False
    where: str = ""

    def __str__(self) -> str:
        if self.source is not Source.NOWHERE:
            return f"{self.path}: was damaged in DVC's cache; mended from {self.source}"
        cache = "damaged in DVC's cache (removed)" if self.damaged else "missing in DVC's cache"
        remote = f"no good copy in the remote '{self.where}'" if self.where else "there is no remote to fetch it from"
        return f"{self.path}: {cache}, and {remote}"


Report = Callable[[int, int], object]


def restore(name: str, to: Path | None, out: Console, err: Console) -> int:
    """Restores the version ``name`` into ``to`` and returns the exit code: 0, or 1 when a file is lost.

    Raises :class:`UserMistake` when there is no such version, or ``to`` is no place for it.
    """
    root = project.find()
    git_remote = project.parameters(root).publish.git_remote
    version = registry.resolve_with(root, name, git_remote, functools.partial(print_line, err))
    outputs = contents.recorded(root, version.commit)
    target = (to or root / FOLDER / version.name).absolute()
    claim(target, version.commit)
    unpacked = _unpack(archive(root, version.commit), target)
    with dvc.store(root, remote(root)) as store:
        with progress("restore", err) as report:
            fetched = place(store, outputs, target, root, report)
        lost = tell(store, version.name, fetched, err)
    if strays := _strays(target, {*unpacked, *(one.path for one in fetched)}):
        more = f" and {len(strays) - _MOST_NAMED} more" if len(strays) > _MOST_NAMED else ""
        named = ", ".join(map(str, strays[:_MOST_NAMED]))
        print_line(err, f"{len(strays)} files there are none of the version's, and stay: {named}{more}")
    from_remote = sum(one.source is Source.REMOTE for one in fetched)
    said = f"{len(fetched) - lost} of {len(fetched)} files verified, {from_remote} of them fetched from the remote"
    where = target.relative_to(root) if target.is_relative_to(root) else target
    how = "is not whole in" if lost else "is in"
    print_line(out, f"{version.name} {how} {where}: {said}")
    return EXIT_LOST if lost else 0


def tell(store: dvc.Store, name: str, fetched: Sequence[Fetched], err: Console) -> int:
    """Says a line for each file of the version ``name`` that was damaged or is lost, and where lost ones may be.

    Returns how many are lost. Raises as :meth:`flows.store.Store.download` does.
    """
    for one in fetched:
        if one.source is Source.NOWHERE:
            err.print(f"[bold red]error:[/] {escape(str(one))}", soft_wrap=True, highlight=False)
        elif one.damaged:
            print_line(err, str(one))
    if any(one.where for one in fetched):
        print_line(err, cure(store, name, fetched))
    return sum(one.source is Source.NOWHERE for one in fetched)


def cure(store: dvc.Store, name: str, fetched: Sequence[Fetched]) -> str:
    """Returns what brings back what neither the cache nor the remote has of the version ``name``."""
    if all(one.source is not Source.REMOTE for one in fetched) and store.is_empty():
        return f"DVC's remote '{store.remote}' {EMPTY}."
    return f"`{VERIFY} {name}` on a machine that has them brings them to the remote."


def remote(root: Path) -> str | None:
    """Returns the DVC remote that versions are kept in, None for DVC's default one."""
    return project.parameters(root).publish.data_remote


def place(
    store: dvc.Store, outputs: Sequence[Output], target: Path, root: Path, report: Report, without: Path | None = None
) -> tuple[Fetched, ...]:
    """Writes each file of ``outputs`` below ``target`` and returns how each was had; ``report`` gets bytes and total.

    A file is looked for in ``target``, the cache, the project at ``root``, and the remote; only bytes of the recorded
    MD5 are taken. A damaged object of the cache is replaced by a good one, or removed where there is none. What lies in
    the folder ``without``, a path in the project, is not looked for.
    """
    wanted: list[tuple[Path, str]] = []
    found: list[Fetched] = []
    for output in outputs:
        if not output.is_folder:
            wanted.append((output.path, output.md5))
            continue
        listing, fetched = read(store, output.path / "(the list of its files)", output.md5, root)
        if listing is None or fetched.damaged:
            found.append(fetched)
        if listing is not None:
            with _in_the_way_is_told():
                (target / output.path).mkdir(parents=True, exist_ok=True)
            files = [(output.path / path, md5) for path, md5 in contents.parse_listing(listing).items()]
            wanted.extend(file for file in files if without is None or not file[0].is_relative_to(without))
    done = 0
    with concurrent.futures.ThreadPoolExecutor(_COPIES_AT_A_TIME) as pool:
        copies = [pool.submit(_fetch, store, path, md5, target / path, root) for path, md5 in wanted]
        try:
            for copy in concurrent.futures.as_completed(copies):
                done += 1
                report(done, len(copies))
                copy.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for (path, md5), copy in zip(wanted, copies, strict=True):
        fetched = copy.result()
        if fetched.source is Source.NOWHERE:
            # The same bytes under another name may have been found meanwhile.
            again = _fetch(store, path, md5, target / path, root)
            fetched = again if again.source is not Source.NOWHERE else fetched
        found.append(fetched)
    return tuple(found)


def read(store: dvc.Store, path: Path, md5: str, root: Path) -> tuple[bytes | None, Fetched]:
    """Returns the verified bytes of one object, None where it is lost, and how it was had, named ``path``."""
    # The cache may be somebody else's, who lets us read alone.
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "read"
        fetched = _fetch(store, path, md5, copy, root)
        return (None if fetched.source is Source.NOWHERE else copy.read_bytes()), fetched


def _fetch(store: dvc.Store, path: Path, md5: str, target: Path, root: Path) -> Fetched:
    digest = md5.removesuffix(contents.FOLDER_SUFFIX)
    if target.is_file() and contents.md5_of(target) == digest:
        return Fetched(path, Source.PLACE)
    cached = store.path(md5)
    damaged = cached.exists() and not _copy(cached, target, digest)
    if cached.exists() and not damaged:
        return Fetched(path, Source.CACHE)
    for source, fill in (
        (Source.PROJECT, lambda to: copy_if_there(root / path, to)),
        (Source.REMOTE, lambda to: store.download(md5, to)),
    ):
        if heal(cached, digest, fill) and _copy(cached, target, digest):
            return Fetched(path, source, damaged)
    if cached.exists() and _copy(cached, target, digest):
        # The same bytes under another name were found meanwhile.
        return Fetched(path, Source.CACHE, damaged)
    # DVC would take it for good, here and in every remote that it is pushed to.
    cached.unlink(missing_ok=True)
    return Fetched(path, Source.NOWHERE, damaged, store.remote or "")


def _copy(source: Path, target: Path, digest: str) -> bool:
    """Copies the file; returns False, and leaves no copy, when what was written does not have the ``digest``."""
    with atomic.disk_full_is_told(target), _in_the_way_is_told():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _beside(target)
        try:
            shutil.copyfile(source, partial)
            if contents.md5_of(partial) != digest:
                return False
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    return True


def heal(cached: Path, digest: str, fill: Callable[[Path], bool]) -> bool:
    """Puts what ``fill`` writes into the cache, in place of what is there, when it has the ``digest``."""
    with atomic.disk_full_is_told(cached):
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = _beside(cached)
        try:
            if not fill(partial) or contents.md5_of(partial) != digest:
                return False
            # As DVC keeps its objects.
            partial.chmod(0o444)
            os.replace(partial, cached)
        finally:
            partial.unlink(missing_ok=True)
    return True


def copy_if_there(source: Path, target: Path) -> bool:
    """Copies the file ``source``; returns False, and writes nothing, where there is none."""
    if not source.is_file():
        return False
    shutil.copyfile(source, target)
    return True


@contextlib.contextmanager
def _in_the_way_is_told() -> Iterator[None]:
    try:
        yield
    except (IsADirectoryError, NotADirectoryError, FileExistsError) as error:
        wanted = Path(error.filename2 or error.filename)
        place = next(path for path in (wanted, *wanted.parents) if path.exists())
        there, belongs = ("folder", "file") if place.is_dir() else ("file", "folder")
        raise UserMistake(f"{place}: a {there} lies where a {belongs} of the version belongs. Move it away.") from None


def _beside(path: Path) -> Path:
    # Several may fetch one object at a time: equal files of one version, or two commands.
    return path.with_name(f"{atomic.PARTIAL}{os.getpid()}-{time.monotonic_ns()}-{path.name[:64]}")


def claim(target: Path, commit: str, option: str = "--to") -> None:
    """Makes ``target`` a folder that holds ``commit`` and nothing else.

    Raises :class:`UserMistake`, about what was given by ``option``, if it cannot be.
    """
    # The next attempt may go on in it.
    mark = target / project.RESTORED
    if target.exists():
        held = mark.read_text().strip() if mark.is_file() else None
        if not target.is_dir():
            raise UserMistake(f"{option}: {target} is a file. Name a folder that is empty or not there yet.")
        if (target / ".git").exists():
            raise UserMistake(f"{option}: {target} is a Git checkout, whose files would be lost. Name another folder.")
        if held not in (None, commit):
            raise UserMistake(f"{option}: {target} holds another version (commit {held[:12]}). Name another folder.")
        if held is None and any(target.iterdir()):
            raise UserMistake(f"{option}: {target} is not empty. Name a folder that is empty or not there yet.")
    try:
        atomic.write_text(mark, commit + "\n")
    except OSError as error:
        raise UserMistake(f"{option}: {target} cannot be written to ({error.strerror}). Name another folder.") from None


def _strays(target: Path, known: Set[Path]) -> list[Path]:
    """Returns the files below ``target`` that are neither ``known`` nor what Python and we leave there, in order."""
    files = (path.relative_to(target) for path in target.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path for path in files if path not in known and not {"__pycache__", ".overnight"} & {*path.parts})


def _unpack(files: bytes, target: Path) -> list[Path]:
    """Unpacks the archive ``files`` below ``target`` and returns what is in it."""
    # Python before 3.11.4, which Debian 12 has, knows no filter.
    filtered: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with (
        atomic.disk_full_is_told(target),
        _in_the_way_is_told(),
        tarfile.open(fileobj=io.BytesIO(files)) as tar,
    ):
        for member in tar:
            # Where a link that is there already may lead.
            _check_inside(member, target)
            tar.extract(member, target, **filtered)
        return [Path(name) for name in tar.getnames()]


def _check_inside(member: tarfile.TarInfo, target: Path) -> None:
    place = target / member.name
    for leads_to in (place, place.parent / member.linkname):
        if not leads_to.resolve().is_relative_to(target.resolve()):
            raise UserMistake(f"{target}: the commit holds a file that would lie outside ({member.name}).")


@contextlib.contextmanager
def progress(name: str, err: Console) -> Iterator[Report]:
    """Yields what shows on the terminal how many files are verified."""
    sink = sink_for(err)
    started = time.monotonic()

    def report(done: int, total: int) -> None:
        rate = done / max(time.monotonic() - started, 1e-6)
        sink.show(Event(name, "verifying", done, total, "files", rate))

    try:
        yield report
    finally:
        sink.close()
