"""The order of samples, a pure function of (seed, position) without state, and all seeds.

The training stream is infinite. Position p is in epoch p // size, and its sample is a
pseudorandom permutation of p % size, keyed by (seed, epoch). The permutation is a Feistel network
(Luby and Rackoff, 1988) over the smallest even number of bits that holds the size, with cycle
walking (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002); its round function and
all hashes are the 64-bit finaliser of SplitMix64 (Steele, Lea and Flood, 2014). Any position takes
constant time and memory.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

MAX_SIZE = 2**48
_ROUNDS = 12
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1

# The purpose of a hash is its first word, so that hashes of two purposes never have equal words.
_ORDER, _SAMPLE, _MODEL, _INITIAL, _REPORT, _EVALUATION = 1, 2, 3, 4, 5, 6


def mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64: a bijection of 64-bit words; each bit affects all bits."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def mix_int(*words: int) -> int:
    """A 64-bit hash of several integers: ``mix`` of each, chained."""
    state = 0
    for word in words:
        state = (state ^ (word & _MASK)) + _GOLDEN & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """64-bit seed of the augmentation of one sample in one epoch."""
    return mix_int(_SAMPLE, seed, epoch, index)


def micro_batch_seed(seed: int, position: int) -> int:
    """64-bit seed of the model's randomness (dropout) in the micro-batch that starts at a position
    of the stream. It does not depend on the rank or on restarts."""
    return mix_int(_MODEL, seed, position)


def dataset_seed(seed: int) -> int:
    """Seed of the random numbers that a task draws while it builds its datasets.

    It is the run's seed itself, which is used for nothing else: version 0.1.0 built datasets with
    it, and a resumed run must get the same data.
    """
    return seed


def initial_seed(seed: int) -> int:
    """64-bit seed of the model's initial values."""
    return mix_int(_INITIAL, seed)


def module_seed(seed: int, name: str) -> int:
    """64-bit seed of the initial values of one module, by its name in the model."""
    digest = hashlib.sha256(name.encode()).digest()
    return mix_int(_INITIAL, seed, int.from_bytes(digest[:8], "little"))


def evaluation_seed(seed: int, index: int) -> int:
    """64-bit seed of what an evaluation draws in the micro-batch that starts at an index of the
    evaluation data; the same in each evaluation."""
    return mix_int(_EVALUATION, seed, index)


def report_seed(seed: int) -> int:
    """64-bit seed of a task's report after an evaluation, the same for each evaluation."""
    return mix_int(_REPORT, seed)


class SampleOrder:
    """The sample at each position of the training stream.

    ``size`` is the number of samples, 1 to 2**48; with ``shuffle`` false each epoch has the
    samples in the order of their indices. Raises ValueError for any other size.
    """

    def __init__(self, seed: int, size: int, shuffle: bool = True) -> None:
        if not 1 <= size <= MAX_SIZE:
            raise ValueError(f"The number of samples must be from 1 to 2**48, but is {size}.")
        self.seed, self.size, self.shuffle = seed, size, shuffle
        # Halves of at least three bits: with halves of two bits, a chi-square test shows that the
        # permutations of a few samples are not equally frequent, for any number of rounds.
        self._half = max(3, -(-(size - 1).bit_length() // 2))
        self._low = np.uint64((1 << self._half) - 1)

    def keys(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Epochs and sample indices, int64, of the given positions (int64, >= 0), same shape."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.ndim == 0:  # numpy would return scalars, which have no in-place updates
            epochs, indices = self.keys(positions[None])
            return epochs.reshape(()), indices.reshape(())
        if positions.size and positions.min() < 0:
            raise ValueError(f"Positions must not be negative, but one is {positions.min()}.")
        epochs, offsets = np.divmod(positions, self.size)
        if not self.shuffle or self.size == 1:
            return epochs, offsets
        return epochs, self._permute(epochs, offsets.astype(np.uint64)).astype(np.int64)

    def _permute(self, epochs: NDArray[np.int64], values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        base = np.uint64(mix_int(_ORDER, self.seed))
        epoch_keys = mix(base ^ mix(epochs.astype(np.uint64) * np.uint64(_GOLDEN)))
        values = self._network(epoch_keys, values)
        # Cycle walking: at most four steps on average, 32 at size 2.
        outside = np.flatnonzero(values >= self.size)
        while outside.size:
            flat = values.reshape(-1)
            flat[outside] = self._network(epoch_keys.reshape(-1)[outside], flat[outside])
            outside = outside[flat[outside] >= self.size]
        return values

    def _network(self, keys: NDArray[np.uint64], values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        half = np.uint64(self._half)
        left, right = values >> half, values & self._low
        for number in range(_ROUNDS):
            round_keys = keys + np.uint64(number * _GOLDEN & _MASK)
            left, right = right, left ^ (mix(right + mix(round_keys)) & self._low)
        return (left << half) | right
