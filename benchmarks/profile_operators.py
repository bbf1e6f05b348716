"""Where the time of a text goes, operator by operator: ``python benchmarks/profile_operators.py``.

onnxruntime's profiler over what :class:`lm.runtime.Generator` runs, with the session that it makes: a prompt of 512
tokens in its pieces, then 32 tokens one by one, on two threads; shapes and graphs as in ``benchmarks/decode.py``.
Milliseconds are those of the whole prompt, and medians of the tokens. An operator's bytes are those that it has to
read from memory: the weights that its nodes have in the file (of experts no more than the tokens choose, of a table a
row a token), and caches with the room that they have. Its share of the roof is how fast it reads them against how
fast memory can be read; a prompt is held by products instead. The profiler takes some microseconds a node itself,
which are "between". The last line is one JSON object.
"""

import argparse
import json
import math
import statistics
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import decode
import peers

TOKENS = 32
BETWEEN = "between"
# What takes less of the time stands in the JSON object alone.
_LEAST_SHARE = 0.01
# What they return from there on are caches, written where they lie.
_CACHES_FROM = {"ScatterND": 0, "GroupQueryAttention": 1}


@dataclass(frozen=True)
class Cost:
    """What the nodes of one operator come to."""

    nodes: float
    ms: float
    bytes: float


@dataclass(frozen=True)
class Weights:
    """What a node of the file has for constants: their bytes, and the share of them that one token chooses."""

    bytes: int
    chosen: float = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=decode.SHAPES, default="SmolLM2-135M")
    parser.add_argument("--side", choices=decode.OURS, default="blocks, 8 bits", help="the graph, and how threads wait")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape, side = arguments.shape, arguments.side
    if arguments.folder:
        print(json.dumps(profile(arguments.folder, side.endswith(decode.SPINNING))))
        return
    read = peers.bandwidth(decode.THREADS)
    with tempfile.TemporaryDirectory() as name:
        decode.write(shape, [side], Path(name))
        found: dict[str, Any] = peers.apart(__file__, side, Path(name) / side, decode.THREADS)
    told = {"shape": shape, "side": side, "threads": decode.THREADS, "GB/s": round(read / 1e9, 1)}
    print(f"{shape}, {side}, {decode.THREADS} threads, which read {told['GB/s']} GB/s")
    parts = {
        "prefill": (f"a prompt of {decode.PREFILL}", decode.PREFILL),
        "decode": (f"a token after {decode.PREFILL}", 1),
    }
    tables = {}
    for part, (title, tokens) in parts.items():
        costs = {name: Cost(**cost) for name, cost in found[part].items()}
        tables[part] = {name: row(cost, total(costs.values()), tokens, read) for name, cost in costs.items()}
        show(title, costs, tokens, read)
    print(json.dumps({**told, **tables}))


def row(cost: Cost, whole: Cost, tokens: int, read: float) -> dict[str, float]:
    """Returns ``cost`` as shares: of the time of the ``whole``, and of ``read``, what memory gives in a second."""
    return {
        "nodes": cost.nodes,
        "ms": round(cost.ms, 3),
        "share": round(cost.ms / whole.ms, 4),
        "MB a token": round(cost.bytes / tokens / 1e6, 3),
        "of the roof": round(cost.bytes / read / (cost.ms / 1e3), 3) if cost.ms else 0.0,
    }


def show(title: str, costs: dict[str, Cost], tokens: int, read: float) -> None:
    """Prints a line for each operator that takes much of the time, one for the others, and one for all."""
    whole = total(costs.values())
    by_time = sorted(costs, key=lambda name: -costs[name].ms)
    much = [name for name in by_time if costs[name].ms >= _LEAST_SHARE * whole.ms]
    others = total(cost for name, cost in costs.items() if name not in much)
    print(f"\n{title:<24}{'nodes':>7}{'ms':>10}{'share':>8}{'MB a token':>12}{'of the roof':>13}")
    for name, cost in [*((name, costs[name]) for name in much), ("others", others), ("in all", whole)]:
        nodes, ms, share, size, roof = row(cost, whole, tokens, read).values()
        print(f"{name:<24}{nodes:7.0f}{ms:10.2f}{share:8.1%}{size:12.3f}{roof:13.0%}")


def total(costs: Iterable[Cost], how: Callable[[Iterable[float]], float] = sum) -> Cost:
    """Returns the costs together: their sum, or ``how`` many times."""
    found = [*costs]
    return Cost(how(c.nodes for c in found), how(c.ms for c in found), how(c.bytes for c in found))


