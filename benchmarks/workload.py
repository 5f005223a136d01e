"""The one piece of work that all contenders do who train beside each other, and its stopwatch."""

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
from train.optim.optimizer import build_optimizer
from train.optim.schedule import learning_rate_factor
from train.tasks.base import Ratio
from train.tasks.text.model import Transformer
from train.tasks.text.task import TextTask


@dataclass(frozen=True)
class Size:
    """A model and batch, and how its steps are measured."""

    name: str
    layers: int
    heads: int
    width: int
    context: int
    batch: int
    """Samples per step, of all ranks together; the same number for each."""
    steps: int
    """Steps of a turn that are timed; a multiple of ten, so that every turn logs equally often."""
    rounds: int
    """Turns of each contender that are to count."""
    threads: int = 1
    """Of torch's. With one per core, each process finds a pace of its own that it keeps, up to a
    fifth from the next one's: more than all that is to be measured here."""
    precision: str = "fp32"
    compile: bool = False
    vocabulary: int | None = None
    """Of the model, where it is to be larger than the tokens need."""

    @property
    def total_steps(self) -> int:
        """The length that the run is given; it ends before, when enough rounds are measured."""
        return 100 * max(self.rounds, 10) * (LEAD + self.steps)


LEAD = 3
"""Steps at the beginning of a turn that are not timed: the caches are another's."""
WARM_STEPS = 20
"""Steps before the first turn: lazy imports, allocations, the first log line."""

SIZES = [
    Size("near-empty", layers=1, heads=1, width=8, context=8, batch=1, steps=100, rounds=24),
    Size("20 ms", layers=2, heads=2, width=64, context=128, batch=9, steps=20, rounds=24),
    Size("80 ms", layers=4, heads=4, width=128, context=128, batch=9, steps=10, rounds=16),
]


class EnoughError(BaseException):
    """Ends a training from within; no Exception, so that no framework takes it for a fault."""


class Stopwatch:
    """Ticks when a loop fetches a batch: in a steady loop one step passes from tick to tick,
    however far ahead it fetches. Between two turns the loop is held at a tick.

    ``turn_over`` takes the seconds per step of the turn that ended (of the first, which is no
    turn, a meaningless number) and returns when the next may begin, or raises EnoughError.
    """

    def __init__(self, size: Size, turn_over: Callable[[float], None]) -> None:
        self.size, self._turn_over = size, turn_over
        self._ticks = -WARM_STEPS
        self._started = 0.0
        self.first_peak = 0
        """Bytes of a GPU's memory in use at most before the first turn."""

    @property
    def batches(self) -> int:
        """Fetched so far."""
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
    """The losses of all steps, in memory that is taken at the start: a scalar that stays, laid
    by each step where the next one wants its large tensors, would let the heap grow for ever."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self._values = torch.zeros(steps + WARM_STEPS + 1, device=device)
        self._next = 0

    def add(self, loss: torch.Tensor, batches: int) -> None:
        """Takes in the loss of a step. ``batches`` were fetched so far: what comes without a new
        one, such as isorun's check of a compiled model, is replaced by the next."""
        self._next = min(self._next, batches - 1)
        self._values[self._next] = loss.detach()
        self._next += 1

    def losses(self) -> list[float]:
        """All so far."""
        return self._values[: self._next].tolist()


class TimedText(TextTask):
    """isorun's text task with the stopwatch in its collate and a record of its losses."""

    stopwatch: Stopwatch
    trace: Trace
    vocabulary: int | None

    def build_model(self) -> Transformer:
        """As the text task's, or with more rows in embedding and head."""
        if self.vocabulary is None:
            return super().build_model()
        return Transformer(self.config.model, self.vocabulary, self.config.data.context)

    def collate(self, samples: list[Any]) -> dict[str, torch.Tensor]:
        """As the text task's."""
        self.stopwatch.tick()
        return super().collate(samples)

    def loss(self, model: nn.Module, batch: Any) -> Ratio:
        """As the text task's."""
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
        # On the class, since isorun makes the task itself.
        TimedText.stopwatch = self.stopwatch = Stopwatch(size, turn_over)
        TimedText.trace = self.trace = Trace(size.total_steps, self.device)
        TimedText.vocabulary = size.vocabulary

    @cached_property
    def loaded(self) -> LoadedConfig:
        """The config of isorun's run; the others take their numbers from it."""
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
                "track.console=plain",
                *self.overrides,
            ],
        )

    @cached_property
    def task(self) -> TimedText:
        """The task, for those who are not isorun."""
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
        """Fused AdamW."""
        optimizer = build_optimizer(self.loaded.config.optim, model)
        assert optimizer.defaults["fused"]
        return optimizer

    @cached_property
    def factor(self) -> Callable[[int], float]:
        """The learning rate's factor at a step, from 0."""
        return learning_rate_factor(self.loaded.config.schedule, self.steps)

    def loader(self) -> Any:
        """A plain DataLoader whose sampler is a list of this rank's part of isorun's order: cheaper
        than shuffling."""
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
