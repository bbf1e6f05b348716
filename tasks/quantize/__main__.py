"""``python -m tasks.quantize``: checks everything that can be checked, then starts the fine-tuning processes."""

import signal

from tasks import native, stage, stopping

if __name__ == "__main__":
    # Before it takes the time to import torch.
    signal.signal(signal.SIGTERM, stopping.end_at_once)
    native.settle()
    stage.begin()

from lm.hugging_face_config import Unusable, architecture_of
from lm.hugging_face_files import read_config
from tasks import paths
from tasks.errors import BadInput, BadParameter
from tasks.launch import check_device, launch
from tasks.quantize.params import QuantizeParams
from tasks.section import read_section
from tasks.shards import Shards, read_manifest


def main() -> None:
    params = read_section("quantize", QuantizeParams)
    if not any(paths.FLOAT.glob("*.safetensors")):
        raise BadInput(f"{paths.FLOAT / 'model.safetensors'}: no such file. Run the stage 'train' first.")
    check_device("quantize", params)
    check_model(params)
    manifest = read_manifest()
    manifest.check_tokenizer(paths.SHARDS)
    for split in ("train", "valid"):
        Shards(paths.SHARDS, manifest, split)
    launch("tasks.quantize.worker", params)


def check_model(params: QuantizeParams) -> None:
    """Raises :class:`BadParameter` when the float model does not fit ``params``, :class:`BadInput` when it is none."""
    try:
        told = params.misfit(architecture_of(read_config(paths.FLOAT)))
    except Unusable as error:
        raise BadInput(f"{paths.FLOAT}: {error}. Run the stage 'train' again.") from None
    if told:
        raise BadParameter(f"{paths.PARAMS}: {told}")


if __name__ == "__main__":
    stage.run(main)
