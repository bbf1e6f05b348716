"""The card's text. Every number in it comes from a report."""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from tasks.card import verdict
from tasks.card.evidence import NOT_ASSESSED, Evidence, Report
from tasks.card.markdown import literal, table
from tasks.card.params import CardParams

EXAMPLE = Path(__file__).with_name("example.py")
MOST_GROUPS_NAMED = 12


def front_matter(evidence: Evidence, params: CardParams) -> str:
    """Returns the metadata that the Hub reads: licence, languages, and the evaluation as a model index."""
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=f"test split of {', '.join(_source_names(evidence))}",
            dataset_split="test",
            metric_type="bits_per_byte",
            metric_name=f"bits per byte ({kind})",
            metric_value=value,
        )
        for kind in ("float", "int8")
        if (value := evidence.evaluation.get(f"models.{kind}.bits_per_byte.value")) is not None
    ]
    data = ModelCardData(
        language=params.language,
        license=params.licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[
            evidence.config.get("model_type") or "causal-lm",
            *("onnx", "int8"),
            *(["quantization-aware-training"] if evidence.quantization.get("fine_tuned") else []),
        ],
        model_name=params.name,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def body(evidence: Evidence, params: CardParams) -> str:
    """Returns the card below its metadata."""
    parts = [
        f"# {params.name}",
        *verdict.warning(evidence.evaluation),
        _summary(evidence),
        "## How to run it",
        "The INT8 model needs `onnxruntime`, `tokenizers` and `numpy`; run this in the folder with `model.onnx`:",
        f"```python\n{EXAMPLE.read_text()}```",
        "The float model loads in `transformers` with `AutoModelForCausalLM.from_pretrained`.",
        "## Architecture",
        "![architecture](architecture.png)" if evidence.config.content else NOT_ASSESSED,
        _parameters(evidence),
        "## Data",
        _sources(evidence),
        _splits(evidence),
        "## Training",
        "![training curve](curve.png)" if evidence.curve else NOT_ASSESSED,
        _training(evidence),
        "## Evaluation",
        _evaluation(evidence),
        "## Gate",
        verdict.section(evidence.evaluation),
        "## Quantization",
        _quantization(evidence),
        "## Intended use",
        params.intended_use,
        "## Limits",
        _limits(evidence, params),
        "## Risk controls",
        _risks(evidence),
        "## Where it comes from",
        "SHA-256 of what made this version; a hash over several files is the hash of their hashes.",
        table(["what", "SHA-256"], [[name, f"`{value}`"] for name, value in evidence.hashes.items()]),
        f"Contact: {params.contact or NOT_ASSESSED}",
    ]
    return "\n\n".join(parts) + "\n"


def _summary(evidence: Evidence) -> str:
    evaluation, train = evidence.evaluation, evidence.train
    return (
        f"A {_family(evidence)} language model of {train.show('parameters', '{:,}')} parameters "
        f"({train.show('active_parameters', '{:,}')} active a token), trained on "
        f"{', '.join(_source_names(evidence)) or NOT_ASSESSED}, with an INT8 version for onnxruntime. "
        f"Bits per byte on the test split: float {evaluation.show('models.float.bits_per_byte.value', '{:.3f}')}, INT8 "
        f"{evaluation.show('models.int8.bits_per_byte.value', '{:.3f}')}. The gate: {verdict.in_a_word(evaluation)}."
    )


def _parameters(evidence: Evidence) -> str:
    config, train = evidence.config, evidence.train
    rows = [
        ["parameters, total", train.show("parameters", "{:,}")],
        ["parameters, active a token", train.show("active_parameters", "{:,}")],
        ["layers", config.show("num_hidden_layers")],
        ["context (tokens)", config.show("max_position_embeddings", "{:,}")],
        ["vocabulary", config.show("vocab_size", "{:,}")],
        ["cache a token and layer (numbers)", _cache_width(evidence)],
    ]
    return table(["", ""], rows)


_FAMILIES = {
    "deepseek_v2": "DeepSeek-V2",
    "deepseek_v3": "DeepSeek-V3",
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3-MoE",
}


def _family(evidence: Evidence) -> str:
    return evidence.config.tell("model_type", lambda name: f"{_FAMILIES.get(name, name)}-style")


def _cache_width(evidence: Evidence) -> str:
    config = evidence.config
    if not config.content:
        return NOT_ASSESSED
    if "kv_lora_rank" in config.content:
        return str(config.get("kv_lora_rank") + config.get("qk_rope_head_dim"))
    return str(2 * config.get("num_key_value_heads") * config.get("head_dim"))


def _sources(evidence: Evidence) -> str:
    rows = []
    for source in evidence.corpus.get("sources") or []:
        documents = source["documents"]
        rows.append(
            [
                source["name"],
                source["licence"],
                f"{source['records']['rejected']:,} of {source['records']['in']:,}",
                f"{documents['duplicated']:,}",
                f"{documents['out']:,}",
                f"{source['bytes']['out']:,}",
                f"`{source['sha256'][:16]}`",
            ]
        )
    header = ["source", "licence", "records rejected", "duplicates removed", "documents", "bytes", "SHA-256"]
    return table(header, rows) if rows else NOT_ASSESSED


def _splits(evidence: Evidence) -> str:
    rows = []
    for name, split in (evidence.corpus.get("splits") or {}).items():
        names = split.get("group_names") or []
        shown = ", ".join(map(literal, names)) if 0 < len(names) <= MOST_GROUPS_NAMED else f"{split['groups']:,} groups"
        rows.append([name, f"{split['documents']:,}", f"{split['bytes']:,}", shown])
    return table(["split", "documents", "bytes", "groups"], rows) if rows else NOT_ASSESSED


def _training(evidence: Evidence) -> str:
    train = evidence.train
    rows = [
        ["steps", train.show("steps", "{:,}")],
        ["tokens", train.show("tokens", "{:,}")],
        ["passes over the training split", train.show("epochs", "{:.2f}")],
        *_if_told(train, "skipped_steps", "steps left out, whose gradient was not finite", "{:,}"),
        *_if_told(train, "overflowed_steps", "steps left out, whose gradient fp16 could not hold", "{:,}"),
        ["processes", train.show("processes")],
        ["precision", train.show("precision")],
        *_if_told(train, "valid_loss_before", "validation loss before the first step (nats a token)", "{:.4f}"),
        ["last training loss (nats a token)", train.show("train_loss", "{:.4f}")],
        ["last validation loss (nats a token)", train.show("valid_loss", "{:.4f}")],
        *_if_told(train, "started_from", "started from"),
        *_if_told(train, "trained_parameters", "parameters trained (LoRA)", "{:,}"),
        *(
            [["busiest expert's tokens over the mean's", train.show("expert_imbalance", "{:.2f}")]]
            if evidence.config.get("num_experts_per_tok")
            else []
        ),
    ]
    return table(["", ""], rows)


def _if_told(report: Report, where: str, name: str, style: str = "{}") -> list[list[str]]:
    """Returns a row ``name`` for what lies at ``where``, and none where that is nothing."""
    return [[name, report.show(where, style)]] if report.get(where) else []


def _evaluation(evidence: Evidence) -> str:
    report = evidence.evaluation
    measures = [
        ("bits per byte", "bits_per_byte", "{:.3f}"),
        ("nats a token", "nats_per_token", "{:.4f}"),
        ("next token right", "accuracy", "{:.4f}"),
        ("KL divergence from float (nats a token)", "kl_divergence", "{:.5f}"),
        ("the same, 99th percentile", "kl_divergence_99", "{:.5f}"),
        ("same likeliest token as float", "same_top_1", "{:.4f}"),
        *(
            (f"same experts as float, layer {found['layer']}", f"same_experts.{index}.share", "{:.4f}")
            for index, found in enumerate(report.get("models.int8.same_experts") or [])
        ),
    ]
    sides = {"float": "float", "post_training": "rounded alone", "int8": "INT8"}
    if report.get("models.post_training") is None:
        del sides["post_training"]
    rows = [
        [name, *(report.interval(f"models.{side}.{key}", style) for side in sides)] for name, key, style in measures
    ]
    for row in rows[3:]:
        row[1] = "-"
    others = [
        [
            f"{report.show('baselines.ngram.order')}-gram model of characters, interpolated",
            report.interval("baselines.ngram.bits_per_byte"),
        ],
        ["`xz -9` primed with that text", report.show("baselines.xz.bits_per_byte.value", "{:.3f}")],
    ]
    if report.get("champion") is not None:
        champion = f"the champion, {report.show('champion.version')} (INT8)"
        others.append([champion, report.interval("champion.bits_per_byte")])
    return "\n\n".join(
        [
            f"On {_documents(report)} ({report.show('bytes', '{:,}')} bytes) of the test split, {_unseen(evidence)}. "
            f"Each token is predicted from at most {report.show('context', '{:,}')} before it. "
            "In brackets: 95% intervals from a bootstrap over documents; those of one group are alike, so that they "
            "say less about text of other groups."
            + (
                " *Rounded alone* is float under INT8's roundings, neither corrected nor fine-tuned."
                if "post_training" in sides
                else ""
            )
            + (
                " Of conversations only the assistant's answers count, read after what came before them."
                if evidence.manifest.get("has_conversations")
                else ""
            ),
            table(["", *sides.values()], rows),
            "Others on the same text. The first two have read the last "
            f"{report.show('baselines.trained_on_bytes', '{:,}')} bytes of the training split:",
            table(["", "bits per byte"], others),
        ]
    )


def _documents(report: Report) -> str:
    there = report.get("documents_in_split")
    drawn = f" of {there:,}" if there and there != report.get("documents") else ""
    return f"{report.show('documents', '{:,}')}{drawn} documents"


def _unseen(evidence: Evidence) -> str:
    if not (start := evidence.train.get("started_from")):
        return "none of whose groups was trained on"
    return f"none of whose groups this training has read (what {start} had read before, its own card may tell)"


_ACTIVATIONS = "Activations: unsigned 8 bits, one scale and zero point a token."
_FIXED = (
    "Activations: unsigned 8 bits, one scale and zero point a layer, with the least squared error on calibration "
    "windows of the training split; what lies outside is clipped."
)
_IN_BLOCKS = "Activations: signed 8 bits, one scale a block of as many."
_PLANS = {
    "per-token-8": f"Weights: signed 8 bits, one scale an output channel. {_ACTIVATIONS}",
    "static-8": f"Weights: signed 8 bits, one scale an output channel. {_FIXED}",
    "blockwise-8": f"Weights: 8 bits, one scale a block of 32 inputs. {_IN_BLOCKS}",
    "blockwise-8-wide": f"Weights: 8 bits, one scale a block of 64 inputs. {_IN_BLOCKS}",
    "blockwise-4": f"Weights: 4 bits, one scale a block of 32 inputs; in the head, and in routers if "
    f"they are rounded, 8 bits, of 64. {_IN_BLOCKS}",
}
_BEFORE_ROUNDING = {
    "rotated": "Before that the spaces between its layers were turned: the function stays as it was, and no channel is "
    "larger than all others (QuaRot, arXiv 2404.00456). Where what `down_proj` reads is turned too, that is done while "
    "the model runs, by the matrices `turn_...` that the table names.",
    "compensated": "The rounding of each weight makes up for those before it, by what calibration windows of the "
    "training split bring into the layer (GPTQ, arXiv 2210.17323).",
}
_FINE_TUNED = {
    "text": "The model was fine-tuned with exactly these roundings before the export; a negative relative loss means "
    "that this further training gained more than the rounding cost.",
    "float": "The model was fine-tuned with exactly these roundings before the export, towards the float model's own "
    "predictions (LLM-QAT, arXiv 2305.17888).",
}


def _quantization(evidence: Evidence) -> str:
    report, audit, found = evidence.evaluation, evidence.audit, evidence.quantization
    products = audit.tell("float_products", lambda names: ", ".join(f"`{name}`" for name in names) or "none")
    trained = found.tell(
        "fine_tuned", lambda done: found.tell("objective", _FINE_TUNED.__getitem__) if done else "No fine-tuning."
    )
    trials = [
        [
            f"`{trial['scheme']}` after {trial['after']}",
            found.interval(f"trials.{index}.relative_loss", "{:+.4f}"),
            found.interval(f"trials.{index}.kl_divergence", "{:.5f}"),
        ]
        for index, trial in enumerate(found.get("trials") or [])
    ]
    return "\n\n".join(
        [
            f"{found.tell('plan', _PLANS.__getitem__)} {trained}",
            *(text for key, text in _BEFORE_ROUNDING.items() if found.get(key)),
            table(
                ["", ""],
                [
                    [
                        "scheme (`quantize.scheme`)",
                        found.show("scheme", "`{}`") + found.show("asked", " (asked: `{}`)"),
                    ],
                    ["relative loss against float, paired", report.interval("gate.relative_loss", "{:+.4f}")],
                    ["quantized matrix products", audit.show("quantized_products", "{:,}")],
                    ["share of all weight bytes", audit.show("quantized_share_of_bytes", "{:.1%}")],
                    ["left in float on purpose", products],
                ],
            ),
            f"On {found.show('windows', '{:,}')} windows of the validation split, by what was tried:",
            table(["", "relative loss against float", "KL divergence from float (nats a token)"], trials),
        ]
    )


def _limits(evidence: Evidence, params: CardParams) -> str:
    context = evidence.config.show("max_position_embeddings", "{:,}")
    return "\n".join(
        [
            f"- Out of scope: {params.out_of_scope}",
            f"- It attends to at most {context} tokens; longer texts have to be cut.",
            f"- {_knowledge(evidence)}; what it says is not checked for truth.",
            "- Factual accuracy, bias, toxicity and memorization of training text: " + NOT_ASSESSED + ".",
        ]
    )


def _knowledge(evidence: Evidence) -> str:
    if start := evidence.train.get("started_from"):
        return f"What it knows comes from {start} and from its corpus"
    return "It writes like its corpus and knows nothing else"


def _risks(evidence: Evidence) -> str:
    sources = evidence.corpus.get("sources")
    rejected = NOT_ASSESSED if sources is None else f"{sum(source['records']['rejected'] for source in sources):,}"
    duplicated = (
        NOT_ASSESSED if sources is None else f"{sum(source['documents']['duplicated'] for source in sources):,}"
    )
    return table(
        ["risk", "control", "evidence"],
        [
            ["damaged input", "invalid records go to quarantine with file, line and reason", f"{rejected} records"],
            [
                "duplicates inflate the evaluation",
                "exact duplicates are removed over all splits",
                f"{duplicated} removed",
            ],
            [
                "test text seen in training",
                "splits are dealt by group, not by document",
                "the table of splits above" + (", of this training" if evidence.train.get("started_from") else ""),
            ],
            ["quantization harms the model", "a gate on the paired relative loss", "the table of the gate above"],
            [
                "a worse model takes the place of a better one",
                "a gate against the model in production",
                verdict.of_check(evidence.evaluation, "against_champion"),
            ],
            ["a layer left float in silence", "the exported graph is audited", "`audit.json` beside the INT8 model"],
            ["personal data in the corpus", "no screening", NOT_ASSESSED],
            ["training text can be extracted", "no differential privacy", NOT_ASSESSED],
        ],
    )


def _source_names(evidence: Evidence) -> list[str]:
    return [source["name"] for source in evidence.corpus.get("sources") or []]
