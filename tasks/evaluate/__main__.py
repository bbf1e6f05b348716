"""``python -m tasks.evaluate``: measures float, INT8 and the champion on the test split, beside two baselines."""

from tasks import stage

if __name__ == "__main__":
    # Before it takes the time to import torch.
    stage.begin()

from tokenizers import Tokenizer

from lm import hugging_face
from tasks import atomic, native, paths
from tasks.bootstrap import Bootstrap
from tasks.errors import BadInput
from tasks.evaluate import baselines, champion, gate, report, texts
from tasks.evaluate.graphs import graphs
from tasks.evaluate.params import EvaluateParams
from tasks.evaluate.routing import Int8Routing
from tasks.evaluate.score import score
from tasks.progress import progress
from tasks.section import read_section
from tasks.shards import Shards, read_manifest


def main() -> None:
    params = read_section("evaluate", EvaluateParams)
    manifest = read_manifest()
    manifest.check_tokenizer(paths.SHARDS)
    for made, by in ((paths.FLOAT / "config.json", "train"), (paths.INT8_GRAPH, "quantize")):
        if not made.is_file():
            raise BadInput(f"{made}: no such file. Run the stage '{by}' first.")
    in_split = texts.documents(Shards(paths.SHARDS, manifest, "test"), manifest)
    if not in_split.tokens:
        raise BadInput(f"{paths.SHARDS}: the test split is empty. Raise ingest.split.test in params.yaml.")
    measured = texts.drawn(in_split, params.test_tokens, params.seed)
    documents, learned = measured.tokens, measured.learned
    # Before the work begins: what is wrong with the champion is told at once.
    opponent = champion.load()
    native.compute_repeatably()
    model = hugging_face.mapped(paths.FLOAT)
    tokenizer = Tokenizer.from_file(str(paths.TOKENIZER))
    known = texts.last(texts.documents(Shards(paths.SHARDS, manifest, "train"), manifest), baselines.MOST_BYTES)
    test = measured.texts(tokenizer)
    with progress("evaluate") as shown, graphs(model) as folders:
        quantized = {name: Int8Routing(folder, model) for name, folder in folders.items()}
        scores = score(model, quantized, documents, params.threads, shown, learned)
        nats = None if opponent is None else opponent.nats(test, documents, learned, params.threads, shown)
        bootstrap = Bootstrap(len(documents), params.bootstrap_samples, params.seed)
        others = baselines.measure(known.texts(tokenizer), test, params.ngram_order, bootstrap, shown)
    models = report.models(scores, bootstrap, model.layers_with_experts())
    unmeasured = opponent.version if opponent is not None and nats is None else None
    beside = None if opponent is None or nats is None else opponent.result(nats, scores, bootstrap)
    evaluation = report.Evaluation(
        documents=len(documents),
        documents_in_split=len(in_split.tokens),
        tokens=int(scores.tokens.sum()),
        bytes=int(scores.bytes.sum()),
        context=model.config.window,
        models=models,
        baselines=others,
        champion=beside,
        gate=gate.decide(models.int8.relative_loss, beside, models.int8.bits_per_byte, params, unmeasured),
    )
    atomic.write_json(paths.EVALUATION, evaluation.model_dump())


if __name__ == "__main__":
    stage.run(main)
