"""The card's pictures: the architecture as the configuration says it is, and the curve of the training."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
# A user's own matplotlibrc must not change the bytes.
matplotlib.rcdefaults()

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

# Equal input gives equal bytes: no version of the writer, no date.
_SAVE: dict[str, Any] = {"dpi": 110, "metadata": {"Software": None}}
_COLOURS = {"ends": "#e8e8ef", "attention": "#cfe3f7", "dense": "#fbe3c4", "experts": "#d5efd3", "norm": "#ffffff"}


def draw_curve(curve: list[dict[str, float]], path: Path) -> None:
    """Draws training and validation loss in nats a token over the steps."""
    figure, axes = pyplot.subplots(figsize=(7, 4))
    steps = [row["step"] for row in curve]
    axes.plot(steps, [row["train_loss"] for row in curve], marker="o", label="training")
    axes.plot(steps, [row["valid_loss"] for row in curve], marker="o", label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, **_SAVE)
    pyplot.close(figure)


def draw_architecture(config: dict[str, Any], path: Path) -> None:
    """Draws the decoder that ``config`` (the model's config.json) describes, from the tokens at the bottom upwards."""
    dense = 0 if "num_experts" in config else config.get("first_k_dense_replace", config["num_hidden_layers"])
    sparse = config["num_hidden_layers"] - dense
    attention = _attention_text(config)
    boxes = [("ends", f"embedding  {config['vocab_size']:,} x {config['hidden_size']}")]
    if dense:
        boxes += [("attention", attention), ("dense", f"SwiGLU  {config['intermediate_size']}")]
    if sparse:
        boxes += [("attention", attention), ("experts", _experts_text(config))]
    boxes += [("norm", "RMSNorm"), ("ends", f"head  {config['hidden_size']} x {config['vocab_size']:,}")]

    figure, axes = pyplot.subplots(figsize=(6.4, 0.72 * len(boxes) + 0.4))
    for row, (kind, text) in enumerate(boxes):
        _box(axes, row, _COLOURS[kind], text)
    row = 1
    for count in (dense, sparse):
        if count:
            _brace(axes, row, f"x {count}")
            row += 2
    axes.set_xlim(-0.2, 7.2)
    axes.set_ylim(-0.3, len(boxes))
    axes.axis("off")
    figure.tight_layout()
    figure.savefig(path, **_SAVE)
    pyplot.close(figure)


def _attention_text(config: dict[str, Any]) -> str:
    if "kv_lora_rank" not in config:
        return (
            f"grouped-query attention  {config['num_attention_heads']} heads of {config['head_dim']}\n"
            f"{config['num_key_value_heads']} of keys and values in the cache"
        )
    queries = "" if config["q_lora_rank"] is None else f"query latent {config['q_lora_rank']}, "
    return (
        f"latent attention  {config['num_attention_heads']} heads\n{queries}key-value latent {config['kv_lora_rank']} "
        f"+ RoPE {config['qk_rope_head_dim']} in the cache"
    )


def _experts_text(config: dict[str, Any]) -> str:
    if "num_experts" in config:
        size = config.get("shared_expert_intermediate_size")
        count, shared = config["num_experts"], f"+ 1 shared of {size}, gated; " if size else ""
    else:
        count, shared = config["n_routed_experts"], f"+ {config['n_shared_experts']} shared; "
    has_bias = config["model_type"] == "deepseek_v3"
    router = "sigmoid router with balancing bias" if has_bias else "softmax router"
    experts = f"{count} experts of {config['moe_intermediate_size']}, {config['num_experts_per_tok']} a token"
    return f"{experts}\n{shared}{router}"


def _box(axes: Axes, row: int, colour: str, text: str) -> None:
    axes.add_patch(FancyBboxPatch((0.6, row), 5.2, 0.62, boxstyle="round,pad=0.04", facecolor=colour, edgecolor="#444"))
    axes.text(3.2, row + 0.31, text, ha="center", va="center", fontsize=9)
    if row:
        axes.annotate("", (3.2, row - 0.03), (3.2, row - 0.34), arrowprops={"arrowstyle": "->", "color": "#444"})


def _brace(axes: Axes, row: int, text: str) -> None:
    axes.plot([6.0, 6.15, 6.15, 6.0], [row, row, row + 1.62, row + 1.62], color="#444")
    axes.text(6.25, row + 0.81, text, va="center", fontsize=11)
