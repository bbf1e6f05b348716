"""The card's text. Every number in it comes from a report."""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from lm.hugging_face_config import Unusable, config_from_json
from tasks import paths
from tasks.card import measured, quantized, verdict
from tasks.card.evidence import NOT_ASSESSED, Evidence, Report
from tasks.card.params import CardParams
from tasks.errors import BadInput
from tasks.markdown import literal, table

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
        measured.section(evidence),
        "## Gate",
        verdict.section(evidence.evaluation),
        "## Quantization",
        quantized.section(evidence),
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
        ["cache a token and layer (numbers)", _cache_width(config)],
    ]
    return table(["", ""], rows)


def _cache_width(config: Report) -> str:
    if not config.content:
        return NOT_ASSESSED
    try:
        return str(config_from_json(config.content).cache_width)
    except Unusable as error:
        raise BadInput(f"{paths.FLOAT}: {error}. Run the stage 'train' again.") from None


_FAMILIES = {
    "deepseek_v2": "DeepSeek-V2",
    "deepseek_v3": "DeepSeek-V3",
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen2_moe": "Qwen2-MoE",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3-MoE",
}


def _family(evidence: Evidence) -> str:
    return evidence.config.tell("model_type", lambda name: f"{_FAMILIES.get(name, name)}-style")


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
