"""What a test changes in a process that it starts, such as a fault, or a look at what it does."""

import importlib
import os
import pkgutil
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm.model import LanguageModel
    from tasks.world import Meshes

PATIENCE = timedelta(hours=2)


def spoil() -> None:
    """Makes the loss not finite wherever training sees one of the windows in the variable ``SPOILT``."""
    from lm.model import LanguageModel

    spoilt, seen, loss = _windows_in("SPOILT"), _last_windows(), LanguageModel.loss

    def spoiling(self: LanguageModel, windows: Any) -> Any:
        return loss(self, windows) * (float("inf") if self.training and seen & spoilt else 1.0)

    LanguageModel.loss = spoiling  # type: ignore[method-assign]


def spoil_the_loss() -> None:
    """As :func:`spoil`, but for the gradients, which stay as they are."""
    from lm.model import LanguageModel

    spoilt, seen, loss = _windows_in("SPOILT"), _last_windows(), LanguageModel.loss

    def spoiling(self: LanguageModel, windows: Any) -> Any:
        return loss(self, windows) + (float("inf") if self.training and seen & spoilt else 0.0)

    LanguageModel.loss = spoiling  # type: ignore[method-assign]


def _windows_in(variable: str) -> set[int]:
    return set(map(int, filter(None, os.environ[variable].split(","))))


def _last_windows() -> set[int]:
    """Returns what will always hold the windows that were read last."""
    from tasks.shards import WindowReader

    batch, seen = WindowReader.batch, set[int]()

    def remembered(self: WindowReader, indices: Any) -> Any:
        seen.clear()
        seen.update(indices.tolist())
        return batch(self, indices)

    WindowReader.batch = remembered  # type: ignore[method-assign]
    return seen


def diverge() -> None:
    """Makes the validation loss what the variable ``LOSS`` says, from the validation on that ``FROM`` counts."""
    from tasks.trainer import Trainer

    validate, first, calls = Trainer.validate, int(os.environ["FROM"]), [0]

    def diverging(self: Trainer, stop: Any) -> float | None:
        found = validate(self, stop)
        calls[0] += 1
        return float(os.environ["LOSS"]) if calls[0] >= first else found

    Trainer.validate = diverging  # type: ignore[method-assign]


def overflow() -> None:
    """Makes the gradient infinite, and leaves the loss, where training sees one of the windows in ``OVERFLOWS``."""
    from lm.model import LanguageModel

    chosen, seen, loss = _windows_in("OVERFLOWS"), _last_windows(), LanguageModel.loss_from

    # Where a pipeline's last stage begins as well.
    def overflowing(self: LanguageModel, *arguments: Any) -> Any:
        found = loss(self, *arguments)
        if self.training and seen & chosen:
            found = found * 1.0
            found.register_hook(lambda gradient: gradient * float("inf"))
        return found

    LanguageModel.loss_from = overflowing  # type: ignore[method-assign]


def only_the_first_has_bf16() -> None:
    """Has the processor of rank 0 multiply in bf16, and that of no other rank."""
    import torch

    torch.cpu._is_avx512_bf16_supported = lambda: os.environ["RANK"] == "0"
    torch.cpu._is_amx_tile_supported = lambda: False


def lack_bf16() -> None:
    """Has no processor multiply in bf16."""
    import torch

    torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: False


def check_patience() -> None:
    """Makes a mesh whose groups are to have the timeout ``PATIENCE``, and looks at each."""
    _check_groups(_mesh_of_two())


def check_patience_of_replicas() -> None:
    """As :func:`check_patience`, of the groups within and between replicas that train apart."""
    import torch
    import torch.distributed as dist

    from tasks.parallel.diloco import replica_of
    from tasks.world import World

    meshes = _mesh_of_two()
    replica = replica_of(World(dist.get_rank(), 2, torch.device("cpu"), "fp32", meshes))
    assert replica.mesh is not None
    _check_groups(replica.mesh, replica.group, replica.twins)


