"""How many operations a second the processes of a training could do at best."""

import time

import torch

from tasks.world import PRODUCT_TYPES, World

# Dense bf16 products, and fp16 ones, operations a second, from NVIDIA's data sheets. The first name that fits counts.
_DATA_SHEETS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
_ROUNDS = 4
# Of a product that is large enough, in seconds: where twice the size takes eight times as long, it is no faster.
_ENOUGH = 0.002


def peak(world: World) -> tuple[float, str]:
    """Returns the operations a second of all processes together, and where the number is from. All have to call it."""
    known = _model_of(world.device) if world.precision != "fp32" else None
    # At the same time in all, as they train: cores that share a memory, or a clock, are then measured as they are.
    own = _DATA_SHEETS[known] if known else _measured(world)
    # Others may have other GPUs.
    summed = world.sum_all(torch.tensor(own, dtype=torch.float64, device=world.device))
    return float(summed), f"data sheet of {known}" if known else f"{world.precision} product measured here"


def _model_of(device: torch.device) -> str | None:
    """Returns which GPU of the data sheets ``device`` is."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((known for known in _DATA_SHEETS if known in name), None)


def _measured(world: World) -> float:
    """Operations a second of this process: the best of some square products of ones (no random number is drawn)."""
    cuda = world.device.type == "cuda"
    largest = 8192 if cuda else 1024
    size, best, shortest = 64, 0.0, 0.0
    # A CPU without instructions for that type takes seconds for the largest, and is no faster there.
    while size < largest and shortest < _ENOUGH:
        size *= 2
        x = torch.ones(size, size, device=world.device, dtype=PRODUCT_TYPES[world.precision])
        seconds = []
        for _ in range(_ROUNDS):
            started = time.perf_counter()
            x @ x
            if cuda:
                torch.cuda.synchronize(world.device)
            seconds.append(time.perf_counter() - started)
        shortest = min(seconds)
        best = max(best, 2 * size**3 / shortest)
    return best
