"""What one process of a stage that trains has beside its model: the others, and whom it tells how it gets on."""

import dataclasses
from typing import Any

import torch

from tasks.heartbeat import Heartbeat
from tasks.progress import Progress
from tasks.shards import WindowReader
from tasks.world import World


@dataclasses.dataclass(frozen=True)
class Process:
    """One process of ``stage``. ``beat`` tells the others where it is, ``progress`` whoever looks on."""

    stage: str
    world: World
    progress: Progress
    beat: Heartbeat

    def read(self, windows: WindowReader, indices: Any) -> torch.Tensor:
        """Returns token ids [n, T + 1] on the device of this process.

        Where the windows say what is learned, those flags stand behind the ids: [n, 2, T + 1].
        """
        batch = torch.from_numpy(windows.batch(indices)).to(self.world.device).long()
        if windows.learned is not None:
            learned = torch.from_numpy(windows.learned.batch(indices)).to(self.world.device).long()
            batch = torch.stack([batch, learned], dim=1)
        self.beat.move()
        return batch
