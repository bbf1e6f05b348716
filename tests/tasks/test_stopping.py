"""SIGTERM: a spot machine is taken away. The training leaves a checkpoint of the step it is in, and goes on there."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import disturb
import forked
import psutil
import pytest
import tiny
from waiting import until

from tasks import native
from tasks.errors import EXIT_STOPPED


@pytest.fixture
def project(tmp_path: Path) -> Path:
    # No checkpoint is due before the end: what lies there is the signal's.
    tiny.write_params(tmp_path, train__checkpoint_every=1000, train__steps=60)
    tiny.write_shards(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    tiny.write_params(folder, train__checkpoint_every=1000, train__steps=60)
    tiny.write_shards(folder)
    assert forked.end(forked.start([folder, folder], folder / "log")) == [0, 0], (folder / "log").read_text()
    return tiny.files_of(folder / "models")


def await_step(events: Path, step: int) -> None:
    until(lambda: events.exists() and any(json.loads(line)["done"] >= step for line in events.read_text().splitlines()))


def saved(project: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in project.glob(".overnight/checkpoints/train/*/*.pt"))


def test_a_launcher_told_to_end_leaves_a_checkpoint_and_asks_to_be_tried_again(
    project: Path, undisturbed: dict[str, bytes]
) -> None:
    events = project / "events"
    process = tiny.stage("train", project, OVERNIGHT_EVENTS=str(events))
    await_step(events, 1)
    # It has started itself anew, with what is read once. Of its settings glibc leaves the first one in place.
    begun_with = psutil.Process(process.pid).environ()
    assert all(value.startswith(begun_with[name]) for name, value in native.SETTINGS.items())
    process.terminate()
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 75, output
    assert "Warning" not in output
    assert tiny.error_line(output) == "told to end (SIGTERM). Run again to go on from the last checkpoint."
    (step,) = saved(project)
    assert json.loads(events.read_text().splitlines()[-1])["notice"].startswith("told to end (SIGTERM): stopped after")
    events.unlink()
    code, output = tiny.run("train", project, OVERNIGHT_EVENTS=str(events))
    assert code == 0, output
    told = json.loads(events.read_text().splitlines()[0])["notice"]
    assert told == f"goes on after step {step} of 60, whose checkpoint is there"
    assert tiny.first_step(events)["done"] == step + 1
    assert tiny.files_of(project / "models") == undisturbed


def test_a_training_of_which_every_step_is_done_says_so(tmp_path: Path) -> None:
    # As one that is killed between its last checkpoint and its model.
    tiny.write_params(tmp_path, **tiny.ALONE)
    tiny.write_shards(tmp_path)
    events = tmp_path / "events"
    assert tiny.run("train", tmp_path)[0] == 0
    code, output = tiny.run("train", tmp_path, OVERNIGHT_EVENTS=str(events))
    assert code == 0, output
    (told,) = [json.loads(line)["notice"] for line in events.read_text().splitlines()]
    assert told == "all 12 steps are done, and the checkpoint of the last is there"


def test_all_stop_at_one_step_when_one_is_told(project: Path, undisturbed: dict[str, bytes]) -> None:
    log = project / "log"
    ranks = forked.start([project, project], log, OVERNIGHT_EVENTS="events")
    await_step(project / "events", 1)
    # Not the one that is told of in the log.
    ranks[1].terminate()
    assert forked.end(ranks) == [EXIT_STOPPED] * 2, log.read_text()
    (step,) = saved(project)
    assert 1 <= step < 60
    assert "Traceback" not in log.read_text()
    assert forked.end(forked.start([project, project], log)) == [0, 0], log.read_text()
    assert tiny.files_of(project / "models") == undisturbed


@pytest.mark.parametrize("steps", [60, 4])
def test_a_validation_is_broken_off_and_done_by_the_next_attempt(
    steps: int, project: Path, undisturbed: dict[str, bytes]
) -> None:
    log = project / "log"
    if steps != 60:
        # The last validation is the one that is broken off.
        tiny.write_params(project, train__steps=steps, train__checkpoint_every=1000)
        assert forked.end(forked.start([project, project], log)) == [0, 0], log.read_text()
        undisturbed = tiny.files_of(project / "models")
        shutil.rmtree(project / "models")
        shutil.rmtree(project / ".overnight")
    ranks = forked.start([project, project], log, disturb.validate_slowly)
    until((project / "validating").exists, told=log.read_text)
    ranks[1].terminate()
    assert forked.end(ranks, 18) == [EXIT_STOPPED] * 2, log.read_text()
    assert saved(project) == [4]
    assert forked.end(forked.start([project, project], log)) == [0, 0], log.read_text()
    assert tiny.files_of(project / "models") == undisturbed


@pytest.mark.parametrize("mesh", [{}, {"shard": 2}], ids=str)
def test_replicas_that_train_apart_stop_between_two_meetings(mesh: dict[str, int], tmp_path: Path) -> None:
    count = 2 * mesh.get("shard", 1)
    apart = {"train__diloco": {"inner_steps": 40}, "train__validate_every": 40, "train__checkpoint_every": 40}
    tiny.write_params(tmp_path, train__steps=40, train__world_size=count, train__mesh=mesh, **apart)
    tiny.write_shards(tmp_path)
    log, folders = tmp_path / "log", [tmp_path] * count
    assert forked.end(forked.start(folders, log)) == [0] * count, log.read_text()
    undisturbed = tiny.files_of(tmp_path / "models")
    shutil.rmtree(tmp_path / "models")
    shutil.rmtree(tmp_path / ".overnight")
    ranks = forked.start(folders, log, disturb.slowly, OVERNIGHT_EVENTS="events")
    await_step(tmp_path / "events", 5)
    # Not the one that is told of in the log.
    ranks[-1].terminate()
    assert forked.end(ranks, 30) == [EXIT_STOPPED] * count, log.read_text()
    steps = saved(tmp_path)
    assert len(steps) == 1
    assert 5 <= steps[0] < 40
    log.unlink()
    assert forked.end(forked.start(folders, log)) == [0] * count, log.read_text()
    assert f"goes on after step {steps[0]} of 40" in log.read_text()
    assert tiny.files_of(tmp_path / "models") == undisturbed


# In a validation all agree to end; a checkpoint is written, and they go on to the next agreement.
@pytest.mark.parametrize(("validated", "kept", "least"), [(4, 48, 4), (48, 4, 5)], ids=["validated", "kept"])
def test_who_is_told_in_a_meeting_stops_after_what_all_do_next(
    validated: int, kept: int, least: int, tmp_path: Path
) -> None:
    every = {"train__validate_every": validated, "train__checkpoint_every": kept}
    tiny.write_params(tmp_path, train__steps=48, train__diloco={"inner_steps": 4}, **every)
    tiny.write_shards(tmp_path)
    log = tmp_path / "log"
    ranks = forked.start([tmp_path, tmp_path], log, disturb.told_in_a_meeting)
    assert forked.end(ranks, 30) == [EXIT_STOPPED] * 2, log.read_text()
    assert "Traceback" not in log.read_text()
    assert least <= max(saved(tmp_path)) < 48


def test_replicas_that_are_cut_stop_at_a_meeting_when_one_of_their_processes_is_told(tmp_path: Path) -> None:
    # They meet after each step, each process with its like in the other replica.
    every = {"train__steps": 60, "train__validate_every": 60, "train__checkpoint_every": 60}
    apart = {"train__world_size": 4, "train__mesh": {"shard": 2}, "train__diloco": {"inner_steps": 1}}
    tiny.write_params(tmp_path, **every, **apart)
    tiny.write_shards(tmp_path)
    log = tmp_path / "log"
    ranks = forked.start([tmp_path] * 4, log, disturb.slowly, OVERNIGHT_EVENTS="events")
    await_step(tmp_path / "events", 3)
    ranks[-1].terminate()
    assert forked.end(ranks, 30) == [EXIT_STOPPED] * 4, log.read_text()
    (step,) = {*saved(tmp_path)}
    assert 3 <= step < 60


STUCK = """
import threading
from tasks import stopping
with stopping.noted(0.2):
    print("there", flush=True)
    threading.Event().wait(30)
