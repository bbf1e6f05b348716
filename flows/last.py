"""The last INT8 model that was finished, from DVC's cache: a run removes ``models/int8`` before it makes another."""

import os
import shutil
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from flows import contents, dvc, objects
from flows.contents import Output
from tasks import atomic, paths
from tasks.errors import TryAgain, UserMistake

FOLDER = paths.SCRATCH / "last"


def int8(root: Path) -> Path | None:
    """Returns a folder with the INT8 model that ``dvc.lock`` records; None where it records none, or it is lost.

    The files share their bytes with DVC's cache where the file system can do that.
    """
    output = _recorded(root)
    if output is None:
        return None
    folder = root / FOLDER / output.md5.removesuffix(contents.FOLDER_SUFFIX)
    if not folder.is_dir():
        shutil.rmtree(root / FOLDER, ignore_errors=True)
        try:
            _gather(root, output, folder)
        except (UserMistake, TryAgain):
            return None
    return folder


def _recorded(root: Path) -> Output | None:
    try:
        lock = YAML(typ="safe", pure=True).load((root / "dvc.lock").read_text())
        for name, stage in lock["stages"].items():
            for entry in stage.get("outs", ()):
                if Path(entry["path"]) == paths.INT8:
                    return Output(paths.INT8, str(entry["md5"]), int(entry["size"]), name)
    except (OSError, YAMLError, KeyError, TypeError, AttributeError):
        # Not there, or being written.
        pass
    return None


def _gather(root: Path, output: Output, folder: Path) -> None:
    with dvc.store(root) as store:
        listing = contents.parse_listing(objects.read(store, output))
        with atomic.folder(folder) as made:
            for name, md5 in listing.items():
                if (output.path / name).is_relative_to(paths.POST_TRAINING):
                    continue
                (made / name).parent.mkdir(parents=True, exist_ok=True)
                if not store.path(md5).is_file():
                    if not store.download(md5, made / name):
                        raise UserMistake(f"{output.path / name}: neither in DVC's cache nor at a remote.")
                    continue
                try:
                    os.link(store.path(md5), made / name)
                except OSError:
                    # Another file system.
                    shutil.copy2(store.path(md5), made / name)