def _mesh_of_two() -> "Meshes":
    import torch
    import torch.distributed as dist

    from tasks.mesh import MeshParams
    from tasks.world import device_mesh

    dist.init_process_group("gloo")
    meshes = device_mesh(MeshParams(shard=2).over(2), torch.device("cpu"), PATIENCE)
    assert meshes is not None
    return meshes


def _check_groups(meshes: "Meshes", *more: Any) -> None:
    import torch
    import torch.distributed as dist

    from tasks.world import all_again

    groups = [group for one in (meshes.data, meshes.dense, meshes.experts) for group in one.get_all_groups()]
    for group in (*groups, all_again(2, PATIENCE), *more):
        assert group._get_backend(torch.device("cpu")).options._timeout == PATIENCE
    dist.barrier()
    dist.destroy_process_group()


def lose_a_peer_while_joining() -> None:
    """Makes joining the others end as gloo does where one of them is gone before all have joined."""
    import torch.distributed as dist

    def join(*_: object, **__: object) -> None:
        raise RuntimeError(
            "Gloo connectFullMesh failed with [gloo/transport/tcp/pair.cc:553] Connection closed by peer"
        )

    dist.init_process_group = join


def linger() -> None:
    """Makes rank 1 read for ever when it comes to the windows in the variable ``LINGERS``.

    It sees itself that nothing moves as many seconds later as the variable ``LATE`` says.
    """
    import threading
    import time

    from tasks.heartbeat import _Watch
    from tasks.shards import WindowReader

    if os.environ["RANK"] == "1":
        late = float(os.environ.get("LATE", "0"))
        seen = property(lambda self: time.monotonic() - self.here.moved > self.seconds + late)
        _Watch.stands_still = seen  # type: ignore[assignment,method-assign]

    lingers, batch = _windows_in("LINGERS"), WindowReader.batch

    def lingering(self: WindowReader, indices: Any) -> Any:
        if os.environ["RANK"] == "1" and lingers == set(indices.tolist()):
            threading.Event().wait()
        return batch(self, indices)

    WindowReader.batch = lingering  # type: ignore[method-assign]


def stand_still() -> None:
    """Stops rank 1 where it calls the function that the variable ``STANDS_STILL_AT`` names with its module.

    Or the rank that ``STANDS_STILL`` says. The others wait for no more than two seconds for it to join.
    """
    from tasks import world

    world._LEAST_SECONDS_TO_JOIN = 2.0
    place, _, name = os.environ["STANDS_STILL_AT"].rpartition(".")
    module = importlib.import_module(place)
    found = getattr(module, name)

    def standing(*arguments: object, **more: object) -> Any:
        if os.environ["RANK"] == os.environ.get("STANDS_STILL", "1"):
            os.kill(os.getpid(), signal.SIGSTOP)
        return found(*arguments, **more)

    setattr(module, name, standing)


