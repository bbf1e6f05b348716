"""``python -m tasks.evaluate``: measures float, INT8 and the champion on the test split, beside two baselines."""

import itertools

from tokenizers import Tokenizer

from lm import hugging_face
from tasks import atomic, native, paths, stage
from tasks.bootstrap import Bootstrap
from tasks.errors import BadInput
from tasks.evaluate import baselines, champion, gate, report
from tasks.evaluate.params import EvaluateParams
from tasks.evaluate.post_training import post_training
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
    shards = Shards(paths.SHARDS, manifest, "test")
    documents, learned = shards.documents(), shards.learned()
    if not documents:
        raise BadInput(f"{paths.SHARDS}: the test split is empty. Raise ingest.split.test in params.yaml.")
    # Before the work begins: what is wrong with the champion is told at once.
    opponent = champion.load()
    native.compute_repeatably()
    model = hugging_face.load(paths.FLOAT)
    tokenizer = Tokenizer.from_file(str(paths.TOKENIZER))
    train, test = (_texts(tokenizer, found) for found in (Shards(paths.SHARDS, manifest, "train"), shards))
    with progress("evaluate") as shown, post_training(model) as rounded:
        quantized = {report.INT8: Int8Routing(paths.INT8, model)}
        if rounded is not None:
            quantized[report.POST_TRAINING] = Int8Routing(rounded, model)
        scores = score(model, quantized, documents, params.threads, shown, learned)
        nats = None if opponent is None else opponent.nats(test, documents, learned, params.threads, shown)
    bootstrap = Bootstrap(len(documents), params.bootstrap_samples, params.seed)
    models = report.models(scores, bootstrap, model.layers_with_experts())
    unmeasured = opponent.version if opponent is not None and nats is None else None
    beside = None if opponent is None or nats is None else opponent.result(nats, scores, bootstrap)
    evaluation = report.Evaluation(
        documents=len(documents),
        tokens=int(scores.tokens.sum()),
        bytes=int(scores.bytes.sum()),
        context=model.config.window,
        models=models,
        baselines=baselines.measure(train, test, params.ngram_order, bootstrap),
        champion=beside,
        gate=gate.decide(models.int8.relative_loss, beside, models.int8.bits_per_byte, params, unmeasured),
    )
    atomic.write_json(paths.EVALUATION, evaluation.model_dump())


def _texts(tokenizer: Tokenizer, shards: Shards) -> list[str]:
    # Byte-level tokens decode to the very text that was encoded; BOS is left out as a special token. Of a conversation
    # the answers are the text: they alone are scored, and counted in bytes.
    ids, learned = [tokens.tolist() for tokens, _ in shards.documents()], shards.learned()
    if learned is not None:
        ids = [list(itertools.compress(tokens, mask)) for tokens, mask in zip(ids, learned, strict=True)]
    return tokenizer.decode_batch(ids, skip_special_tokens=True)


if __name__ == "__main__":
    stage.run(main)
