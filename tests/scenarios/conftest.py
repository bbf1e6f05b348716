"""One undisturbed run of a whole project, which the scenarios copy and compare with."""

import dataclasses
import os
import socket
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from chain import Chain, Ended, seconds_of_stages
from lay_out import lay_out

from flows.process import Child


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
def reference(tmp_path_factory: pytest.TempPathFactory, blank: Chain) -> Reference:
    chain = blank.copy(tmp_path_factory.mktemp("reference") / "project")
    running = chain.start("run")
    seconds = seconds_of_stages(running)
    ended = running.end()
    assert ended.code == 0, ended.err
    return Reference(chain, ended, chain.version(), seconds)


@pytest.fixture(scope="session")
def server(home: Path) -> Iterator[str]:
    """The URL of a Prefect server that runs can share, as users start one."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")},
        "HOME": str(home),
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--no-ui", "--port", str(port)]
    with Child(command, home / "server.log", environment) as child:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=60).close()
                break
            except OSError:
                assert child.wait(0.5) is None, (home / "server.log").read_text()
        yield f"http://127.0.0.1:{port}/api"


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
