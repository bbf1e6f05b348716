"""How many bytes a process sends to the others, from torch's own record of every collective.

The flight recorder of torch.distributed notes the tensors that each collective was given, whoever called it: this code,
DistributedDataParallel, FSDP2, or a sum of validation losses. It keeps the last ``ENTRIES``; reading it costs about
50 µs an entry on a CPU, so it is read when it may be half full. What processes say about a checkpoint while it is
written beside the training, some hundred bytes a tensor, is left out: it is on the record at no certain step.
"""

import math
import os
import pickle
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

ENTRIES = 2000
_SIZES_TOLD = 3
_SIZE_OF = {
    "Bool": 1, "Byte": 1, "Char": 1, "Short": 2, "Half": 2, "BFloat16": 2, "Int": 4, "Float": 4, "Long": 8, "Double": 8,
}  # fmt: skip


def record() -> None:
    """Has collectives recorded; to be called before the first process group is made."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(ENTRIES))


class Traffic:
    """Counts what this process sends from now on, and what was sent before a resume."""

    def __init__(self, device: torch.device, messages: bool = False, left_out: dist.ProcessGroup | None = None) -> None:
        """``messages``: processes send some to others, as a pipeline does; gloo records none of them.

        What is sent in the group ``left_out`` does not count.
        """
        self._device, self._left_out = device, left_out
        earlier = _entries(device)
        self._seen = earlier[-1]["record_id"] if earlier else -1
        self._steps, self._between = 0, 1
        self._sent: int | None = None if messages and device.type == "cpu" else 0

    def after_step(self, last: bool) -> int | None:
        """Returns the bytes sent so far, as of the last reading; ``last`` reads at once.

        None where a reading came too late for the recorder, or nothing is recorded.
        """
        self._steps += 1
        if last or self._steps >= self._between:
            new = self._read()
            # Half of the room, for a step with a validation and a checkpoint has more collectives than another.
            self._between = max(1, ENTRIES // 2 * self._steps // max(1, new))
            self._steps = 0
        return self._sent

    def so_far(self) -> int | None:
        """Returns the bytes sent so far, those of :meth:`go_on` among them."""
        self._read()
        return self._sent

    def go_on(self, sent: int | None) -> None:
        """Counts ``sent`` too, which earlier processes of this run sent up to the checkpoint that it goes on from."""
        self._sent = None if sent is None or self._sent is None else self._sent + sent

    def _read(self) -> int:
        entries = [entry for entry in _entries(self._device) if entry["record_id"] > self._seen]
        if not entries:
            # Replicas may train apart, but not without having agreed on where to start.
            if self._seen < 0:
                self._sent = None
            return 0
        if entries[0]["record_id"] != self._seen + 1:
            self._sent = None
        self._seen = entries[-1]["record_id"]
        if self._sent is not None:
            sizes = {group.group_name: group.size() for group in distributed_c10d._world.pg_map}
            if self._left_out is not None:
                # As in a group of one, where nothing is sent.
                sizes[self._left_out.group_name] = 1
            # With TORCH_DISTRIBUTED_DEBUG=DETAIL gloo's groups are wrapped, and have no name by themselves.
            known = all(entry["process_group"][0] in sizes for entry in entries)
            sent = (sent_by(entry, sizes[entry["process_group"][0]]) for entry in entries)
            self._sent = self._sent + sum(sent) if known else None
        return len(entries)


def waits_in() -> str | None:
    """Returns which collective this process has begun and not ended, in words; None where there is none on record."""
    begun = [entry for entry in _entries(_device()) if not entry["retired"] and entry["state"] != "completed"]
    if not begun:
        return None
    first = begun[0]
    sizes = ", ".join(f"[{' x '.join(map(str, size))}]" for size in first["input_sizes"][:_SIZES_TOLD])
    return f"{_operation(first)} of {sizes or 'nothing'} in group {first['process_group'][1]}"


def sent_by(entry: dict[str, Any], processes: int) -> int:
    """Returns the bytes that one of ``processes`` sends in the collective of the flight recorder's ``entry``.

    What a ring or a pairwise exchange of the given tensors takes (Thakur et al. 2005), which no algorithm undercuts by
    much: of S bytes, with n processes, an all-reduce 2 S (n-1)/n, a reduce-scatter and an all-to-all S (n-1)/n, an
    all-gather S (n-1). A broadcast is S (n-1)/n, its mean over the processes; between two, S.
    """
    given = sum(
        math.prod(size) * _SIZE_OF[kind] for size, kind in zip(entry["input_sizes"], entry["input_dtypes"], strict=True)
    )
    operation = _operation(entry).replace("_", "")
    if operation.startswith("allreduce"):
        return of_all_reduce(given, processes)
    if operation.startswith(("reducescatter", "alltoall", "broadcast")):
        return given * (processes - 1) // processes
    if operation.startswith("allgather"):
        return given * (processes - 1)
    # A message, a reduction to one, a gathering at one, a barrier.
    return given if processes > 1 else 0


def of_all_reduce(size: int, processes: int) -> int:
    """Returns the bytes that one of ``processes`` sends in an all-reduce of ``size`` bytes."""
    return 2 * size * (processes - 1) // processes


def _operation(entry: dict[str, Any]) -> str:
    return str(entry["profiling_name"].rpartition(":")[2].strip("_"))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_initialized() else "cpu")


def _entries(device: torch.device) -> list[dict[str, Any]]:
    c10d: Any = torch._C._distributed_c10d
    # Collectives, but not the stacks that they were called from.
    dump = c10d._dump_nccl_trace if device.type == "cuda" else c10d._dump_fr_trace
    return list(pickle.loads(dump(True, False, False)).get("entries", []))
