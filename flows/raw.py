"""The collected text of two branches as one: ``data/raw.dvc``, merged file by file."""

from pathlib import Path, PurePosixPath

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from flows import contents, dvc, objects
from flows.contents import Output
from flows.git import git
from tasks import atomic, paths

POINTER = paths.RAW.with_name(f"{paths.RAW.name}.dvc")
Listing = dict[PurePosixPath, str]
# As Git numbers the sides of a conflict: what both began with, ours, theirs.
_SIDES = (1, 2, 3)


def merge(before: Listing, ours: Listing, theirs: Listing) -> Listing:
    """Returns the files of ``ours`` with all that ``theirs`` added, changed and removed since ``before``.

    A file that both changed is theirs. A pure function.
    """
    changed = {path for path in before.keys() | theirs.keys() if before.get(path) != theirs.get(path)}
    kept = {path: md5 for path, md5 in ours.items() if path not in changed}
    return kept | {path: theirs[path] for path in changed & theirs.keys()}


def is_in_conflict(root: Path) -> bool:
    """Whether Git has stopped at a conflict in the pointer."""
    return bool(git(root, "ls-files", "--unmerged", "--", str(POINTER)))


def resolve(root: Path, remote: str | None) -> None:
    """Merges the text of both sides where Git has stopped at a conflict in the pointer.

    The list of the files goes into DVC's cache. Where a side has no text, or a list is lost, the conflict stays.
    Raises :class:`tasks.errors.TryAgain` when ``remote``, DVC's default one for None, is needed and does not answer.
    """
    if not is_in_conflict(root):
        return
    before, ours, theirs = (git(root, "show", f":{side}:./{POINTER}", check=False) for side in _SIDES)
    with dvc.store(root, remote) as store:
        try:
            files = merge(_files(store, before) if before else {}, _files(store, ours), _files(store, theirs))
        except (objects.Unlisted, YAMLError, LookupError, TypeError, ValueError):
            return
        md5 = contents.listing_md5(files)
        if not store.path(md5).is_file():
            atomic.write_bytes(store.path(md5), contents.listing(files))
            # As DVC keeps its objects.
            store.path(md5).chmod(0o444)
        places = [store.path(md5) for md5 in files.values()]
    entry: dict[str, object] = {"md5": md5, "nfiles": len(files), "hash": "md5", "path": paths.RAW.name}
    if all(place.is_file() for place in places):
        entry["size"] = sum(place.stat().st_size for place in places)
    with atomic.file(root / POINTER) as file:
        YAML().dump({"outs": [entry]}, file)
    git(root, "add", "--", str(POINTER))


def _files(store: dvc.Store, pointer: str) -> Listing:
    (entry,) = YAML(typ="safe").load(pointer)["outs"]
    return contents.parse_listing(objects.read(store, Output(paths.RAW, str(entry["md5"]), 0, None)))
