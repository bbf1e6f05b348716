"""What was measured on the test split: the model as float and INT8, and others on the same text."""

from tasks.card.evidence import Evidence, Report
from tasks.markdown import table

_STEPS = {
    "rounded": " *Rounded alone* is float under INT8's roundings, neither corrected nor fine-tuned.",
    "post_training": " *Post-training* is what the fine-tuning began with: INT8 against it is what that is worth.",
}


def section(evidence: Evidence) -> str:
    """Returns each measure with its interval, side by side, and the bits per byte of others."""
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
    sides = {"float": "float", "rounded": "rounded alone", "post_training": "post-training", "int8": "INT8"}
    for step in _STEPS:
        if report.get(f"models.{step}") is None:
            del sides[step]
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
            + "".join(told for step, told in _STEPS.items() if step in sides)
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
