"""The workload of all contenders, and its stopwatch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from train.config.load import LoadedConfig, load_config
from train.data.order import SampleOrder, initial_seed
from train.distributed.randomness import seed_everything
from train.optim.groups import parameter_settings
from train.optim.optimizer import build_optimizer
from train.optim.schedule import learning_rate_factor
from train.tasks.base import Ratio
from train.tasks.text.model import Transformer
from train.tasks.text.task import TextTask


@dataclass(frozen=True)
class Size:
    """A model, a batch size, and how steps are measured."""

    name: str
    layers: int
    heads: int
    width: int
    context: int
    batch: int
    """Samples per step over all ranks, equal for each rank."""
    steps: int
    """Timed steps per turn; a multiple of 10, so that every turn logs equally often."""
    rounds: int
    """Counted turns of each contender."""
    threads: int = 1
    """torch's threads. With one per core, the speed differs by up to 20 % between processes, which
    is more than the differences measured here."""
    precision: str = "fp32"
    compile: bool = False
    vocabulary: int | None = None
    """Vocabulary of the model, if larger than that of the tokenizer."""

    @property
    def total_steps(self) -> int:
        """The configured length of the run; it is stopped earlier, after the last round."""
        return 100 * max(self.rounds, 10) * (LEAD + self.steps)


LEAD = 3
"""Untimed steps at the start of a turn, because other contenders used the CPU caches."""
WARM_STEPS = 20
"""Untimed steps before the first turn, for lazy imports, allocations and the first log line."""

SIZES = [
    Size("near-empty", layers=1, heads=1, width=8, context=8, batch=1, steps=100, rounds=24),
    Size("20 ms", layers=2, heads=2, width=64, context=128, batch=9, steps=20, rounds=24),
    Size("80 ms", layers=4, heads=4, width=128, context=128, batch=9, steps=10, rounds=16),
]


class EnoughError(BaseException):
    """Stops a training. A BaseException, so that no framework handles it as an error."""


class Stopwatch:
    """Measures steps by the times at which the loop fetches batches (ticks), independent of
    prefetching.

    Between turns the loop blocks in a tick: ``turn_over`` gets the seconds per step of the last
    turn (at the first call a meaningless number) and returns when the next turn starts, or raises
    EnoughError.
    """

    def __init__(self, size: Size, turn_over: Callable[[float], None]) -> None:
        self.size, self._turn_over = size, turn_over
        self._ticks = -WARM_STEPS
        self._started = 0.0
        self.first_peak = 0
        """Peak GPU memory before the first turn, in bytes."""

    @property
    def batches(self) -> int:
        """Number of batches fetched so far."""
        return self._ticks + WARM_STEPS

    def tick(self) -> None:
        """Called once per batch."""
        self._ticks += 1
        if self._ticks < 0:
            return
        step = self._ticks % (LEAD + self.size.steps)
        if step in (0, LEAD) and torch.cuda.is_initialized():
            torch.cuda.synchronize()
            if self._ticks == 0:
                self.first_peak = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()
        if step == 0:
            self._turn_over((time.perf_counter() - self._started) / self.size.steps)
        elif step == LEAD:
            self._started = time.perf_counter()


class Trace:
    """The losses of all steps, in one tensor allocated at the start: a small allocation per step
    would fragment the heap, so that it grows without limit."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self._values = torch.zeros(steps + WARM_STEPS + 1, device=device)
        self._next = 0

    def add(self, loss: torch.Tensor, batches: int) -> None:
        """Records the loss of a step. ``batches``: number of batches fetched so far. A loss without
        a new batch, such as in isorun's check of a compiled model, is overwritten by the next
        one."""
        self._next = min(self._next, batches - 1)
        self._values[self._next] = loss.detach()
        self._next += 1

    def losses(self) -> list[float]:
        """The losses so far."""
        return self._values[: self._next].tolist()


class TimedText(TextTask):
    """isorun's text task with a stopwatch in ``collate`` and a trace of its losses."""

    stopwatch: Stopwatch
    trace: Trace
    vocabulary: int | None

    def build_model(self) -> Transformer:
        """The text task's model, or one with a larger vocabulary."""
        if self.vocabulary is None:
            return super().build_model()
        return Transformer(self.config.model, self.vocabulary, self.config.data.context)

    def collate(self, samples: list[Any]) -> dict[str, torch.Tensor]:
        """Ticks the stopwatch, then collates."""
        self.stopwatch.tick()
        return super().collate(samples)

    def loss(self, model: nn.Module, batch: Any) -> Ratio:
        """The text task's loss, recorded in the trace."""
        loss = super().loss(model, batch)
        self.trace.add(loss.sum / loss.count, self.stopwatch.batches)
        return loss


