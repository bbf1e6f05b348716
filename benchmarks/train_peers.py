"""The sides that `train.py` measures the project's training against, each in its own library's way.

Each returns the seconds of its median step: of ``params.global_batch`` windows, on random tokens of ``vocabulary``
words, of the model in ``folder`` or one of its shape.
"""

import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tasks.train.params import TrainParams

WARM_UP = 5
TOKENS = 2**21


class Stopwatch:
    """Notes when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def seconds(self) -> float:
        """Seconds of the median step after the warm-up: neighbours on the machine slow single steps down threefold."""
        ends = self.ends[WARM_UP - 1 :]
        return statistics.median(after - before for before, after in itertools.pairwise(ends))


def run_trainer(params: TrainParams, vocabulary: int, folder: Path) -> float:
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from tasks.world import resolve_precision

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokens = np.random.default_rng(0).integers(0, vocabulary, TOKENS, dtype=np.int64)
    stopwatch = Stopwatch()

    class Timed(TrainerCallback):
        def on_step_end(self, *arguments: object, **more: object) -> None:
            if params.device == "cuda":
                torch.cuda.synchronize()
            stopwatch.ends.append(time.perf_counter())

    class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
        def __len__(self) -> int:
            return len(tokens) // params.seq_len

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            window = torch.from_numpy(tokens[index * params.seq_len : (index + 1) * params.seq_len])
            return {"input_ids": window, "labels": window}

    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(folder / "trainer"),
            max_steps=params.steps,
            per_device_train_batch_size=params.micro_batch,
            gradient_accumulation_steps=params.global_batch // (params.micro_batch * params.world_size),
            learning_rate=params.learning_rate,
            weight_decay=params.weight_decay,
            max_grad_norm=params.clip_grad_norm,
            bf16=resolve_precision(params) == "bf16",
            use_cpu=params.device == "cpu",
            ddp_backend="gloo" if params.device == "cpu" else "nccl",
            optim="adamw_torch_fused",
            torch_compile=params.compile,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Windows(),
        callbacks=[Timed()],
    )
    trainer.train()
    return stopwatch.seconds()


def run_litgpt(params: TrainParams, vocabulary: int, folder: Path) -> float:
    """``litgpt pretrain`` (litgpt.pretrain.main), which compiles the model; its step is timed where it logs it."""
    import lightning
    from litgpt import pretrain
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.config import Config
    from litgpt.data import DataModule

    from tasks.world import resolve_precision

    model = params.model
    assert model is not None and model.model_type == "llama"  # noqa: PT018
    stopwatch = Stopwatch()

    class Timed(lightning.Fabric):
        def log_dict(self, *arguments: object, **more: object) -> None:
            stopwatch.ends.append(time.perf_counter())

    class Windows(DataModule):
        def connect(self, *arguments: object, **more: object) -> None: ...

        def train_dataloader(self) -> Any:
            tokens = torch.from_numpy(np.random.default_rng(0).integers(0, vocabulary, TOKENS, dtype=np.int64))
            windows: Any = tokens.unfold(0, params.seq_len + 1, params.seq_len)
            return torch.utils.data.DataLoader(windows, params.micro_batch)

        val_dataloader = train_dataloader

    passes = params.global_batch // params.micro_batch
    shape = Config(
        name="benchmark", block_size=params.seq_len, n_layer=model.num_hidden_layers, n_head=model.num_attention_heads,
        n_embd=model.hidden_size, n_query_groups=model.num_key_value_heads, head_size=model.head_dim,
        rotary_percentage=1.0, rope_base=int(model.rope_theta), parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", norm_eps=model.rms_norm_eps, mlp_class_name="LLaMAMLP",
        intermediate_size=model.intermediate_size, vocab_size=vocabulary, padded_vocab_size=vocabulary,
    )  # fmt: skip
    precision: Any = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[resolve_precision(params)]
    fabric = Timed(devices=1, accelerator="cpu" if params.device == "cpu" else "cuda", precision=precision)
    fabric.launch()
    pretrain.save_checkpoint = lambda *arguments: None
    pretrain.main(
        fabric=fabric, devices=1, seed=params.seed, initial_checkpoint_dir=None, resume=False, config=shape,
        data=Windows(), out_dir=folder / "litgpt", tokenizer_dir=None, tokenizer=None,
        train=TrainArgs(
            save_interval=None, log_interval=1, global_batch_size=params.global_batch,
            micro_batch_size=params.micro_batch, max_tokens=params.steps * passes * params.micro_batch * params.seq_len,
            max_norm=params.clip_grad_norm, lr_warmup_steps=params.steps // 10,
            tie_embeddings=model.tie_word_embeddings,
        ),
        eval=EvalArgs(interval=10**9, max_iters=1, initial_validation=False, final_validation=False),
        optimizer={
            "class_path": "torch.optim.AdamW",
            "init_args": {"lr": params.learning_rate, "weight_decay": params.weight_decay, "betas": (0.9, 0.95)},
        },
    )  # fmt: skip
    return stopwatch.seconds()


PEERS = {"trainer": run_trainer, "litgpt": run_litgpt}
