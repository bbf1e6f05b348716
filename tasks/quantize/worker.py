"""One fine-tuning process, as torchrun starts it. The first one exports the INT8 graph and audits it."""

from lm import fake_quant, hugging_face, onnx_int8
from lm.model import LanguageModel
from tasks import atomic, inputs, paths, stage, world
from tasks.checkpoints import Checkpoints
from tasks.progress import progress
from tasks.quantize.audit import audit
from tasks.quantize.params import QuantizeParams
from tasks.section import read_section
from tasks.shards import Shards, read_manifest
from tasks.training import Curve, train

COPIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def main() -> None:
    params = read_section("quantize", QuantizeParams)
    manifest = read_manifest()
    weights = paths.FLOAT / "model.safetensors"
    checkpoints = Checkpoints("quantize", inputs.key("quantize", params, [paths.MANIFEST, weights]))
    with world.joined(params) as here, progress("quantize", here.is_first) as shown:
        if here.is_first:
            checkpoints.forget_others()
        model = fake_quant.prepare(hugging_face.load(paths.FLOAT))
        length = model.config.max_position_embeddings
        readers = [Shards(paths.SHARDS, manifest, split).reader(length) for split in ("train", "valid")]
        curve = train(model, params, readers[0], readers[1], checkpoints, here, shown, "quantize")
        if here.is_first:
            write(model.cpu(), curve)


def write(model: LanguageModel, curve: Curve) -> None:
    """Writes the INT8 graph with what a program needs beside it, its audit, and the curve of the fine-tuning."""
    with atomic.folder(paths.INT8) as folder:
        graph = folder / paths.INT8_GRAPH.name
        onnx_int8.export(model, graph)
        report = audit(graph, model)
        for name in COPIED:
            (folder / name).write_bytes((paths.FLOAT / name).read_bytes())
        (folder / "curve.csv").write_text(curve.to_csv())
        atomic.write_json(folder / paths.AUDIT.name, report.model_dump())


if __name__ == "__main__":
    stage.run(main)
