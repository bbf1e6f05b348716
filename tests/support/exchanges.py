"""One process of several that train a small model with each kind of exchange: ``exchanges.py FOLDER``.

Each kind but that of whole gradients trains once more from the checkpoint in the middle, and those of ``AGAIN`` from
the beginning. The first process writes what came of it to ``FOLDER/results.json``.
"""

import json
import os
from pathlib import Path
from typing import Any

import meshes
import numpy as np
import torch
import torch.distributed as dist
import xxhash

from lm.config import LatentConfig
from lm.model import LanguageModel
from tasks import step_meter
from tasks.checkpoints import Checkpoints
from tasks.exchange_params import DilocoParams, ExchangeParams
from tasks.heartbeat import Heartbeat
from tasks.parallel import traffic
from tasks.process import Process
from tasks.progress import Lines, Progress
from tasks.shards import WindowReader, Windows
from tasks.training import train
from tasks.world import World, all_again

STEPS, MIDDLE, WIDTH, LENGTH = 48, 24, 64, 16
MEETING = 12
KINDS = {
    "none": ExchangeParams(),
    "powersgd": ExchangeParams(compression="powersgd", rank=2),
    "int8": ExchangeParams(compression="int8"),
    "diloco": ExchangeParams(diloco=DilocoParams(inner_steps=MEETING, outer_momentum=0.5)),
    # Of bytes, three meetings cost less than one of whole numbers. Of means alone, without a momentum.
    "diloco in bytes": ExchangeParams(
        compression="int8",
        diloco=DilocoParams(inner_steps=MEETING // 3, outer_learning_rate=1.0, outer_momentum=0.0),
    ),
}
# DiLoCo in bytes exchanges as DiLoCo and as int8 do.
AGAIN = ("powersgd", "diloco in bytes")


class Params(meshes.Params):
    """With an exchange."""

    how: ExchangeParams

    @property
    def exchange(self) -> ExchangeParams:
        return self.how


def params_of(kind: str) -> Params:
    case = meshes.Case({}, micro_batch=4)
    changes = {"how": KINDS[kind], "steps": STEPS, "validate_every": MIDDLE, "checkpoint_every": MIDDLE}
    return Params(**{**meshes.params_of(case, 2).model_dump(), **changes, "keep_checkpoints": 2, "clip_grad_norm": 1.0})


def model_of() -> LanguageModel:
    wide = {"hidden_size": WIDTH, "moe_intermediate_size": 48, "intermediate_size": 160, "initializer_range": 0.05}
    wide |= {"max_position_embeddings": LENGTH, "vocab_size": 64, "v_head_dim": 16}
    config = LatentConfig.model_validate({**meshes.MODELS["latent"].model_dump(), **wide})
    model = LanguageModel(config)
    model.initialize(7)
    return model


def tokens_of(seed: int, count: int) -> Any:
    """Tokens of which most follow from the one before."""
    generator = np.random.default_rng(seed)
    tokens = np.zeros(count, dtype=np.uint16)
    jumps = generator.random(count) < 0.1
    for index in range(1, count):
        tokens[index] = generator.integers(64) if jumps[index] else (5 * tokens[index - 1] + 3) % 64
    return tokens


def run(kind: str, folder: Path, world: World, spoil: int = -1) -> dict[str, Any]:
    """Trains in ``folder``; the loss of step ``spoil`` is not finite in the second process."""
    folder.mkdir(exist_ok=True)
    dist.barrier()
    os.chdir(folder)
    model = model_of()
    params = params_of(kind)
    checkpoints = Checkpoints("train", "key-2-1", params.keep_checkpoints, root=folder / "checkpoints")
    readers = [WindowReader([tokens_of(seed, count)], LENGTH) for seed, count in ((1, 4000), (2, 200))]
    said: list[str] = []
    progress = Progress("train", Lines(said.append))
    calls = [0]

    def spoilt(_: object, arguments: tuple[torch.Tensor, ...]) -> None:
        if model.training:
            calls[0] += 1
            if calls[0] == spoil and world.rank == 1:
                with torch.no_grad():
                    arguments[0].mul_(torch.nan)

    if spoil >= 0:
        model.model.norm.register_forward_pre_hook(spoilt)
    process = Process("train", world, progress, Heartbeat())
    curve, _ = train(model, params, Windows(*readers), process, checkpoints)
    digest = xxhash.xxh3_128_hexdigest(b"".join(value.numpy().tobytes() for value in model.state_dict().values()))
    digests: list[Any] = [None] * world.size
    dist.all_gather_object(digests, digest)
    measured = json.loads((folder / ".overnight/measurements/train.json").read_text())
    told = {"sent": measured["bytes_sent"], "share": measured["share_of_whole_gradients"], "said": said}
    return {"weights": digests, "rows": curve.rows, "skipped": curve.skipped, **told}


def work(folder: Path) -> None:
    """Is the process that torchrun's variables name; the first one writes what each kind gave."""
    torch.set_num_threads(1)
    torch.set_deterministic_debug_mode("error")
    # Measured anew for each training, it would take longer than most of these.
    step_meter.peak = lambda world: (1e9, "a test")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    traffic.record()
    dist.init_process_group("gloo")
    world = World(rank, size, torch.device("cpu"), "fp32", writers=all_again(size, None))
    results: dict[str, Any] = {}
    for kind in KINDS:
        place = folder / kind
        results[kind] = run(kind, place, world)
        if kind == "none":
            continue
        if kind in AGAIN:
            results[f"{kind} again"] = run(kind, folder / f"{kind}-again", world)
        dist.barrier()
        if world.is_first:
            for file in (place / "checkpoints").rglob(f"*-{STEPS:09d}-*.pt"):
                file.unlink()
        dist.barrier()
        results[f"{kind} resumed"] = run(kind, place, world)
        if not kind.startswith("diloco"):
            results[f"{kind} spoilt"] = run(kind, folder / f"{kind}-spoilt", world, spoil=3)
    if world.is_first:
        (folder / "results.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
