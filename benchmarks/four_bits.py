"""What fine-tuning wins back in 4 bits on a model that people deploy: ``python benchmarks/four_bits.py``.

Model, text and measures are those of ``benchmarks/accuracy.py``. The model is rotated and compensated for
``weight-only-4``, then fine-tuned as the stage ``quantize`` does it, on pages of the same manual that nothing is
measured on: once for the loss of the text, once for the divergence from the float model's own predictions
(``quantize.objective``). It prints a line before fine-tuning and one after each; the last line is one JSON object.
"""

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accuracy import by_graph, bytes_of, compare, told, unpack
from tuning import BATCH, LENGTH, RATE, STEPS, fine_tune, params_of

from lm.compensation import compensate
from lm.model import LanguageModel
from lm.quantization import PLANS
from lm.rotation import rotate, turn_hidden

PLAN = PLANS["blockwise-4"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objective", action="append", choices=["text", "float"], help="only this one")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=BATCH, help="windows of 256 tokens a step")
    parser.add_argument("--learning-rate", type=float, default=RATE)
    asked = parser.parse_args()
    params = params_of(asked.steps, asked.batch, asked.learning_rate)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        model, ids, calibration = unpack(place / "origin")
        _, _, pages = unpack(place / "pages", asked.steps * asked.batch, LENGTH + 1)
        with torch.no_grad():
            exact = torch.cat([F.log_softmax(model(window[None, :-1]), dim=-1) for window in torch.from_numpy(ids)])
        started = compensate(turn_hidden(rotate(copy.deepcopy(model)), PLAN), PLAN, torch.from_numpy(calibration))

        def measure(model: LanguageModel, what: str) -> dict[str, object]:
            graph = by_graph(model, PLAN, place / what, place / "origin")
            return compare(graph, place / what, ids, bytes_of(place / "origin", ids), exact)

        table = {"before": measure(started, "before")}
        show("before", table["before"])
        for objective in asked.objective or ["text", "float"]:
            tuned, began = copy.deepcopy(started), time.monotonic()
            fine_tune(tuned, model, objective, torch.from_numpy(pages), params)
            seconds = time.monotonic() - began
            table[objective] = measure(tuned, objective)
            show(f"{objective}, {asked.steps} steps in {seconds:.0f} s", table[objective])
    print(json.dumps({**vars(asked), **table}))


def show(what: str, row: dict[str, object]) -> None:
    print(
        f"{what:<28} loss {told(row['loss'], '{:+.2%}')}, KLD {told(row['kld'], '{:.4f}')}, "
        f"same first {told(row['same_first'], '{:.1%}')}",
        flush=True,
    )


if __name__ == "__main__":
    main()
