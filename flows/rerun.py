"""``overnight rerun``: goes on with a run that failed, was stopped or was killed, under the same id."""

import os
import time
from pathlib import Path

from rich.console import Console

from flows import dvc, failures, lock, project, run, runs, server
from flows.execute import LOGS
from flows.git import commit_of, is_ancestor
from flows.terminal import print_line, speaker
from flows.termination import sigterm_raises
from flows.watch import EXIT_FAILED
from tasks.errors import EXIT_USER_MISTAKE, UserMistake
from tasks.stage import importing

_SECONDS_BETWEEN_LOOKS = 0.2
_WELL = ("completed", "unchanged", "skipped")


def rerun(name: str | None, from_stage: str | None, force: bool, wait: bool, out: Console, err: Console) -> int:
    """Goes on with the run ``name`` (None: the last one that can) and returns the exit code, as ``overnight run`` does.

    Without ``from_stage`` it finishes what the run was asked to do. With one it does that instead, with a finished run
    too. With ``wait`` it waits for the end of a run that is at work, this one or another. Raises :class:`UserMistake`
    when there is nothing to do, :class:`flows.lock.Held` when a run is at work.
    """
    root = project.find()
    chosen = choose(runs.read(root), from_stage is not None) if name is None else runs.find(root, name)
    if chosen.alive and wait:
        chosen = _ended(root, chosen, err)
        if chosen.state in _WELL and from_stage is None:
            speaker(err)(f"run {chosen.run} is {chosen.condition}; nothing is left to go on with.")
            return 0
    if chosen.alive:
        raise lock.Held(
            f"run {chosen.run} is at work (process {chosen.pid}); there is nothing to go on with. `overnight status` "
            "shows how far it is."
        )
    if not chosen.can_go_on and from_stage is None:
        raise UserMistake(
            f"run {chosen.run} is {chosen.condition}; there is nothing to go on with. `--from STAGE --force` repeats "
            "stages, `overnight run` starts a new run."
        )
    if from_stage is None:
        from_stage, force = chosen.from_stage, chosen.force or force
    if chosen.night:
        return _night(root, chosen, from_stage, force, wait, err)
    return run.run(run.Request(from_stage, force, wait, chosen), out, err)


def choose(known: tuple[runs.Run, ...], finished_too: bool = False) -> runs.Run:
    """Returns the newest run, which must be one that did not come to its end. Raises :class:`UserMistake`."""
    for one in reversed(known):
        if one.state == "skipped":
            continue
        if not one.can_go_on and not one.alive and not finished_too:
            raise UserMistake(
                f"the last run, {one.run}, is {one.condition}; there is nothing to go on with. Name an older one "
                "(`overnight runs`) to go on with that, or repeat stages of this one with `--from STAGE --force`."
            )
        return one
    raise UserMistake("there is no run yet. `overnight run` starts one.")


def _night(root: Path, chosen: runs.Run, from_stage: str | None, force: bool, wait: bool, err: Console) -> int:
    # The night takes it again, and would wait for whoever came between.
    advice = "Wait until it has ended, or run `overnight rerun --wait`."
    with lock.hold(root, chosen.run, wait, tell=speaker(err), advice=advice):
        pass
    if from_stage is not None:
        dvc.graph(root).check(from_stage, "--from")
    # The night itself takes the lock; the server's supervisor needs no part in it.
    nothing = os.open(os.devnull, os.O_RDONLY)
    with sigterm_raises(), server.serve(root, nothing) as serving:
        with importing():
            # Importing Prefect takes a second, in which the server starts.
            from flows import flow_runs
            from flows.nightly import nightly

            flow_runs.import_ahead()
        serving.wait()
        if chosen.flow_run is None or not flow_runs.is_known(chosen.flow_run):
            raise UserMistake(
                f"the Prefect server at {os.environ['PREFECT_API_URL']} does not know run {chosen.run}. Set "
                "PREFECT_API_URL to the server that it was started on."
            )
        _tell_commit(root, chosen, err)
        try:
            with serving.settings():
                state = flow_runs.start(
                    nightly, chosen.flow_run, from_stage=from_stage, force=force, scratch=False, project=str(root)
                )
        finally:
            run.flush()
    return 0 if state.is_completed() else _tell_failure(root, chosen, state.message, err)


def _tell_failure(root: Path, before: runs.Run, message: str | None, err: Console) -> int:
    """Says why an attempt at a night failed, and returns its exit code. ``before``: the night as it was before it."""
    print_line(err, f"error: {message}")
    failed = runs.find(root, before.run)
    if failed.attempt == before.attempt:
        # It failed before it had a record: what that says is of the attempt before.
        return EXIT_FAILED
    stage = failed.last_stage
    if stage is not None and (log := root / LOGS / failed.run / f"{failures.file_name(stage.stage)}.log").is_file():
        print_line(err, f"The whole log: {log.relative_to(root)}")
    first = "Change that first, then go" if failed.exit_code == EXIT_USER_MISTAKE else "Go"
    print_line(err, f"{first} on with: overnight rerun {failed.run}")
    return failed.exit_code or EXIT_FAILED


def _ended(root: Path, chosen: runs.Run, err: Console) -> runs.Run:
    """Waits until no process works on the run, as one told to stop does for seconds; returns it as it is then."""
    speaker(err)(f"run {chosen.run} is at work (process {chosen.pid}); waiting until it has ended.")
    while chosen.alive:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        chosen = runs.find(root, chosen.run)
    return chosen


def _tell_commit(root: Path, chosen: runs.Run, err: Console) -> None:
    """Says what the night works on: edits since then, made to mend it perhaps, are no part of it."""
    if chosen.commit is not None and not is_ancestor(root, commit_of(root, "HEAD"), chosen.commit):
        speaker(err)(
            f"run {chosen.run} goes on with what was committed when it began ({chosen.commit[:12]}); later commits are "
            "for the next night."
        )
