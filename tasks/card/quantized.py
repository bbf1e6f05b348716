"""How the model was made INT8, what that cost, and what was tried."""

from tasks.card.evidence import Evidence
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


def section(evidence: Evidence) -> str:
    """Returns the plan of the roundings, what they cost, and the trials."""
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
