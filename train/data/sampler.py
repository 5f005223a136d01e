"""Batch samplers: the sample keys of this rank's micro-batches, in order."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from train.data.fetch import EVALUATION, SampleKeys
from train.data.ledger import sample_digests
from train.data.order import SampleOrder
from train.data.plan import BatchPlan, EvalPlan

_BLOCK = 4096  # positions whose samples are looked up at once: numpy's overhead is per call


class TrainingSampler:
    """The keys of a rank's micro-batches of training; computed in blocks of steps."""

    def __init__(
        self, order: SampleOrder, plan: BatchPlan, rank: int, start_position: int, steps: int
    ) -> None:
        self.order, self.plan, self.start, self.steps = order, plan, start_position, steps
        bounds = [plan.bounds(rank, micro) for micro in range(plan.accumulation)]
        self.offsets = np.concatenate([np.arange(*b, dtype=np.int64) for b in bounds])
        stops = np.cumsum([stop - start for start, stop in bounds]).tolist()
        self.parts = [slice(*bounds) for bounds in pairwise([0, *stops])]

    def __len__(self) -> int:
        return self.steps * self.plan.accumulation

    def __iter__(self) -> Iterator[SampleKeys]:
        batch, mine = self.plan.global_batch_size, len(self.offsets)
        block = max(1, _BLOCK // mine)
        for first in range(0, self.steps, block):
            steps = np.arange(first, min(first + block, self.steps), dtype=np.int64)
            positions = self.start + steps[:, None] * batch + self.offsets
            epochs, indices = self.order.keys(positions)
            digests = sample_digests(positions, indices)
            for row in range(len(steps)):
                for part in self.parts:
                    digest = int(digests[row, part].sum(dtype=np.uint64))
                    yield SampleKeys(
                        positions[row, part], epochs[row, part], indices[row, part], digest
                    )


class EvaluationSampler:
    """The keys of a rank's micro-batches of one evaluation."""

    def __init__(self, plan: EvalPlan, rank: int) -> None:
        self.plan, self.rank = plan, rank

    def __len__(self) -> int:
        return self.plan.rounds

    def __iter__(self) -> Iterator[SampleKeys]:
        for number in range(self.plan.rounds):
            start, stop = self.plan.bounds(self.rank, number)
            indices = np.arange(start, stop, dtype=np.int64)
            counts = stop > start
            if not counts:
                indices = np.zeros(1, dtype=np.int64)
            epochs = np.full_like(indices, EVALUATION)
            yield SampleKeys(indices, epochs, indices, 0, counts)
