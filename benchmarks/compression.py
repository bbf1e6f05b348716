"""Time to the same validation loss over a slow network: whole gradients (plain DDP) against exchanges that send less.

Two processes train the model of params.yaml on its corpus, in two network namespaces, over a link of 100 Mbit/s and
10 ms each way: two TUN devices, each with tc's token bucket filter (tbf), between which a process hands every packet on
10 ms later. (netem would do the latter, where the kernel has it.) All sides take as many windows a step. The steps of
DiLoCo are quick and teach less, so that it takes more of them; each side has a schedule over its own. A side's time is
that to 1.01 times the loss with which plain DDP ends; the ratio is plain DDP's time over it.
Run as root: .venv/bin/python benchmarks/compression.py
"""

import argparse
import ctypes
import fcntl
import itertools
import json
import os
import select
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lm.weights import fill
from tasks.checkpoints import Checkpoints
from tasks.heartbeat import Heartbeat
from tasks.launch import worker_environment
from tasks.process import Process
from tasks.progress import Progress
from tasks.section import read_section
from tasks.shards import read_manifest, read_windows
from tasks.train import start
from tasks.train.params import TrainParams
from tasks.training import train

ROOT = Path(__file__).parent.parent
NAMESPACES = [f"overnight-{os.getpid()}-{number}" for number in range(2)]
DEVICE, ADDRESSES = "slow0", ("10.77.0.1", "10.77.0.2")
MEGABITS, DELAY = 100, 0.010
WITHIN, GOAL = 1.01, 5.0
SIDES: dict[str, dict[str, Any]] = {
    "plain DDP": {},
    "powersgd": {"compression": "powersgd"},
    "int8": {"compression": "int8"},
    "diloco": {"diloco": {}},
    "diloco int8": {"diloco": {}, "compression": "int8"},
}
Curve = list[tuple[float, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240, help="a multiple of --validate-every")
    parser.add_argument("--validate-every", type=int, default=20)
    parser.add_argument("--windows", type=int, default=2, help="a process and step")
    parser.add_argument("--rank", type=int, default=4, help="of powersgd")
    parser.add_argument("--inner-steps", type=int, default=10, help="of diloco; divides --validate-every")
    parser.add_argument(
        "--diloco-steps", type=int, default=300, help="in the place of --steps; a multiple of --inner-steps"
    )
    parser.add_argument("--outer-learning-rate", type=float, default=0.7, help="of diloco")
    parser.add_argument("--outer-momentum", type=float, default=0.3, help="of diloco, for the few meetings here")
    parser.add_argument("--sides", nargs="+", choices=[name for name in SIDES if name != "plain DDP"], default=None)
    parser.add_argument("--picture", type=Path, default=Path("compression.png"), help="of the curves")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        run_side(json.loads(arguments.side))
        return
    for steps, of in ((arguments.steps, arguments.validate_every), (arguments.diloco_steps, arguments.inner_steps)):
        if steps % of:
            parser.error(f"{steps} steps are no multiple of {of}")
    if os.geteuid():
        sys.exit("error: network namespaces need root. Run this as root, or in a container of your own.")
    chosen = arguments.sides or [name for name in SIDES if name != "plain DDP"]
    with tempfile.TemporaryDirectory() as name, slow_link():
        project = Path(name)
        prepare(project)
        results = {}
        for side in ("plain DDP", *chosen):
            results[side] = measure(project, changes_of(side, arguments))
            curve, steps = results[side]["curve"], results[side]["steps"]
            print(
                f"{side}: {steps} steps, {curve[-1][0]:,.0f} s to a validation loss of {curve[-1][1]:.4f}", flush=True
            )
    draw(results, arguments.picture)
    print(json.dumps({**compared(results), "megabits": MEGABITS, "delay_ms": DELAY * 1000}))


def changes_of(side: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns what ``side`` changes of the section ``train``."""
    steps = arguments.diloco_steps if "diloco" in SIDES[side] else arguments.steps
    changes = {
        **SIDES[side], "steps": steps, "validate_every": arguments.validate_every,
        "checkpoint_every": steps, "micro_batch": arguments.windows,
        "global_batch": 2 * arguments.windows, "world_size": 2, "compression_rank": arguments.rank,
    }  # fmt: skip
    if "diloco" in changes:
        changes["diloco"] = {
            "inner_steps": arguments.inner_steps,
            "outer_learning_rate": arguments.outer_learning_rate,
            "outer_momentum": arguments.outer_momentum,
        }
    return changes


def prepare(project: Path) -> None:
    """Collects, cleans and cuts the project's corpus in ``project``."""
    for file in ("params.yaml", "requirements.lock"):
        (project / file).write_text((ROOT / file).read_text())
    for stage in ("collect", "ingest", "shard"):
        done = subprocess.run(
            [sys.executable, "-m", f"tasks.{stage}"], cwd=project, env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"the stage '{stage}' failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def measure(project: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Trains one side in both namespaces; returns its curve (seconds, validation loss) and the bytes it sent."""
    before = bytes_of_device()
    started = [
        subprocess.Popen(
            ["ip", "netns", "exec", namespace, sys.executable, __file__, "--side", json.dumps(changes)],
            cwd=project,
            env={
                **os.environ, **worker_environment(1), "PYTHONPATH": str(ROOT), "RANK": str(rank), "LOCAL_RANK": "0",
                "WORLD_SIZE": "2", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": DEVICE,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, namespace in enumerate(NAMESPACES)
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit("a side failed:\n" + "\n".join(output[-3000:] for output in outputs))
    measured = json.loads((project / ".overnight/measurements/benchmark.json").read_text())
    curve = json.loads((project / "curve.json").read_text())
    return {
        "curve": curve,
        "steps": changes["steps"],
        "bytes": measured["bytes_sent"],
        "bytes_of_device": bytes_of_device() - before,
    }


class _Timed(Progress):
    """Notes when each validation had been done, in seconds since the first step began."""

    def __init__(self) -> None:
        self.curve: Curve = []
        self.losses: float | None = None

    def begin(self, step: str, done: float = 0) -> None:
        self.started = time.perf_counter()

    def update(self, done: float, total: float, unit: str, **numbers: float) -> None:
        # `valid_loss` is the last one known: a new one is another number.
        if numbers.get("valid_loss") != self.losses:
            self.losses = numbers["valid_loss"]
            self.curve.append((time.perf_counter() - self.started, self.losses))


def run_side(changes: dict[str, Any]) -> None:
    """One process of one side."""
    from tasks import world

    section = read_section("train", TrainParams).model_dump()
    params = TrainParams.model_validate({**section, **changes})
    manifest, timed = read_manifest(), _Timed()
    with tempfile.TemporaryDirectory() as folder, world.joined(params, params.mesh) as here:
        checkpoints = Checkpoints("train", "benchmark", 1, root=Path(folder))
        model, weights = start.begun(None, params, manifest)
        fill(model, weights)
        process = Process("benchmark", here, timed, Heartbeat())
        train(model, params, read_windows(manifest, params.seq_len), process, checkpoints)
    if os.environ["RANK"] == "0":
        Path("curve.json").write_text(json.dumps(timed.curve))


def seconds_to(curve: Curve, loss: float) -> float | None:
    """Returns when ``curve`` first came down to ``loss``, between two validations on the straight line; None: never."""
    for (before, above), (after, below) in itertools.pairwise([(0.0, float("inf")), *curve]):
        if below <= loss:
            return after if above == float("inf") else before + (after - before) * (above - loss) / (above - below)
    return None


def compared(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns ratios of times, losses and bytes to those of plain DDP."""
    plain = results["plain DDP"]
    final = plain["curve"][-1][1]
    loss = WITHIN * final
    least = seconds_to(plain["curve"], loss)
    assert least is not None
    summary: dict[str, Any] = {"loss": round(loss, 4), "goal": GOAL, "plain DDP": {"seconds": round(least, 1)}}
    summary["plain DDP"] |= {"final_loss": round(final, 4), "megabytes": round(plain["bytes"] / 1e6, 2)}
    for name, found in results.items():
        took = seconds_to(found["curve"], loss)
        summary[name] = {
            "times_as_fast": None if took is None else round(least / took, 2),
            "seconds": None if took is None else round(took, 1),
            "steps": found["steps"],
            "final_loss": round(found["curve"][-1][1], 4),
            "final_loss_ratio": round(found["curve"][-1][1] / final, 4),
            "all_seconds_ratio": round(plain["curve"][-1][0] / found["curve"][-1][0], 2),
            "megabytes": round(found["bytes"] / 1e6, 2),
            "megabytes_of_device": round(found["bytes_of_device"] / 1e6, 2),
            "bytes_ratio": round(found["bytes"] / plain["bytes"], 4),
        }
    return summary


def draw(results: dict[str, dict[str, Any]], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), dpi=120)
    for name, found in results.items():
        axes.plot(*zip(*found["curve"], strict=True), marker=".", label=name)
    axes.axhline(WITHIN * results["plain DDP"]["curve"][-1][1], color="grey", linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.set_xlabel(f"seconds, over {MEGABITS} Mbit/s and {DELAY * 1000:g} ms")
    axes.set_ylabel("validation loss, nats a token")
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture, metadata={"Software": None})


@contextmanager
def slow_link() -> Iterator[None]:
    """Two namespaces and the link between them, while it lasts."""
    child = 0
    try:
        devices = []
        for namespace, address in zip(NAMESPACES, ADDRESSES, strict=True):
            command("ip", "netns", "add", namespace)
            devices.append(tun(namespace))
            inside = ("ip", "netns", "exec", namespace)
            command(*inside, "ip", "link", "set", "lo", "up")
            command(*inside, "ip", "address", "add", f"{address}/24", "dev", DEVICE)
            # Large packets, so that handing them on takes little of the processors that train.
            command(*inside, "ip", "link", "set", DEVICE, "mtu", "9000", "up")
            shape = f"qdisc add dev {DEVICE} root tbf rate {MEGABITS}mbit burst 32kb latency 200ms"
            command(*inside, "tc", *shape.split())
        child = os.fork()
        if not child:
            hand_on(*devices)
        for device in devices:
            os.close(device)
        yield
    finally:
        if child:
            os.kill(child, 9)
            os.waitpid(child, 0)
        for namespace in NAMESPACES:
            subprocess.run(["ip", "netns", "delete", namespace], stderr=subprocess.DEVNULL, check=False)


def tun(namespace: str) -> int:
    """Returns the file of a new TUN device in ``namespace``."""
    libc, own = ctypes.CDLL(None, use_errno=True), os.open("/proc/self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        if libc.setns(there, 0):
            sys.exit(f"error: cannot enter a network namespace ({os.strerror(ctypes.get_errno())}).")
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        # TUNSETIFF with IFF_TUN | IFF_NO_PI.
        fcntl.ioctl(device, 0x400454CA, struct.pack("16sH", DEVICE.encode(), 0x1001))
        return device
    finally:
        libc.setns(own, 0)
        os.close(there)
        os.close(own)


def hand_on(first: int, second: int) -> None:
    """Writes each packet that one device gives to the other, ``DELAY`` later; never returns."""
    others = {first: second, second: first}
    waiting: deque[tuple[float, int, bytes]] = deque()
    while True:
        patience = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for device in select.select(list(others), [], [], patience)[0]:
            waiting.append((time.monotonic() + DELAY, others[device], os.read(device, 65536)))
        while waiting and waiting[0][0] <= time.monotonic():
            _, device, packet = waiting.popleft()
            os.write(device, packet)


def bytes_of_device() -> int:
    """Returns the bytes that the first process's device has sent, headers and what was sent again included."""
    told = command("ip", "-n", NAMESPACES[0], "-s", "-j", "link", "show", DEVICE)
    return int(json.loads(told)[0]["stats64"]["tx"]["bytes"])


def command(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    main()
