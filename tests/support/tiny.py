"""A task that takes seconds and uses all that can break reproducibility: random augmentation from
three libraries, dropout, and sample counts that differ.
"""

import os
import random
import signal
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from train import Ratio, Section, Task
from train.section import non_semantic


class Noisy(Dataset):
    """Samples of 8 numbers with 1 to 4 targets each."""

    def __init__(self, size, augment, fail_at=None):
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(size, 8, generator=generator)
        self.w = torch.randn(8, 4, generator=generator)
        self.augment, self.fail_at = augment, fail_at

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        if index == self.fail_at:
            raise ValueError("this sample is broken")
        x = self.x[index]
        y = x @ self.w
        if self.augment:
            x = x + 0.1 * torch.randn(8) + 0.1 * random.random() + 0.1 * np.random.rand()
        mask = (torch.arange(4) <= index % 4).float()
        return {"x": x.float(), "y": y, "mask": mask}


class TinyTask(Task):
    class Options(Section):
        kill_at_step: int | None = non_semantic(None)
        """Die by SIGKILL in the forward pass of this step, but only in the first attempt."""
        nan_at_steps: list[int] = non_semantic([])
        """Steps whose loss is NaN."""
        sleep: float = non_semantic(0.0)
        """Seconds that each forward pass takes longer."""
        wrong_count: bool = non_semantic(False)
        """Let count() disagree with loss()."""

    class Model(Section):
        hidden: int = 16
        """Width."""
        dropout: float = 0.1
        """Dropout."""

    class Data(Section):
        size: int = 103
        """Samples."""
        fail_at: int | None = non_semantic(None)
        """Index of a sample that raises."""

    unit = "targets"

    def __init__(self, config):
        super().__init__(config)
        self.calls = 0

    def build_model(self):
        m = self.config.model
        return nn.Sequential(
            nn.Linear(8, m.hidden), nn.LayerNorm(m.hidden), nn.Tanh(), nn.Dropout(m.dropout),
            nn.Linear(m.hidden, 4),
        )  # fmt: skip

    def train_dataset(self):
        return Noisy(self.config.data.size, augment=True, fail_at=self.config.data.fail_at)

    def eval_dataset(self):
        return Noisy(37, augment=True)

    def count(self, batch):
        return int(batch["mask"].sum()) + self.config.task.wrong_count

    def loss(self, model, batch):
        if model.training:
            self.misbehave()
        errors = (model(batch["x"]) - batch["y"]).square() * batch["mask"]
        total = errors.sum()
        if model.training and self.calls in self.config.task.nan_at_steps:
            total = total * float("nan")
        return Ratio(total, batch["mask"].sum())

    def misbehave(self):
        """Counts the forward passes in training, which are steps if nothing is accumulated, and
        fails as configured."""
        import time

        self.calls += 1
        options = self.config.task
        time.sleep(options.sleep)
        attempts = Path(self.config.run.dir, "attempts.jsonl").read_bytes()
        first = len(attempts.splitlines()) == 1
        if options.kill_at_step == self.calls and first:
            os.kill(os.getpid(), signal.SIGKILL)

    def example_inputs(self):
        return (torch.zeros(2, 8),)
