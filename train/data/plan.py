"""Who computes what: how a step's global batch, and the evaluation data, are shared out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator

from train.exits import UsageError
from train.section import Section, non_semantic


class BatchConfig(Section):
    """How many samples make up one step of the optimiser."""

    global_batch_size: int = Field(ge=1)
    """Samples per optimiser step over all ranks; part of what is computed. Each rank's share and
    the number of accumulated micro-batches follow from it."""

    micro_batch_size: int | Literal["auto"] = non_semantic("auto")
    """The most samples that a rank puts through the model at once; smaller ones need less
    memory and more time. auto: a rank's whole share of the step, or as much of it as fits."""

    try_out: bool | None = non_semantic(None)
    """Find out what fits (for micro_batch_size auto) by trying before the first step; the result
    is kept in the run directory. By default only on GPUs: on a host whose memory is full, the
    kernel ends the process instead."""

    @field_validator("micro_batch_size")
    @classmethod
    def _check(cls, value: int | Literal["auto"]) -> int | Literal["auto"]:
        if value != "auto" and value < 1:
            raise ValueError("at least 1, or auto")  # after "batch.micro_batch_size must be"
        return value


@dataclass(frozen=True)
class BatchPlan:
    """Cuts the B positions of each step into world_size * accumulation contiguous cells.

    Cell ``micro * world_size + rank`` is micro-batch ``micro`` of ``rank``. Cells differ in size
    by one sample at the most; sums and counts make up for that exactly. A cell must not be
    empty, since in sharded strategies all ranks compute forward passes together.
    """

    global_batch_size: int
    micro_batch_size: int | None
    world_size: int

    def __post_init__(self) -> None:
        batch, micro = self.global_batch_size, self.micro_batch_size
        if micro is not None and micro > batch:
            raise UsageError(
                f"batch.micro_batch_size is {micro}, which is more than batch.global_batch_size, "
                f"{batch}; make it smaller, or auto."
            )
        if batch < self.cells:
            raise UsageError(
                f"batch.global_batch_size is {batch}, which cannot be divided among "
                f"{self.world_size} ranks with batch.micro_batch_size {micro or 'auto'} so that "
                f"each has a sample in every micro-batch; use {self._nearest()}."
            )

    @classmethod
    def from_config(cls, config: BatchConfig, world_size: int) -> BatchPlan:
        """The plan of a config; raises UsageError where none exists for this world size."""
        micro = config.micro_batch_size
        return cls(config.global_batch_size, None if micro == "auto" else micro, world_size)

    @property
    def accumulation(self) -> int:
        """Micro-batches per rank and step: ceil(B / (ranks * micro-batch size))."""
        if self.micro_batch_size is None:
            return 1
        return -(-self.global_batch_size // (self.world_size * self.micro_batch_size))

    @property
    def cells(self) -> int:
        """Micro-batches of all ranks in a step."""
        return self.world_size * self.accumulation

    @property
    def largest_micro_batch(self) -> int:
        """Samples in the largest cell."""
        return -(-self.global_batch_size // self.cells)

    def bounds(self, rank: int, micro: int) -> tuple[int, int]:
        """Where in the step's positions, from 0, a rank's micro-batch starts and ends."""
        cell = micro * self.world_size + rank
        return (
            cell * self.global_batch_size // self.cells,
            (cell + 1) * self.global_batch_size // self.cells,
        )

    def _nearest(self) -> str:
        """The nearest batch sizes that work, below (where there is one) and above."""

        def works(batch: int) -> bool:
            micro = self.micro_batch_size
            per_rank = 1 if micro is None else -(-batch // (self.world_size * micro))
            return batch >= self.world_size * per_rank

        below = next((b for b in range(self.global_batch_size - 1, 0, -1) if works(b)), None)
        above = next(b for b in range(self.global_batch_size + 1, 2 * self.cells + 1) if works(b))
        return f"{above}" if below is None else f"{below} or {above}"


@dataclass(frozen=True)
class EvalPlan:
    """Shares ``size`` samples out in rounds of at most one micro-batch per rank, each sample
    exactly once. All ranks have the same number of rounds; a share of the last may be empty."""

    size: int
    micro_batch_size: int
    world_size: int

    @property
    def rounds(self) -> int:
        """Forward passes per rank."""
        return -(-self.size // (self.world_size * self.micro_batch_size))

    def bounds(self, rank: int, number: int) -> tuple[int, int]:
        """The samples of a rank in a round; both numbers are equal where there are none."""
        first = number * self.world_size * self.micro_batch_size
        here = min(self.world_size * self.micro_batch_size, self.size - first)
        start, stop = rank * here // self.world_size, (rank + 1) * here // self.world_size
        return first + start, first + stop
