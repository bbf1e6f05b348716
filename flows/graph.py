"""The DAG as plain values: what the planner, the flow and the status command know about the stages."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from tasks import paths
from tasks.errors import UserMistake

# Collecting touches the outside world, so it is a task of the flow and not a stage of dvc.yaml.
COLLECT = "collect"
# So does bringing the model that a new one is measured against.
CHAMPION = "champion"
# And bringing what training starts from.
INIT = "init"
# A night begins with one of these and ends with the other.
CHECKOUT = "checkout"
PUBLISH = "publish"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of ``dvc.yaml``."""

    name: str
    description: str
    # The stages whose outputs this one reads.
    upstream: tuple[str, ...]
    dependencies: tuple[Path, ...]
    outputs: tuple[Path, ...]

    @property
    def reads_collected(self) -> bool:
        """Whether the stage reads what ``collect`` brings in."""
        return paths.RAW in self.dependencies

    @property
    def reads_init(self) -> bool:
        """Whether the stage reads what training starts from."""
        return paths.INIT in self.dependencies

    @property
    def reads_champion(self) -> bool:
        """Whether the stage measures a model against the one in production."""
        return paths.CHAMPION in self.dependencies


@dataclasses.dataclass(frozen=True)
class Graph:
    """The stages of ``dvc.yaml`` in an order in which each comes after what it reads."""

    stages: tuple[Stage, ...]

    def ancestors(self, name: str) -> frozenset[str]:
        """Returns the stages that ``name`` depends on, at any distance."""
        upstream = {stage.name: stage.upstream for stage in self.stages}
        found: set[str] = set()
        waiting = list(upstream[name])
        while waiting:
            one = waiting.pop()
            if one not in found:
                found.add(one)
                waiting.extend(upstream[one])
        return frozenset(found)

    def descendants(self, name: str) -> frozenset[str]:
        """Returns the stages that depend on ``name``, at any distance."""
        return frozenset(stage.name for stage in self.stages if name in self.ancestors(stage.name))

    def names(self) -> list[str]:
        """Returns every name that ``--from`` accepts, in order."""
        return [COLLECT, *(stage.name for stage in self.stages)]

    def check(self, name: str, where: str) -> None:
        """Raises :class:`UserMistake` when there is no stage ``name``, which the user gave at ``where``."""
        if name not in self.names():
            raise UserMistake(f"{where}: there is no stage '{name}'; choose one of {', '.join(self.names())}.")

    def check_there(self, name: str, root: Path) -> None:
        """Raises :class:`UserMistake` where what is read of the stages that ``--from name`` leaves out is not there."""
        for stage in self.stages if name != COLLECT else ():
            for output in stage.outputs if stage.name in self.ancestors(name) else ():
                if not (root / output).exists() and any(output in one.dependencies for one in self.stages):
                    raise UserMistake(
                        f"--from {name}: {output} is not there, which {stage.name} makes. `dvc checkout` brings what "
                        f"it made before; else take --from {stage.name}, or leave --from out."
                    )


def in_order(stages: Iterable[Stage]) -> Graph:
    """Returns the graph of ``stages``, sorted topologically; ties keep the order given."""
    waiting = list(stages)
    placed: dict[str, Stage] = {}
    while waiting:
        # DVC has refused cycles, so one stage at least is ready.
        ready = next(stage for stage in waiting if all(name in placed for name in stage.upstream))
        placed[ready.name] = ready
        waiting.remove(ready)
    return Graph(tuple(placed.values()))
