"""Which stages a run starts: a pure function of the graph, of what is stale, and of what the user asked for."""

import dataclasses
import enum
from collections.abc import Collection

from flows.graph import COLLECT, Graph, Stage


class Action(enum.StrEnum):
    """What a run does with a stage."""

    # Start `dvc repro`, which may still find that nothing changed.
    RUN = "run"
    # Unchanged, and nothing upstream runs: no process is started.
    CACHED = "cached"
    # Upstream of --from.
    SKIPPED = "skipped"


@dataclasses.dataclass(frozen=True)
class Step:
    """One stage of a planned run."""

    stage: Stage
    action: Action
    force: bool = False
    # To be skipped, though what it made before is not what it would make now.
    stale: bool = False


def plan(
    graph: Graph,
    stale: Collection[str],
    from_stage: str | None = None,
    force: bool = False,
    finished: Collection[str] = (),
) -> tuple[Step, ...]:
    """Returns one step a stage, in the graph's order.

    Without ``from_stage`` a stage runs when it is ``stale`` or when something upstream of it runs. ``from_stage`` skips
    its ancestors, stale or not. ``force`` runs ``from_stage`` and its descendants, or every stage, in any case, but
    those that an earlier attempt at this run has ``finished``.
    """
    if from_stage in (None, COLLECT):
        skipped: frozenset[str] = frozenset()
        forced = frozenset(graph.names()) if force else frozenset()
    else:
        assert from_stage is not None
        graph.check(from_stage, "--from")
        skipped = graph.ancestors(from_stage)
        forced = graph.descendants(from_stage) | {from_stage} if force else frozenset()
    forced -= frozenset(finished)
    steps: list[Step] = []
    running: set[str] = set()
    outdated: set[str] = set()
    for stage in graph.stages:
        if stage.name in skipped:
            is_stale = stage.name in stale or bool(outdated & set(stage.upstream))
            outdated |= {stage.name} if is_stale else set()
            steps.append(Step(stage, Action.SKIPPED, stale=is_stale))
        elif stage.name in forced or stage.name in stale or running & set(stage.upstream):
            running.add(stage.name)
            steps.append(Step(stage, Action.RUN, force=stage.name in forced))
        else:
            steps.append(Step(stage, Action.CACHED))
    return tuple(steps)


def collects(from_stage: str | None) -> bool:
    """Whether a run begins with ``collect``, which is upstream of every stage."""
    return from_stage in (None, COLLECT)
