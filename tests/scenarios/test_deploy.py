"""``deployments/prefect.yaml`` on a real server: deployed whole, run by a worker when data has arrived, read back.

The commands are those of docs/schedule.md. What is deployed does not depend on what the stages compute: they are cheap.
"""

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import page
import publishing
import pytest
import tiny
from chain import Chain
from prefect_server import ask

from flows import runs
from flows.process import Child

_SECONDS_A_NIGHT = 180
STAGES = ("quantize", "evaluate")


@pytest.fixture
def clone(tmp_path: Path, home: Path, server: str) -> Chain:
    """The clone on a worker's machine, in which everything has been computed once."""
    made = publishing.collecting(tmp_path / "place")
    shutil.copytree(publishing.REPOSITORY / "deployments", made.root / "deployments")
    (made.root / "texts/0.txt").write_text("And the evening and the morning were the first day.\n")
    with contextlib.chdir(made.root):
        made.collect()
        made.run()
    return Chain(made.root, home, server)


def test_what_is_deployed_runs_on_a_worker_when_data_has_arrived(clone: Chain) -> None:
    _, deploy, emit, (setting, work) = page.blocks("schedule")
    assert setting[0] == "export"
    variable, _, _ = setting[1].partition("=")
    for command in deploy:
        _run(clone, command)

    nightly, scratch, arrived = (
        _ask(clone, f"deployments/name/nightly/{name}") for name in ("nightly-full", "weekly-scratch", "on-new-data")
    )
    for deployment in (nightly, scratch, arrived):
        assert deployment["work_pool_name"] == "overnight"
        assert deployment["global_concurrency_limit"]["limit"] == 1
        assert deployment["concurrency_options"]["collision_strategy"] == "ENQUEUE"
        # Nothing of the machine that deployed.
        assert str(clone.root) not in json.dumps(deployment)
        [step] = deployment["pull_steps"]
        assert step == {"prefect.deployments.steps.set_working_directory": {"directory": "{{ $OVERNIGHT_PROJECT }}"}}
    assert scratch["parameters"] == {"scratch": True}
    crons = [[(one["schedule"]["cron"], one["active"]) for one in each["schedules"]] for each in (nightly, arrived)]
    assert crons == [[("0 2 * * *", True)], [("17 * * * *", False)]]

    with _worker(clone, work, {variable: str(clone.root)}):
        for command in emit:
            _run(clone, command)
        run = _ended(clone, arrived["id"])
        assert (run["state_name"], run["state"]["message"]) == ("Completed", "v1.0.0 is in production"), run["state"]
        # Nobody told this run where the project is but the worker's environment.
        assert run["parameters"] == {}
        assert _outcomes(clone, run) == {"collect": "ran", **dict.fromkeys(STAGES, "cached"), "publish": "ran"}

        # As if nothing had been computed before; and it is the same model.
        _ask(clone, f"deployments/{scratch['id']}/create_flow_run", {})
        run = _ended(clone, scratch["id"])
    assert (run["state_name"], run["state"]["message"]) == ("Nothing new", "nothing new since v1.0.0"), run["state"]
    assert _outcomes(clone, run) == {"collect": "cached", **dict.fromkeys(STAGES, "ran"), "publish": "cached"}


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_a_server_takes_the_other_pools(kind: str, server: str) -> None:
    # As `prefect work-pool create` asks for it, which the test above runs.
    template = json.loads((tiny.ROOT / "deployments/pools" / f"{kind}.json").read_text())
    ask(server, "work_pools/", {"name": kind, "type": kind, "base_job_template": template})
    pool = ask(server, f"work_pools/{kind}")
    assert pool["type"] == kind
    assert pool["base_job_template"] == template


def _outcomes(chain: Chain, run: Any) -> dict[str, str | None]:
    """How each stage of a night went."""
    record = runs.recall(chain.root, run["name"])
    assert record is not None
    return {stage.stage: stage.outcome for stage in record.stages}


def _program(command: list[str]) -> list[str]:
    """A command of the page as this environment has it."""
    program, *arguments = command
    return [sys.executable, *([] if program == "python" else ["-m", program]), *arguments]


def _run(chain: Chain, command: list[str]) -> None:
    done = subprocess.run(
        _program(command),
        cwd=chain.root,
        env=chain.environment(PYTHONPATH=str(publishing.REPOSITORY)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@contextlib.contextmanager
def _worker(chain: Chain, command: list[str], settings: dict[str, str]) -> Iterator[None]:
    environment = chain.environment(
        **settings,
        # Stands in for the installed package.
        PYTHONPATH=str(publishing.REPOSITORY),
        PREFECT_WORKER_QUERY_SECONDS="1",
    )
    with Child(_program(command), chain.root.parent / "worker.log", environment):
        yield


def _ask(chain: Chain, path: str, body: dict[str, Any] | None = None) -> Any:
    assert chain.api is not None
    return ask(chain.api, path, body)


def _ended(chain: Chain, deployment: str) -> Any:
    deadline = time.monotonic() + _SECONDS_A_NIGHT
    wanted = {"deployments": {"id": {"any_": [deployment]}}}
    while True:
        runs = _ask(chain, "flow_runs/filter", wanted)
        if runs and runs[0]["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            return runs[0]
        assert time.monotonic() < deadline, (runs, (chain.root.parent / "worker.log").read_text())
        time.sleep(0.2)
