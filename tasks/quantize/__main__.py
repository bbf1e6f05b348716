"""``python -m tasks.quantize``: checks everything that can be checked, then starts the fine-tuning processes."""

from tasks import native, stage

if __name__ == "__main__":
    # Before it takes the time to import torch.
    native.settle()
    stage.begin()

from lm.config import LatentArchitecture
from lm.hugging_face_config import Unusable, architecture_of
from lm.hugging_face_files import read_config
from tasks import paths
from tasks.errors import BadInput, BadParameter
from tasks.launch import check_device, launch
from tasks.mesh import check_fits
from tasks.quantize.params import QuantizeParams
from tasks.section import read_section
from tasks.shards import Shards, read_manifest


def main() -> None:
    params = read_section("quantize", QuantizeParams)
    if not any(paths.FLOAT.glob("*.safetensors")):
        raise BadInput(f"{paths.FLOAT / 'model.safetensors'}: no such file. Run the stage 'train' first.")
    check_device("quantize", params)
    check_mesh(params)
    manifest = read_manifest()
    manifest.check_tokenizer(paths.SHARDS)
    for split in ("train", "valid"):
        Shards(paths.SHARDS, manifest, split)
    launch("tasks.quantize.worker", params)


def check_mesh(params: QuantizeParams) -> None:
    """Raises :class:`BadParameter` when the float model cannot be cut as ``params`` ask."""
    try:
        architecture = architecture_of(read_config(paths.FLOAT))
        if isinstance(architecture, LatentArchitecture):
            # What predicts further tokens is for training alone.
            architecture = architecture.model_copy(update={"num_nextn_predict_layers": 0})
        check_fits(params.layout, architecture)
    except Unusable as error:
        raise BadInput(f"{paths.FLOAT}: {error}. Run the stage 'train' again.") from None
    except ValueError as error:
        raise BadParameter(f"{paths.PARAMS}: quantize: {error}.") from None


if __name__ == "__main__":
    stage.run(main)
