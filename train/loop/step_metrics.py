"""What happened since the last log line: losses on the device, times and counts on the host."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from train.loop.mfu import peak_flops
from train.strategies.engine import StepResult

if TYPE_CHECKING:
    from train.loop.run import Run


class Window:
    """Collects results of steps and turns them into the numbers of a log line.

    Nothing is read from the device before ``read``, so steps never wait for it.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._unread: list[tuple[StepResult, int]] = []
        self._loss_sum = self._count = 0.0
        self._norm = float("nan")
        self._flops = run.task.flops_per_sample()
        self._peak = peak_flops(run.engine.device, run.config.precision)
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._started = time.perf_counter()
        self._timed_steps = self._timed_units = 0
        self.data_seconds = self.forward_seconds = 0.0
        self.checkpoint_seconds = self.evaluation_seconds = 0.0

    def add(self, result: StepResult, count: int) -> None:
        """Takes in a step whose loss was divided by ``count``."""
        self._unread.append((result, count))
        self._timed_steps += 1
        self._timed_units += count

    @property
    def own_seconds(self) -> tuple[float, float]:
        """Seconds per step spent on loading data and on forward passes: what this rank takes by
        itself, not waiting for others. Of a GPU, only what the host takes to feed it."""
        steps = max(1, self._timed_steps)
        return self.data_seconds / steps, self.forward_seconds / steps

    @property
    def unread_steps(self) -> int:
        """Steps whose numbers are still on the device."""
        return len(self._unread)

    def read(self) -> list[bool]:
        """Reads all numbers off the device, in one copy; for each step since the last reading,
        whether it was skipped."""
        if not self._unread:
            return []
        values = [value for result, _ in self._unread for value in result]
        rows = torch.stack(values).view(-1, 3).tolist()
        for (loss_sum, norm, skipped), (_, count) in zip(rows, self._unread, strict=True):
            if not skipped:
                self._loss_sum += loss_sum
                self._count += count
            self._norm = norm
        self._unread.clear()
        return [bool(skipped) for _, _, skipped in rows]

    def metrics(self) -> dict[str, float]:
        """The numbers of a log line over the steps since the last one; starts a new window.

        ``train/loss`` is the mean over all units of these steps but the skipped ones. Call
        ``read`` before.
        """
        run, now = self.run, time.perf_counter()
        steps = max(1, self._timed_steps)
        training = max(1e-9, now - self._started - self.evaluation_seconds)
        compute = training - self.data_seconds - self.checkpoint_seconds
        samples = self._timed_steps * run.config.batch.global_batch_size
        metrics = {
            "train/loss": self._loss_sum / self._count if self._count else float("nan"),
            "train/learning_rate": run.engine.optimizer.param_groups[0]["lr"],
            "train/gradient_norm": self._norm,
            "train/epoch": run.progress.position / run.order.size,
            "train/skipped_steps": float(run.progress.skipped_steps),
            "speed/samples_per_second": samples / training,
            "time/step": training / steps,
            "time/data": self.data_seconds / steps,
            "time/compute": compute / steps,
            "time/checkpoint_stall": self.checkpoint_seconds / steps,
            "time/evaluation": self.evaluation_seconds / steps,
            **_memory(run.engine.device),
        }
        if run.task.unit != "samples":
            metrics[f"speed/{run.task.unit}_per_second"] = self._timed_units / training
        if self._flops and self._peak:
            achieved = samples * self._flops / training / run.engine.world_size
            metrics["speed/mfu"] = achieved / self._peak
        self._loss_sum = self._count = 0.0
        self._restart_clock()
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The sums of an unfinished window, so that a resumed run logs what it would have."""
        return {
            "loss_sum": self._loss_sum,
            "count": self._count,
            "norm": self._norm if self._norm == self._norm else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what ``state_dict`` gave."""
        self._loss_sum, self._count = state["loss_sum"], state["count"]
        self._norm = float("nan") if state["norm"] is None else state["norm"]


def _memory(device: torch.device) -> dict[str, float]:
    """GiB in use: resident set of this process, and the peak on the device."""
    memory = {}
    statm = Path("/proc/self/statm")
    if statm.exists():
        pages = int(statm.read_text().split()[1])
        memory["memory/rss_gib"] = pages * os.sysconf("SC_PAGE_SIZE") / 2**30
    if device.type == "cuda":
        memory["memory/device_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return memory
