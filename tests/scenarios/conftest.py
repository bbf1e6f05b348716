"""One undisturbed run of a whole project, which the scenarios copy and compare with."""

import dataclasses
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from chain import Chain, Ended, seconds_of_stages
from filelock import FileLock
from lay_out import lay_out
from prefect_server import PrefectServer


@dataclasses.dataclass(frozen=True)
class Reference:
    """A project after one undisturbed run: how that ended, what it wrote, how many seconds each stage lived.

    Nobody changes it; a scenario takes a copy.
    """

    chain: Chain
    ended: Ended
    version: dict[str, bytes]
    seconds: dict[str, float]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def blank(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Chain:
    """A project in which nothing has run. Nobody changes it; a scenario takes a copy.

    One for all, so that the repository may be worked on while the tests run.
    """
    return lay_out(tmp_path_factory.mktemp("blank") / "project", home)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, blank: Chain, worker_id: str) -> Reference:
    # One for all the processes that run tests, which share the folder above their own.
    own = tmp_path_factory.getbasetemp()
    shared = (own if worker_id == "master" else own.parent) / "reference"
    with FileLock(f"{shared}.lock"):
        kept = shared / "reference.pickle"
        if not kept.exists():
            shutil.rmtree(shared, ignore_errors=True)
            shared.mkdir()
            kept.write_bytes(pickle.dumps(_undisturbed(blank.copy(shared / "project"))))
        found: Reference = pickle.loads(kept.read_bytes())
    return found


def _undisturbed(chain: Chain) -> Reference:
    running = chain.start("run")
    seconds = seconds_of_stages(running)
    ended = running.end()
    assert ended.code == 0, ended.err
    return Reference(chain, ended, chain.version(), seconds)


@pytest.fixture(scope="session")
def prefect(home: Path) -> Iterator[PrefectServer]:
    """A Prefect server that runs can share."""
    with PrefectServer(home) as started:
        yield started


@pytest.fixture(scope="session")
def server(prefect: PrefectServer) -> str:
    """Its URL."""
    return prefect.api


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    left = Chain(tmp_path, tmp_path).processes()
    for process in left:
        process.kill()
    assert not left, f"left behind: {left}"


@pytest.fixture
def fresh(tmp_path: Path, blank: Chain) -> Chain:
    """A project in which nothing has run."""
    return blank.copy(tmp_path / "fresh")


@pytest.fixture
def finished(tmp_path: Path, reference: Reference) -> Chain:
    """A copy of the project after its undisturbed run."""
    return reference.chain.copy(tmp_path / "finished")
