"""The attempts at one stage of a run: what the last one complained about, and whether another one is worth it."""

import traceback
from collections.abc import Callable
from typing import Any

from prefect.client.schemas.objects import State

from flows import dvc
from flows.execute import Site, remember
from flows.ownership import NoPermission, others_are_told
from flows.watch import Watch
from tasks import atomic
from tasks.errors import DiskFull
from tasks.params import FlowParams


class StageFailed(Exception):
    """A stage failed. ``mendable``: another attempt may succeed. ``exit_code`` is that of its own command, if any."""

    def __init__(self, message: str, mendable: bool, exit_code: int | None) -> None:
        super().__init__(message)
        self.mendable, self.exit_code = mendable, exit_code


class Attempts:
    """Those at the stage ``name``; ``watch`` is told of another one."""

    def __init__(self, name: str, site: Site, params: FlowParams, watch: Watch) -> None:
        self._name, self.site, self._params, self._watch = name, site, params, watch
        self._failure: Exception | None = None
        self._count = 0

    @property
    def exit_code(self) -> int | None:
        return self._failure.exit_code if isinstance(self._failure, StageFailed) else None

    @property
    def message(self) -> str:
        """The last complaint in one line; nothing where there was none."""
        if self._failure is None:
            return ""
        kind = "" if isinstance(self._failure, StageFailed) else f"{type(self._failure).__name__}: "
        return kind + " ".join(str(self._failure).split())

    def run(self, body: Callable[[], State[Any]]) -> State[Any]:
        """Returns what ``body`` does, one more attempt; what it raises is raised, and remembered as the complaint."""
        self._count += 1
        try:
            with atomic.disk_full_is_told(self.site.root), others_are_told(self.site.root):
                return body()
        except StageFailed as error:
            self._failure = error
            raise
        except (DiskFull, NoPermission) as error:
            # Where DVC or a log has no room, or may not write; a stage tells it by itself.
            self._failure = StageFailed(str(error), False, error.exit_code)
            raise self._failure from None
        except Exception as error:
            # A bug of ours: the terminal gets its last line, the log all of it.
            self._failure = error
            log = self.site.root / self.site.log(self._name)
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a") as file:
                file.write(traceback.format_exc())
            remember(self.site, self._name, dvc.Result("failed", None, self.message))
            raise

    def may_retry(self) -> bool:
        """Returns whether another attempt may succeed; says so where there will be one."""
        mendable = isinstance(self._failure, StageFailed) and self._failure.mendable
        if mendable and self._count <= self._params.retries.get(self._name, 0):
            self._watch.retrying(self._name, self.message, self._count + 1, self._params.retry_delay_seconds)
        return mendable