def profile(folder: Path, spin: bool) -> dict[str, dict[str, dict[str, float]]]:
    """Returns the :class:`Cost` of each operator for a prompt, all its pieces together, and for a token."""
    import numpy as np
    import onnxruntime

    make = onnxruntime.SessionOptions

    def profiling() -> Any:
        options = make()
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / "profile")
        return options

    with mock.patch("onnxruntime.SessionOptions", profiling):
        writer = peers.Graph(folder, decode.THREADS, spin)
    prompt = np.random.default_rng(0).integers(1, 8000, size=(1, decode.PREFILL))
    # The first calls pay for buffers and kernels.
    for count in (decode.WARM_UP, TOKENS):
        writer.read(prompt)
        writer.write(count)
    events = json.loads(Path(writer._generator.session.end_profiling()).read_text())
    stored = weights_of(folder / "model.onnx")
    runs = [costs_of(run, nodes, stored) for run, nodes in runs_of(events)]
    pieces = (len(runs) - decode.WARM_UP - TOKENS) // 2
    prompt_runs, token_runs = runs[-TOKENS - pieces : -TOKENS], runs[-TOKENS:]
    return {"prefill": over(prompt_runs, sum), "decode": over(token_runs, statistics.median)}


def over(runs: list[dict[str, Cost]], how: Callable[[Iterable[float]], float]) -> dict[str, dict[str, float]]:
    """Returns the costs of several runs together, operator by operator."""
    names = dict.fromkeys(name for run in runs for name in run)
    costs = {name: total((run.get(name, Cost(0, 0, 0)) for run in runs), how) for name in names}
    return {name: asdict(costs[name]) for name in sorted(names, key=lambda name: -costs[name].ms)}


def runs_of(events: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Yields each run of the graph with the nodes that ran in it, in order."""
    nodes = [event for event in events if event["cat"] == "Node" and event["name"].endswith("_kernel_time")]
    nodes.sort(key=lambda node: (node["ts"], -node["dur"]))
    for run in sorted((event for event in events if event["name"] == "model_run"), key=lambda run: run["ts"]):
        yield run, [node for node in nodes if run["ts"] <= node["ts"] < run["ts"] + run["dur"]]


def costs_of(run: dict[str, Any], nodes: list[dict[str, Any]], stored: dict[str, Weights]) -> dict[str, Cost]:
    """Returns what each operator costs in one ``run``; a branch's nodes are told of, and not within what chose it."""
    count, took, read = Counter[str](), Counter[str](), defaultdict[str, float](float)
    caches: set[tuple[int, ...]] = set()
    around: list[tuple[str, int]] = []
    for node in nodes:
        operator = node["args"]["op_name"]
        while around and node["ts"] >= around[-1][1]:
            around.pop()
        if around:
            took[around[-1][0]] -= node["dur"]
        around.append((operator, node["ts"] + node["dur"]))
        if operator in _CACHES_FROM:
            caches |= {*shapes(node["args"]["output_type_shape"])[_CACHES_FROM[operator] :]}
        count[operator] += 1
        took[operator] += node["dur"]
        read[operator] += bytes_read(node, caches, stored)
    costs = {name: Cost(count[name], took[name] / 1e3, read[name]) for name in count}
    return {**costs, BETWEEN: Cost(0, (run["dur"] - took.total()) / 1e3, 0)}


def bytes_read(node: dict[str, Any], caches: set[tuple[int, ...]], stored: dict[str, Weights]) -> float:
    """Returns what ``node`` has to read from memory; ``caches``: the shapes of the run's caches so far."""
    args = node["args"]
    operator, inputs = args["op_name"], shapes(args["input_type_shape"])
    if any(0 in shape for shape in inputs):
        return 0
    name = node["name"].removesuffix("_kernel_time")
    # Fusions append to the name of a node that they take.
    while name and name not in stored:
        name = name.rpartition("/")[0]
    weights = stored.get(name, Weights(0))
    # The profiler does not see weights that a kernel has laid out for itself; the file does not have what was folded.
    read: float = max(weights.bytes, int(args["parameter_size"]))
    if weights.chosen < 1:
        read *= min(1.0, weights.chosen * inputs[0][0])
    if operator == "Gather":
        read = min(read, int(args["output_size"]))
    if operator in {"GroupQueryAttention", "RotaryEmbedding"}:
        read = 0
    if operator == "ScatterND":
        return read
    return read + sum(4 * math.prod(shape) for shape in inputs if shape in caches)


def shapes(told: list[dict[str, list[int]]]) -> list[tuple[int, ...]]:
    """Returns the shapes that a profile tells with their types."""
    return [tuple(shape) for one in told for shape in one.values()]


def weights_of(path: Path) -> dict[str, Weights]:
    """Returns the constants of each node of the graph at ``path`` that has some, by the node's name."""
    import onnx
    from onnx import helper

    from lm.graph import nodes_of

    graph = onnx.load(path, load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    found = {}
    for node in nodes_of(graph):
        read = [tensors[name] for name in dict.fromkeys(node.input) if name in tensors]
        size = sum(math.prod(one.dims) * helper.tensor_dtype_to_np_dtype(one.data_type).itemsize for one in read)
        chosen = 1.0
        if node.op_type == "QMoE":
            most = next(one.i for one in node.attribute if one.name == "k")
            chosen = most / tensors[node.input[2]].dims[0]
        if read:
            found[node.name] = Weights(size, chosen)
    return found


if __name__ == "__main__":
    main()
