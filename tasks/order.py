"""The order in which training sees its samples: a pure function of seed, epoch and the global position in the stream.

All ranks together walk one stream of positions 0, 1, 2, ...; position p belongs to epoch p // samples and is the
sample that a pseudo-random permutation of that epoch puts at p % samples. The stream is cut into steps, and a step over
ranks, only afterwards: 1, 2 or 8 ranks see the same samples in the same steps, and the whole state of the loader is
one integer, the number of steps done.

The permutation is a Feistel network with cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
CT-RSA 2002): it needs no table, so that a corpus of a billion windows costs no memory and a resume costs no time.
"""

import functools

import numpy as np
import numpy.typing as npt

_ROUNDS = 4
_BLOCK = 4096
Indices = npt.NDArray[np.int64]


def samples_at(positions: Indices, samples: int, seed: int) -> Indices:
    """Returns the sample at each of ``positions`` [n] of the stream over ``samples`` samples.

    Within an epoch each sample comes exactly once; each epoch has an order of its own.
    """
    epochs, within = np.divmod(positions, samples)
    order = np.empty_like(positions)
    for epoch in np.unique(epochs).tolist():
        chosen = epochs == epoch
        order[chosen] = _permute(within[chosen], samples, np.uint64(_mix(np.uint64(seed), np.uint64(epoch))))
    return order


def batch_of_rank(
    step: int, samples: int, seed: int, global_batch: int, micro_batch: int, rank: int, world_size: int
) -> Indices:
    """Returns the samples of ``rank`` in ``step``: [passes, micro_batch], a strided cut of the step's global batch.

    ``global_batch`` must be a multiple of ``micro_batch`` x ``world_size``.
    """
    first, end = step * global_batch, (step + 1) * global_batch
    blocks = [_block(block, samples, seed) for block in range(first // _BLOCK, (end - 1) // _BLOCK + 1)]
    whole = np.concatenate(blocks) if len(blocks) > 1 else blocks[0]
    offset = first // _BLOCK * _BLOCK
    return whole[first - offset : end - offset][rank::world_size].reshape(-1, micro_batch)


@functools.lru_cache(maxsize=4)
def _block(block: int, samples: int, seed: int) -> Indices:
    # The permutation costs as much for a few positions as for thousands, so steps share what was computed.
    order = samples_at(np.arange(block * _BLOCK, (block + 1) * _BLOCK, dtype=np.int64), samples, seed)
    order.flags.writeable = False
    return order


def _permute(values: Indices, size: int, key: np.uint64) -> Indices:
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    walked = values.astype(np.uint64)
    outside = np.ones(len(walked), dtype=bool)
    while outside.any():
        walked[outside] = _feistel(walked[outside], half_bits, key)
        outside = walked >= size
    return walked.astype(np.int64)


def _feistel(values: npt.NDArray[np.uint64], half_bits: int, key: np.uint64) -> npt.NDArray[np.uint64]:
    bits, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    left, right = values >> bits, values & mask
    for round_ in range(_ROUNDS):
        left, right = right, left ^ (_mix(right, key + np.uint64(round_)) & mask)
    return (left << bits) | right


def _mix(value: npt.NDArray[np.uint64] | np.uint64, key: np.uint64) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele et al., OOPSLA 2014) over ``value`` and ``key``; it wraps at 64 bits."""
    with np.errstate(over="ignore"):
        z = np.asarray(value, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key * np.uint64(0xD1B54A32D192ED03)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
