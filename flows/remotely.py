"""What a run asks of DVC's remote, each question in a process of its own: one that hears no more is ended.

``python -m flows.remotely STEP ROOT ...`` ends as a stage does (:mod:`tasks.errors`). A thread would not do: Python
waits for it at its end, so a run would never end and the next one never start.
"""

import concurrent.futures
import functools
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from flows import champion, contents, dvc, dvc_fork, execute, init, objects, raw, restore
from flows.contents import Output
from flows.ownership import others_are_told
from tasks.atomic import disk_full_is_told
from tasks.errors import EXIT_USER_MISTAKE, TryAgain, UserMistake
from tasks.progress import Event, progress

# Of `lacks` and `nothing`, when it does, or has nothing.
_EXIT_YES = 10
_EXIT_LOST = 11
_READ_AT_A_TIME = 8
_MOST_NAMED = 5


class Lost(UserMistake):
    """Bytes of a version are neither at the remote nor in the cache, or damaged at both."""


def lacks(root: Path, commit: str, remote: str, log: Path, minutes: float) -> bool:
    """Whether ``remote`` lacks an output of ``commit``; where it has a folder's listing, it has had the files before.

    Raises :class:`TryAgain` when the remote does not answer, or nothing for ``minutes``, :class:`UserMistake` when it
    refuses.
    """
    return _ask("lacks", root, log, minutes, commit, remote) == _EXIT_YES


def has_nothing(root: Path, commit: str, remote: str, log: Path, minutes: float) -> bool:
    """Whether ``remote`` has no output of ``commit`` at all. Raises as :func:`lacks` does."""
    return _ask("nothing", root, log, minutes, commit, remote) == _EXIT_YES


def verify(root: Path, commit: str, remote: str, log: Path, minutes: float) -> None:
    """Uploads what ``remote`` lacks of ``commit``. Raises as :func:`lacks`, :class:`Lost` if the cache lacks it too.

    DVC's own push passes over what its cache has lost, and over what is there, cut off or not.
    """
    _ask("verify", root, log, minutes, commit, remote)


def read_back(
    root: Path, commit: str, remote: str, seen: Path, log: Path, minutes: float, on_event: Callable[[Event], None]
) -> None:
    """Reads every object of ``commit`` at ``remote``, and uploads good ones of the cache over those that are damaged.

    What the file ``seen`` names is not read again, and what was read is added to it. Raises as :func:`lacks`,
    :class:`Lost` for what is damaged at both places.
    """
    _ask("read_back", root, log, minutes, commit, remote, str(seen), on_event=on_event)


def check(root: Path, remote: str, log: Path, minutes: float) -> None:
    """Reads again what a push of the project to ``remote`` would upload, and mends what is damaged in the cache.

    DVC would push it as it is. Uploads anew what is cut off at the remote: DVC may stumble over a listing there. Raises
    as :func:`verify` does, where there is no good copy in the project or at the remote either.
    """
    _ask("check", root, log, minutes, remote)


def bring_champion(root: Path, log: Path, minutes: float) -> None:
    """Does what :func:`flows.champion.bring` does. Raises as that and :func:`lacks` do."""
    _ask("champion", root, log, minutes)


def bring_init(root: Path, wanted: str, log: Path, minutes: float) -> None:
    """Does what :func:`flows.init.bring` does. Raises as that and :func:`lacks` do."""
    _ask("init", root, log, minutes, wanted)


def merge_text(root: Path, remote: str | None, log: Path, minutes: float) -> None:
    """Does what :func:`flows.raw.resolve` does. Raises as that and :func:`lacks` do."""
    _ask("text", root, log, minutes, *([remote] if remote else []))


def _ask(
    step: str,
    root: Path,
    log: Path,
    minutes: float,
    *arguments: str,
    on_event: Callable[[Event], None] = lambda event: None,
) -> int:
    command = [*dvc_fork.REMOTELY, step, str(root.resolve()), *arguments]
    result = execute.run(root, command, log, on_event, classify=dvc.classify_stage, minutes=minutes)
    if result.outcome == "failed" and result.exit_code != _EXIT_YES:
        if result.exit_code == _EXIT_LOST:
            raise Lost(result.message)
        if result.exit_code == EXIT_USER_MISTAKE:
            raise UserMistake(result.message)
        raise TryAgain(result.message if result.exit_code else f"DVC's remote: {result.message}")
    return result.exit_code or 0


def main(arguments: list[str]) -> int:
    """Takes one step and returns the exit code; what went wrong is told in one line."""
    step, root, *more = arguments
    try:
        with disk_full_is_told(Path(root)), others_are_told(Path(root)):
            return _STEPS[step](Path(root), *more)
    except (UserMistake, TryAgain) as error:
        print(f"error: {error}", file=sys.stderr)
        return _EXIT_LOST if isinstance(error, Lost | objects.Unlisted) else error.exit_code


def _lacks(root: Path, commit: str, remote: str) -> int:
    with dvc.store(root, remote) as store:
        return _EXIT_YES if store.lacking({output.md5 for output in contents.recorded(root, commit)}) else 0


