"""How the model was made INT8, what that cost, and what was tried."""

from collections import Counter

from tasks.card.evidence import NOT_ASSESSED, Evidence, Report
from tasks.markdown import table

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
# What a graph stores, by the ending of a tensor's name, and why it is not an integer of 8 or 4 bits.
_INTEGERS = "rounded weights", ""
_SCALES = "scales", "each times an integer is a weight"
_SUMS = "sums of rounded weights", "what a token's zero point is taken out by"
_ENDINGS = {
    "int8": _INTEGERS,
    "int4": _INTEGERS,
    "scales": _SCALES,
    "sums": _SUMS,
    "bias": ("biases", "added behind the products"),
}
_TURNS = "turns of what `down_proj` reads", "multiplied while the model runs, before the rounding"
_ROTATIONS = "rotations by position", "applied to queries and keys in float"
_PRODUCTS = "products left in float", "`quantize.routers`, `quantize.in_float`"
_NORMS = "weights of norms", "`quantize.norms`"
_EMBEDDING = "embedding left in float", "`quantize.in_float`"
_CONSTANTS = "constants", "sizes, places and bounds"


def section(evidence: Evidence) -> str:
    """Returns the plan of the roundings, what they cost, what the graph holds, and the trials."""
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
            "The exported file itself, as the audit counts it:",
            _graph(audit),
            f"On {found.show('windows', '{:,}')} windows of the validation split, by what was tried:",
            table(["", "relative loss against float", "KL divergence from float (nats a token)"], trials),
        ]
    )


def _graph(audit: Report) -> str:
    """Returns how often the graph has each operator, and the bytes that it stores by type and by what they are for."""
    operators, weights = audit.get("operators"), audit.get("weights")
    if operators is None or weights is None:
        return NOT_ASSESSED
    sizes: Counter[tuple[str, tuple[str, str]]] = Counter()
    for weight in weights:
        sizes[weight["type"], _kind(weight["name"], len(weight["shape"]), audit.get("float_products"))] += weight[
            "bytes"
        ]
    rows = [
        [f"`{of_type}`, {whole:,} in all", what, f"{size:,}", why]
        for of_type, whole in Counter(audit.get("bytes_by_type")).most_common()
        for (other, (what, why)), size in sizes.most_common()
        if other == of_type
    ]
    named = ", ".join(f"`{name}` {count:,}" for name, count in Counter(operators).most_common())
    told = f"Operators, {sum(operators.values()):,} in all: {named}."
    return table(["type", "what it is", "bytes", "why it is not rounded"], rows) + "\n\n" + told


def _kind(name: str, axes: int, float_products: list[str]) -> tuple[str, str]:
    """Returns what the stored tensor ``name`` is, and why it is not rounded."""
    ending = name.rpartition(".")[2]
    if ending in _ENDINGS:
        return _ENDINGS[ending]
    if name.startswith("turn_"):
        return _TURNS
    if name.startswith("rotations."):
        return _ROTATIONS
    if name in float_products:
        return _PRODUCTS
    if ending == "weight":
        return _NORMS if axes == 1 else _EMBEDDING
    return _CONSTANTS