"""


def test_who_is_stuck_in_a_step_ends_without_its_end() -> None:
    process = subprocess.Popen([sys.executable, "-c", STUCK], cwd=tiny.ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    process.terminate()
    assert process.wait(10) == EXIT_STOPPED


def test_a_process_that_needs_more_than_stop_seconds_leaves_no_checkpoint(project: Path) -> None:
    tiny.write_params(project, train__checkpoint_every=1000, train__steps=60, train__stop_seconds=0.2)
    log = project / "log"
    ranks = forked.start([project, project], log, disturb.validate_slowly)
    until((project / "validating").exists, told=log.read_text)
    for rank in ranks:
        rank.terminate()
    assert forked.end(ranks, 18) == [EXIT_STOPPED] * 2, log.read_text()
    assert not saved(project)


def test_afterwards_the_signal_does_what_it_did() -> None:
    from tasks import stopping

    before = signal.getsignal(signal.SIGTERM)
    with stopping.noted(60) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: stop.told, 10)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("module", "text"),
    [
        # Of the interpreter, while it begins anew with what is read once.
        ("sitecustomize", "if 'GLIBC_TUNABLES' in os.environ:\n    open('there', 'w').close()\n    time.sleep(0.5)\n"),
        ("torch", "open('there', 'w').close()\ntime.sleep(30)\n"),
    ],
)
@pytest.mark.parametrize("stage", ["train", "quantize"])
def test_a_launcher_told_to_end_before_it_has_torch_says_so(
    stage: str, module: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    (tmp_path / f"{module}.py").write_text(f"import os, time\n{text}")
    process = tiny.stage(stage, tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{tiny.ROOT}")
    until((tmp_path / "there").exists)
    process.terminate()
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 75, output
    assert tiny.error_line(output) == "told to end (SIGTERM) while no process was at work. Run again."