def _nothing(root: Path, commit: str, remote: str) -> int:
    md5s = {output.md5 for output in contents.recorded(root, commit)}
    with dvc.store(root, remote) as store:
        return _EXIT_YES if md5s and store.compare(md5s)[0] == md5s else 0


def _verify(root: Path, commit: str, remote: str) -> int:
    with dvc.store(root, remote) as store:
        lacking = store.lacking(objects.needed(store, contents.recorded(root, commit), {}))
        if lacking:
            lost = _mend(root, store, contents.recorded(root, commit), lacking)
            # DVC does not push what it believes to be there, though another machine's `dvc gc` has removed it.
            store.upload(lacking)
            # What is cut off there and damaged here has no size left to be compared with.
            lacking = store.lacking(lacking) | lost.keys()
    if lacking:
        raise Lost(
            f"DVC's remote '{remote}' lacks {len(lacking)} of the version's objects ({min(lacking)}), and so does the "
            "cache. `overnight run --force` makes them again."
        )
    return 0


def _read_back(root: Path, commit: str, remote: str, seen: str) -> int:
    outputs, note = contents.recorded(root, commit), Path(seen)
    known = set(note.read_text().split()) if note.exists() else set()
    with dvc.store(root, remote) as store, progress("push") as shown:
        wanted = objects.needed(store, outputs, {}) - known
        places = _places(store, outputs)
        shown.begin("reading")
        damaged = _damaged(store, wanted, lambda done: shown.update(done, len(wanted), "objects"))
        _mend(root, store, outputs, damaged)
        store.upload(damaged)
        lost = _damaged(store, damaged)
        for path in sorted(places[md5] for md5 in damaged - lost):
            shown.notice(f"{path}: was damaged at DVC's remote '{remote}'; uploaded anew")
    note.write_text("\n".join(sorted(known | wanted - lost)))
    if lost:
        named = ", ".join(map(str, sorted(places[md5] for md5 in lost)[:_MOST_NAMED]))
        more = f" and {len(lost) - _MOST_NAMED} more" if len(lost) > _MOST_NAMED else ""
        raise Lost(
            f"damaged at DVC's remote '{remote}', with no good copy in DVC's cache nor in the project: {named}{more}"
        )
    return 0


def _damaged(store: dvc.Store, md5s: Collection[str], report: Callable[[int], object] = lambda done: None) -> set[str]:
    """Returns those objects whose bytes at the remote are other ones, or gone."""
    ordered, found = sorted(md5s), set()
    with concurrent.futures.ThreadPoolExecutor(_READ_AT_A_TIME) as pool:
        for done, (md5, held) in enumerate(zip(ordered, pool.map(store.stored_md5, ordered), strict=True), 1):
            if held != md5.removesuffix(contents.FOLDER_SUFFIX):
                found.add(md5)
            report(done)
    return found


def _check(root: Path, remote: str) -> int:
    outputs = contents.present(root)
    with dvc.store(root, remote) as store:
        absent, differing = store.compare(objects.needed(store, outputs, {}))
        lost = _mend(root, store, outputs, absent | differing)
        # One whose size was wrong in the cache alone is whole there.
        store.upload(store.compare(differing)[1])
    if lost:
        raise UserMistake(
            f"{next(iter(lost.values()))}: damaged in DVC's cache (removed), and no good copy is left in the project. "
            "`overnight run --force` makes again what is a stage's; a text has to come back to its source."
        )
    return 0


def _mend(root: Path, store: dvc.Store, outputs: Sequence[Output], md5s: Iterable[str]) -> dict[str, Path]:
    """Replaces those objects of the cache that are damaged, as a power failure leaves them, or gone.

    A good copy is the project's file, or the remote's. Removes the damaged ones of which there is none; returns what
    they were, by their MD5.
    """
    places = _places(store, outputs)
    lost = {}
    for md5 in sorted(md5s):
        cached, digest = store.path(md5), md5.removesuffix(contents.FOLDER_SUFFIX)
        is_there = cached.is_file()
        if is_there and contents.md5_of(cached) == digest:
            continue
        copies = (functools.partial(restore.copy_if_there, root / places[md5]), functools.partial(store.download, md5))
        if not any(restore.heal(cached, digest, copy) for copy in copies) and is_there:
            cached.unlink()
            lost[md5] = places[md5]
    return lost


def _places(store: dvc.Store, outputs: Sequence[Output]) -> dict[str, Path]:
    """Returns where in the project each object behind ``outputs`` lies."""
    places = {output.md5: output.path for output in outputs}
    for output in filter(lambda output: output.is_folder, outputs):
        listing = contents.parse_listing(objects.read(store, output))
        places |= {md5: output.path / path for path, md5 in listing.items()}
    return places


def _champion(root: Path) -> int:
    champion.bring(root)
    return 0


def _init(root: Path, wanted: str) -> int:
    init.bring(root, wanted)
    return 0


def _text(root: Path, remote: str | None = None) -> int:
    raw.resolve(root, remote)
    return 0


_STEPS: Mapping[str, Callable[..., int]] = {
    "lacks": _lacks,
    "nothing": _nothing,
    "verify": _verify,
    "read_back": _read_back,
    "check": _check,
    "champion": _champion,
    "init": _init,
    "text": _text,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
