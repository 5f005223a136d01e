"""The text task on a GPU of which it may use only a part, with faults of a GPU's own."""

import time

import torch

from train.section import non_semantic
from train.tasks.text.task import TextTask


class SmallGpuTask(TextTask):
    class Options(TextTask.Options):
        fraction: float = non_semantic(0.04)
        """Part of the GPU's memory."""
        hang: bool = non_semantic(False)
        """Wait in the third forward pass of the training."""
        bad_index: bool = non_semantic(False)
        """Read behind a table in the third forward pass of the training, which a kernel
        detects."""

    def __init__(self, config):
        super().__init__(config)
        self.calls = 0

    def build_model(self):
        if torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(self.config.task.fraction)
        return super().build_model()

    def loss(self, model, batch):
        self.calls += model.training
        if model.training and self.calls == 3 and self.config.task.hang:
            time.sleep(10_000)
        if model.training and self.calls == 3 and self.config.task.bad_index:
            batch = {**batch, "tokens": batch["tokens"] + 1_000_000}
        return super().loss(model, batch)
