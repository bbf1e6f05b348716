"""One training process, as torchrun starts it. Trains from scratch; the first process writes ``models/float``."""

from lm import hugging_face
from lm.config import GroupedConfig, LatentArchitecture, LatentConfig, ModelConfig
from lm.model import LanguageModel
from tasks import atomic, inputs, paths, stage, world
from tasks.checkpoints import Checkpoints
from tasks.progress import progress
from tasks.section import read_section
from tasks.shards import Manifest, Shards, read_manifest
from tasks.train.params import CHECKPOINT_INPUTS, TrainParams
from tasks.training import Curve, train


def main() -> None:
    params = read_section("train", TrainParams)
    manifest = read_manifest()
    checkpoints = Checkpoints("train", inputs.key("train", params, CHECKPOINT_INPUTS))
    with world.joined(params, params.mesh) as here, progress("train", here.is_first) as shown:
        if here.is_first:
            checkpoints.forget_others()
        model = LanguageModel(model_config(params, manifest))
        model.initialize(params.seed)
        readers = [Shards(paths.SHARDS, manifest, split).reader(params.seq_len) for split in ("train", "valid")]
        curve = train(model, params, readers[0], readers[1], checkpoints, here, shown, "train")
        if here.is_first:
            write(model, curve, params, len(readers[0]), here.precision)


def model_config(params: TrainParams, manifest: Manifest) -> ModelConfig:
    """Returns the chosen architecture with the tokenizer's ids and the longest position that training sees."""
    kind = LatentConfig if isinstance(params.model, LatentArchitecture) else GroupedConfig
    return kind(
        **params.model.model_dump(),
        vocab_size=manifest.vocab_size,
        max_position_embeddings=params.seq_len,
        bos_token_id=manifest.bos_token_id,
        eos_token_id=manifest.eos_token_id,
    )


def write(model: LanguageModel, curve: Curve, params: TrainParams, windows: int, precision: str) -> None:
    """Writes the model, its curve and the report of the training."""
    with atomic.folder(paths.FLOAT) as folder:
        hugging_face.save(model, paths.TOKENIZER, folder)
    atomic.write_text(paths.CURVE, curve.to_csv())
    total, active = model.parameter_counts()
    tokens = params.steps * params.global_batch * params.seq_len
    report = {
        "parameters": total,
        "active_parameters": active,
        "steps": params.steps,
        "tokens": tokens,
        "epochs": round(params.steps * params.global_batch / windows, 3),
        "processes": params.world_size,
        "precision": precision,
        "train_loss": round(curve.last("train_loss"), 6),
        "valid_loss": round(curve.last("valid_loss"), 6),
        "expert_imbalance": round(curve.last("expert_imbalance"), 4),
    }
    atomic.write_json(paths.TRAIN_REPORT, report)


if __name__ == "__main__":
    stage.run(main)
