"""Slurm's script and the Kubernetes manifest start what docs/train-on-many-machines.md says they do."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from ruamel.yaml import YAML

from tasks.errors import EXIT_TRY_AGAIN, EXIT_USER_MISTAKE
from tasks.launch import seconds_to_stop
from tasks.training_params import TrainingParams

DEPLOYMENTS = Path(__file__).parent.parent / "deployments"
SCRIPT = DEPLOYMENTS / "train.sbatch"
DOCUMENT = DEPLOYMENTS.parent / "docs/train-on-many-machines.md"

SCONTROL = """\
#!/bin/sh
case "$1" in
    show) printf 'node07\\nnode08\\nnode09\\n' ;;
    requeue) echo "$2" > requeued ;;
esac
"""
# Ends as the stage does when it is told to: with 75, after the signal.
SRUN = """\
#!/bin/sh
trap 'echo told >> srun.log; exit 75' TERM
env | grep '^PET_' | sort > srun.log
echo "$@" >> srun.log
[ -z "$SRUN_CODE" ] || exit "$SRUN_CODE"
while :; do sleep 0.05; done
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on three machines, with commands that stand for Slurm's."""
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    outside = {
        name: value for name, value in os.environ.items() if not name.startswith(("PET_", "SLURM_", "OVERNIGHT_"))
    }
    return {
        **outside,
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "41234",
        "SLURM_JOB_NODELIST": "node[07-09]",
        "SLURM_JOB_NUM_NODES": "3",
    }


def submit(folder: Path, environment: dict[str, str], **more: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["bash", str(SCRIPT)], cwd=folder, env={**environment, **more})


def test_slurm_starts_an_agent_on_each_machine_that_meets_the_others_at_the_first(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0
    assert submit(tmp_path, cluster, SRUN_CODE="0").wait(20) == 0
    *variables, command = (tmp_path / "srun.log").read_text().splitlines()
    assert variables == [
        "PET_MAX_RESTARTS=10",
        "PET_NNODES=3",
        "PET_RDZV_BACKEND=c10d",
        "PET_RDZV_ENDPOINT=node07:21234",
        "PET_RDZV_ID=overnight-41234",
    ]
    assert command == (
        "--ntasks-per-node=1 --cpu-bind=none --no-kill --kill-on-bad-exit=0 --wait=0 .venv/bin/python -m tasks.train"
    )  # fmt: skip
    assert not (tmp_path / "requeued").exists()


def test_slurm_asks_for_what_the_user_asks_for(cluster: dict[str, str], tmp_path: Path) -> None:
    asked = {"PET_NNODES": "1:3", "PET_MAX_RESTARTS": "2", "OVERNIGHT_PYTHON": "/opt/venv/bin/python"}
    assert submit(tmp_path, cluster, SRUN_CODE="0", **asked).wait(20) == 0
    started = (tmp_path / "srun.log").read_text()
    assert "PET_NNODES=1:3\n" in started
    assert "PET_MAX_RESTARTS=2\n" in started
    assert started.endswith("/opt/venv/bin/python -m tasks.train\n")


@pytest.mark.parametrize("notice", [signal.SIGUSR1, signal.SIGTERM])
def test_slurm_s_notice_reaches_the_training_and_the_job_comes_again(
    cluster: dict[str, str], tmp_path: Path, notice: signal.Signals
) -> None:
    job = submit(tmp_path, cluster)
    deadline = time.monotonic() + 20
    while not (tmp_path / "srun.log").exists() or "tasks.train" not in (tmp_path / "srun.log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(notice)
    assert job.wait(20) == EXIT_TRY_AGAIN
    assert (tmp_path / "srun.log").read_text().endswith("told\n")
    assert (tmp_path / "requeued").read_text() == "41234\n"


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [
        (EXIT_TRY_AGAIN, "19", True),
        (EXIT_TRY_AGAIN, "20", False),
        (128 + signal.SIGKILL, "0", True),
        (EXIT_USER_MISTAKE, "0", False),
        (1, "0", False),
    ],
)
def test_slurm_repeats_only_what_may_pass(
    cluster: dict[str, str], tmp_path: Path, code: int, restarts: str, again: bool
) -> None:
    assert submit(tmp_path, cluster, SRUN_CODE=str(code), SLURM_RESTART_COUNT=restarts).wait(20) == code
    assert (tmp_path / "requeued").exists() is again


def test_slurm_puts_a_job_back_and_gives_it_one_task_a_machine_and_all_of_that() -> None:
    options = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "--requeue" in options
    assert "--ntasks-per-node=1" in options
    # Else that task has one core, and the memory of one.
    assert {"--exclusive", "--mem=0"} <= {*options}


@pytest.fixture(scope="module")
def manifest() -> dict[str, dict[str, Any]]:
    found = YAML(typ="safe").load_all(DEPLOYMENTS / "train.kubernetes.yaml")
    return {resource["kind"]: resource for resource in found}


@pytest.mark.parametrize("kind", ["Service", "Job"])
@pytest.mark.parametrize("version", ["1.33", "1.37"])
def test_kubernetes_takes_the_manifest(manifest: dict[str, dict[str, Any]], kind: str, version: str) -> None:
    kubernetes_validate.validate(manifest[kind], version, strict=True)


def test_an_unknown_key_is_seen(manifest: dict[str, dict[str, Any]]) -> None:
    wrong = {**manifest["Job"], "spec": {**manifest["Job"]["spec"], "parallel": 4}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.37", strict=True)


def test_the_pods_of_kubernetes_meet_at_the_first(
    manifest: dict[str, dict[str, Any]], tmp_path: Path
) -> None:  # fmt: skip
    job, service = manifest["Job"], manifest["Service"]
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {one["name"]: one.get("value") for one in container["env"]}
    # The first pod's name: that of the job and its index, below the headless service.
    host, port = variables["PET_RDZV_ENDPOINT"].split(":")
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert int(port) == service["spec"]["ports"][0]["port"]
    most = int(variables["PET_NNODES"].rpartition(":")[2])
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == most
    codes = {rule["action"]: rule["onExitCodes"]["values"] for rule in job["spec"]["podFailurePolicy"]["rules"][:2]}
    assert codes == {"FailJob": [EXIT_USER_MISTAKE], "Ignore": [EXIT_TRY_AGAIN, 128 + signal.SIGTERM]}

    # The command itself, with another Python.
    (tmp_path / "python").write_text('#!/bin/sh\necho "$PET_RDZV_CONF $@"\n')
    (tmp_path / "python").chmod(0o755)
    for index, is_host in (("0", "true"), ("3", "false")):
        environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "JOB_COMPLETION_INDEX": index}
        command = [*container["command"], *container["args"]]
        told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        assert told == f"is_host={is_host} -m tasks.train\n"


def test_slurm_and_kubernetes_wait_for_as_long_as_the_document_says(manifest: dict[str, dict[str, Any]]) -> None:
    (told,) = re.findall(r"give (\d+) s, enough for `stop_seconds: (\d+)`", DOCUMENT.read_text())
    given, seconds = map(int, told)
    assert seconds_to_stop(TrainingParams.model_construct(stop_seconds=seconds)) < given
    assert manifest["Job"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == given
    assert f"#SBATCH --signal=B:USR1@{given}\n" in SCRIPT.read_text()
