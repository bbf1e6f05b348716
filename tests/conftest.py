"""Makes tests/support importable, and what tests of several folders share."""

import contextlib
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

sys.path.insert(0, str(Path(__file__).parent / "support"))
# Before torch is imported, here and in what the tests start. There are as many processes that run tests as cores; the
# threads of several wait for each other at full speed, which made small tests ten times as slow.
os.environ["OMP_NUM_THREADS"] = "1"

import needed
from prefect_server import PrefectServer, make_database

# Of a name and of what fills a folder.
Made = Callable[[str, Callable[[Path], object]], Path]


def pytest_collectstart() -> None:
    # Imports and thousands of tests make objects that stay: these are not looked through again and again.
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stands in for the user's."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def once(
    tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> Callable[[str], contextlib.AbstractContextManager[Path]]:
    """Holds the folder of a name, one for all the processes that run tests; each finds what the first has made."""

    @contextlib.contextmanager
    def hold(name: str) -> Iterator[Path]:
        own = tmp_path_factory.getbasetemp()
        folder = (own if worker_id == "master" else own.parent) / name
        with FileLock(f"{folder}.lock"):
            yield folder

    return hold


@pytest.fixture(scope="session")
def made(once: Callable[[str], contextlib.AbstractContextManager[Path]]) -> Made:
    """Returns the folder of a name, which the first of all the processes that run tests has filled.

    Nobody changes it; a test takes a copy.
    """

    def folder_of(name: str, fill: Callable[[Path], object]) -> Path:
        with once(name) as folder, contextlib.chdir(Path.cwd()):
            filled = folder.with_name(f"{name}.filled")
            if not filled.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                filled.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def prefect_database(once: Callable[[str], contextlib.AbstractContextManager[Path]]) -> Path:
    """Prefect's database with all its tables and nothing in them; making those takes longer than many a test."""
    with once("database") as folder:
        file = folder / "prefect.db"
        if not file.exists():
            make_database(file)
    return file


@pytest.fixture(scope="session")
def _prefect(home: Path, prefect_database: Path) -> Iterator[PrefectServer]:
    with PrefectServer(home, prefect_database) as started:
        yield started


@pytest.fixture
def prefect(_prefect: PrefectServer) -> Iterator[PrefectServer]:
    """A Prefect server that runs can share. Between tests its processes are stopped: idle, it works all the time."""
    with _prefect.awake():
        yield _prefect


@pytest.fixture
def server(prefect: PrefectServer) -> str:
    """Its URL."""
    return prefect.api


@pytest.fixture
def small_disk() -> Iterator[Callable[[Path, int], None]]:
    """Mounts an empty disk of some KiB on a folder."""
    mounted: list[Path] = []

    def mount(folder: Path, kibibytes: int) -> None:
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            needed.missing("mounting a small disk needs root")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)
