"""``python -m tasks.quantize``: checks everything that can be checked, then starts the fine-tuning processes."""

from tasks import native

if __name__ == "__main__":
    # Before it takes the time to import torch.
    native.settle()

from tasks import paths, stage
from tasks.errors import BadInput
from tasks.launch import check_device, launch
from tasks.quantize.params import QuantizeParams
from tasks.section import read_section
from tasks.shards import Shards, read_manifest


def main() -> None:
    params = read_section("quantize", QuantizeParams)
    if not any(paths.FLOAT.glob("*.safetensors")):
        raise BadInput(f"{paths.FLOAT / 'model.safetensors'}: no such file. Run the stage 'train' first.")
    check_device("quantize", params)
    manifest = read_manifest()
    manifest.check_tokenizer(paths.SHARDS)
    for split in ("train", "valid"):
        Shards(paths.SHARDS, manifest, split)
    launch("tasks.quantize.worker", params)


if __name__ == "__main__":
    stage.run(main)
