"""How the global batch of a step, and the evaluation data, are divided among ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator

from train.exits import UsageError
from train.section import Section, non_semantic


class BatchConfig(Section):
    """The samples of one optimiser step."""

    global_batch_size: int = Field(ge=1)
    """Samples per optimiser step over all ranks. It changes results; the samples per rank and the
    gradient accumulation steps are derived from it."""

    micro_batch_size: int | Literal["auto"] = non_semantic("auto")
    """Maximum samples per forward pass of a rank; smaller needs less memory and more time. auto:
    all samples of a rank's step, or as many as fit into memory."""

    try_out: bool | None = non_semantic(None)
    """With micro_batch_size auto, find the largest size that fits by trials before the first step;
    the result is kept in the run directory. null: on GPUs only, because on the CPU the kernel kills
    a process that runs out of memory."""

    @field_validator("micro_batch_size")
    @classmethod
    def _check(cls, value: int | Literal["auto"]) -> int | Literal["auto"]:
        if value != "auto" and value < 1:
            raise ValueError("at least 1, or auto")  # after "batch.micro_batch_size must be"
        return value


@dataclass(frozen=True)
class BatchPlan:
    """Divides the B positions of each step into world_size * accumulation contiguous cells.

    Cell ``micro * world_size + rank`` is micro-batch ``micro`` of ``rank``. Cell sizes differ by at
    most one sample, which is exact because losses are summed and divided by the global count. No
    cell may be empty, because sharded strategies need a forward pass on every rank.
    """

    global_batch_size: int
    micro_batch_size: int | None
    world_size: int

    def __post_init__(self) -> None:
        batch, micro = self.global_batch_size, self.micro_batch_size
        if micro is not None and micro > batch:
            raise UsageError(
                f"batch.micro_batch_size is {micro}, which is more than batch.global_batch_size, "
                f"{batch}; lower it, or set it to auto."
            )
        if batch < self.cells:
            raise UsageError(
                f"batch.global_batch_size is {batch}, which leaves a micro-batch empty on "
                f"{self.world_size} ranks with batch.micro_batch_size {micro or 'auto'}; set it to "
                f"{self._nearest()}."
            )

    @classmethod
    def from_config(cls, config: BatchConfig, world_size: int) -> BatchPlan:
        """The plan of a config. Raises UsageError if a micro-batch would be empty."""
        micro = config.micro_batch_size
        return cls(config.global_batch_size, None if micro == "auto" else micro, world_size)

    @property
    def accumulation(self) -> int:
        """Gradient accumulation steps: ceil(B / (ranks * micro-batch size))."""
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
        """Start and end of a rank's micro-batch among the step's positions, from 0."""
        cell = micro * self.world_size + rank
        return (
            cell * self.global_batch_size // self.cells,
            (cell + 1) * self.global_batch_size // self.cells,
        )

    def _nearest(self) -> str:
        """The nearest valid batch sizes, below (if there is one) and above."""

        def works(batch: int) -> bool:
            micro = self.micro_batch_size
            per_rank = 1 if micro is None else -(-batch // (self.world_size * micro))
            return batch >= self.world_size * per_rank

        below = next((b for b in range(self.global_batch_size - 1, 0, -1) if works(b)), None)
        above = next(b for b in range(self.global_batch_size + 1, 2 * self.cells + 1) if works(b))
        return f"{above}" if below is None else f"{below} or {above}"


@dataclass(frozen=True)
class EvalPlan:
    """Divides ``size`` samples into rounds of at most one micro-batch per rank.

    Each sample occurs exactly once. All ranks have the same number of rounds; in the last round a
    rank's micro-batch may be empty.
    """

    size: int
    micro_batch_size: int
    world_size: int

    @property
    def rounds(self) -> int:
        """Forward passes per rank."""
        return -(-self.size // (self.world_size * self.micro_batch_size))

    def bounds(self, rank: int, number: int) -> tuple[int, int]:
        """Start and end of a rank's samples in a round; equal if it has none."""
        first = number * self.world_size * self.micro_batch_size
        here = min(self.world_size * self.micro_batch_size, self.size - first)
        start, stop = rank * here // self.world_size, (rank + 1) * here // self.world_size
        return first + start, first + stop
