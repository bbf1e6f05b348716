"""A night as others see it: its record, its name, what it reads, and that it never ends without a word.

What a night does in its worktree is a stand-in here; tests/scenarios plays whole ones.
"""

import contextlib
import io
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock
from uuid import UUID

import pytest
from prefect.client.schemas.objects import FlowRun
from receiver import Receiver, receiving
from rich.console import Console
from ruamel.yaml import YAML

from flows import crashed, lock, lost, nightly, project, runs
from flows.dvc import Changes, Stale
from flows.execute import Site
from flows.git import git
from flows.graph import Graph
from flows.nightly import Outcome
from flows.overnight import Night
from flows.rerun import rerun
from flows.watch import All, StageRun
from tasks.errors import UserMistake
from tasks.notice_params import NoticeParams
from tasks.params import Params

ID = UUID(int=7)
SUCCESS = Outcome("success", "v1.0.0 is in production", "v1.0.0")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "project"
    (place / ".dvc").mkdir(parents=True)
    (place / "dvc.yaml").touch()
    shutil.copy(Path(__file__).parents[2] / "params.yaml", place)
    (place / ".gitignore").write_text(".overnight\n")
    git(place, "init", "-q", "-b", "main")
    commit(place)
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with receiving() as one:
        monkeypatch.setenv("OVERNIGHT_WEBHOOK", one.url)
        yield one


def commit(root: Path) -> None:
    git(root, "add", "--all")
    git(root, "-c", "user.name=a", "-c", "user.email=a@localhost", "commit", "-q", "-m", "The project")


def edit(root: Path, section: str, **values: object) -> None:
    yaml = YAML()
    content = yaml.load(root / "params.yaml")
    content[section].update(values)
    yaml.dump(content, root / "params.yaml")


def play(monkeypatch: pytest.MonkeyPatch, work: Callable[[Params], Outcome], late: timedelta = timedelta()) -> Any:
    """Plays a night of which ``work`` is the work; returns the state of the flow run."""
    monkeypatch.setattr(nightly, "_attempt", lambda root, params, *others: work(params))
    planned = datetime.now(UTC) - late
    return nightly._night(FlowRun(id=ID, flow_id=ID, expected_start_time=planned, run_count=1), None, False)


def notices(receiver: Receiver) -> list[dict[str, Any]]:
    return [json.loads(body)["overnight"] for _, body in receiver.received]


def fail(params: Params) -> Outcome:
    raise OSError("the disk is on fire")