def damage_what_is_loaded() -> None:
    """Does to the parts of checkpoints what the variable ``DAMAGE`` says, when all are found intact and are read."""
    from tasks.trainer import Trainer

    restore = Trainer.restore

    def damaging(self: Trainer, state: Any) -> int:
        for file in Path.cwd().glob(".overnight/checkpoints/train/*/parts-*/*.distcp"):
            with file.open("r+b") as opened:
                if os.environ["DAMAGE"] == "cut":
                    opened.truncate(file.stat().st_size // 2)
                else:
                    opened.seek(file.stat().st_size // 2)
                    opened.write(b"\xff")
        return restore(self, state)

    Trainer.restore = damaging  # type: ignore[method-assign]


def stall_a_checkpoint() -> None:
    """Has the disk not answer while the checkpoint of the step that the variable ``STALLS`` says is written."""
    import threading

    from tasks.checkpoints import Checkpoints

    write = Checkpoints._write

    def stalling(self: Checkpoints, step: int, *arguments: Any) -> None:
        if step == int(os.environ["STALLS"]):
            threading.Event().wait()
        write(self, step, *arguments)

    Checkpoints._write = stalling  # type: ignore[method-assign]


def slow_the_first_graph() -> None:
    """Has the first process take the seconds that the variable ``SLOW`` says to write what fine-tuning begins with."""
    from tasks.quantize import worker

    export = worker.export

    def slow(model: Any, plan: Any, folder: Path) -> None:
        export(model, plan, folder)
        if folder.name == "post_training":
            time.sleep(float(os.environ["SLOW"]))

    worker.export = slow


def run_out_of_memory() -> None:
    """Makes the function that the variable ``WHERE`` names fail as torch does where there is no memory left.

    It does so in the words of the variable ``ERROR``.
    """
    import torch

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError(os.environ["ERROR"])

    owner, _, name = os.environ["WHERE"].rpartition(".")
    setattr(pkgutil.resolve_name(owner), name, fail)


def count_models() -> None:
    """Writes to the file that the variable ``COUNTS`` names how many models there are when one more is loaded."""
    import weakref

    from lm import hugging_face

    # Of a model that is gone its layers may be left, which have nearly all of the weights.
    living = weakref.WeakSet[Any]()

    def counting(read: "Callable[[Path], LanguageModel]") -> "Callable[[Path], LanguageModel]":
        def counted(folder: Path) -> "LanguageModel":
            layers = len(living)
            model = read(folder)
            with Path(os.environ["COUNTS"]).open("a") as counts:
                counts.write(f"{layers / len(model.blocks()):g}\n")
            living.update(model.blocks())
            return model

        return counted

    hugging_face.load, hugging_face.mapped = counting(hugging_face.load), counting(hugging_face.mapped)


def record() -> None:
    """Appends each step that is taken and this rank's windows of it to ``seen-RANK``."""
    import json

    from steps import on_each_step

    def note(run: Any, last: list[Any]) -> None:
        with Path(f"seen-{run.world.rank}").open("a") as seen:
            seen.write(json.dumps(last) + "\n")

    on_each_step(note)


def told_in_a_meeting() -> None:
    """Tells the first process to end while it waits for the second in their first meeting (DiLoCo)."""
    from tasks.parallel.diloco import Diloco

    meet, meetings = Diloco.meet, [0]

    def meeting(self: Diloco, statistics: Any) -> Any:
        meetings[0] += 1
        if meetings[0] == 1 and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        if meetings[0] == 1 and os.environ["RANK"] == "1":
            time.sleep(0.5)
        return meet(self, statistics)

    Diloco.meet = meeting  # type: ignore[method-assign]


def slowly() -> None:
    """Makes each step take a tenth of a second longer."""
    from steps import on_each_step

    on_each_step(lambda run, last: time.sleep(0.1))


def validate_slowly() -> None:
    """Makes each batch of a validation take a second, and leaves a file ``validating`` where there is one."""
    from unittest import mock

    from tasks.process import Process
    from tasks.trainer import Trainer

    read, validate = Process.read, Trainer.validate

    def slow(self: Process, *arguments: Any) -> Any:
        Path("validating").touch()
        time.sleep(1)
        return read(self, *arguments)

    def validating(self: Trainer, stop: Any) -> float | None:
        with mock.patch.object(Process, "read", slow):
            return validate(self, stop)

    Trainer.validate = validating  # type: ignore[method-assign]


def draw() -> None:
    """Makes training draw at random within its steps, as dropout would."""
    import torch

    from lm.model import LanguageModel

    loss = LanguageModel.loss

    def noisy(self: LanguageModel, windows: Any) -> Any:
        return loss(self, windows) * (1 + torch.rand(()) if self.training else 1.0)

    LanguageModel.loss = noisy  # type: ignore[method-assign]
