"""Latent attention's two orders side by side, and where the exported graph changes from one to the other:
``python benchmarks/latent_order.py``.

New tokens after a past either read the latents as they are, the queries being brought to them (absorbed), or keys and
values that are expanded for all tokens (see :func:`lm.onnx_attention.latent`). The graph that ships decides by counted
products; here both of its branches are timed, told from outside which to take, and so in one session with the same
weights, in turns. Whole runs of a model in blocks of 8 bits on two threads: ``benchmarks/decode.py``'s shapes with
fewer layers, and the attention of DeepSeek-V2-Lite in one of them. The last line is one JSON object.
"""

import argparse
import functools
import json
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import decode
import numpy as np
import onnx
import pairs
import peers
from onnx import TensorProto, helper

from lm.cache import Cache
from lm.runtime import Generator

SIDE = "blocks, 8 bits"
NEW = (1, 4, 16, 32, 64, 96, 128, 192, 256)
PAST = (0, 256, 1024, 4096)
LAYERS = 4
# A measurement goes on for so many seconds at least.
SECONDS = 0.02
# What may be lost where the graph takes the slower order.
TOLERATED = 0.1
_SMALL = {"num_hidden_layers": LAYERS, "max_position_embeddings": 8192}
# Its configuration on the Hub (deepseek-ai/DeepSeek-V2-Lite).
_LITE = {
    "num_attention_heads": 16, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip
SHAPES = {
    "default, 90M": {**decode.SHAPES["default, 90M"], **_SMALL},
    "64 experts, 300M": {**decode.SHAPES["64 experts, 300M"], **_SMALL},
    "DeepSeek-V2-Lite's": {**decode.SHAPES["64 experts, 300M"], **_SMALL, **_LITE},
}
ABSORBED, EXPANDED = "absorbed", "expanded"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", choices=SHAPES, help="only this one")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        print(json.dumps(measure(Orders(arguments.folder), arguments.rounds)))
        return
    result: dict[str, Any] = {"rounds": arguments.rounds, "threads": decode.THREADS}
    for shape in [arguments.shape] if arguments.shape else SHAPES:
        with tempfile.TemporaryDirectory() as name, mock.patch.dict(decode.SHAPES, SHAPES):
            decode.write(shape, [SIDE], Path(name))
            rounds = "--rounds", str(arguments.rounds)
            result[shape] = peers.apart(__file__, SIDE, Path(name) / SIDE, decode.THREADS, *rounds)
        show(shape, result[shape])
    print(json.dumps(result))


class Orders:
    """The graph in a folder, told which order to take."""

    def __init__(self, folder: Path) -> None:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        layers = [node for node in model.graph.node if node.op_type == "If"]
        (self._rule,) = {layer.input[0] for layer in layers}
        for layer in layers:
            layer.input[0] = EXPANDED
        model.graph.input.append(helper.make_tensor_value_info(EXPANDED, TensorProto.BOOL, [1]))
        model.graph.output.append(helper.make_tensor_value_info(self._rule, TensorProto.BOOL, [1]))
        self._generator = Generator(folder, decode.THREADS, graph=model.SerializeToString())

    def rate(self, cache: Cache, past: int, new: int, order: str) -> float:
        """Returns how many times a second ``new`` tokens are read after ``past`` that ``cache`` has."""
        began, count = time.perf_counter(), 0
        while (took := time.perf_counter() - began) < SECONDS or not count:
            self.run(cache, past, new, order)
            count += 1
        return count / took

    def run(self, cache: Cache, past: int, new: int, order: str) -> bool:
        """Reads so many tokens; returns whether the graph that ships would expand for them."""
        cache.lengths[:] = past
        cache.binding.bind_cpu_input(EXPANDED, np.array([order == EXPANDED]))
        _, (rule,) = self._generator.observe(np.ones((1, new), np.int64), cache, [self._rule], last=True)
        return bool(rule.item())

    def new_cache(self, tokens: int) -> Cache:
        """Returns a cache of zeros with room for ``tokens``, as a text of so many has it."""
        cache = self._generator.new_cache()
        cache.reserve(tokens, self._generator.context)
        return cache


def measure(orders: Orders, rounds: int) -> dict[str, dict[str, float]]:
    """Returns for each number of tokens after each past how many times as fast it is to expand, and what is chosen."""
    found = {}
    for past in PAST:
        for new in NEW:
            cache = orders.new_cache(past + new)
            sides = {order: functools.partial(orders.rate, cache, past, new, order) for order in (ABSORBED, EXPANDED)}
            # The first calls pay for buffers.
            chosen = {order: orders.run(cache, past, new, order) for order in sides}
            *_, rates = pairs.in_turns(sides, rounds)
            # The quickest of each: what else computes on the machine only adds to a time.
            best = {order: max(of_rounds) for order, of_rounds in rates.items()}
            found[f"{new} after {past}"] = {
                **{f"{order} ms": round(1e3 / rate, 2) for order, rate in best.items()},
                "ratio": round(best[EXPANDED] / best[ABSORBED], 3),
                "rule expands": chosen[EXPANDED],
            }
    return found


def show(shape: str, cells: dict[str, dict[str, float]]) -> None:
    """Prints how many times as fast it is to expand, marked where the graph does, and where that loses much."""
    print(f"\n{shape}: times as fast expanded; * where the graph expands, ! where it takes an order that loses a tenth")
    print(f"{'tokens after':>14}" + "".join(f"{new:>8}" for new in NEW))
    for past in PAST:
        line = ""
        for new in NEW:
            cell = cells[f"{new} after {past}"]
            loss = 1 / cell["ratio"] if cell["rule expands"] else cell["ratio"]
            marks = ("*" if cell["rule expands"] else "") + ("!" if loss > 1 + TOLERATED else "")
            line += f"{cell['ratio']:>6.2f}{marks:<2}"
        print(f"{past:>14}{line}", flush=True)


if __name__ == "__main__":
    main()
