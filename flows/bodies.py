"""What the tasks of the flow do, each in commands or questions of its own.

A body returns how its task ended, and raises :class:`flows.attempts.StageFailed` where it did not.
"""

import contextlib
import shutil
import sys
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows import artifacts, champion, computed, dvc, dvc_lock, failures, init, raw, remotely, worktree
from flows.attempts import StageFailed
from flows.execute import Classify, Site, execute, remember
from flows.graph import CHAMPION, CHECKOUT, COLLECT, INIT, Graph, Stage
from flows.watch import Watch
from tasks import paths
from tasks.champion import read as read_champion
from tasks.collect.report import read as read_report
from tasks.errors import EXIT_USER_MISTAKE, TryAgain, UserMistake
from tasks.init import PREVIOUS
from tasks.init import read as read_init
from tasks.params import Params
from tasks.progress import Event


class Bodies:
    """Those of one flow run."""

    def __init__(self, site: Site, params: Params, watch: Watch) -> None:
        self._site = site
        self._params, self._watch = params, watch
        self.seen: dvc.Changes | None = None
        """What was stale when ``collect`` had nothing new to bring: the plan needs the same answer."""

    def stale(self) -> Collection[str]:
        """Returns the stages that are not up to date, now that ``collect`` has ended."""
        return (self.seen or self._look()).stages.keys()

    def _look(self) -> dvc.Changes:
        while True:
            try:
                return dvc.changes(self._site.root)
            except dvc_lock.Busy:
                # Somebody typed a DVC command meanwhile.
                dvc_lock.await_others(self._site.root, lambda line: None)

    def checkout(self) -> None:
        """Makes the outputs what the commit's pointers say, from DVC's cache, and from a remote where it lacks them."""
        self._ask_remote(CHECKOUT, dvc.checkout_command(self._site.root, self._params.publish.data_remote))

    def collect(self, graph: Graph) -> State[Any]:
        """Copies what is new at the sources, and versions it."""
        root = self._site.root
        if (root / raw.POINTER).exists() and not (root / paths.RAW).exists():
            # Else what is gone at the sources by now would be left out of the next version without a word.
            self._restore_raw()
        if (root / init.POINTER).exists() and not (root / paths.INIT).exists():
            # As with the text: a checkpoint that has gone from where it was is still that of the project.
            self._ask_remote(COLLECT, dvc.checkout_command(root, self._params.publish.data_remote, init.POINTER))
        command = [sys.executable, "-m", "tasks.collect", "--relative-to", str(worktree.main(root))]
        self._execute(COLLECT, command, dvc.classify_stage)
        report = read_report(root)
        copied = {paths.RAW: (raw.POINTER, report.has_news)}
        if report.init is not None and any(stage.reads_init for stage in graph.stages):
            copied[paths.INIT] = (init.POINTER, report.init.state in ("new", "changed"))
        changes = None
        if not any(has_news or not (root / pointer).exists() for pointer, has_news in copied.values()):
            changes = self._look()
            if not any(str(pointer) in changes.data for pointer, _ in copied.values()):
                self.seen = changes
                return Completed(name="Cached", message="nothing new at the sources", data="cached")
        for folder, (pointer, has_news) in copied.items():
            if has_news or not (root / pointer).exists() or changes is None or str(pointer) in changes.data:
                self._execute(COLLECT, dvc.add_command(folder))
        return Completed(name="Ran", data="ran")

    def _restore_raw(self) -> None:
        self._ask_remote(COLLECT, dvc.checkout_command(self._site.root, self._params.publish.data_remote, raw.POINTER))
        if not (self._site.root / paths.RAW).exists():
            raise StageFailed(
                f"{raw.POINTER} names text that lies neither here nor in DVC's cache nor at a remote. Name the remote "
                f"that has it (`dvc remote add --default NAME PLACE`), or delete {raw.POINTER} to begin with what the "
                "sources have now.",
                False,
                EXIT_USER_MISTAKE,
            )

    def bring_init(self, graph: Graph, running: Collection[str]) -> State[Any]:
        """Fetches and versions what training starts from, where a stage of ``running`` needs another one."""
        root, wanted = self._site.root, self._params.train.init
        action = self._bring(
            INIT, paths.INIT, init.POINTER,
            lambda: init.look(root, wanted, graph, self.seen or self._look(), running),
            partial(remotely.bring_init, root, wanted),
        )  # fmt: skip
        try:
            self._params.check_start(root / paths.INIT)
        except UserMistake as error:
            raise self.refused(INIT, error) from None
        if action != champion.Action.KEEP:
            # What was seen is stale itself by now.
            self.seen = None
        nothing = action == champion.Action.BRING and read_init(root / paths.INIT).version is None
        if nothing and wanted == PREVIOUS:
            told = "no version is in production yet that training could go on from: it starts from scratch"
            self._watch.event(Event(INIT, "", 0, 0, "", 0, notice=told))
        return _brought(action, "from scratch" if nothing else None)

    def bring_champion(self, stage: Stage) -> State[Any]:
        """Fetches and versions the model in production, which ``stage`` measures a new one against."""
        root = self._site.root
        action = self._bring(
            CHAMPION, paths.CHAMPION, champion.POINTER,
            lambda: champion.look(root, stage.name, self._look()),
            partial(remotely.bring_champion, root),
        )  # fmt: skip
        nothing = action == champion.Action.BRING and read_champion(root / paths.CHAMPION).version is None
        return _brought(action, "no champion yet" if nothing else None)

    def _bring(
        self, name: str, folder: Path, pointer: Path,
        look: Callable[[], champion.Action], bring: Callable[[Path, float], None],
    ) -> champion.Action:  # fmt: skip
        """Does what ``look`` says about a ``folder`` that a version brings along, and returns what that was."""
        try:
            action = look()
            if action == champion.Action.BRING:
                bring(self._site.root / self._site.log(name), self._params.publish.stall_minutes)
        except (UserMistake, TryAgain) as error:
            raise self.refused(name, error, mendable=isinstance(error, TryAgain)) from None
        match action:
            case champion.Action.KEEP:
                failures.forget(self._site.root, name)
            case champion.Action.RESTORE:
                try:
                    self._ask_remote(name, dvc.pull_command(pointer))
                except StageFailed as error:
                    if error.mendable:
                        raise
                    told = " ".join(str(error).split()).rstrip(".?")
                    cure = f"delete {pointer}, and the next run brings what is in production now"
                    place = "name the remote that has it (`dvc remote add --default NAME PLACE`)"
                    message = f"{folder} is lost or edited, and cannot be had again ({told}): {place}, or {cure}."
                    raise StageFailed(message, False, EXIT_USER_MISTAKE) from None
            case champion.Action.BRING:
                self._execute(name, dvc.add_command(folder))
        return action

    def refused(self, name: str, error: UserMistake | TryAgain, mendable: bool = False) -> StageFailed:
        """Remembers what ``name`` has met outside of any command, for `overnight status`; returns it as its failure."""
        remember(self._site, name, dvc.Result("failed", error.exit_code, str(error)))
        return StageFailed(str(error), mendable, error.exit_code)

    def forget_checkpoints(self, stage: Stage) -> None:
        """Removes the checkpoints of ``stage``, which computes everything anew then."""
        shutil.rmtree(self._site.root / paths.CHECKPOINTS / stage.name, ignore_errors=True)

    def repro(self, stage: Stage, force: bool) -> State[Any]:
        """Has DVC run ``stage``."""
        result = self._execute(stage.name, dvc.repro_command(stage.name, force))
        if result.outcome == "ran":
            computed.note(self._site.root, stage.name)
        # DVC has the result now, so nobody will go on from there.
        self.forget_checkpoints(stage)
        artifacts.report(stage, self._site.root)
        return Completed(name=result.outcome.capitalize(), data=result.outcome)

    def _ask_remote(self, name: str, command: list[str]) -> dvc.Result:
        return self._execute(name, command, minutes=self._params.publish.stall_minutes)

    def _execute(
        self, name: str, command: list[str], classify: Classify = dvc.classify, minutes: float | None = None
    ) -> dvc.Result:
        with contextlib.closing(artifacts.ProgressArtifact(name)) as shown:

            def on_event(event: Event) -> None:
                self._watch.event(event)
                shown.update(event)

            result = execute(self._site, name, command, on_event, classify, minutes)
        if result.outcome == "failed":
            raise StageFailed(result.message, result.mendable, result.exit_code)
        return result


def _brought(action: champion.Action, nothing: str | None) -> State[Any]:
    if action == champion.Action.KEEP or nothing:
        return Completed(name="Cached", message=nothing or "unchanged", data="cached")
    return Completed(name="Ran", data="ran")
