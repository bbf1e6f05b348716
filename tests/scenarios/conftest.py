"""One undisturbed run of a whole project, which the scenarios copy and compare with."""

import dataclasses
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from chain import Chain, Ended, seconds_of_stages
from lay_out import lay_out
from processes import left_within


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
def blank(made: Callable[[str, Callable[[Path], object]], Path], home: Path) -> Chain:
    """A project in which nothing has run. Nobody changes it; a scenario takes a copy.

    One for all, so that the repository may be worked on while the tests run.
    """
    place = made("blank", lambda folder: lay_out(folder / "project", home))
    return Chain(place / "project", home)


@pytest.fixture(scope="session")
def reference(blank: Chain, prefect_database: Path, once: Callable[[str], AbstractContextManager[Path]]) -> Reference:
    with once("reference") as shared:
        kept = shared / "reference.pickle"
        if not kept.exists():
            shutil.rmtree(shared, ignore_errors=True)
            shared.mkdir()
            kept.write_bytes(pickle.dumps(_undisturbed(_copied(blank, shared / "project", prefect_database))))
        found: Reference = pickle.loads(kept.read_bytes())
    return found


def _copied(blank: Chain, root: Path, prefect_database: Path) -> Chain:
    chain = blank.copy(root)
    (chain.root / ".overnight/prefect").mkdir(parents=True)
    shutil.copy(prefect_database, chain.root / ".overnight/prefect")
    return chain


def _undisturbed(chain: Chain) -> Reference:
    running = chain.start("run")
    seconds = seconds_of_stages(running)
    ended = running.end()
    assert ended.code == 0, ended.err
    return Reference(chain, ended, chain.version(), seconds)


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    left = left_within(tmp_path)
    for process in left:
        process.kill()
    assert not left, f"left behind: {left}"


@pytest.fixture
def fresh(tmp_path: Path, blank: Chain, prefect_database: Path) -> Chain:
    """A project in which nothing has run."""
    return _copied(blank, tmp_path / "fresh", prefect_database)


@pytest.fixture
def finished(tmp_path: Path, reference: Reference) -> Chain:
    """A copy of the project after its undisturbed run."""
    return reference.chain.copy(tmp_path / "finished")