def test_half_typed_edits_in_the_checkout_reach_no_night(
    root: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(root, "publish", branch="elsewhere", git_remote="nowhere")
    edit(root, "notice", kinds=[], webhook_env="NOBODY")
    seen: list[Params] = []
    assert play(monkeypatch, lambda params: seen.append(params) or SUCCESS).is_completed()
    with (root / "params.yaml").open("a") as file:
        file.write("publish: {branch")
    assert play(monkeypatch, lambda params: seen.append(params) or SUCCESS).is_completed()
    assert [(params.publish.branch, params.publish.git_remote) for params in seen] == [("nightly", None)] * 2
    assert [one["kind"] for one in notices(receiver)] == ["success", "success"]


def test_parameters_that_were_committed_with_a_mistake_fail_the_night_and_are_told(
    root: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(root, "publish", brunch="nightly")
    commit(root)
    state = play(monkeypatch, lambda params: SUCCESS)
    assert (state.is_failed(), state.message) == (
        True,
        "params.yaml: publish.brunch: unknown key; did you mean `branch`?",
    )
    (run,) = runs.read(root)
    assert (run.state, run.reason, run.exit_code) == ("failed", state.message, 2)
    assert [(one["kind"], one["message"]) for one in notices(receiver)] == [("failure", state.message)]


@pytest.mark.parametrize("codes", [(2, 2), (75, 1), (None, 1)], ids=str)
def test_a_rerun_of_a_night_ends_with_the_code_of_what_the_night_has_met(
    root: Path, monkeypatch: pytest.MonkeyPatch, codes: tuple[int | None, int]
) -> None:
    night = Night(Site(root, "night", 0), project.committed(root), watch=All(), resumed=runs.Resumed())
    night.runs["publish"] = StageRun("publish", "failed", 1.0, "DVC's remote refuses", codes[0])
    play(monkeypatch, lambda params: nightly._failure(night))

    def again(*_: object, **__: object) -> Any:
        return play(monkeypatch, lambda params: nightly._failure(night))

    monkeypatch.setattr("flows.server.serve", lambda *_: MagicMock())
    monkeypatch.setattr("flows.flow_runs.is_known", lambda flow_run: True)
    monkeypatch.setattr("flows.flow_runs.start", again)
    monkeypatch.setattr("flows.run.flush", lambda: None)

    err = Console(file=io.StringIO(), width=200)
    assert rerun(None, None, False, False, err, err) == codes[1]
    said = err.file.getvalue().splitlines()[-1]  # type: ignore[attr-defined]
    assert said.startswith("Change that first, then go on with: " if codes[1] == 2 else "Go on with: ")


def test_an_exception_nobody_thought_of_is_a_failure_that_is_told_with_its_last_lines(
    root: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert play(monkeypatch, fail).message == "OSError: the disk is on fire"
    (run,) = runs.read(root)
    assert (run.state, run.told, run.can_go_on) == ("failed", True, True)
    (told,) = notices(receiver)
    assert told["last_lines"][-1] == "OSError: the disk is on fire"
    assert told["command"] == f"overnight rerun {run.run}"


def test_a_second_measurement_looks_again_at_what_is_stale(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    night = Night(Site(root, "night", 0), project.committed(root), watch=All(), resumed=runs.Resumed())
    looks = iter([Changes({"train": Stale((), True)}, {}), Changes({"evaluate": Stale((), True)}, {})])
    monkeypatch.setattr(night.bodies, "_look", lambda: next(looks))
    # What `collect` does when it has nothing new to bring.
    night.bodies.seen = night.bodies._look()
    assert set(night.bodies.stale()) == {"train"}
    monkeypatch.setattr(night, "_run", lambda *arguments: None)
    night.collect(Graph(()), wanted=True)
    assert set(night.bodies.stale()) == {"evaluate"}


def test_outside_a_project_it_says_so(tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no dvc.yaml here" in play(monkeypatch, lambda params: SUCCESS).message
    assert [one["kind"] for one in notices(receiver)] == ["failure"]
    assert not any(tmp_path.iterdir())


def test_a_night_that_comes_too_late_is_skipped_with_a_note(
    root: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = play(monkeypatch, fail, late=timedelta(hours=3, minutes=5))
    assert (state.name, state.is_completed()) == ("Skipped", True)
    assert state.message == "3 h 5 min late, more than params.yaml's flow.skip_when_late_minutes"
    assert [run.state for run in runs.read(root)] == ["skipped"]
    assert [one["kind"] for one in notices(receiver)] == ["skipped"]


def test_a_night_that_has_waited_too_long_for_another_run_is_skipped_and_says_meanwhile_that_it_waits(
    root: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Five seconds: more than a night takes to begin, where all is slow.
    edit(root, "flow", skip_when_late_minutes=5 / 60)
    commit(root)
    seen: list[runs.Run] = []

    def other() -> None:
        with lock.hold(root, "other"):
            entered.set()
            while not seen:
                seen.extend(run for run in runs.read(root) if run.reason)
            time.sleep(5.1)

    entered = threading.Event()
    thread = threading.Thread(target=other)
    thread.start()
    entered.wait()
    assert play(monkeypatch, fail).name == "Skipped"
    thread.join()
    assert (seen[0].condition, seen[0].reason.split(" (")[0]) == ("running", "run other")


def test_a_run_keeps_its_name_where_the_clock_shows_another_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Prefect plans days ahead; the name tells when the night was to be.
    planned = datetime(2026, 1, 4, 1, 0, tzinfo=UTC)
    flow_run = FlowRun(id=ID, flow_id=ID, created=planned - timedelta(days=3), expected_start_time=planned)
    with time_zone("Europe/Berlin", monkeypatch):
        name = nightly.name_of(root, flow_run)
        assert name == "20260104-020000-00000000"
        runs.begin(root, name, flow_run=str(ID))
    with time_zone("UTC", monkeypatch):
        assert nightly.name_of(root, flow_run) == name


@contextlib.contextmanager
def time_zone(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", name)
        time.tzset()
        yield
    time.tzset()


def test_a_night_that_was_stopped_is_told_once_by_the_next_one(
    root: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped() -> None:
        with runs.attempt(root, "stopped", night=True) as record:
            record.began("train")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    for _ in range(2):
        play(monkeypatch, lambda params: SUCCESS)
    first, *others = notices(receiver)
    assert (first["kind"], first["run"], first["stage"]) == ("failure", "stopped", "train")
    assert first["message"] == "it was stopped: interrupted (Ctrl-C) at train"
    assert [one["kind"] for one in others] == ["success", "success"]


def test_a_night_that_somebody_has_taken_up_again_is_not_marked_as_dead(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked: list[str] = []
    monkeypatch.setattr(lost, "get_client", lambda sync_client: contextlib.nullcontext())
    monkeypatch.setattr(crashed, "mark", lambda client, ids, *others: marked.extend(map(str, ids)) or [])
    dead, taken_up = UUID(int=1), UUID(int=2)
    runs.begin(root, "dead", flow_run=str(dead), night=True)
    with runs.attempt(root, "taken up", flow_run=str(taken_up), night=True):
        lost.settle(root, NoticeParams(), [dead, taken_up])
        assert marked == [str(dead)]
        assert [run.condition for run in runs.read(root)] == ["killed", "running"]


def test_a_night_that_died_before_its_first_word_is_told_without_a_command(
    root: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost, "get_client", lambda sync_client: contextlib.nullcontext())
    monkeypatch.setattr(lost.server, "standing", lambda root: "here")
    monkeypatch.setattr(crashed, "mark", lambda *_: ["begun", "unbegun"])
    runs.begin(root, "begun", flow_run=str(UUID(int=1)), night=True)
    lost.settle(root, NoticeParams(), [UUID(int=2)])
    begun, unbegun = notices(receiver)
    assert (begun["run"], begun["command"]) == ("begun", "overnight rerun begun")
    assert (unbegun["run"], unbegun["command"]) == ("unbegun", None)
    assert unbegun["message"].endswith("; nothing of it was begun, and the next night does its work")


@pytest.mark.parametrize("wait", [False, True])
def test_a_rerun_waits_for_the_run_itself_only_when_it_is_asked_to(root: Path, wait: bool) -> None:
    err = Console(file=io.StringIO(), width=200)
    with contextlib.ExitStack() as stack:
        record = stack.enter_context(runs.attempt(root, "night", night=True))
        if not wait:
            with pytest.raises(lock.Held, match="run night is at work"):
                rerun("night", None, False, wait, err, err)
            return

        def end() -> None:
            record.end("stopped", "terminated (SIGTERM)")
            stack.close()

        threading.Timer(0.5, end).start()
        # It has ended by then, so that the next mistake is told.
        with pytest.raises(UserMistake, match="nowhere"):
            rerun("night", "nowhere", False, wait, err, err)
    assert "run night is at work" in err.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("wait", [False, True])
def test_a_rerun_of_a_night_waits_for_another_run_only_when_it_is_asked_to(root: Path, wait: bool) -> None:
    runs.begin(root, "night", night=True).end("failed")
    err = Console(file=io.StringIO(), width=200)
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock.hold(root, "other"))
        if not wait:
            with pytest.raises(lock.Held, match=r"run other .* is at work .* `overnight rerun --wait`"):
                rerun("night", None, False, wait, err, err)
            return
        threading.Timer(0.3, stack.close).start()
        with pytest.raises(UserMistake):
            rerun("night", "nowhere", False, wait, err, err)
        assert "Waiting for it to end." in err.file.getvalue()  # type: ignore[attr-defined]