class Workload:
    """Model, data, order, optimiser and schedule of one size, the same for every contender."""

    def __init__(self, size: Size, directory: Path, turn_over: Callable[[float], None]) -> None:
        self.size, self.directory = size, directory
        self.overrides: list[str] = []
        self.steps = size.total_steps
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        on_gpu = torch.cuda.is_available()
        self.device = torch.device(f"cuda:{self.rank}" if on_gpu else "cpu")
        # Set on the class, because isorun creates the task.
        TimedText.stopwatch = self.stopwatch = Stopwatch(size, turn_over)
        TimedText.trace = self.trace = Trace(size.total_steps, self.device)
        TimedText.vocabulary = size.vocabulary

    @cached_property
    def loaded(self) -> LoadedConfig:
        """The config of isorun's run; other contenders use its values."""
        size = self.size
        return load_config(
            [],
            [
                "task.use=benchmarks.workload:TimedText",
                f"run.dir={self.directory}",
                f"model.layers={size.layers}",
                f"model.heads={size.heads}",
                f"model.width={size.width}",
                f"data.context={size.context}",
                f"batch.global_batch_size={size.batch}",
                f"length.steps={self.steps}",
                f"precision={size.precision}",
                f"compile={str(size.compile).lower()}",
                "optim.lr=1e-3",
                "optim.weight_decay=0.1",
                "optim.clip_norm=1.0",
                "schedule.use=cosine",
                "schedule.warmup_steps=10",
                "evaluate.at_end=false",
                "task.sample_tokens=0",  # a larger vocabulary has tokens that stand for no text
                "track.console=plain",
                *self.overrides,
            ],
        )

    @cached_property
    def task(self) -> TimedText:
        """The task, for contenders other than isorun."""
        task = self.loaded.task(self.loaded.config)
        assert isinstance(task, TimedText)
        return task

    @cached_property
    def dataset(self) -> Any:
        """The training samples, map-style."""
        return self.task.train_dataset()

    def model(self) -> nn.Module:
        """The model with isorun's initial weights, on this rank's device."""
        seed_everything(initial_seed(self.loaded.config.run.seed))
        return self.task.build_model().train().to(self.device)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Fused AdamW, with weight decay for the parameters that have it in isorun."""
        config = self.loaded.config.optim
        optimizer = build_optimizer(config, model, parameter_settings(config, model))
        assert optimizer.defaults["fused"]
        return optimizer

    @cached_property
    def factor(self) -> Callable[[int], float]:
        """The learning rate's factor at a step, from 0."""
        return learning_rate_factor(self.loaded.config.schedule, self.steps)

    def loader(self) -> Any:
        """A DataLoader whose sampler is the list of this rank's samples in isorun's order, which
        costs less than shuffling."""
        from torch.utils.data import DataLoader

        order = SampleOrder(self.loaded.config.run.seed, len(self.dataset))
        _, indices = order.keys(np.arange(self.steps * self.size.batch, dtype=np.int64))
        return DataLoader(
            self.dataset,
            batch_size=self.size.batch // self.world_size,
            sampler=indices.reshape(self.steps, self.world_size, -1)[:, self.rank].ravel().tolist(),
            collate_fn=self.task.collate,
            pin_memory=self.device.type == "cuda",
        )

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Mean cross entropy, in the size's precision."""
        from torch.nn import functional as F

        if self.device.type == "cuda":
            batch = {
                name: value.to(self.device, non_blocking=True) for name, value in batch.items()
            }
        if self.size.precision == "bf16":
            with torch.autocast(self.device.type, torch.bfloat16):
                logits = model(batch["tokens"])
        else:
            logits = model(batch["tokens"])
        loss = F.cross_entropy(
            logits.float().flatten(0, 1), batch["targets"].flatten(), ignore_index=-100
        )
        self.trace.add(loss, self.stopwatch.batches)
        return loss

    def losses(self) -> list[float]:
        """The loss of every step."""
        return self.trace.losses()
