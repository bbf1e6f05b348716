"""``python -m tasks.train``: checks everything that can be checked, then starts the training processes."""

from tasks import paths, stage
from tasks.errors import BadInput
from tasks.launch import check_device, launch
from tasks.section import read_section
from tasks.shards import Shards, SplitName, read_manifest
from tasks.train import start
from tasks.train.params import TrainParams


def main() -> None:
    params = read_section("train", TrainParams)
    check_device("train", params)
    manifest = read_manifest()
    manifest.check_tokenizer(paths.SHARDS)
    start.check(params, manifest)
    needs: dict[SplitName, int] = {"train": params.global_batch, "valid": 1}
    for split, needed in needs.items():
        found = len(Shards(paths.SHARDS, manifest, split).reader(params.seq_len))
        if found < needed:
            raise BadInput(
                f"{paths.SHARDS}: the {split} split holds {found} windows of seq_len {params.seq_len}, "
                f"and {needed} are needed. Collect more text, or lower train.seq_len or train.global_batch in "
                f"{paths.PARAMS}."
            )
    launch("tasks.train.worker", params.world_size, params.threads_per_process)


if __name__ == "__main__":
    stage.run(main)
