"""Runs that could not say how they ended: killed, or stopped together with the machine or the schedule.

The next start of ``overnight schedule``, or the next night, writes that down, corrects Prefect, and tells it once.
"""

from collections.abc import Collection
from pathlib import Path
from uuid import UUID

from prefect.client.orchestration import get_client

from flows import crashed, notice, runs, server
from tasks.notice_params import Kind, NoticeParams

DIED = "its process died without a word (killed, or the machine went down)"
# Not Prefect's word, Crashed: the automation that tells of those would come a quarter of an hour late. A server that
# has just started waits that long for the events that went before, which it will not see again.
_STATE = "Died"


def settle(root: Path, params: NoticeParams, unfinished: Collection[UUID] = (), but: str | None = None) -> list[str]:
    """Marks what has died, here and on the server, and tells whom it concerns; returns the names of the marked ones.

    ``unfinished`` are flow runs that nobody works on, unless a record says otherwise: one that `overnight rerun` has
    taken up is alive. Leaves out the run ``but``, which goes on now. Call it while no other process does: holding the
    lock of runs, or that of the schedule.
    """
    known = [run for run in runs.read(root) if run.run != but]
    alive = {run.flow_run for run in known if run.alive}
    dead = [run for run in known if run.state == "running" and not run.alive]
    lost = {run.flow_run for run in dead if run.flow_run} | {str(one) for one in unfinished} - alive
    own = server.standing(root) is not None
    marked: list[str] = []
    if lost:
        with get_client(sync_client=True) as client:
            # A server that others share gets the automations from whoever looks after it, once, and they tell.
            state = _STATE if own else "Crashed"
            marked = crashed.mark(client, map(UUID, sorted(lost)), f"{DIED[0].upper()}{DIED[1:]}.", state)
    for run in dead:
        runs.bury(root, run)
    # A night of which the server knew already that it was dead: an automation has told.
    told_here = set(marked) if own else set()
    for run in known:
        if run.night and run.state == "stopped" and not run.told:
            _tell(root, run, "failure", f"it was stopped: {run.reason}", params)
        elif run.run in told_here:
            _tell(root, run, "died", DIED, params)
    for name in sorted(told_here - {run.run for run in known}):
        # It died before it had written a word: there is nothing to go on with.
        notice.tell(notice.Notice("died", root.name, name, f"{DIED}; {runs.UNBEGUN}"), params)
    return marked


def _tell(root: Path, run: runs.Run, kind: Kind, message: str, params: NoticeParams) -> None:
    stage = run.last_stage.stage if run.last_stage is not None else None
    command = f"overnight rerun {run.run}"
    notice.tell(
        notice.Notice(kind, root.name, run.run, message, stage=stage, command=command, flow_run=run.flow_run), params
    )
    runs.tell(root, run.run)
